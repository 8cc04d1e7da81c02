"""RoLoRA: one factor moves in a round, and the other rests (Chen et al. 2025, arXiv:2502.01755).

What rests is the same for all, so that each mean is exact. r · outputs numbers a layer go up in odd rounds, r · inputs
in even ones; both factors go down, as nothing tells the server who has kept the other.
"""

from fedllm_helpers.aggregation.ruled import Rule


class RoLoRA(Rule):
    """The wrapped strategy on B in odd rounds and on A in even ones."""

    name = "RoLoRA"

    def trains(self, number: int) -> str:
        """B first: with B = 0 the gradient of A is 0."""
        return "B" if number % 2 else "A"
