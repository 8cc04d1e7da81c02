"""One round of a federation on the server: who is there, who is asked, and what came back."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig
from tqdm import tqdm

from fedllm_helpers.adapters.records import Adapter, message_bytes
from fedllm_helpers.adapters.screening import LIMITS, Expected, Reply, screen, shapes_of
from fedllm_helpers.adapters.wrapping import as_reply
from fedllm_helpers.aggregation import rules, strategies
from fedllm_helpers.aggregation.edits import Base
from fedllm_helpers.communication.codec import layout
from fedllm_helpers.communication.compression import restored
from fedllm_helpers.config.schema import BY_PRODUCT
from fedllm_helpers.federation.nodes import sample, send
from fedllm_helpers.federation.outgoing import Outgoing, formats, masks, training_orders
from fedllm_helpers.federation.tables import NUMBERS, Tables, summary
from fedllm_helpers.privacy import noise
from fedllm_helpers.privacy.masked_clients import MASKED, SENT
from fedllm_helpers.privacy.masked_rounds import Session
from fedllm_helpers.training.fine_tuning import Round

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Federation:
    """What stays the same over the rounds: ``tables`` and ``base``, the edits of the base model, are added to."""

    grid: Grid
    cfg: DictConfig
    strategy: Strategy
    tables: Tables
    base: Base
    shown: tqdm


@dataclass(frozen=True)
class _Turn:
    """One round under way: what was sent to whom, and the replies that were left out."""

    run: Federation
    step: Round
    adapter: Adapter
    asked: list[int]
    out: Outgoing
    left: list[Reply] = field(default_factory=list)


def run_round(run: Federation, step: Round, adapter: Adapter, names: dict[int, int]) -> tuple[Adapter, dict[str, Any]]:
    """Send the adapter out, screen what comes back, combine it as ``federation.aggregation`` says.

    Args:
        run: to whose tables a row for every hospital that was drawn is added, and to whose base what a rule edits.
        step: number, rate and size of the round.
        adapter: of the server.
        names: the hospital of each node that is connected.

    Returns:
        The new adapter, or the old one where fewer than ``federation.min_replies`` replies were usable, or the strategy
        made nothing of them; and the row of the history.

    Raises:
        RuntimeError: no reply was usable, or nothing was made of them, and so it was in the round before.
    """
    adapter = rules.begin(run.cfg, step.number, adapter)
    nodes, first = {hospital: node for node, hospital in names.items()}, len(run.tables.clients)
    asked, away = sample(run.cfg, step, nodes)
    orders = training_orders(run.cfg, run.strategy, step, adapter, nodes[asked[0]])
    turn = _Turn(run, step, adapter, asked, Outgoing(run.cfg, adapter, run.base, nodes, orders))
    combine = _combine_masked if run.cfg.federation.secure_aggregation.threshold else _combine_open
    combined, why, more = combine(turn)
    _finish_rows(turn, first, away, why)
    row = summary(step, run.tables.clients[first:], *more)
    _say_what_is_missing(turn, row, away, why)
    if run.cfg.federation.fraction_evaluate:
        _evaluate_at_clients(replace(turn, out=Outgoing(run.cfg, combined or adapter, run.base, nodes)), row)
    return combined or adapter, row


def _combine_open(turn: _Turn) -> tuple[Adapter | None, str, tuple[int, int]]:
    """The replies one by one, combined as rule and strategy do; no bytes beside the messages in the table."""
    run, number, cfg = turn.run, turn.step.number, turn.run.cfg
    replies = _usable(turn, lambda hospital: rules.up(cfg, turn.adapter, number, hospital))
    least = cfg.federation.min_replies
    if cfg.federation.aggregation in BY_PRODUCT:
        given = [(reply.arrays, reply.numbers["num-examples"]) for reply in replies]
        if len(given) < least:
            return None, "", (0, 0)
        return *strategies.tried(cfg.federation.aggregation, lambda: _products(turn, given)), (0, 0)
    part = rules.up(cfg, turn.adapter, number)
    tidy = (noise.bounded(cfg, reply, part) for reply in replies)
    finish = noise.finish(cfg, number)
    combined, why = strategies.combine(run.strategy, number, tidy, turn.out.request, least, finish)
    return combined and {**turn.adapter, **combined}, why, (0, 0)


def _products(turn: _Turn, given: list[tuple[Adapter, float]]) -> Adapter:
    """The rules that need all replies at once; what is added to the base model goes into the run's base."""
    combined, edit = rules.combined(turn.run.cfg, turn.step.number, turn.adapter, given)
    if edit is not None:
        turn.run.base.add(turn.step.number, edit)
    return combined


def _combine_masked(turn: _Turn) -> tuple[Adapter | None, str, tuple[int, int]]:
    """The sum of masked replies, opened; and the bytes of keys, shares and openings, down and up."""
    run, out, cfg, number = turn.run, turn.out, turn.run.cfg, turn.step.number
    session, part, opened = Session(run.grid, masks(cfg), number, out.nodes), rules.up(cfg, turn.adapter, number), None
    present = session.begin(turn.asked)
    if present:
        out.more = {SENT: session.orders()}
        masked = {MASKED: np.zeros(sum(value.size for value in part.values()), np.uint32)}
        for reply in _usable(replace(turn, asked=present), lambda _: masked):
            session.add(reply)
        if len(session.survivors) >= cfg.federation.min_replies:
            opened = session.end(part)
    more = session.bytes_down, session.bytes_up
    if opened is None:
        needed = max(session.how.threshold, cfg.federation.min_replies)
        return None, f"not opened: {len(session.survivors)} masked updates arrived, {needed} are needed", more
    finish = noise.finish(cfg, number)
    mean = finish(*opened) if finish else opened[0]
    combined, why = strategies.step(run.strategy, number, [as_reply(mean, out.request)])
    return combined and {**turn.adapter, **combined}, why, more


def _usable(turn: _Turn, like: Callable[[int], Adapter]) -> Iterator[Reply]:
    """The usable replies as they come; every reply leaves a row, every one that is left out a line in the log.

    Whoever sent a usable one has the edits that went out with the request.
    """
    run, out, number = turn.run, turn.out, turn.step.number
    for hospital, message in _answers(turn, "train"):
        reply = screen(message, hospital, message_bytes(message), _expected(run.cfg, like(hospital)))
        figures = {name: reply.numbers[name] for name in NUMBERS}
        run.tables.clients.append((number, hospital, reply.status, out.sizes[hospital], reply.size, *figures.values()))
        run.shown.set_description(f"round {number}", refresh=False)
        if np.isfinite(figures["loss-after"]):
            run.shown.set_postfix_str(f"loss {figures['loss-after']:.2f}", refresh=False)
        run.shown.update()
        if reply.status == "used":
            out.base.confirm(out.nodes[hospital])
            yield reply
        else:
            turn.left.append(reply)
            logger.warning("round %d: hospital %d is left out: %s", number, hospital, reply.status)


def _expected(cfg: DictConfig, like: Adapter) -> Expected:
    """A reply to a training message: arrays like these, or an update that leads to them; and numbers."""
    numbers = {name: LIMITS.get(name, (1, cfg.federation.max_cards)) for name in NUMBERS}
    required = ("num-examples",) if noise.silent(cfg) else ("num-examples", "loss-before")
    how = formats(cfg)
    if not how.packs:
        return Expected(numbers, required, shapes_of(like))
    return Expected(numbers, required, layout(how.up, how.keep), lambda encoded: restored(how, encoded, like))


def _answers(turn: _Turn, kind: str) -> Iterable[tuple[int, Message]]:
    """(hospital, reply) in order of hospital."""
    run, names = turn.run, {node: hospital for hospital, node in turn.out.nodes.items()}
    requests = (turn.out.message(hospital, kind) for hospital in turn.asked)

    def known() -> Iterator[tuple[int, Message]]:
        """Replies to what was asked."""
        for node, reply in send(run.grid, requests, run.cfg.federation.timeout):
            if node in names:
                yield names[node], reply
            else:
                logger.warning("round %d: a reply that nobody asked for is left out", turn.step.number)

    # in one process they come one by one, in the order in which they were asked
    return known() if getattr(run.grid, "lazy", False) else sorted(known(), key=lambda answer: answer[0])


def _finish_rows(turn: _Turn, first: int, away: list[int], why: str) -> None:
    """Say of replies that came to nothing that they did, and give those that sent none a row."""
    rows, number, nothing = turn.run.tables.clients, turn.step.number, [float("nan")] * len(NUMBERS)
    if why:
        status = why if why.startswith("not combined") else "not opened"
        rows[first:] = [(*row[:2], status if row[2] == "used" else row[2], *row[3:]) for row in rows[first:]]
    silent = sorted(set(turn.asked) - {row[1] for row in rows[first:]})
    rows.extend((number, k, "no reply", turn.out.sizes.get(k, 0), 0, *nothing) for k in silent)
    rows.extend((number, k, "not connected", 0, 0, *nothing) for k in away)


def _say_what_is_missing(turn: _Turn, row: dict[str, Any], away: list[int], why: str) -> None:
    number, used, cfg, history = row["round"], row["used"], turn.run.cfg, turn.run.tables.history
    if away:
        logger.warning("round %d: not connected: hospitals %s", number, ", ".join(map(str, away)))
    if not used:
        before, first = history[-1] if history else {}, next(iter(turn.left), None)
        said = f"round {number}: none of {row['asked']} hospitals sent a usable adapter; "
        said += f"the first, hospital {first.hospital}: {first.status}" if first else why or "no reply in time"
        idle = why.startswith("not combined")
        said = f"round {number}: {why}" if idle else said
        if not before.get("used") and not (idle and "used" not in before):
            error = RuntimeError(said)
            if first and first.trace:
                error.add_note(first.trace)
            raise error
        logger.warning("%s; the adapter stays as it was, and another such round ends the run", said)
    elif used < cfg.federation.min_replies:
        kept = f"federation.min_replies={cfg.federation.min_replies}: the adapter stays as it was"
        logger.warning("round %d: %d usable replies of %d, %s", number, used, row["asked"], kept)


def _evaluate_at_clients(turn: _Turn, row: dict[str, Any]) -> None:
    """Put into the row: nats per answer token on sampled hospitals' own held-out cards, weighted by cards.

    They are drawn by themselves: were they those that trained, the average would be scored where it came from.
    """
    cfg, out, number = turn.run.cfg, turn.out, turn.step.number
    size = max(1, round(cfg.federation.fraction_evaluate * cfg.federation.num_clients))
    asked, _ = sample(cfg, replace(turn.step, clients=size), out.nodes, 1)
    orders = RecordDict({"config": ConfigRecord({"server-round": number})})
    out.request = Message(orders, out.nodes[asked[0]], "evaluate")
    limits = {"num-examples": (0, cfg.federation.max_cards), "nll": LIMITS["nll"]}
    scored = []
    for hospital, message in _answers(replace(turn, asked=asked), "evaluate"):
        reply = screen(message, hospital, message_bytes(message), Expected(limits, tuple(limits)))
        row["bytes_up"] += reply.size
        if reply.status == "used":
            scored.append((reply.numbers["num-examples"], reply.numbers["nll"]))
            out.base.confirm(out.nodes[hospital])
        else:
            logger.warning("round %d: hospital %d's evaluation is left out: %s", number, hospital, reply.status)
    row["bytes_down"] += sum(out.sizes.values())
    total = sum(cards for cards, _ in scored)
    row["client_nll"] = sum(cards * nll for cards, nll in scored) / total if total else float("nan")
