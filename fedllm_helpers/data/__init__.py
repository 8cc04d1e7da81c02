"""Flashcards: from an ontology, any file of rows, or the hub, to prompts and a train/test split. Taught in notebook 02.

A card is ``{"question", "answer", "specialty", "card_id"}``; one from a longer conversation has ``earlier_turns``, too,
and where a file says whose a card is, ``patient_id``.
:mod:`files` reads rows as they were written, :mod:`columns` and :mod:`conversations` make cards of them, :mod:`loading`
finds the parts of a dataset, :mod:`splitting` divides cards, and :mod:`prompts` writes what a model reads.
"""

from fedllm_helpers.faces import face

NAMES = {
    "PROMPTS": "prompts",
    "WHOLE_FILE": "loading",
    "choose": "splitting",
    "format_prompt": "prompts",
    "load": "loading",
    "load_flashcards": "loading",
    "load_parts": "loading",
    "split": "splitting",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
