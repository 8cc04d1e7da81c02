"""FFA-LoRA: B alone is trained and sent, A stays as the seed drew it (Sun et al. 2024, arXiv:2403.12313).

With one A for all, the mean of B·A is the mean of B times A: exact, also with noise on it. r · outputs numbers a layer
in either direction; A never crosses the network.
"""

import numpy as np

from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.aggregation.ruled import Rule
from fedllm_helpers.aggregation.rules import chosen, fresh, shapes_of


class FFALoRA(Rule):
    """The wrapped strategy on B; A is drawn by everyone from the same seed."""

    name, draws = "FFA-LoRA", "A"

    def trains(self, number: int) -> str:
        """B."""
        return "B"

    def begin(self, number: int, adapter: Adapter) -> Adapter:
        """The adapter with the drawn A.

        Raises:
            ValueError: it has another A, and a B that is not zero: another A would bend what it says.
        """
        super().begin(number, adapter)
        frozen, given = chosen(fresh(self.seed, self.draw(), shapes_of(adapter)), "A"), chosen(adapter, "A")
        same = all(np.allclose(given[key], value, rtol=1e-5) for key, value in frozen.items())
        if not same and any(value.any() for value in chosen(adapter, "B").values()):
            raise ValueError("FFA-LoRA draws its own A, and the given adapter has another one and a B that is not zero")
        return {**adapter, **frozen}
