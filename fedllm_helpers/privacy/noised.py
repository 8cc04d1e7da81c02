"""Noise on the average, for any Flower app: a strategy that clips every client's update and blurs their mean.

Flower has two wrappers for this, ``DifferentialPrivacyServerSideFixedClipping`` and ``…ClientSideFixedClipping``. They
scale the noise by 1 / clients also where clients weigh differently and one moves the mean by more than that, pair
arrays by place and not by key, end a round in which one client fails, and draw from numpy's global generator; behind a
strategy with a server optimiser the noise would come after it. So they are not used here.
"""

import math
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_helpers import limits
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.adapters.updates import LARGEST_SHARE, update_of
from fedllm_helpers.adapters.wrapping import Wrapper, as_reply
from fedllm_helpers.privacy.accounting import epsilon
from fedllm_helpers.privacy.noise import clip, noisy


class Noised(Wrapper):
    """A strategy that gets the noisy mean of clipped updates as one reply; clients need nothing. In notebook 05.

    Args:
        strategy: any that averages, with a server optimiser or without; screening stands around this one.
        noise_multiplier: standard deviation, in units of what one client can move the mean by.
        clipping_norm: of each client's update.
        uniform: whether clients count alike; else by ``num-examples``, and the heaviest sets the noise.
        seed: of the noise, for tests; None takes the system's entropy, and nobody can take the noise off.

    Raises:
        ValueError: a multiplier or a norm that is not above 0.
    """

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
        self.generator, self.rounds, self.request = np.random.default_rng(seed), 0, None
        self.behind_masks = False  # set by a strategy of masks around this one

    def epsilon(self, delta: float) -> float:
        """ε after the rounds so far, for all of one client's examples at once; see :mod:`accounting` for its limits."""
        return epsilon(self.noise_multiplier, 1.0, self.rounds, delta) if self.rounds else 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.request = messages[0] if messages else None
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip, average, add noise. Numbers that clients send besides do not go further: nothing protects them."""
        total, weights, largest, start = {}, [], 0.0, None
        for reply in (reply for reply in replies if not reply.has_error()):
            start = self.expected(reply.metadata.src_node_id)
            (numbers,), update = reply.content.metric_records.values(), update_of(reply, start)
            if (
                self.behind_masks and LARGEST_SHARE in numbers
            ):  # a client may not say so: a mean already, of updates that clients clipped behind masks
                weight, largest = 1.0, float(numbers[LARGEST_SHARE])
            else:
                weight, update = (
                    1.0 if self.uniform else float(numbers["num-examples"]),
                    clip(update, self.clipping_norm),
                )
            weights.append(weight)
            total = {key: total.get(key, 0.0) + weight * value.astype(np.float64) for key, value in update.items()}
        if not weights:
            return None, None
        mean: Adapter = {key: start[key] + value / math.fsum(weights) for key, value in total.items()}
        sensitivity = self.clipping_norm * (largest or max(weights) / math.fsum(weights))
        mean = noisy(mean, sensitivity, self.noise_multiplier, self.generator)
        self.rounds += 1
        mean = {key: value.astype(start[key].dtype) for key, value in mean.items()}
        return super().aggregate_train(server_round, [as_reply(mean, self.request)])
