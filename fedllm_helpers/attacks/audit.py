"""Audits of a promised ε in one training: canaries of one coordinate each, and what the noisy sums tell about them.

The auditor is the one against whom DP-SGD is accounted for: it chooses the gradients of some records, sees every noisy
sum, and knows all but whether each of its records is in the data (white box: Nasr et al. 2023, arXiv:2302.07956).

What it catches: less noise than promised, also if it is missing in a quarter of the values alone; a clipping norm above
the promised one; records that steps take more often than promised; and, with some 5,000 canaries and where ε is small,
steps that all take the same records. What it cannot: gradients of single cards that mix cards, because canaries enter
where those are already known; noise that is missing in a few values, that repeats, or whose seed someone knows; losses
and counts that leave beside the sums; learning rates chosen on private cards; a wrong accountant.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import limits, models
from fedllm_helpers.attacks.bounds import Mechanism, lower_bound, one_run_bound, rates_bound
from fedllm_helpers.privacy.accounting import RecordPrivacy
from fedllm_helpers.training import dp_sgd, guarantees
from fedllm_helpers.training.fine_tuning import fine_tune
from fedllm_helpers.training.schedule import round_config, rounds

PLANTED = "canaries of a batch"  # beside the collator's own entries
BEFORE_CLIPPING = 10.0  # norm of a canary's gradient, in units of the clipping norm, which has to cut it
GUESSED = 0.3  # share of the canaries at which :func:`one_run_bound` guesses "included"
LIMITS = 0.0, 3.0  # of the two scores, above which a canary is guessed "included"; fixed before anything is seen
BLOCK = 1024  # neighbouring values of whose noise a canary is taken to have its share
ROWS = 32  # canaries whose gradients are in memory at a time


@dataclass(frozen=True)
class Audited:
    """A promise, and what one run says against it, each with 95 % confidence.

    Attributes:
        promise: ε, for the δ of the plan.
        bound: on ε by :func:`bounds.rates_bound`; above the promise, something is wrong.
        noise_multiplier: the noise is no larger than this, for the same reason; ∞ where nothing can be said.
        one_run: on ε by :func:`bounds.one_run_bound`.
        any_mechanism: on ε by :func:`bounds.lower_bound`.
        right, guesses, canaries: behind the last two.
        seconds: of the whole audit.
    """

    promise: float
    bound: float
    noise_multiplier: float
    one_run: float
    any_mechanism: float
    right: int
    guesses: int
    canaries: int
    seconds: float

    @property
    def broken(self) -> bool:
        """Whether the run contradicts the promise, by the first of the bounds alone: three would err more often."""
        return self.bound > self.promise


class Canaries:
    """Records with gradients along one coordinate each, in the data by fair coins, and the sums they went into.

    Args:
        number: of canaries, from 10.
        values: that are trained, at least as many.
        seed: of coins and coordinates.

    Raises:
        ValueError: fewer values than canaries.
    """

    def __init__(self, number: int, values: int, seed: int) -> None:
        limits.whole("canaries", number, 10)
        if number > values:
            raise ValueError(f"canaries={number}: each takes one of {values} trained values, allowed are 10 to that")
        rng = np.random.default_rng([seed, 7])
        self.included = rng.random(number) < 0.5
        self.places = rng.choice(values, number, replace=False)
        self.seen: list[np.ndarray] = []  # per step, each canary's value in the noisy sum, in clipping norms
        self.noise: list[np.ndarray] = []  # per step, the standard deviation around each of them

    def see(self, noisy: np.ndarray, noise: float | None = None) -> None:
        """Take a noisy sum, in units of the clipping norm, shape (values,); its noise is measured unless given."""
        self.seen.append(noisy[self.places])
        around = self._around(noisy) if noise is None else np.full(len(self.places), noise)
        self.noise.append(np.maximum(around, 1e-9))

    def _around(self, noisy: np.ndarray) -> np.ndarray:
        """Noise of the values around each canary: it may be missing in one place and be there in another."""
        others = np.abs(noisy)
        others[self.places] = np.nan
        blocks = np.array_split(others, max(1, len(others) // BLOCK))
        wide = [1.4826 * np.nanmedian(block) for block in blocks]  # the median of |N(0, z²)| is z / 1.4826
        return np.repeat(wide, [len(block) for block in blocks])[self.places]

    def scores(self, rate: float) -> list[np.ndarray]:
        """Log-likelihood ratios of "included" to "left out", (canaries,): steps draw anew, and one draw holds for all.

        The first is the best test of DP-SGD as it should be; the second finds steps that take the same records.
        """
        ratio = (2 * np.array(self.seen) - 1) / (2 * np.array(self.noise) ** 2)  # of N(1, z²) to N(0, z²)
        with np.errstate(divide="ignore"):  # a rate of 1
            left, taken = np.log1p(-rate), math.log(rate)
        return [np.logaddexp(left, taken + ratio).sum(0), np.logaddexp(left, taken + ratio.sum(0))]

    def audited(self, mechanism: Mechanism, noise_multiplier: float, start: float) -> Audited:
        """What all sums together say against a noise multiplier; ``start`` is when the audit began, in seconds."""
        scores, inside, rates = self.scores(mechanism.sample_rate), self.included, []
        for score, limit in zip(scores, LIMITS, strict=True):  # two tests, each of which may fail half as often
            caught, alarms = (score > limit)[inside], (score > limit)[~inside]
            counts = [(int(guessed.sum()), len(guessed)) for guessed in (caught, alarms)]
            rates.append(rates_bound(*counts, mechanism, 1 - 0.05 / len(LIMITS)))
        noise, bound = min(rates)
        guesses = round(GUESSED * len(inside))
        right = int(inside[np.argsort(-scores[0], kind="stable")[:guesses]].sum())
        counts = (right, guesses, len(inside))
        one_run, any_one = one_run_bound(*counts, mechanism)[1], lower_bound(*counts, mechanism.delta)
        promise = mechanism.epsilon(noise_multiplier)
        return Audited(promise, bound, noise, one_run, any_one, *counts, time.perf_counter() - start)


def audit(
    loaded: tuple[PeftModel, PreTrainedTokenizerBase],
    cards: Dataset,
    cfg: DictConfig,
    *,
    canaries: int = 2000,
    seed: int = 0,
    kind: type[dp_sgd.Private] = dp_sgd.PrivateTrainer,
) -> Audited:
    """Train as a hospital does in all rounds, with canaries among its cards, and hold ε against what is seen.

    Everything is the real training: canaries are rows that it samples, gradients that it clips, sums that it blurs.
    The adapter is afterwards as it was before. Taught in notebook 05b.

    Args:
        loaded: model and tokenizer.
        cards: of the hospital; it decides the sample rate, canaries do not.
        cfg: with ``federation.privacy.record``.
        canaries: from 10 to the number of trained values.
        seed: of coins, coordinates, sampling and noise.
        kind: the Trainer that is audited.

    Raises:
        ValueError: a configuration without DP-SGD, or more canaries than values.
    """
    start, (model, tokenizer) = time.perf_counter(), loaded
    if (plan := guarantees.record_privacy(cfg, len(cards))) is None:
        raise ValueError("federation.privacy.record promises nothing that could be audited: set epsilon")
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planted, before = Canaries(canaries, values, seed), models.get_adapter(model)
    watched = type(f"Audited{kind.__name__}", (_Audited, kind), {})
    try:
        for one in rounds(cfg):
            noise = np.random.SeedSequence([seed, 3, one.number])
            trainer = partial(watched, plan=plan, seed=noise, canaries=planted)
            local, more = round_config(cfg, one.number), {"learning_rate": one.learning_rate, "description": None}
            fine_tune(model, tokenizer, cards, local, trainer=trainer, **more)
    finally:
        models.set_adapter(model, before)
    return planted.audited(Mechanism(plan.sample_rate, plan.steps, plan.delta), plan.noise_multiplier, start)


class _Audited:
    """What makes a private Trainer an audited one: rows without text, whose gradients are known."""

    def __init__(self, *args: Any, plan: RecordPrivacy, canaries: Canaries, **kw: Any) -> None:
        super().__init__(*args, plan=plan, **kw)
        self.canaries = canaries
        self.train_dataset = [*self.train_dataset, *({PLANTED: int(n)} for n in np.flatnonzero(canaries.included))]
        self.data_collator = partial(_apart, collate=self.data_collator)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The audited optimiser, with a look at each noisy sum before the step."""
        self.summing = super().create_optimizer(*args)
        self.summing.attach_step_hook(self._see)
        return self.summing

    def training_step(self, model: PeftModel, inputs: dict[str, Any], *rest: Any, **kw: Any) -> torch.Tensor:
        """A step on the cards of a batch, and its canaries clipped and added by the same optimiser."""
        planted, examples = inputs.pop(PLANTED, []), inputs.pop(dp_sgd.EXAMPLES, 0)
        given = {**inputs, dp_sgd.EXAMPLES: examples - len(planted)} if inputs else {}
        loss = super().training_step(model, given, *rest, **kw)
        of_cards = [p.grad_sample for p in self.trained.values()]
        for begin in range(0, len(planted), ROWS):
            self._plant(planted[begin : begin + ROWS])
            self.summing.clip_and_accumulate()
        for p, grads in zip(self.trained.values(), of_cards, strict=True):
            p.grad_sample = grads
        return loss

    def _plant(self, some: list[int]) -> None:
        """Put the gradients of some canaries where Opacus looks for those of cards."""
        places, begin = self.canaries.places[some], 0
        for p in self.trained.values():
            grads = torch.zeros(len(some), p.numel(), device=p.device)
            rows = np.flatnonzero((begin <= places) & (places < begin + p.numel()))
            grads[rows, places[rows] - begin] = BEFORE_CLIPPING * self.plan.clipping_norm
            p.grad_sample, begin = grads.view(len(some), *p.shape), begin + p.numel()

    def _see(self, optimizer: torch.optim.Optimizer) -> None:
        noisy = torch.cat([p.grad.detach().flatten().float() for p in self.trained.values()])
        self.canaries.see(noisy.cpu().numpy() * (self.args.train_batch_size / self.plan.clipping_norm))


def _apart(rows: list[dict[str, Any]], collate: Callable[[list[Any]], dict[str, Any]]) -> dict[str, Any]:
    """The batch of the cards, and the numbers of the canaries among them."""
    cards, planted = [row for row in rows if PLANTED not in row], [row[PLANTED] for row in rows if PLANTED in row]
    return {**(collate(cards) if cards else {}), PLANTED: planted}
