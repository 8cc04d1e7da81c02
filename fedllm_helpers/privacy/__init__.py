"""What others learn from what is sent, and less of it: accounting, noise, masks. Taught in notebook 05.

:mod:`accounting` counts ε, :mod:`noise` clips updates and blurs their mean, :mod:`secure_aggregation` is the algebra
of masks, and :mod:`masked_clients` and :mod:`masked_rounds` are its two sides on Flower's messages.
"""

from fedllm_helpers.privacy.noise import clip, noise_seed

__all__ = ["clip", "noise_seed"]
