"""What of an adapter crosses the network, and what becomes of it: seven rules of federated LoRA.

``federation.aggregation`` names the rule. Four send factors whose mean is taken, three work on products at the server:

- ``FedIT``: A and B (Zhang et al. 2023, arXiv:2305.05644). A mean of factors is not the mean of updates.
- ``FFA-LoRA``: B alone, A stays as the seed drew it (Sun et al. 2024, arXiv:2403.12313).
- ``RoLoRA``: B in odd rounds, A in even ones; the other one rests (Chen et al. 2025, arXiv:2502.01755). Both go down,
  as nothing tells the server who has kept the other.
- ``FedSA-LoRA``: A alone, every hospital keeps its B (Guo et al. 2024, arXiv:2410.01463): a model for each.
- ``FLoRA``: the stack comes down and is added to the base model, and adapters start anew (Wang et al. 2024,
  arXiv:2409.05976).
- ``FedEx-LoRA``: the mean of factors, and what it misses is added to the base model (Singhal et al. 2024,
  arXiv:2410.09432).
- ``FlexLoRA``: the best approximation of the mean update, to each hospital at its own rank (Bai et al. 2024,
  arXiv:2402.11505). With mixed ranks its higher ranks fade from round to round (Wu et al. 2026, arXiv:2602.13486).

Hospitals of smaller rank hold the model's adapter with zeros in the ranks that they have not, which training leaves at
zero; only their own ranks are sent. All share one scale α/r, whatever their rank.

FLoRA and FedEx-LoRA have a size: clients keep ΔW as full matrices in their state, which on a deployed node crosses
Flower's wire and has to stay below 2 GiB. For the queries and values of a 7B model it is 2.7 GB, so there they are for
runs in process; and the server keeps the stacks of all rounds, K adapters for each.
"""

from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message
from omegaconf import DictConfig

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.aggregation.edits import Base
from fedllm_helpers.models.editing import scaling
from fedllm_helpers.models.process import first_adapter

PERSONAL = "personal factors"  # in a client's state


def rank_of(cfg: DictConfig, hospital: int) -> int:
    """The rank of a hospital's adapter."""
    return cfg.federation.ranks[hospital] if cfg.federation.ranks else cfg.model.lora.peft_lora_r


def trained(cfg: DictConfig, number: int) -> tuple[str, ...] | None:
    """The factors that a round trains, as they stand in keys; None for all."""
    alternate = factors.B if number % 2 else factors.A  # B first: with B = 0 the gradient of A is 0
    return {"FFA-LoRA": (factors.B,), "RoLoRA": (alternate,)}.get(cfg.federation.aggregation)


def up(cfg: DictConfig, adapter: Adapter, number: int, hospital: int = 0) -> Adapter:
    """What a hospital sends of its adapter in a round."""
    parts = (factors.A,) if cfg.federation.aggregation == "FedSA-LoRA" else trained(cfg, number)
    chosen = {key: value for key, value in adapter.items() if parts is None or any(part in key for part in parts)}
    return factors.cut(chosen, rank_of(cfg, hospital)) if cfg.federation.ranks else chosen


def down(cfg: DictConfig, adapter: Adapter, hospital: int = 0) -> Adapter:
    """What the server sends of its adapter, edits of the base model left aside."""
    parts = {"FFA-LoRA": (factors.B,), "FedSA-LoRA": (factors.A,), "FLoRA": ()}.get(cfg.federation.aggregation)
    chosen = {key: value for key, value in adapter.items() if parts is None or any(part in key for part in parts)}
    return factors.cut(chosen, rank_of(cfg, hospital)) if cfg.federation.ranks else chosen


def whole(cfg: DictConfig, received: Adapter, number: int, hospital: int = 0, own: Adapter | None = None) -> Adapter:
    """The adapter that a hospital trains: what came down, and what it has by itself.

    Args:
        cfg: of the federation.
        received: as :func:`down` made it.
        number: of the round.
        hospital: from 0.
        own: what FedSA-LoRA's hospital has kept; None before it trained.
    """
    rule = cfg.federation.aggregation
    if rule == "FLoRA":
        received = factors.cut(fresh(cfg, number, first_adapter(cfg)), rank_of(cfg, hospital))
    elif rule == "FFA-LoRA":
        received = _with_frozen(cfg, {**first_adapter(cfg), **received})
    elif rule == "FedSA-LoRA":
        received = {**first_adapter(cfg), **received, **(own or {})}
    return factors.padded(received, cfg.model.lora.peft_lora_r) if cfg.federation.ranks else received


def received(cfg: DictConfig, message: Message, context: Context) -> Adapter:
    """The adapter that a hospital has on getting a message, with what it kept for itself."""
    number, hospital = int(message.content["config"]["server-round"]), int(context.node_config["partition-id"])
    kept = context.state.array_records.get(PERSONAL)
    own = from_record(kept) if kept is not None else None
    return whole(cfg, from_record(message.content["arrays"]), number, hospital, own)


def keep(cfg: DictConfig, adapter: Adapter, context: Context) -> None:
    """Keep at the hospital, in its client's state, what FedSA-LoRA does not send."""
    if cfg.federation.aggregation == "FedSA-LoRA":
        own = {key: value for key, value in adapter.items() if factors.B in key}
        if not all(np.isfinite(value).all() for value in own.values()):
            raise FloatingPointError("B is no longer finite after this training: the hospital keeps the one before")
        context.state[PERSONAL] = to_record(own)


def begin(cfg: DictConfig, number: int, adapter: Adapter) -> Adapter:
    """The server's adapter at the start of a round: with FLoRA a new one, with FFA-LoRA's A at first, else as it is."""
    if cfg.federation.aggregation == "FLoRA":
        return fresh(cfg, number, adapter)
    return _with_frozen(cfg, adapter) if cfg.federation.aggregation == "FFA-LoRA" else adapter


def fresh(cfg: DictConfig, number: int, like: Adapter) -> Adapter:
    """An adapter as PEFT draws one, A uniform in ±1/√inputs and B zero, from seed and round alone.

    PEFT's own draw depends on the number format in which a machine holds the base model: server and hospitals would
    have different ones.
    """
    rng, made = np.random.default_rng([cfg.seed, 4, number]), {}
    for key in sorted(like):
        bound = like[key].shape[1] ** -0.5  # kaiming_uniform with a = √5
        drawn = rng.uniform(-bound, bound, like[key].shape) if factors.A in key else np.zeros(like[key].shape)
        made[key] = drawn.astype(np.float32)
    return {key: made[key] for key in like}


def _with_frozen(cfg: DictConfig, adapter: Adapter) -> Adapter:
    frozen = fresh(cfg, 1, adapter)
    return {key: frozen[key] if factors.A in key else value for key, value in adapter.items()}


def combined(
    cfg: DictConfig, number: int, adapter: Adapter, replies: list[tuple[Adapter, float]]
) -> tuple[Adapter, Adapter | None]:
    """The server's step of the three rules that work on products; all replies are in memory.

    Args:
        cfg: of the federation.
        number: of the round.
        adapter: as it was before.
        replies: adapters as :func:`up` makes them, ordered by hospital, and their weights.

    Returns:
        The new adapter, and what is to be added to the base model, scale included; None where nothing is.
    """
    given, weights = [one for one, _ in replies], [weight for _, weight in replies]
    if cfg.federation.aggregation == "FedEx-LoRA":
        mean, residual = factors.mean_and_residual(given, weights)
        return mean, _scaled(residual, scaling(cfg.model.lora)) if factors.rank(residual) else None
    stack = factors.stacked(given, weights)
    if cfg.federation.aggregation == "FLoRA":
        return fresh(cfg, number + 1, adapter), _scaled(stack, scaling(cfg.model.lora))
    size = factors.rank(adapter)
    best = factors.truncated(stack, min(size, factors.rank(stack)))
    rest = {key: value[factors.rank(best) :] for key, value in adapter.items() if factors.A in key}
    grown = factors.padded(best, size)  # where fewer ranks came than there are, the others keep their A and stay alive
    return {k: np.concatenate([best[k], rest[k]]) if factors.A in k else v for k, v in grown.items()}, None


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    return {key: (value * scale).astype(np.float32) if factors.B in key else value for key, value in adapter.items()}


def update(cfg: DictConfig, adapter: Adapter, base: Base) -> Adapter:
    """Factors of everything that was learned, scale included: the adapter's product and all edits."""
    return factors.together([_scaled(adapter, scaling(cfg.model.lora)), *base.edits.values()])


def values(cfg: DictConfig, adapter: Adapter) -> Callable[[int, int, str], tuple[int, int]]:
    """How many numbers a training message holds, by round, hospital and direction: of the adapter, and of edits.

    For :func:`fedllm_helpers.communication.ledger`, where every hospital takes part in every round and
    ``federation.fraction_evaluate`` is 0 (messages to evaluate carry edits, too). ``adapter`` is any, for its shapes.
    """

    def count(number: int, hospital: int, direction: str) -> tuple[int, int]:
        """Of one message."""
        if direction == "up":
            return _size(up(cfg, adapter, number, hospital)), 0
        others = [up(cfg, adapter, 1, other) for other in range(cfg.federation.num_clients)]
        edit = {"FLoRA": others, "FedEx-LoRA": others[1:]}.get(cfg.federation.aggregation, [])
        return _size(down(cfg, adapter, hospital)), sum(map(_size, edit)) if number > 1 else 0

    return count


def _size(adapter: Adapter) -> int:
    return sum(value.size for value in adapter.values())


def check_shapes(cfg: DictConfig, adapter: Adapter) -> None:
    """Raise ValueError, before anyone trains, for layers without factors A and B, and for FlexLoRA's rank too large."""
    if cfg.federation.aggregation != "FedIT":
        factors.pairs(adapter)
    if cfg.federation.aggregation == "FlexLoRA":
        for layer, (first, second) in factors.pairs(adapter).items():
            largest = min(second.shape[0], first.shape[1])
            if first.shape[0] > largest:
                raise ValueError(f"model.lora.peft_lora_r={first.shape[0]}: {layer!r} has no rank above {largest}")
