"""One round of a federation on the server: who is asked, what comes back, and what is written down of it."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from omegaconf import DictConfig
from tqdm import tqdm

from fedllm_helpers import training
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import Reply
from fedllm_helpers.federation.chain import Chain
from fedllm_helpers.federation.nodes import Present, answers, sample
from fedllm_helpers.federation.tables import NUMBERS, Tables, summary
from fedllm_helpers.training.schedule import Round

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Federation:
    """What stays the same over the rounds: ``tables`` are added to, ``chain`` has the strategies."""

    grid: Grid
    cfg: DictConfig
    chain: Chain
    tables: Tables
    shown: tqdm


def run_round(run: Federation, step: Round, adapter: Adapter, names: dict[int, int]) -> tuple[Adapter, dict[str, Any]]:
    """Send the adapter down the chain of strategies and out, and take what comes back up the chain.

    Args:
        run: to whose tables a row for every hospital that was drawn is added.
        step: number, rate and size of the round.
        adapter: of the server.
        names: the hospital of each node that is connected.

    Returns:
        The new adapter, or the old one where too few replies were usable (``federation.min_replies`` and
        ``federation.min_share``), or the strategy made nothing of them; and the row of the history.

    Raises:
        RuntimeError: no reply was usable, or nothing was made of them, and so it was in the round before.
    """
    top, number = run.chain.top, step.number
    asked, away = sample(run.cfg, step, names.values())
    run.chain.named(names)
    here = Present(run.grid, names, asked)
    requests = top.configure_train(number, to_record(adapter), ConfigRecord({"lr": step.learning_rate}), here)
    arrays, _ = top.aggregate_train(number, _shown(run, number, answers(here, requests, run.cfg.federation.timeout)))
    row = _write_down(run, step, asked, away)
    adapter = adapter if arrays is None else from_record(arrays)
    if run.cfg.federation.fraction_evaluate:
        _evaluate_at_clients(run, step, adapter, names, row)
    return adapter, row


def _shown(run: Federation, number: int, replies: Iterable[Message]) -> Iterator[Message]:
    """The replies, each on the bar once it was looked at."""
    for reply in replies:
        yield reply
        run.shown.set_description(f"round {number}", refresh=False)
        seen = run.chain.screened.seen.get(reply.metadata.src_node_id)
        if seen and np.isfinite(seen.numbers["loss-after"]):
            run.shown.set_postfix_str(f"loss {seen.numbers['loss-after']:.2f}", refresh=False)
        run.shown.update()


def _write_down(run: Federation, step: Round, asked: list[int], away: list[int]) -> dict[str, Any]:
    """Add a row for every hospital that was drawn; the row of the round.

    Raises:
        RuntimeError: as :func:`run_round`.
    """
    chain, number, nothing = run.chain, step.number, [float("nan")] * len(NUMBERS)
    sizes = {(way, node): size for row, kind, way, node, size in chain.top.rows if (row, kind) == (number, "train")}
    why, rows, nodes = chain.why(), [], {hospital: node for node, hospital in chain.hospitals.items()}
    came = "not combined" if why.startswith("not combined") else "not opened" if why else "used"
    for node, reply in chain.screened.seen.items():
        status = chain.status(node)
        status = (why if came == "not combined" else came) if status == "used" else status
        figures = [reply.numbers[name] for name in NUMBERS]
        rows.append((number, chain.hospitals[node], status, sizes["down", node], sizes["up", node], *figures))
    silent = [hospital for hospital in asked if nodes[hospital] not in chain.screened.seen]
    rows += [(number, k, "no reply", sizes.get(("down", nodes[k]), 0), 0, *nothing) for k in silent]
    rows += [(number, k, "not connected", 0, 0, *nothing) for k in away]
    run.tables.clients.extend(rows)
    session = chain.masked and chain.masked.session
    row = summary(step, rows, *((session.bytes_down, session.bytes_up) if session else ()))
    left = [chain.screened.seen[node] for node in chain.screened.seen if chain.status(node) != "used"]
    _say_what_is_missing(run, row, away, left)
    return row


def _say_what_is_missing(run: Federation, row: dict[str, Any], away: list[int], left: list[Reply]) -> None:
    number, used, why, history = row["round"], row["used"], run.chain.why(), run.tables.history
    if away:
        logger.warning("round %d: not connected: hospitals %s", number, ", ".join(map(str, away)))
    if used:
        return
    idle, before = why.startswith("not combined"), history[-1] if history else {}
    none = f"none of {row['asked']} hospitals sent a usable adapter"
    said = f"round {number}: {why or none}; "
    if left:
        hospital, status = run.chain.hospitals[left[0].sender], run.chain.status(left[0].sender)
        said += f"the first {'of the others' if why else 'of them'}, hospital {hospital}: {status}"
    elif not why:
        said += "no reply in time"
    said = said.removesuffix("; ")
    if not before.get("used") and not (idle and "used" not in before):
        error = RuntimeError(said)
        if left and left[0].trace:
            error.add_note(left[0].trace)
        raise error
    logger.warning("%s; the adapter stays as it was, and another such round ends the run", said)


def _evaluate_at_clients(
    run: Federation, step: Round, adapter: Adapter, names: dict[int, int], row: dict[str, Any]
) -> None:
    """Put into the row: nats per answer token on sampled hospitals' own held-out cards, each and weighted by cards.

    They are drawn by themselves: were they those that trained, the average would be scored where it came from.
    """
    cfg, top, number = run.cfg, run.chain.top, step.number
    size = max(1, round(cfg.federation.fraction_evaluate * cfg.federation.num_clients))
    asked, _ = sample(cfg, replace(step, clients=size), names.values(), 1)
    here, weighed = Present(run.grid, names, asked), len(top.rows)
    requests = top.configure_evaluate(number, to_record(adapter), ConfigRecord(), here)
    scored = top.aggregate_evaluate(number, answers(here, requests, cfg.federation.timeout))
    for _, _, way, _, size in top.rows[weighed:]:
        row[f"bytes_{way}"] += size
    row["client_nll"] = scored["nll"] if scored else float("nan")
    seen = run.chain.screened.seen.values()
    found = [reply for reply in seen if reply.status == "used" and reply.numbers["num-examples"]]
    row["own"] = [(names[one.sender], *_score(cfg, one.numbers)) for one in found]


def _score(cfg: DictConfig, told: dict[str, float]) -> tuple[int, float, float]:
    """Cards, nats per answer token, and the standard deviation of the noise in them, by the settings."""
    cards = int(told["num-examples"])
    return cards, told["nll"], training.guarantees.score_noise(cfg, cards)
