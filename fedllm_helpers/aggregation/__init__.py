"""How adapters are combined, and what of them crosses the network. Taught in notebooks 03 and 04.

:mod:`strategies` has the weighted mean and Flower's strategies, :mod:`rules` the seven rules of federated LoRA, and
:mod:`edits` what two of them add to the base model.
"""

from fedllm_helpers.aggregation.strategies import combine, make_strategy, weighted_mean

__all__ = ["combine", "make_strategy", "weighted_mean"]
