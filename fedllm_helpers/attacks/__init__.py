"""What an adapter gives away, and hospitals that cheat. Taught in notebook 05."""

from fedllm_helpers.attacks.leakage import (
    Canary,
    Roc,
    canaries,
    exposure,
    extracted,
    membership,
    plant,
    scores,
    text_baseline,
)

__all__ = ["Canary", "Roc", "canaries", "exposure", "extracted", "membership", "plant", "scores", "text_baseline"]
