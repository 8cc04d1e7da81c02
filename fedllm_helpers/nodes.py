"""The hospitals behind Flower's nodes: how many there are, which node is which, and messages to them."""

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from omegaconf import DictConfig

from fedllm_helpers import config, packing

logger = logging.getLogger(__name__)


def join(grid: Grid, cfg: DictConfig) -> tuple[DictConfig, dict[int, Message]]:
    """Ask the nodes how many hospitals there are: whoever started them decided that.

    Returns:
        The configuration with that ``federation.num_clients``, where a change is said in the log; and the answers by
        node, for :func:`hospitals`.

    Raises:
        TimeoutError: no node is connected.
        RuntimeError: no node can say which hospital it is, or they do not agree on how many there are.
    """
    answers = dict(introductions(grid, cfg, _wait_for(grid, cfg, 1)))
    known = [reply.content["metrics"] for reply in answers.values() if not reply.has_error()]
    if not known:
        said = reason(next(iter(answers.values()))) if answers else "no answer within federation.timeout"
        raise RuntimeError(f"a node cannot say which hospital it is:\n{said}")
    counts, wanted = sorted({int(numbers["num-partitions"]) for numbers in known}), cfg.federation.num_clients
    if len(counts) > 1:
        raise RuntimeError(f"the nodes disagree on how many hospitals there are: num-partitions={counts}")
    if counts[0] != wanted:
        logger.warning("the nodes were started as %d hospitals, not %d: so many it is", counts[0], wanted)
        cfg = config.load(cfg, f"federation.num_clients={counts[0]}")
    return cfg, answers


def hospitals(
    grid: Grid, cfg: DictConfig, known: dict[int, int], answers: dict[int, Message] | None = None
) -> dict[int, int]:
    """Wait for the hospitals, and learn from each new node which one it is.

    A hospital whose node was started anew may be there twice for a while: then its new node counts.

    Args:
        grid: of the run.
        cfg: ``federation.num_clients`` are waited for the first time, ``federation.timeout`` seconds at most.
        known: hospitals by node so far.
        answers: of nodes that have introduced themselves already.

    Returns:
        The number of the hospital by node, for the nodes that are connected.

    Raises:
        TimeoutError: too few are connected.
        RuntimeError: no node could say which hospital it is, or at the start two say the same.
    """
    nodes = _wait_for(grid, cfg, 1 if known else cfg.federation.num_clients)
    found, reasons = {known[node]: node for node in nodes if node in known}, []
    new, given = [node for node in nodes if node not in known], answers or {}
    replies = {node: given[node] for node in new if node in given}
    replies |= introductions(grid, cfg, [node for node in new if node not in replies])
    for node, reply in replies.items():
        why = reason(reply) if reply.has_error() else _misfit(cfg, reply)
        if why:
            reasons.append(why)
            logger.warning("node %d does not take part: %s", node, why.splitlines()[-1])
            continue
        hospital = int(reply.content["metrics"]["partition-id"])
        if hospital in found and not known:
            raise RuntimeError(f"nodes {found[hospital]} and {node} are both hospital {hospital}")
        found[hospital] = node
    if len(replies) < len(new):
        logger.warning("%d nodes do not say which hospital they are, and do not take part", len(new) - len(replies))
    if not found:
        raise RuntimeError("\n".join(["no node can say which hospital it is; the first:", *reasons[:1]]))
    return {node: hospital for hospital, node in found.items()}


def _misfit(cfg: DictConfig, reply: Message) -> str:
    count, wanted = int(reply.content["metrics"]["num-partitions"]), cfg.federation.num_clients
    return "" if count == wanted else f"it was started with num-partitions={count}, the others with {wanted}"


def introductions(grid: Grid, cfg: DictConfig, nodes: list[int]) -> Iterator[tuple[int, Message]]:
    """(node, answer) of the nodes that answer, as they come."""
    requests = (Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes)
    replies, sent = send(grid, requests, cfg.federation.timeout) if nodes else ((), {})
    yield from ((sender(reply, sent), reply) for reply in replies)


def send(grid: Grid, messages: Iterable[Message], timeout: float) -> tuple[Iterable[Message], dict[str, int]]:
    """Send messages and get the replies, and the node of each message by the number that Flower gave the message.

    A grid that is ``lazy`` takes the messages one by one; Flower's own go through them more than once.
    """
    if getattr(grid, "lazy", False):
        return grid.send_and_receive(messages, timeout=timeout), {}
    messages = packing.packed(messages)
    replies = packing.unpacked(grid.send_and_receive(messages, timeout=timeout))
    return replies, {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id}


def sender(reply: Message, sent: dict[str, int]) -> int:
    """The node whose reply this is; where that went offline, the server answers in its place."""
    return sent.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)


def reason(reply: Message) -> str:
    """Why a reply is an error, in words; the last line says most."""
    return (reply.error.reason or "").strip() or f"an error without a reason (code {reply.error.code})"


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
