"""FlexLoRA: the best approximation of the mean update, each client at its rank (Bai et al. 2024, arXiv:2402.11505).

Exact up to the rank of the adapter. r · (inputs + outputs) numbers a layer in either direction, r the client's own.
With mixed ranks its higher ranks fade from round to round (Wu et al. 2026, arXiv:2602.13486).
"""

import numpy as np

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.aggregation.ruled import ProductRule


class FlexLoRA(ProductRule):
    """Averages the products, and decomposes the mean by its singular values; clients of equal rank need no mod."""

    name, mixes = "FlexLoRA", True

    def begin(self, number: int, adapter: Adapter) -> Adapter:
        """The adapter as it is.

        Raises:
            ValueError: a layer is too small for its rank.
        """
        for layer, (first, second) in factors.pairs(super().begin(number, adapter)).items():
            largest = min(second.shape[0], first.shape[1])
            if first.shape[0] > largest:
                raise ValueError(f"model.lora.peft_lora_r={first.shape[0]}: {layer!r} has no rank above {largest}")
        return adapter

    def combined(self, number: int, adapters: list[Adapter], weights: list[float]) -> tuple[Adapter, None]:
        """The first singular vectors; where fewer ranks came than there are, the others keep their A and stay alive."""
        stack, size = factors.stacked(adapters, weights), factors.rank(self.adapter)
        best = factors.truncated(stack, min(size, factors.rank(stack)))
        rest = {key: value[factors.rank(best) :] for key, value in self.adapter.items() if factors.A in key}
        grown = factors.padded(best, size)
        return {k: np.concatenate([best[k], rest[k]]) if factors.A in k else v for k, v in grown.items()}, None
