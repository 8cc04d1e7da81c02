"""LoRA-XS: an r × r core between frozen factors is trained, sent and averaged (Bałazy et al. 2024, arXiv:2405.17604).

Every node takes the factors P and A of a layer from the singular vectors of its own copy of the base weights, so that
neither crosses the network: r² numbers a layer do, in either direction, whatever the layer's size. The update is
P·R·A, and the mean of cores R is the core of the mean: exact, also under masks and with noise on it, as in Fed-SB
(Singhal et al. 2025, arXiv:2502.15436), whose factors come from a gradient on training samples instead.

The model's side is :mod:`fedllm_helpers.models.cores`.
"""

from collections.abc import Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.aggregation.ruled import Rule
from fedllm_helpers.aggregation.rules import FACTORS, RULE, STACKS, shapes_of, stacked, unstacked

CORE = ".lora_B.core."  # in the middle of the key names


class LoRAXS(Rule):
    """The wrapped strategy on cores.

    Args:
        factors: the server's, in short, from :func:`fedllm_helpers.models.cores.sketch`; clients whose own are others
            can say so. None: nobody looks.
    """

    name, stacks = "LoRA-XS", True

    def __init__(self, strategy: Strategy, *, factors: Sequence[float] | None = None, **options: Any) -> None:
        super().__init__(strategy, **options)
        self.factors = factors

    def ordering(self) -> bool:
        """Clients say that they follow: what they send is to be of cores."""
        return True

    def up(self, adapter: Adapter, number: int, rank: int | None = None) -> Adapter:
        """All cores as one array: names and headers would be a fifth of the bytes at rank 16, and most at rank 4."""
        return stacked(adapter)

    def down(self, adapter: Adapter, rank: int | None = None) -> Adapter:
        """As up."""
        return stacked(adapter)

    def taken(self, arrays: Adapter) -> Adapter:
        """The cores by layer."""
        return unstacked(arrays, shapes_of(self.adapter))

    def begin(self, number: int, adapter: Adapter) -> Adapter:
        """The cores as they are.

        Raises:
            ValueError: an array is no core.
        """
        for key, value in adapter.items():
            if CORE not in key or value.ndim != 2 or value.shape[0] != value.shape[1]:
                raise ValueError(
                    f"LoRA-XS averages r × r cores, and {key!r} has shape {value.shape}: models.cores.put_in makes them"
                )
        return adapter

    def _orders(self, adapter: Adapter, rank: int | None) -> dict[str, Any]:
        known = {} if self.factors is None else {FACTORS: list(self.factors)}
        return super()._orders(adapter, rank) | {STACKS: True} | known


def factors_of(message: Message) -> list[float] | None:
    """The server's factors, in short, or None: what a client's app gives :func:`fedllm_helpers.models.cores.check`."""
    orders = message.content.config_records.get(RULE)
    return None if orders is None else orders.get(FACTORS)
