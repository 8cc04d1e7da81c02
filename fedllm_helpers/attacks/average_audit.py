"""Audits of a promised ε of noise on the average: a federation of canaries, and what its averages tell about them."""

import time

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedllm_helpers import limits
from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.attacks.audit import BEFORE_CLIPPING, Audited, Canaries
from fedllm_helpers.attacks.bounds import Mechanism
from fedllm_helpers.grids import in_process
from fedllm_helpers.privacy.noised import Noised

NAME = "audited"  # of the only array of the adapter


def audit_average(strategy: Noised, delta: float, *, rounds: int = 1, canaries: int = 1000, seed: int = 0) -> Audited:
    """Run a federation whose clients are canaries, and hold ε of a client against the averages.

    Each client has a coordinate of its own. By a fair coin it sends in every round an update along it, longer than the
    clipping norm, or the adapter as it came. The auditor sees every average.

    Args:
        strategy: clients count alike; the promise follows from its ``noise_multiplier``, in a federation of its own.
        delta: of the promise.
        rounds: in which every client takes part.
        canaries: clients, from 10.
        seed: of coins and coordinates; the noise has that of the strategy.

    Raises:
        ValueError: clients that weigh differently, or a number out of bounds.
    """
    limits.whole("rounds", rounds)
    if not strategy.uniform:
        raise ValueError("uniform=False: an audit of the average needs clients that count alike")
    start, planted = time.perf_counter(), Canaries(canaries, canaries, seed)
    averages = _averages(strategy, planted, rounds)
    share = strategy.clipping_norm / canaries  # what one client can move the average by
    for before, after in zip(averages, averages[1:], strict=False):
        planted.see((after - before) / share, strategy.noise_multiplier)
    return planted.audited(Mechanism(1.0, rounds, delta), strategy.noise_multiplier, start)


def _averages(strategy: Noised, planted: Canaries, rounds: int) -> list[np.ndarray]:
    """What the server has before the first round and after each, (values,)."""
    seen, length = {}, BEFORE_CLIPPING * strategy.clipping_norm

    def client(message: Message, context: Context) -> Message:
        """One canary's round."""
        number = int(context.node_config["partition-id"])
        adapter = from_record(message.content["arrays"])[NAME]
        seen.setdefault(int(message.content["config"]["server-round"]), adapter.copy())
        if planted.included[number]:
            adapter = adapter + length * (np.arange(len(adapter)) == planted.places[number]).astype(np.float32)
        content = {"arrays": to_record({NAME: adapter}), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    server, initial = ServerApp(), to_record({NAME: np.zeros(len(planted.included), np.float32)})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        """All rounds, and the last average."""
        last = strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)
        seen[rounds + 1] = from_record(last.arrays)[NAME]

    in_process.run_apps(server, client, len(planted.included))
    return [seen[number].astype(np.float64) for number in sorted(seen)]
