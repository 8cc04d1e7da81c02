"""What the text of a notebook says: numbers that a cell prints or a setting holds, and pointers that lead somewhere."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[1-7]*.ipynb"))
# facts from elsewhere, or given by construction, that no cell has to print
GIVEN = {
    "01_intro": {"135 million": "the model's card", "240": "cpu.yaml", "27.3": "4 bytes per number of the count above"},
    "02_centralized": {"49,152": "the model's vocabulary", "100 %": "of a bootstrap"},
    "03_federated": {"145": "the two megabytes that 3.10 prints, one over the other", "200": "1,200 over six"},
    "04_federated_aggregation": {"4096": "a 7B model's width", "200": "1,200 over six"},
    "05a_federated_attacks": {
        "1,000": "candidates of three digits",
        "368": "one of them",
        "0.05": "the usual level",
        "5 %": "members.LEVELS",
        "1 %": "members.LEVELS",
    },
    "05b_federated_privacy": {"1,000": "of three digits", "0.02": "the course's", "0.001": "1e-3, as in code"},
    "06_federated_deployment": {"127.0": "of 127.0.0.1", "6.9": "a section"},
    "07_analysis": {
        **dict.fromkeys(("107.76", "0.30", "162.5", "169", "1,063", "4.5", "359", "0.007"), "the course's, as it says"),
        **dict.fromkeys(("768", "1,200", "240", "200", "120"), "cards, by the settings of the grid"),
        "10 %": "an arm's name",
        "0.1": "of two columns of the table above",
        "143": "143.5 in the table above",
        "0.17": "0.165 in the table above",
        "7.5": "a section",
    },
}
ALWAYS = {"95 %", "100", "7B"}
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?: ?%| million)?")
PARTS = (  # what is not said of a result: folded answers, code, formulas, links, citations, pointers, tables, tasks
    r"<details>.*?</details>",
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$",
    r"\]\([^)]*\)|arXiv:\S+|^#.*$|^\| .*$",
    r"\([^()]*(?:19|20)\d\d[a-z]?(?:, [^()]*)?\)|\b(?:19|20)\d\d\b|10[⁰-⁹²³⁻]+",
    r"\(\d\.\d+(?:[ ,a-z]+\d\.\d+)*\)|\b[Ss]ections? \d\.\d+|[Nn]otebooks? \d[ab]?(?: (?:and|to) \d)?",
    r"\*\*Exercise.*?(?=\n\n|$)",
)
ASIDE = re.compile("|".join(PARTS), re.S | re.M)


def cells(path):
    return nbformat.read(path, as_version=4).cells


def told(cell):
    """What a cell shows and is the same on every machine: its source, and its output unless a check passes it over."""
    parts = [cell.source]
    if "nbval-ignore-output" not in cell.metadata.get("tags", []):
        for out in cell.outputs:
            parts += [out.get("text", ""), out.get("data", {}).get("text/plain", "")]
            parts.append(out.get("metadata", {}).get("image/png", {}).get("alt", ""))
    return "\n".join(parts)


def variants(number):
    """A number as code or a table writes it."""
    digits = re.sub(r"[^\d.]", "", number)
    share = [f"{digits}%", f"{float(digits) / 100:g}"] if number.endswith("%") else []
    return share if share else [number, digits]


def unprinted(book, sections=(), given=()):
    """Numbers of the prose that no strict cell above shows: (place of the cell, number)."""
    known, wrong = "", []
    for place, cell in enumerate(book):
        if cell.cell_type == "code":
            known += f"\n{told(cell)}"
            continue
        for number in NUMBER.findall(ASIDE.sub(" ", cell.source)):
            number = number.strip().rstrip(",")
            small = re.fullmatch(r"\d{1,2}", number)
            pointer = number in sections and re.search(rf"\b(?:in|of|from|and|to) {number}\b", cell.source)
            if small or pointer or number in ALWAYS or number in given:
                continue
            if not any(re.search(rf"(?<![\d.]){re.escape(one)}(?!\.?\d)", known) for one in variants(number)):
                wrong.append((place, number))
    return wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_number_stands_in_prose_that_another_run_would_change(path):
    assert unprinted(cells(path), headings(), GIVEN[path.stem]) == []


@pytest.mark.parametrize(
    ("tags", "prose", "found"),
    [
        ([], "It falls to 2.43, with 2.33 and 40 % of 1,200.", []),
        (["nbval-ignore-output"], "It falls to 2.43.", ["2.43"]),
        ([], "It falls to 2.4.", ["2.4"]),
        ([], "It falls to 2.435, or by 41 %, of 1,201 cards.", ["2.435", "41 %", "1,201"]),
        ([], "See `2.99`, $e^{3.16}$, (Wu et al. 2026, arXiv:2602.13486), 5 of 16 and section 3.9.", []),
        ([], "| a | 9.99 |", []),
    ],
)
def test_the_check_of_prose_finds_what_no_strict_cell_prints(tags, prose, found):
    """A number that only a cell passed over by nbval prints is found, and so is one that is printed as another."""
    shown = nbformat.v4.new_output("stream", name="stdout", text="NLL 2.43 [2.33, 2.52], 40% of 1,200\n")
    code = nbformat.v4.new_code_cell("show()", metadata={"tags": tags}, outputs=[shown])
    assert [number for _, number in unprinted([code, nbformat.v4.new_markdown_cell(prose)])] == found


def headings():
    """Number of each section of the notebooks to its text."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        number = ""
        for cell in cells(path):
            for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
                match = re.match(r"#+ (\d+\.\d+)\b", line)
                number = match[1] if match else number
            found[number] = found.get(number, "") + "\n" + cell.source
    return found


def test_glossary_pointers_lead_to_a_section_that_has_the_word():
    sections, wrong = headings(), []
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert len(rows) >= 39
    for word, meaning in rows:
        pointers = [
            one
            for group in re.findall(r"\((\d\.\d+(?:[,a-z ]+\d\.\d+)*)\)", meaning)
            for one in re.findall(r"\d\.\d+", group)
        ]
        stems = [name.strip()[:5].lower() for name in re.split(r"[,(]", word)]
        for pointer in pointers:
            if pointer not in sections:
                wrong.append(f"{word}: there is no section {pointer}")
            elif not any(stem in sections[pointer].lower() for stem in stems):
                wrong.append(f"{word}: section {pointer} does not have it")
    assert not wrong, "\n".join(wrong)


def test_section_pointers_in_docs_and_notebooks_lead_somewhere():
    sections, wrong = headings(), []
    texts = {path.name: path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        texts[path.name] = "\n\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    for name, text in texts.items():
        for group in re.findall(
            r"\((?:see )?([1-7]\.[1-9]\d?(?:(?:, | and | to )\d\.\d+)*)\)|[Ss]ections? (\d\.\d+)", text
        ):
            wrong += [f"{name}: {one}" for one in re.findall(r"\d\.\d+", " ".join(group)) if one not in sections]
    assert not wrong, "\n".join(wrong)
