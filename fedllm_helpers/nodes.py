"""The hospitals behind Flower's nodes: how many there are, which node is which, and messages to them."""

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from omegaconf import DictConfig

from fedllm_helpers import config

logger = logging.getLogger(__name__)


def join(grid: Grid, cfg: DictConfig) -> DictConfig:
    """Ask a node how many hospitals there are: whoever started the nodes decided that.

    Returns:
        The configuration with that ``federation.num_clients``; a change is said in the log.

    Raises:
        TimeoutError: no node is connected.
        RuntimeError: the node cannot say which hospital it is, or does not answer.
    """
    reply = next((answer for _, answer in introductions(grid, cfg, _wait_for(grid, cfg, 1)[:1])), None)
    if reply is None or reply.has_error():
        said = reason(reply) if reply else "no answer within federation.timeout"
        raise RuntimeError(f"a node cannot say which hospital it is:\n{said}")
    wanted, count = cfg.federation.num_clients, int(reply.content["metrics"]["num-partitions"])
    if count != wanted:
        logger.warning("the nodes were started as %d hospitals, not %d: so many it is", count, wanted)
        cfg = config.load(cfg, f"federation.num_clients={count}")
    return cfg


def hospitals(grid: Grid, cfg: DictConfig, known: dict[int, int]) -> dict[int, int]:
    """Wait for the hospitals, and learn from each new node which one it is.

    A hospital whose node was started anew may be there twice for a while: then its new node counts.

    Args:
        grid: of the run.
        cfg: ``federation.num_clients`` are waited for the first time, ``federation.timeout`` seconds at most.
        known: hospitals by node so far.

    Returns:
        The number of the hospital by node, for the nodes that are connected.

    Raises:
        TimeoutError: too few are connected.
        RuntimeError: no node could say which hospital it is, or at the start two say the same.
    """
    nodes = _wait_for(grid, cfg, 1 if known else cfg.federation.num_clients)
    found, reasons = {known[node]: node for node in nodes if node in known}, []
    new, answered = [node for node in nodes if node not in known], 0
    for node, reply in introductions(grid, cfg, new):
        answered += 1
        if reply.has_error():
            reasons.append(reason(reply))
            logger.warning("node %d does not take part: %s", node, reasons[-1].splitlines()[-1])
            continue
        hospital = int(reply.content["metrics"]["partition-id"])
        if hospital in found and not known:
            raise RuntimeError(f"nodes {found[hospital]} and {node} are both hospital {hospital}")
        found[hospital] = node
    if answered < len(new):
        logger.warning("%d nodes do not say which hospital they are, and do not take part", len(new) - answered)
    if not found:
        raise RuntimeError("\n".join(["no node can say which hospital it is; the first:", *reasons[:1]]))
    return {node: hospital for hospital, node in found.items()}


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
    messages = list(messages)
    replies = grid.send_and_receive(messages, timeout=timeout)
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
