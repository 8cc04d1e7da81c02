"""Audits of a promised ε: bounds against closed forms, and the real DP-SGD, with and without faults."""

import math
import time

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binom, binomtest, norm

from fedllm_helpers import config, models
from fedllm_helpers.attacks import audit, bounds
from fedllm_helpers.attacks.average_audit import audit_average
from fedllm_helpers.privacy.accounting import noise_for
from fedllm_helpers.privacy.noised import Noised
from fedllm_helpers.training import dp_sgd

DP_SGD = bounds.Mechanism(0.2, 12, 1e-3)  # 12 of 60 cards a step, as in the grid of notebook 05b


def by_the_letter(canaries, guesses, right, epsilon, delta):
    """Appendix D of arXiv:2305.08846, term by term."""
    chance, alpha, between = expit(epsilon), 0.0, 0.0
    for i in range(1, right + 1):
        between += binom.pmf(right - i, guesses, chance)
        alpha = max(alpha, between / i)
    return min(1.0, sum(binom.pmf(range(right, guesses + 1), guesses, chance)) + 2 * canaries * delta * alpha)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize(("right", "guesses", "canaries"), [(0, 3, 5), (1, 1, 1), (7, 9, 40), (60, 80, 100)])
def test_the_theorem_is_that_of_the_paper(right, guesses, canaries, delta):
    for epsilon in (0.0, 0.7, 3.0):
        given = bounds.p_value(right, guesses, canaries, epsilon, delta)
        assert given == pytest.approx(by_the_letter(canaries, guesses, right, epsilon, delta), rel=1e-9)


def test_without_delta_the_bound_is_an_exact_binomial_interval():
    for right, guesses in ((30, 40), (95, 100), (500, 500)):
        low = binomtest(right, guesses, alternative="greater").proportion_ci(0.95, method="exact").low
        assert bounds.lower_bound(right, guesses, 1000, 0.0) == pytest.approx(logit(low), rel=1e-6)
    assert bounds.lower_bound(1000, 1000, 1000, 0.0) == pytest.approx(logit(0.05 ** (1 / 1000)))  # 5.81
    assert bounds.lower_bound(50, 100, 100, 1e-3) == bounds.lower_bound(0, 0, 100, 1e-3) == 0.0


def test_no_private_mechanism_guesses_better_than_the_theorem_allows():
    """Randomised response that gives each canary away with probability δ, and one that gives all away at once."""
    right, m, delta = np.arange(21), 20, 0.01
    for epsilon in (0.0, 0.5, 2.0):
        allowed = np.array([bounds.p_value(int(v), m, m, epsilon, delta) for v in right])
        each = binom.sf(right - 1, m, delta + (1 - delta) * expit(epsilon))
        at_once = delta + (1 - delta) * binom.sf(right - 1, m, expit(epsilon))
        assert (allowed >= each - 1e-12).all() and (allowed >= at_once - 1e-12).all()


def test_bounds_by_a_curve_have_their_closed_form_without_sampling():
    """Noise z in T steps that take all is noise z / √T in one, whose curve is that of two normals."""
    mechanism, hits, alarms = bounds.Mechanism(1.0, 3, 1e-3), (440, 500), (20, 480)
    least, most = (binomtest(*some).proportion_ci(0.95, method="exact") for some in (hits, alarms))
    apart = norm.ppf(least.low) - norm.ppf(most.high)
    noise, epsilon = bounds.rates_bound(hits, alarms, mechanism)
    assert noise == pytest.approx(math.sqrt(3) / apart, rel=0.01) and epsilon == mechanism.epsilon(noise)

    def excess(z):  # algorithm 3 of arXiv:2410.22235, with its curve in closed form
        r, h = 0.05 * 285 / 1000, 0.05 * 15 / 1000
        for i in range(284, -1, -1):
            wrong = max(h, norm.cdf(norm.ppf(min(2 * r, 1.0)) - math.sqrt(3) / z) / 2)
            r, h = r + i / (300 - i) * (wrong - h), wrong
        return r + h - 0.3

    assert bounds.one_run_bound(285, 300, 1000, mechanism)[0] == pytest.approx(brentq(excess, 0.5, 20), rel=0.01)
    assert bounds.rates_bound((10, 100), (90, 100), mechanism) == (math.inf, 0.0)


def simulated(real, promised, seed, canaries=300, once=False):
    """An audit of DP-SGD in numpy: each canary's own draws and noise, and nothing else; ``once`` draws once for all."""
    planted, rng = audit.Canaries(canaries, canaries, seed), np.random.default_rng([seed, 1])
    draws = rng.random((DP_SGD.steps, canaries)) < DP_SGD.sample_rate
    for drawn in draws[:1].repeat(DP_SGD.steps, 0) if once else draws:
        taken = drawn & planted.included
        noisy = np.empty(canaries)
        noisy[planted.places] = taken + real * rng.normal(size=canaries)
        planted.see(noisy, real)
    return planted.audited(DP_SGD, promised, time.perf_counter())


def test_a_promise_that_is_kept_is_seldom_called_broken_and_a_quarter_of_its_noise_always():
    noise = noise_for(8.0, DP_SGD.sample_rate, DP_SGD.steps, DP_SGD.delta)
    kept = [simulated(noise, noise, seed) for seed in range(40)]
    assert sum(one.broken for one in kept) <= 5  # 2 are expected at most, 6 or more have a chance of 1.4 %
    assert 2 < np.median([one.bound for one in kept]) < 8
    assert all(simulated(noise / 4, noise, seed).bound > 30 for seed in range(5))


def test_steps_that_take_the_same_records_are_caught_by_many_canaries():
    noise = noise_for(8.0, DP_SGD.sample_rate, DP_SGD.steps, DP_SGD.delta)
    assert all(simulated(noise, noise, seed, 8000, once=True).broken for seed in range(2))
    assert not simulated(noise, noise, 0, 8000).broken


def test_bad_numbers_are_one_line():
    for given, says in (((3, 2, 5), "3 right of 2 guesses"), ((1, 6, 5), "6 guesses at 5"), ((-1, 2, 5), "right=-1")):
        with pytest.raises(ValueError, match=says):
            bounds.lower_bound(*given, 1e-3)
    with pytest.raises(ValueError, match="confidence=95"):
        bounds.lower_bound(1, 2, 5, 1e-3, 95)
    with pytest.raises(ValueError, match="expected .some, of all."):
        bounds.rates_bound((3, 2), (0, 1), DP_SGD)
    with pytest.raises(ValueError, match="each takes one of 20 trained values"):
        audit.Canaries(21, 20, 0)


class TooQuiet(dp_sgd.PrivateTrainer):
    """A quarter of the noise."""

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        optimizer.noise_multiplier /= 4
        return optimizer


class Patchy(dp_sgd.PrivateTrainer):
    """No noise in every other matrix."""

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        blur = optimizer.add_noise

        def wrong():
            blur()
            for p in optimizer.params[::2]:
                p.grad = p.summed_grad.clone()

        optimizer.add_noise = wrong
        return optimizer


class TooLong(dp_sgd.PrivateTrainer):
    """Clips to four times the norm by which the noise goes."""

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        clip, limit = optimizer.clip_and_accumulate, optimizer.max_grad_norm

        def wrong():
            optimizer.max_grad_norm = 4 * limit
            clip()
            optimizer.max_grad_norm = limit

        optimizer.clip_and_accumulate = wrong
        return optimizer


class TooOften(dp_sgd.PrivateTrainer):
    """Takes every record in every step."""

    def get_train_dataloader(self):
        self.sampling = type("Zeros", (), {"random": staticmethod(np.zeros)})
        return super().get_train_dataloader()


@pytest.fixture(scope="module")
def hospital(cards):
    """(model and tokenizer, eight short cards, settings of four steps that promise ε = 8)."""
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2}
    steps = [f"federation.training_arguments.{name}={value}" for name, value in arguments.items()]
    more = ["federation.num_rounds=2", "model.lora.peft_lora_r=4", "federation.privacy.record.epsilon=8"]
    cfg = config.load("cpu", *steps, *more)
    lengths = [len(card["question"]) + len(card["answer"]) for card in cards[0]]
    return models.load(cfg), cards[0].select(np.argsort(lengths)[:8]), cfg


def test_the_real_dp_sgd_keeps_its_promise(hospital):
    loaded, cards, cfg = hospital
    before = models.get_adapter(loaded[0])
    found = audit.audit(*hospital, canaries=400)
    assert found.promise == pytest.approx(8, abs=0.05) and not found.broken and found.bound > 3
    assert (found.guesses, found.canaries) == (120, 400) and found.any_mechanism < found.one_run < found.bound
    after = models.get_adapter(loaded[0])
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert not any(hasattr(p, "grad_sample") for p in loaded[0].parameters())


@pytest.mark.parametrize("fault", [TooQuiet, Patchy, TooLong, TooOften])
def test_faults_of_the_real_dp_sgd_are_caught(hospital, fault):
    found = audit.audit(*hospital, canaries=400, kind=fault)
    assert found.broken and found.bound > 1.1 * found.promise


def test_a_configuration_that_promises_nothing_is_not_audited(hospital):
    loaded, cards, cfg = hospital
    with pytest.raises(ValueError, match="promises nothing that could be audited"):
        audit.audit(loaded, cards, config.load(cfg, "federation.privacy.record.epsilon=null"))


class Quieter(Noised):
    """A quarter of the noise that it says."""

    def aggregate_train(self, *given):
        said, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 4
        try:
            return super().aggregate_train(*given)
        finally:
            self.noise_multiplier = said


def test_noise_on_the_average_keeps_its_promise_and_a_quarter_of_it_is_caught():
    made = [kind(FedAvg(fraction_evaluate=0.0), 1.5, 0.5, seed=2) for kind in (Noised, Quieter)]
    right, wrong = (audit_average(one, 1e-3, rounds=2, canaries=300) for one in made)
    assert right.promise == wrong.promise == made[0].epsilon(1e-3)
    assert 0.5 < right.bound < right.promise and not right.broken
    assert wrong.broken and wrong.bound > 2 * wrong.promise
    with pytest.raises(ValueError, match="clients that count alike"):
        audit_average(Noised(FedAvg(), 1.0, 1.0, uniform=False), 1e-3)
