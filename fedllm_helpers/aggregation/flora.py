"""FLoRA: the stack of updates goes into the base model, adapters start anew (Wang et al. 2024, arXiv:2409.05976).

Exact, also with mixed ranks. r · (inputs + outputs) numbers a layer go up; down come the factors of everyone, K times
as many. Clients keep ΔW as full matrices in their state, which on a deployed node crosses Flower's wire and has to stay
below 2 GiB: for the queries and values of a 7B model it is 2.7 GB, so there this rule is for runs in one process. The
server keeps the stacks of all rounds.
"""

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.aggregation.ruled import ProductRule
from fedllm_helpers.aggregation.rules import fresh, scaled, shapes_of


class FLoRA(ProductRule):
    """Stacks what is sent; everyone draws a new adapter each round."""

    name, draws, mixes = "FLoRA", "AB", True

    def draw(self) -> int:
        """Another adapter in every round."""
        return self.number

    def begin(self, number: int, adapter: Adapter) -> Adapter:
        """A new adapter, whose product is 0."""
        return fresh(self.seed, number, shapes_of(super().begin(number, adapter)))

    def combined(self, number: int, adapters: list[Adapter], weights: list[float]) -> tuple[Adapter, Adapter]:
        """The next round's new adapter, and the stack."""
        following = fresh(self.seed, number + 1, shapes_of(self.adapter))
        return following, scaled(factors.stacked(adapters, weights), self.scale)

    def edit_values(self, sizes: list[int]) -> int:
        """The stack of all."""
        return sum(sizes)
