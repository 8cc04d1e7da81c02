"""One round of a federation on the server: who is there, who is asked, and what came back."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig
from tqdm import tqdm

from fedllm_helpers import aggregation, privacy, rules
from fedllm_helpers.compression import decompress
from fedllm_helpers.edits import Base
from fedllm_helpers.masked_clients import SENT
from fedllm_helpers.masked_rounds import Session, as_reply
from fedllm_helpers.messages import from_record, message_bytes
from fedllm_helpers.models import Adapter
from fedllm_helpers.nodes import reason, send, sender
from fedllm_helpers.outgoing import Outgoing, training_orders
from fedllm_helpers.tables import CLIENTS, NUMBERS, Tables
from fedllm_helpers.training import Round

logger = logging.getLogger(__name__)


def sample(cfg: DictConfig, step: Round, present: Iterable[int]) -> list[int]:
    """The hospitals of a round, in order: drawn from those present by the seed and the number of the round alone."""
    ids = sorted(present)
    rng = np.random.default_rng([cfg.seed, step.number])
    return sorted(rng.choice(ids, size=min(step.clients, len(ids)), replace=False).tolist())


def run_round(
    grid: Grid,
    cfg: DictConfig,
    strategy: Strategy,
    step: Round,
    adapter: Adapter,
    names: dict[int, int],
    tables: Tables,
    shown: tqdm,
    base: Base,
) -> tuple[Adapter, dict[str, Any]]:
    """Send the adapter out, screen what comes back, combine it as ``federation.aggregation`` says.

    Returns:
        The new adapter, or the old one where fewer than ``federation.min_replies`` replies were usable; and the row of
        the history. The rows of the clients are appended to ``tables``, what is added to the base model to ``base``.

    Raises:
        RuntimeError: no reply was usable, and none was in the round before; or the strategy made something not finite.
    """
    adapter = rules.begin(cfg, step.number, adapter)
    nodes, first, errors = {hospital: node for node, hospital in names.items()}, len(tables.clients), []
    asked = sample(cfg, step, nodes)
    out = Outgoing(cfg, adapter, base, nodes, training_orders(cfg, strategy, step, adapter, nodes[asked[0]]))
    combine = _combine_masked if cfg.federation.secure_aggregation.threshold else _combine_open
    combined, more = combine(grid, cfg, strategy, step, adapter, names, asked, out, tables, errors, shown)
    if combined is not None and not all(np.isfinite(value).all() for value in combined.values()):
        raise RuntimeError(f"round {step.number}: {cfg.federation.strategy} made finite adapters into one that is not")
    silent, nothing = set(asked) - {row[1] for row in tables.clients[first:]}, [float("nan")] * len(NUMBERS)
    tables.clients.extend((step.number, k, "no reply", out.sizes.get(k, 0), 0, *nothing) for k in sorted(silent))
    row = _summary(step, tables.clients[first:], *more)
    _say_what_is_missing(cfg, row, errors, tables)
    if cfg.federation.fraction_evaluate:
        out = Outgoing(cfg, combined or adapter, base, nodes)
        _evaluate_at_clients(grid, cfg, step, out, row)
    return combined or adapter, row


def _combine_open(
    grid: Grid, cfg: DictConfig, strategy: Strategy, step: Round, adapter: Adapter, names: dict[int, int],
    asked: list[int], out: Outgoing, tables: Tables, errors: list[str], shown: tqdm,
) -> tuple[Adapter | None, tuple[int, int]]:  # fmt: skip
    """The replies one by one, combined as rule and strategy do; no bytes beside the messages in the table."""

    def check(hospital: int, reply: Message) -> str | None:
        """Why it cannot be used."""
        part = rules.up(cfg, adapter, step.number, hospital)
        return decompress(cfg, reply, part) or aggregation.fault(reply, part, privacy.silent(cfg))

    def usable() -> Iterator[tuple[int, Message]]:
        """Replies with arrays and numbers in order; whoever sent one has the edits that went out with the request."""
        answers = _answers(grid, cfg, out, asked, names)
        for hospital, reply in _screened(answers, step, check, out.sizes, tables, errors, shown):
            out.base.confirm(out.nodes[hospital])
            yield hospital, aggregation.tidied(reply, rules.up(cfg, adapter, step.number, hospital))

    if cfg.federation.aggregation in rules.BY_PRODUCT:
        return _combine_products(cfg, step, adapter, list(usable()), out.base), (0, 0)
    part = rules.up(cfg, adapter, step.number)
    tidy = (privacy.bounded(cfg, reply, part) for _, reply in usable())
    finish = privacy.finish(cfg, step.number)
    combined = aggregation.combine(strategy, step.number, tidy, cfg.federation.min_replies, finish)
    return combined and {**adapter, **combined}, (0, 0)


def _combine_products(
    cfg: DictConfig, step: Round, adapter: Adapter, replies: list[tuple[int, Message]], base: Base
) -> Adapter | None:
    """The rules that need all replies at once; what is added to the base model goes into ``base``."""
    if len(replies) < cfg.federation.min_replies:
        return None
    given = [(from_record(r.content["arrays"]), float(r.content["metrics"]["num-examples"])) for _, r in replies]
    combined, edit = rules.combined(cfg, step.number, adapter, given)
    if edit is not None:
        base.add(step.number, edit)
    return combined


def _combine_masked(
    grid: Grid, cfg: DictConfig, strategy: Strategy, step: Round, adapter: Adapter, names: dict[int, int],
    asked: list[int], out: Outgoing, tables: Tables, errors: list[str], shown: tqdm,
) -> tuple[Adapter | None, tuple[int, int]]:  # fmt: skip
    """The sum of masked replies, opened; and the bytes of keys, shares and openings, down and up."""
    session = Session(grid, cfg, step.number, {hospital: node for node, hospital in names.items()})
    part, first, opened = rules.up(cfg, adapter, step.number), len(tables.clients), None
    size, present = sum(value.size for value in part.values()), session.begin(asked)
    if present:
        out.more = {SENT: session.orders()}
        answers = _answers(grid, cfg, out, present, names)
        for hospital, reply in _screened(
            answers, step, lambda _, r: session.fault(r, size), out.sizes, tables, errors, shown
        ):
            session.add(hospital, reply)
        if len(session.survivors) >= cfg.federation.min_replies:
            opened = session.end(part)
    if opened is None:
        needed = max(session.threshold, cfg.federation.min_replies)
        errors.append(f"the sum stayed closed: {len(session.survivors)} masked updates arrived, {needed} are needed")
        closed = [(*row[:2], "not opened", *row[3:]) if row[2] == "used" else row for row in tables.clients[first:]]
        tables.clients[first:] = closed
        return None, (session.bytes_down, session.bytes_up)
    finish = privacy.finish(cfg, step.number)
    mean = finish(*opened) if finish else opened[0]
    combined = aggregation.combine(strategy, step.number, [as_reply(mean, out.request)])
    return combined and {**adapter, **combined}, (session.bytes_down, session.bytes_up)


def _answers(
    grid: Grid, cfg: DictConfig, out: Outgoing, asked: list[int], names: dict[int, int]
) -> Iterable[tuple[int | None, Message]]:
    """(hospital, reply) in order of hospital; the hospital is None where no one knows the node."""
    requests = (out.message(hospital, out.request.metadata.message_type) for hospital in asked)
    replies, sent = send(grid, requests, cfg.federation.timeout)
    answers = ((names.get(sender(reply, sent)), reply) for reply in replies)
    if getattr(grid, "lazy", False):  # they come one by one, in the order in which they were asked
        return answers
    return sorted(answers, key=lambda answer: -1 if answer[0] is None else answer[0])


def _say_what_is_missing(cfg: DictConfig, row: dict[str, Any], errors: list[str], tables: Tables) -> None:
    number, used, asked, minimum = row["round"], row["used"], row["asked"], cfg.federation.min_replies
    if not used:
        said = errors[0] if errors else f"no reply within federation.timeout={cfg.federation.timeout:.0f} s"
        said = f"round {number}: none of {asked} hospitals sent a usable adapter; the first:\n{said}"
        if not tables.history or not tables.history[-1].get("used"):
            raise RuntimeError(said)
        logger.warning("%s\nthe adapter stays as it was; another such round ends the run", said)
    elif used < minimum:
        kept = f"federation.min_replies={minimum}: the adapter stays as it was"
        logger.warning("round %d: %d usable replies of %d, %s", number, used, asked, kept)


def _screened(
    answers: Iterable[tuple[int | None, Message]],
    step: Round,
    check: Callable[[int, Message], str | None],
    down: dict[int, int],
    tables: Tables,
    errors: list[str],
    shown: tqdm,
) -> Iterator[tuple[int, Message]]:
    """The usable replies as they come; every reply leaves a row, every rejected one a line in the log."""
    for hospital, reply in answers:
        if hospital is None:
            logger.warning("round %d: a reply of an unknown node is left out", step.number)
            continue
        up, why = message_bytes(reply), check(hospital, reply)
        numbers = {} if reply.has_error() else next(iter(reply.content.metric_records.values()), {})
        figures = {name: _number(numbers.get(name)) for name in NUMBERS}
        tables.clients.append((step.number, hospital, why or "used", down[hospital], up, *figures.values()))
        shown.set_description(f"round {step.number}", refresh=False)
        if "loss-after" in numbers:
            shown.set_postfix_str(f"loss {figures['loss-after']:.2f}", refresh=False)
        shown.update()
        if why:
            errors.append(reason(reply) if reply.has_error() else f"hospital {hospital}: {why}")
            logger.warning("round %d: hospital %d is left out: %s", step.number, hospital, why)
        else:
            yield hospital, reply


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _summary(step: Round, rows: list[tuple], more_down: int = 0, more_up: int = 0) -> dict[str, Any]:
    frame = pd.DataFrame(rows, columns=CLIENTS)
    used = frame[frame["status"] == "used"]
    weights = used["cards"] / used["cards"].sum()
    return {
        "round": step.number,
        "learning_rate": step.learning_rate,
        "asked": len(frame),
        "used": len(used),
        "examples": int(used["examples"].sum()),
        "tokens": int(used["tokens"].sum()),  # 0 where privacy is promised: hospitals do not tell
        "loss_before": float((weights * used["loss_before"]).sum(skipna=False)),
        "loss_after": float((weights * used["loss_after"]).sum(skipna=False)),
        "bytes_down": int(frame["bytes_down"].sum()) + more_down,
        "bytes_up": int(frame["bytes_up"].sum()) + more_up,
        "client_seconds": float(frame["seconds"].sum()),
    }


def _evaluate_at_clients(grid: Grid, cfg: DictConfig, step: Round, out: Outgoing, row: dict[str, Any]) -> None:
    """Put into the row: nats per answer token on sampled hospitals' own held-out cards, weighted by cards."""
    size = max(1, round(cfg.federation.fraction_evaluate * len(out.nodes)))
    asked = sample(cfg, Round(step.number, 0.0, size, False), out.nodes)
    orders = RecordDict({"config": ConfigRecord({"server-round": step.number})})
    out.request = Message(orders, out.nodes[asked[0]], "evaluate")
    requests = [out.message(hospital, "evaluate") for hospital in asked]
    scored = []
    replies, sent = send(grid, requests, cfg.federation.timeout)
    for reply in replies:
        row["bytes_up"] += message_bytes(reply)
        numbers = {} if reply.has_error() else next(iter(reply.content.metric_records.values()), {})
        hospital, cards, nll = (_number(numbers.get(name)) for name in ("partition-id", "num-examples", "nll"))
        if np.isfinite([hospital, cards, nll]).all():
            scored.append((hospital, cards, nll))
            out.base.confirm(sender(reply, sent))
        else:
            said = reason(reply).splitlines()[-1] if reply.has_error() else f"it sent {dict(numbers)}"
            logger.warning("round %d: a hospital's evaluation is left out: %s", step.number, said)
    row["bytes_down"] += sum(out.sizes.values())
    total = sum(cards for _, cards, _ in scored)
    row["client_nll"] = sum(cards * nll for _, cards, nll in sorted(scored)) / total if total else float("nan")
