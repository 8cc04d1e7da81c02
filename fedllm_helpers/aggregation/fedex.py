"""FedEx-LoRA: the mean of factors, and what it misses goes into the base model (Singhal et al. 2024, arXiv:2410.09432).

Exact. r · (inputs + outputs) numbers a layer go up; down come as many, and the residual of rank (K − 1) · r besides. As
with FLoRA, clients keep ΔW as full matrices: see there for what that means for large models.
"""

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.aggregation.ruled import ProductRule
from fedllm_helpers.aggregation.rules import scaled


class FedExLoRA(ProductRule):
    """Averages both factors, and adds the residual to the base model."""

    name = "FedEx-LoRA"

    def ordering(self) -> bool:
        """Clients add edits to their base model."""
        return True

    def combined(self, number: int, adapters: list[Adapter], weights: list[float]) -> tuple[Adapter, Adapter | None]:
        """The mean, and factors of what its product misses."""
        mean, residual = factors.mean_and_residual(adapters, weights)
        return mean, scaled(residual, self.scale) if factors.rank(residual) else None

    def edit_values(self, sizes: list[int]) -> int:
        """The residual, whose rank is that of all but one."""
        return sum(sizes[1:])
