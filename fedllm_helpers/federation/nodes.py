"""The hospitals behind Flower's nodes: how many there are, which node is which, and messages to them."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from omegaconf import DictConfig

from fedllm_helpers import config
from fedllm_helpers.adapters.packing import send
from fedllm_helpers.adapters.screening import LIMITS, looked_at, read_numbers
from fedllm_helpers.config.rounds import needed
from fedllm_helpers.training.schedule import Round

logger = logging.getLogger(__name__)

AWAY = 60.0  # seconds without a node before another may take its place: Flower shows a dead one as online for so long
Answers = dict[int, tuple[int, int] | None]  # (hospital, how many there are) by node; None for one that makes no sense


def sample(cfg: DictConfig, step: Round, present: Iterable[int], *purpose: int) -> tuple[list[int], list[int]]:
    """The hospitals of a round in order, drawn by seed, round and purpose alone: to be asked, and not connected.

    They are drawn from all; for one that is not there, another is drawn of those that are.
    """
    everyone, present = np.arange(cfg.federation.num_clients), set(present)
    rng = np.random.default_rng([cfg.seed, step.number, *purpose])
    drawn = rng.choice(everyone, size=min(step.clients, len(everyone)), replace=False).tolist()
    asked, away = [k for k in drawn if k in present], [k for k in drawn if k not in present]
    others = sorted(present - set(asked))
    asked += rng.choice(others, size=min(len(away), len(others)), replace=False).tolist() if away and others else []
    return sorted(asked), sorted(away)


class Present:
    """A grid as strategies see it in a round: its nodes are those of the hospitals that are asked, in order."""

    def __init__(self, grid: Grid, names: dict[int, int], asked: Iterable[int]) -> None:
        self.grid, nodes = grid, {hospital: node for node, hospital in names.items()}
        self.nodes = [nodes[hospital] for hospital in asked]

    def get_node_ids(self) -> list[int]:
        """The nodes that are asked."""
        return list(self.nodes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


def answers(here: Present, requests: Iterable[Message], timeout: float) -> Iterator[Message]:
    """The replies to requests, each from the node that was asked, in the order of the hospitals.

    In one process they come one by one, in the order in which they were asked.
    """

    def known() -> Iterator[Message]:
        """Replies to what was asked."""
        for node, reply in send(here.grid, requests, timeout):
            if node is None:
                logger.warning("a reply that nobody asked for is left out")
                continue
            reply.metadata.__dict__["_src_node_id"] = node  # where it went offline, the server answers in its place
            yield reply

    lazy, places = getattr(here.grid, "lazy", False), {node: place for place, node in enumerate(here.nodes)}
    yield from known() if lazy else sorted(known(), key=lambda reply: places[reply.metadata.src_node_id])


def join(grid: Grid, cfg: DictConfig) -> tuple[DictConfig, Answers]:
    """Ask the nodes how many hospitals there are: whoever started them decided that.

    Returns:
        The configuration with that ``federation.num_clients``, where a change is said in the log; and the answers by
        node, for :func:`hospitals`.

    Raises:
        TimeoutError: no node is connected.
        RuntimeError: no node can say which hospital it is, or they do not agree on how many there are.
    """
    moments, answers, failed = _moments(grid, cfg), {}, {}
    while not any(answers.values()):
        if next(moments, None) is None:
            raise RuntimeError(f"no node can say which hospital it is; {_first(failed)}")
        introductions(grid, cfg, [node for node in _wait_for(grid, cfg, 1) if node not in answers], answers, failed)
    counts, wanted = sorted({answer[1] for answer in answers.values() if answer}), cfg.federation.num_clients
    if len(counts) > 1:
        raise RuntimeError(f"the nodes disagree on how many hospitals there are: num-partitions={counts}")
    if counts[0] != wanted:
        logger.warning("the nodes were started as %d hospitals, not %d: so many it is", counts[0], wanted)
        cfg = config.load(cfg, f"federation.num_clients={counts[0]}")
    return cfg, answers


def hospitals(
    grid: Grid, cfg: DictConfig, seats: dict[int, tuple[int, float]], answers: Answers | None = None
) -> dict[int, int]:
    """Wait for the hospitals, and learn from each new node which one it is.

    The first node that says it is a hospital is that hospital for the run. While it is there, and until it has been
    away for a minute, no other takes its place. Flower ties the number of a node to its key, so that a hospital that is
    started anew with the same registered key is the same node; without keys it is a new one, which waits that minute.

    Args:
        grid: of the run.
        cfg: all ``federation.num_clients`` are waited for the first time, ``federation.timeout`` seconds at most; a
            node whose answer is an error is asked again until then. Later as many as may change the adapter are enough:
            ``federation.min_replies``, and more than ``federation.min_share`` of all.
        seats: by hospital its node, and since when that is away (0: it is there); empty at first, and kept up to date.
        answers: of nodes that have introduced themselves already.

    Returns:
        The number of the hospital by node, for the nodes that are connected.

    Raises:
        TimeoutError: too few are connected, or can say which hospital they are.
        RuntimeError: at the start two say the same.
    """
    first, answers, failed, found = not seats, dict(answers or {}), {}, {}
    least = needed(cfg, cfg.federation.num_clients)
    wanted = cfg.federation.num_clients if first else least
    for _ in _moments(grid, cfg):
        nodes = _wait_for(grid, cfg, wanted)
        _note_who_is_away(seats, nodes)
        new = [node for node in nodes if node not in {sitting for sitting, _ in seats.values()}]
        introductions(grid, cfg, [node for node in new if node not in answers], answers, failed)
        for node in new:
            if answers.get(node) and not _seated(cfg, seats, node, answers[node], first):
                answers[node] = None
        found = {node: hospital for hospital, (node, away) in sorted(seats.items()) if not away}
        refused = [node for node in new if answers.get(node, 0) is None]
        if len(found) >= least and len(found) + len(refused) >= wanted:
            return found
    raise TimeoutError(f"{len(found)} of {wanted} hospitals say which they are; {_first(failed)}")


def _note_who_is_away(seats: dict[int, tuple[int, float]], nodes: list[int]) -> None:
    for hospital, (node, away) in seats.items():
        seats[hospital] = (node, 0.0 if node in nodes else away or time.monotonic())


def _seated(
    cfg: DictConfig, seats: dict[int, tuple[int, float]], node: int, answer: tuple[int, int], first: bool
) -> bool:
    """Give a node the place of the hospital that it says it is; or say in one line why it does not take part."""
    (hospital, count), wanted = answer, cfg.federation.num_clients
    before, away = seats.get(hospital, (node, 0.0))
    if count != wanted:
        why = f"it was started with num-partitions={count}, the others with {wanted}"
    elif before != node and first:
        raise RuntimeError(f"nodes {before} and {node} are both hospital {hospital}")
    elif before != node and (not away or time.monotonic() - away < AWAY):
        why = f"it says that it is hospital {hospital}, which is node {before}, there or away for less than a minute"
    else:
        if before != node:
            said = "node %d takes the place of node %d as hospital %d: it has another key, or nodes have none"
            logger.warning(said, node, before, hospital)
        seats[hospital] = (node, 0.0)
        return True
    logger.warning("node %d does not take part: %s", node, why)
    return False


def introductions(
    grid: Grid, cfg: DictConfig, nodes: list[int], answers: Answers, failed: dict[int | None, str]
) -> None:
    """Ask nodes who they are, and put it into ``answers``; where it is an error, only why, into ``failed``."""
    limits = {name: LIMITS[name] for name in ("partition-id", "num-partitions")}
    requests = (Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes)
    for node, reply in send(grid, requests, cfg.federation.timeout) if nodes else ():
        said, why = looked_at(reply, lambda content: read_numbers(content, limits, tuple(limits)))
        if said and said["partition-id"] >= said["num-partitions"]:
            said, why = None, f"it is hospital {said['partition-id']:.0f} of {said['num-partitions']:.0f}, from 0"
        if why and failed.get(node) != why:  # once, however often it is asked
            logger.warning("node %s does not take part: %s", node, why)
            failed[node] = why
        if node is not None and not reply.has_error():
            answers[node] = (int(said["partition-id"]), int(said["num-partitions"])) if said else None


def _first(failed: dict[int | None, str]) -> str:
    return f"the first of the others: {next(iter(failed.values()))}" if failed else "the others do not answer"


def _moments(grid: Grid, cfg: DictConfig) -> Iterator[float]:
    """Whenever it makes sense to ask again: for ``federation.timeout``, or twice in one process, where all is there."""
    if getattr(grid, "lazy", False):
        yield from (0.0, 0.0)
        return
    start = time.monotonic()
    while (waited := time.monotonic() - start) <= cfg.federation.timeout:
        yield waited
        time.sleep(1.0)


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
