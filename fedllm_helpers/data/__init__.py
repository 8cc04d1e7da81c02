"""Flashcards: from an ontology, any file of rows, or the hub, to prompts and a train/test split. Taught in notebook 02.

A card is ``{"question", "answer", "specialty", "card_id"}``; one from a longer conversation has ``earlier_turns``, too,
and where a file says whose a card is, ``patient_id``.
:mod:`files` reads rows as they were written, :mod:`columns` and :mod:`conversations` make cards of them, :mod:`loading`
finds the parts of a dataset, :mod:`splitting` divides cards, and :mod:`prompts` writes what a model reads.
"""

from fedllm_helpers.config.prompts import PROMPTS
from fedllm_helpers.data.loading import WHOLE_FILE, load, load_flashcards, load_parts
from fedllm_helpers.data.prompts import format_prompt
from fedllm_helpers.data.splitting import choose, split

__all__ = ["PROMPTS", "WHOLE_FILE", "choose", "format_prompt", "load", "load_flashcards", "load_parts", "split"]
