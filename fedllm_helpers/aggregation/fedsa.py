"""FedSA-LoRA: A is shared, every client keeps its B (Guo et al. 2024, arXiv:2410.01463): a model for each.

r · inputs numbers a layer in either direction. The server has no model of its own to score or to save.
"""

from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.aggregation.ruled import Rule
from fedllm_helpers.aggregation.rules import chosen


class FedSALoRA(Rule):
    """The wrapped strategy on A; each client's B stays in its state, and starts at zero."""

    name, keeps = "FedSA-LoRA", "B"

    def sends(self, number: int) -> str:
        """A; both are trained."""
        return "A"

    def begin(self, number: int, adapter: Adapter) -> Adapter:
        """The adapter as it is.

        Raises:
            ValueError: its B is not zero, and would reach nobody.
        """
        if any(value.any() for value in chosen(super().begin(number, adapter), "B").values()):
            raise ValueError("FedSA-LoRA starts every client's B at zero, and the given adapter has another one")
        return adapter
