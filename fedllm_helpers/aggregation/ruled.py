"""A rule of federated LoRA at the server: a strategy that wraps a strategy; each rule is a file of its own beside this.

A rule says what a round trains and sends, what everyone draws and what clients keep. Here are the orders for that, to
:func:`fedllm_helpers.aggregation.rules.mod`, edits of the base model, and one line where it cannot be.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers.adapters import factors, screening
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import Shapes
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.aggregation import edits
from fedllm_helpers.aggregation.rules import FOLLOWED, RULE, chosen, shapes_of
from fedllm_helpers.aggregation.strategies import tried


class Rule(Wrapper):
    """A strategy that averages what this rule sends of LoRA factors; for :func:`rules.mod` at the clients.

    A rule says which factors a round ``trains`` and ``sends``, which of them are drawn from the seed (``draws``) and
    which clients keep (``keeps``): what is neither drawn nor kept goes down.

    Args:
        strategy: any that averages; it sees the arrays that are sent.
        seed: of what is drawn.
        ranks: the rank of a client's adapter by its node number, for the rules that can mix them; None: as the model's.

    Raises:
        ValueError: a wrapped strategy has a form of its own for the replies, or is a rule, too; or ranks differ.
    """

    reads = "adapters"
    name, draws, keeps, mixes, stacks = "FedIT", "", "", False, False

    def __init__(self, strategy: Strategy, *, seed: int = 0, ranks: Callable[[int], int] | None = None) -> None:
        super().__init__(strategy)
        self.seed, self.ranks, self.number, self.adapter, self.base = seed, ranks, 0, {}, edits.Base()
        for inner in self.within():
            if isinstance(inner, Rule):
                raise ValueError(f"{self.name} and {inner.name}: one rule combines the factors")
        if ranks and not self.mixes:
            raise ValueError(f"ranks: {self.name} needs equal ranks")
        self.numbers = {FOLLOWED: (1, 1e9)} if self.ordering() else {}
        self.remembers = f"{self.name}'s own factors" if self.keeps else ""

    def trains(self, number: int) -> str:
        """The factors that a round moves."""
        return "AB"

    def sends(self, number: int) -> str:
        """The factors that go up."""
        return self.trains(number)

    def ordering(self) -> bool:
        """Whether clients have anything to do: they do not, where whole adapters go down and up."""
        return bool(self.draws or self.keeps or self.ranks) or (self.trains(1), self.sends(1)) != ("AB", "AB")

    def up(self, adapter: Adapter, number: int, rank: int | None = None) -> Adapter:
        """What a client sends of its adapter in a round."""
        part = chosen(adapter, self.sends(number))
        return factors.cut(part, rank) if rank else part

    def down(self, adapter: Adapter, rank: int | None = None) -> Adapter:
        """What the server sends of its adapter, edits of the base model left aside."""
        part = chosen(adapter, "".join(one for one in "AB" if one not in self.draws + self.keeps))
        return factors.cut(part, rank) if rank else part

    def taken(self, arrays: Adapter) -> Adapter:
        """Arrays of the adapter, from those that cross the network."""
        return arrays

    def begin(self, number: int, adapter: Adapter) -> Adapter:
        """The server's adapter at the start of a round.

        Raises:
            ValueError: arrays that are no LoRA factors, or that do not fit what clients draw or keep.
        """
        if self.ordering() or self.single:
            factors.pairs(adapter)
        return adapter

    def expected(self, node: int) -> Adapter:
        """What a client's reply leads to, before it trained."""
        super().expected(node)  # raises for one that was not asked
        return self.up(self.adapter, self.number, self.ranks and self.ranks(node))

    def form(self, node: int) -> Shapes:
        """The factors that a client sends, at its own rank."""
        return screening.shapes_of(self.expected(node))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, with what this rule sends down and its orders to the mod."""
        self.number, self.adapter = server_round, self.begin(server_round, from_record(arrays))
        sent = to_record(self.up(self.adapter, server_round))
        return self._ordered(super().configure_train(server_round, sent, config, grid), self.adapter)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`configure_train`; what comes back has no arrays."""
        self.number = server_round
        return self._ordered(super().configure_evaluate(server_round, arrays, config, grid), from_record(arrays))

    def _ordered(self, messages: Iterable[Message], adapter: Adapter) -> list[Message]:
        made, messages = {}, list(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            rank = self.ranks(node) if self.ranks else None
            if rank not in made:
                made[rank] = to_record(self.down(adapter, rank))
            content = {**message.content, "arrays": made[rank]}
            if self.ordering():
                lacking, numbers = self.base.lacking(node)
                content |= {**lacking, RULE: ConfigRecord({**self._orders(adapter, rank), **numbers})}
            message.content = RecordDict(content)
        return messages

    def _orders(self, adapter: Adapter, rank: int | None) -> dict[str, Any]:
        orders: dict[str, Any] = {"name": self.name, "trains": self.trains(self.number)}
        orders["sends"] = self.sends(self.number)
        if self.draws:
            orders |= {"draws": self.draws, "seed": self.seed, "draw": self.draw()}
        orders |= {"keeps": self.keeps} if self.keeps else {}
        if self.draws or self.keeps or self.stacks:
            orders["shapes"] = zlib.compress(json.dumps(shapes_of(adapter)).encode(), 9)
        return orders | ({"rank": rank, "full": factors.rank(adapter)} if rank else {})

    def draw(self) -> int:
        """The number of the draw that this round has."""
        return 1

    def edit_values(self, sizes: list[int]) -> int:
        """How many numbers a round adds to the base model, from those that its clients sent."""
        return 0

    def values(self, adapter: Adapter, clients: int) -> Callable[[int, int, str], tuple[int, int]]:
        """How many numbers a training message holds, by round, client and direction: of the adapter, and of edits.

        For :func:`fedllm_helpers.communication.ledger`, where every client takes part in every round. ``adapter`` is
        any, for its shapes; clients are numbered as their ranks are.
        """

        def count(number: int, client: int, direction: str) -> tuple[int, int]:
            """Of one message."""
            ranks = [self.ranks(one) if self.ranks else None for one in range(clients)]
            if direction == "up":
                return _numbers(self.up(adapter, number, ranks[client])), 0
            edit = self.edit_values([_numbers(self.up(adapter, 1, rank)) for rank in ranks]) if number > 1 else 0
            return _numbers(self.down(adapter, ranks[client])), edit

        return count

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The server's adapter with what the wrapped strategy makes of the factors that were sent.

        Raises:
            ValueError: the clients' apps lack :func:`rules.mod`: none follows the orders; or they send something else.
        """
        arrays, metrics = super().aggregate_train(server_round, self.followed(server_round, replies))
        if arrays is None:
            return None, metrics
        made = {**self.adapter, **self.taken(from_record(arrays))}
        if other := sorted(set(made) - set(self.adapter)):
            raise ValueError(f"{self.name}: clients send {other[0]!r}, which the server's adapter has not")
        return to_record(made), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the wrapped strategy makes of the replies; who sent one has the edits that went out with the request."""
        return super().aggregate_evaluate(server_round, map(self._confirmed, replies))

    def followed(self, number: int, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies of clients that did what the orders say; each of the others is left out."""
        other, some = None, False
        for reply in replies:
            node = reply.metadata.src_node_id
            said = next(iter(reply.content.metric_records.values()), {}) if reply.has_content() else {FOLLOWED: number}
            if self.ordering() and not self.averaged and said.get(FOLLOWED) != number:
                other = node
                self.leave_out(number, node, f"it does not follow the orders of {self.name}")
                continue
            some = True
            yield self._confirmed(reply)
        if other is not None and not some:
            raise ValueError(f"node {other} does not follow {self.name}: ClientApp(mods=[…]) needs rules.mod")

    def _confirmed(self, reply: Message) -> Message:
        if reply.has_content():
            self.base.confirm(reply.metadata.src_node_id)
        return reply


def _numbers(adapter: Adapter) -> int:
    return sum(value.size for value in adapter.values())


class ProductRule(Rule):
    """A rule that combines the products B·A at the server: it needs every reply by itself, and all at once.

    Args:
        scale: α/r, by which products are multiplied in the model.
    """

    averages, single = True, "a mean of factors is not the mean of their products"

    def __init__(self, strategy: Strategy, *, scale: float = 1.0, **options: Any) -> None:
        self.scale = scale
        super().__init__(strategy, **options)
        if any(hasattr(inner, "noise_multiplier") for inner in self.within()):
            raise ValueError(f"{self.name}: noise on the average needs a mean of what is sent; take FedIT or FFA-LoRA")

    def combined(self, number: int, adapters: list[Adapter], weights: list[float]) -> tuple[Adapter, Adapter | None]:
        """The new adapter, and factors of what is to be added to the base model, scale included, or None."""
        raise NotImplementedError

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the products; what is added to the base model goes into ``base``. Of no use, they change nothing."""
        usable = list(self.usable(server_round, self.followed(server_round, replies)))
        if not usable:
            return None, None
        made: list[Adapter] = []

        def combine() -> Adapter:
            """One step of the rule."""
            weights = [reply.numbers["num-examples"] for reply in usable]
            adapter, edit = self.combined(server_round, [reply.arrays for reply in usable], weights)
            if edit is not None:
                edits.check(server_round, edit)
                made.append(edit)
            return adapter

        adapter, self.why = tried(self.name, combine)
        if adapter is None:
            return None, None
        for edit in made:
            self.base.add(server_round, edit)
        return Wrapper.aggregate_train(self, server_round, [self.as_one(adapter)])
