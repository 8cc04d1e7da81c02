"""One round of a federation on the server: who is there, who is asked, and what came back."""

import logging
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig
from tqdm import tqdm

from fedllm_helpers import aggregation, config
from fedllm_helpers.messages import message_bytes, to_record
from fedllm_helpers.models import Adapter
from fedllm_helpers.tables import CLIENTS, NUMBERS, Tables
from fedllm_helpers.training import Round

logger = logging.getLogger(__name__)


def join(grid: Grid, cfg: DictConfig) -> DictConfig:
    """Ask the first node how many hospitals there are: whoever started the nodes decided that.

    Returns:
        The configuration with that ``federation.num_clients``; a change is said in the log.
    """
    node = _wait_for(grid, cfg, 1)[0]
    (reply,) = _introductions(grid, cfg, [node])
    if reply.has_error():
        raise RuntimeError(f"a node cannot say which hospital it is:\n{reply.error.reason}")
    hospitals = int(reply.content["metrics"]["num-partitions"])
    if hospitals == cfg.federation.num_clients:
        return cfg
    logger.warning(
        "the nodes were started as %d hospitals, not %d: so many it is", hospitals, cfg.federation.num_clients
    )
    return config.load(cfg, f"federation.num_clients={hospitals}")


def hospitals(grid: Grid, cfg: DictConfig, known: dict[int, int]) -> dict[int, int]:
    """Wait for the hospitals, and learn from each new node which one it is.

    Args:
        grid: of the run.
        cfg: ``federation.num_clients`` are waited for the first time, ``federation.timeout`` seconds at most.
        known: hospitals by node so far.

    Returns:
        The number of the hospital by node, for the nodes that are connected.

    Raises:
        TimeoutError: too few are connected.
        RuntimeError: no node could say which hospital it is, or two say the same.
    """
    nodes = _wait_for(grid, cfg, 1 if known else cfg.federation.num_clients)
    found, reasons = {node: known[node] for node in nodes if node in known}, []
    for reply in _introductions(grid, cfg, [node for node in nodes if node not in known]):
        if reply.has_error():
            reasons.append(reply.error.reason)
            logger.warning("a node does not take part: %s", reply.error.reason.strip().splitlines()[-1])
            continue
        found[reply.metadata.src_node_id] = int(reply.content["metrics"]["partition-id"])
    if not found:
        raise RuntimeError("\n".join(["no node can say which hospital it is; the first:", *reasons[:1]]))
    if len(set(found.values())) < len(found):
        raise RuntimeError(f"two nodes are the same hospital: the partition-ids are {sorted(found.values())}")
    return found


def _wait_for(grid: Grid, cfg: DictConfig, wanted: int) -> list[int]:
    start, said = time.monotonic(), False
    while len(nodes := list(grid.get_node_ids())) < wanted:
        waited = time.monotonic() - start
        if waited > cfg.federation.timeout:
            raise TimeoutError(
                f"{len(nodes)} of {wanted} hospitals are connected after federation.timeout={waited:.0f} s"
            )
        if waited > 10 and not said:
            logger.warning("waiting for hospitals: %d of %d are connected", len(nodes), wanted)
            said = True
        time.sleep(0.2)
    return nodes


def _introductions(grid: Grid, cfg: DictConfig, nodes: list[int]) -> Iterable[Message]:
    requests = (Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes)
    return grid.send_and_receive(requests, timeout=cfg.federation.timeout) if nodes else ()


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
) -> tuple[Adapter, dict[str, Any]]:
    """Send the adapter out, screen what comes back, combine it.

    Returns:
        The new adapter, or the old one where fewer than ``federation.min_replies`` replies were usable; and the row of
        the history. The rows of the clients are appended to ``tables``.

    Raises:
        RuntimeError: no reply was usable.
    """
    nodes, first, errors = {hospital: node for node, hospital in names.items()}, len(tables.clients), []
    asked = sample(cfg, step, nodes)
    request = _request(strategy, step, adapter, nodes[asked[0]])
    requests = (Message(request.content, nodes[hospital], request.metadata.message_type) for hospital in asked)
    replies, down = grid.send_and_receive(requests, timeout=cfg.federation.timeout), message_bytes(request)
    usable = _screened(replies, adapter, step, names, down, tables, errors, shown)
    combined = aggregation.combine(strategy, step.number, usable, cfg.federation.min_replies)
    silent, nothing = set(asked) - {row[1] for row in tables.clients[first:]}, [float("nan")] * len(NUMBERS)
    tables.clients.extend((step.number, hospital, "no reply", down, 0, *nothing) for hospital in sorted(silent))
    row = _summary(step, tables.clients[first:])
    _say_what_is_missing(cfg, row, errors)
    if cfg.federation.fraction_evaluate:
        row["client_nll"] = _client_nll(grid, cfg, step, combined or adapter, nodes)
    return combined or adapter, row


def _request(strategy: Strategy, step: Round, adapter: Adapter, node: int) -> Message:
    """What the strategy would send: the content is the same for all. Strategies sample for themselves: from one."""
    view = SimpleNamespace(get_node_ids=lambda: [node])
    (request,) = strategy.configure_train(
        step.number, to_record(adapter), ConfigRecord({"lr": step.learning_rate}), view
    )
    return request


def _say_what_is_missing(cfg: DictConfig, row: dict[str, Any], errors: list[str]) -> None:
    number, used, asked, minimum = row["round"], row["used"], row["asked"], cfg.federation.min_replies
    if not used:
        said = errors[0] if errors else f"no reply within federation.timeout={cfg.federation.timeout:.0f} s"
        raise RuntimeError(f"round {number}: none of {asked} hospitals sent a usable adapter; the first:\n{said}")
    if used < minimum:
        kept = f"federation.min_replies={minimum}: the adapter stays as it was"
        logger.warning("round %d: %d usable replies of %d, %s", number, used, asked, kept)


def _screened(
    replies: Iterable[Message],
    adapter: Adapter,
    step: Round,
    names: dict[int, int],
    down: int,
    tables: Tables,
    errors: list[str],
    shown: tqdm,
) -> Iterator[Message]:
    """The usable replies in order of hospital; every reply leaves a row, every rejected one a line in the log."""
    if isinstance(replies, list):  # Flower's own come in any order; in this process they come one by one, in order
        replies = sorted(replies, key=lambda reply: names[reply.metadata.src_node_id])
    for reply in replies:
        hospital, reason = names[reply.metadata.src_node_id], aggregation.fault(reply, adapter)
        numbers = {} if reply.has_error() else next(iter(reply.content.metric_records.values()), {})
        figures = [float(numbers.get(name, "nan")) for name in NUMBERS]
        tables.clients.append((step.number, hospital, reason or "used", down, message_bytes(reply), *figures))
        shown.set_description(f"round {step.number}", refresh=False)
        shown.set_postfix_str(f"loss {figures[NUMBERS.index('loss-after')]:.2f}", refresh=False)
        shown.update()
        if reason:
            errors.append(reply.error.reason if reply.has_error() else f"hospital {hospital}: {reason}")
            logger.warning("round %d: hospital %d is left out: %s", step.number, hospital, reason)
        else:
            yield reply


def _summary(step: Round, rows: list[tuple]) -> dict[str, Any]:
    frame = pd.DataFrame(rows, columns=CLIENTS)
    used = frame[frame["status"] == "used"]
    weights = used["cards"] / used["cards"].sum()
    return {
        "round": step.number,
        "learning_rate": step.learning_rate,
        "asked": len(frame),
        "used": len(used),
        "examples": int(used["examples"].sum()),
        "tokens": int(used["tokens"].sum()),
        "loss_before": float((weights * used["loss_before"]).sum()),
        "loss_after": float((weights * used["loss_after"]).sum()),
        "bytes_down": int(frame["bytes_down"].sum()),
        "bytes_up": int(frame["bytes_up"].sum()),
        "client_seconds": float(frame["seconds"].sum()),
    }


def _client_nll(grid: Grid, cfg: DictConfig, step: Round, adapter: Adapter, nodes: dict[int, int]) -> float:
    """Nats per answer token of the adapter on sampled hospitals' own held-out cards, weighted by cards."""
    size = max(1, round(cfg.federation.fraction_evaluate * len(nodes)))
    asked = sample(cfg, Round(step.number, 0.0, size, False), nodes)
    content = RecordDict({"arrays": to_record(adapter), "config": ConfigRecord({"server-round": step.number})})
    requests = (Message(content, nodes[hospital], "evaluate") for hospital in asked)
    replies = [r for r in grid.send_and_receive(requests, timeout=cfg.federation.timeout) if not r.has_error()]
    numbers = sorted((m["partition-id"], m["num-examples"], m["nll"]) for m in (r.content["metrics"] for r in replies))
    cards = sum(count for _, count, _ in numbers)
    return sum(count * nll for _, count, nll in numbers) / cards if cards else float("nan")
