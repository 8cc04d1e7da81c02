"""Noise on the average, for any Flower app: a strategy that clips every client's update and blurs their mean.

Flower has two wrappers for this, ``DifferentialPrivacyServerSideFixedClipping`` and ``…ClientSideFixedClipping``. They
scale the noise by 1 / clients also where clients weigh differently and one moves the mean by more than that, pair
arrays by place and not by key, end a round in which one client fails, and draw from numpy's global generator; behind a
strategy with a server optimiser the noise would come after it. So they are not used here.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedllm_helpers import limits
from fedllm_helpers.adapters.records import Adapter, from_record
from fedllm_helpers.adapters.updates import LARGEST_SHARE
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.privacy.accounting import epsilon
from fedllm_helpers.privacy.noise import clip, noisy


class Noised(Wrapper):
    """A strategy that gets the noisy mean of clipped updates as one reply; clients need nothing. In notebook 05b.

    Args:
        strategy: any that averages, with a server optimiser or without.
        noise_multiplier: standard deviation, in units of what one client can move the mean by.
        clipping_norm: of each client's update.
        uniform: whether clients count alike; else by ``num-examples``, and the heaviest sets the noise.
        seed: of the noise, for tests; None takes the system's entropy, and nobody can take the noise off.

    Raises:
        ValueError: a multiplier or a norm that is not above 0.
    """

    reads, averages = "adapters", True

    def __init__(
        self,
        strategy: Strategy,
        noise_multiplier: float,
        clipping_norm: float,
        *,
        uniform: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(strategy)
        limits.number("noise_multiplier", noise_multiplier)
        limits.number("clipping_norm", clipping_norm)
        self.noise_multiplier, self.clipping_norm, self.uniform = noise_multiplier, clipping_norm, uniform
        self.seed, self.rounds = seed, 0

    def epsilon(self, delta: float) -> float:
        """ε after the rounds so far, for all of one client's examples at once; see :mod:`accounting` for its limits."""
        return epsilon(self.noise_multiplier, 1.0, self.rounds, delta) if self.rounds else 0.0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip, average, add noise. Numbers that clients send besides do not go further: nothing protects them."""
        mean, share = self._opened(replies) if self.averaged else self._mean(server_round, replies)
        if mean is None:
            return None, None
        seed = np.random.SeedSequence(None if self.seed is None else [self.seed, 0, server_round])
        wide, generator = self.clipping_norm * share, np.random.default_rng(seed)
        self.rounds += 1
        blurred = noisy(mean, wide, self.noise_multiplier, generator)
        return super().aggregate_train(server_round, [self.as_one(blurred)])

    def _opened(self, replies: Iterable[Message]) -> tuple[Adapter | None, float]:
        """The mean that masks opened, of updates that clients clipped, and the largest share of one in it."""
        for reply in replies:
            return from_record(reply.content["arrays"]), float(reply.content["metrics"][LARGEST_SHARE])
        return None, 0.0

    def _mean(self, number: int, replies: Iterable[Message]) -> tuple[Adapter | None, float]:
        sums, weights, like = {}, [], {}
        for arrays, weight in self._clipped(number, replies):
            like = like or arrays
            weights.append(weight)
            sums = {key: sums.get(key, 0.0) + weight * value.astype(np.float64) for key, value in arrays.items()}
        total = math.fsum(weights)
        mean = {key: (value / total).astype(like[key].dtype) for key, value in sums.items()}
        return (mean, max(weights) / total) if weights else (None, 0.0)

    def _clipped(self, number: int, replies: Iterable[Message]) -> Iterator[tuple[Adapter, float]]:
        """What each client leads to with a clipped update, and its weight."""
        for reply in self.usable(number, replies):
            start = self.expected(reply.sender)
            update = clip({key: reply.arrays[key] - value for key, value in start.items()}, self.clipping_norm)
            weight = 1.0 if self.uniform else reply.numbers["num-examples"]
            yield {key: value + update[key] for key, value in start.items()}, weight
