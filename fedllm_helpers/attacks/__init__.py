"""What an adapter gives away, and hospitals that cheat. Taught in notebooks 05a and 05b."""

from fedllm_helpers.attacks.leakage import Canary, canaries, candidates, exposure, extracted, plant
from fedllm_helpers.attacks.members import Roc, membership, outside, relative, scores, smallest, text_baseline
from fedllm_helpers.attacks.words import gained, named, row_space

__all__ = [
    "Canary",
    "Roc",
    "canaries",
    "candidates",
    "exposure",
    "extracted",
    "gained",
    "membership",
    "named",
    "outside",
    "plant",
    "relative",
    "row_space",
    "scores",
    "smallest",
    "text_baseline",
]
