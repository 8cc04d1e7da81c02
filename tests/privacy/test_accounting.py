"""ε against exact formulas, Opacus' accountants and an estimate from below; the noise for an ε."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as losses
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import optimize, stats

from fedllm_helpers.privacy import accounting

TYPICAL = [(1.0, 0.05, 100), (0.8, 0.15, 16), (2.0, 0.5, 60), (3.0, 0.2, 200), (0.6, 0.1, 12)]
ODD = list(itertools.product((1e-9, 1e-3, 0.02, 0.3, 50.0, 1e6), (1e-4, 0.15, 0.999, 1.0), (1, 10_000)))


def exact(noise: float, steps: int, delta: float) -> float:
    """ε of the Gaussian mechanism, from δ(ε) = Φ(μ/2 - ε/μ) - exp(ε)·Φ(-μ/2 - ε/μ) with μ = √steps / noise."""
    mu = math.sqrt(steps) / noise

    def above(epsilon: float) -> float:
        first, second = stats.norm.logcdf(mu / 2 - epsilon / mu), stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return first + math.log(-math.expm1(epsilon + second - first)) - math.log(delta)

    return 0.0 if above(0) <= 0 else optimize.brentq(above, 0, mu * (mu / 2 - stats.norm.ppf(delta)), xtol=1e-13)


def by_opacus(accountant: type, mechanisms: list, delta: float, **options) -> float:
    made = accountant()
    made.history = list(mechanisms)
    return made.get_epsilon(delta, **options)


def from_below(mechanisms: list, delta: float, interval: float) -> float:
    """An estimate on a grid that is rounded the other way: ε is above it."""
    whole = losses.identity(interval, pessimistic_estimate=False)
    for noise, rate, steps in mechanisms:
        options = {"value_discretization_interval": interval, "sampling_prob": rate, "use_connect_dots": False}
        one = losses.from_gaussian_mechanism(noise, pessimistic_estimate=False, **options)
        whole = whole.compose(one.self_compose(steps))
    return whole.get_epsilon_for_delta(delta)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5, 1.0, 2.0, 10.0, 50.0])
def test_without_sampling_epsilon_is_exact(noise):
    for steps, delta in itertools.product((1, 2, 12, 10_000), (1e-2, 1e-3, 1e-5, 1e-12)):
        found = accounting.epsilon(noise, 1.0, steps, delta)
        assert found == pytest.approx(exact(noise, steps, delta), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("noise", [0.3, 0.5, 1.0, 5.0])
def test_one_sampled_step_is_near_its_formula_and_never_below(noise):
    for rate, delta in itertools.product((0.01, 0.15, 0.5), (1e-3, 1e-5)):
        true = math.log1p(rate * math.expm1(exact(noise, 1, delta / rate)))  # Balle, Barthe & Gaboardi 2018, theorem 8
        assert true * (1 - 1e-9) <= accounting.epsilon(noise, rate, 1, delta) <= 1.002 * true + 1e-6


@pytest.mark.parametrize("mechanism", TYPICAL)
def test_many_sampled_steps_agree_with_opacus_and_are_below_its_renyi_bound(mechanism):
    for delta in (1e-3, 1e-5):
        found, theirs = accounting.epsilon(*mechanism, delta), by_opacus(PRVAccountant, [mechanism], delta)
        assert theirs - 0.021 < found < theirs + 1e-3 * found  # theirs is above the true ε by 0.02 at most
        assert from_below([mechanism], delta, 1e-4) < found < by_opacus(RDPAccountant, [mechanism], delta)


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:Optimal order")
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_settings_that_no_one_chooses_have_an_epsilon_too(delta):
    for noise, rate, steps in ODD:
        found = accounting.epsilon(noise, rate, steps, delta)
        assert 0 <= found <= accounting.epsilon(noise, 1.0, steps, delta) < math.inf, (noise, rate, steps)
        if 0.02 <= noise <= 50:
            assert found <= by_opacus(RDPAccountant, [(noise, rate, steps)], delta, alphas=[1.5, 2, 4, 8, 32]) + 1e-9
    assert accounting.epsilon(0.02, 1.0, 2, 1e-5) == pytest.approx(2_800, rel=0.02)  # the course's noise
    assert accounting.epsilon(0, 0.1, 1, 1e-5) == accounting.epsilon(1.0, 0.1, 1, 0) == math.inf
    assert accounting.epsilon(100, 1.0, 4, 0.5) == accounting.epsilon(0.3, 1e-4, 1, 1e-3) == 0.0


def test_a_delta_below_all_rounding_falls_back_on_renyi():
    mechanism, delta = (1.0, 0.5, 20), 1e-30
    assert accounting.epsilon(*mechanism, 1e-9) < accounting.epsilon(*mechanism, delta)
    assert accounting.epsilon(*mechanism, delta) <= 1.01 * by_opacus(RDPAccountant, [mechanism], delta)


def test_more_noise_or_a_larger_delta_give_less_and_more_samples_or_steps_more():
    noises = [accounting.epsilon(noise, 0.15, 60, 1e-3) for noise in (0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 20.0)]
    rates = [accounting.epsilon(1.0, rate, 60, 1e-3) for rate in (1.0, 0.99, 0.5, 0.2, 0.1, 0.05, 0.01)]
    steps = [accounting.epsilon(1.0, 0.15, steps, 1e-3) for steps in (1000, 200, 100, 60, 12, 2, 1)]
    deltas = [accounting.epsilon(1.0, 0.15, 60, delta) for delta in (1e-12, 1e-9, 1e-5, 1e-3, 1e-2, 1e-1)]
    for row in (noises, rates, steps, deltas):
        assert np.all(np.diff(row) < 0), row


def test_the_parts_of_a_run_are_the_run():
    whole, parts = (0.8, 0.15, 36), [(0.8, 0.15, 12), (0.8, 0.15, 20), (0.8, 0.15, 4)]
    assert accounting.composed(parts, 1e-3) == accounting.epsilon(*whole, 1e-3)
    unsampled = [(2.0, 1.0, 5), (0.7, 1.0, 1), (5.0, 1.0, 30)]
    one = sum(steps / noise**2 for noise, _, steps in unsampled) ** -0.5
    assert accounting.composed(iter(unsampled), 1e-5) == pytest.approx(exact(one, 1, 1e-5), rel=1e-9)
    assert accounting.composed([], 1e-3) == accounting.composed([(1.0, 0.0, 9), (0.0, 0.5, 0)], 1e-3) == 0.0
    assert accounting.composed([whole, (0.0, 0.5, 1)], 1e-3) == math.inf


@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_different_runs_together_lie_between_bounds(delta):
    runs = [(1.0, 0.15, 36), (0.7, 0.05, 60), (2.0, 0.4, 24), (4.0, 1.0, 2)]
    found = accounting.composed(runs, delta)
    assert found == accounting.composed(runs[::-1], delta)
    alone = [accounting.epsilon(*run, delta) for run in runs]
    assert max(max(alone), from_below(runs, delta, 5e-4)) < found
    assert found < sum(accounting.epsilon(*run, delta / len(runs)) for run in runs)
    assert found < by_opacus(RDPAccountant, runs, delta)
    assert found == pytest.approx(by_opacus(PRVAccountant, runs[:3] + [(4.0, 1 - 1e-9, 2)], delta), abs=0.025)


def test_a_mechanism_that_cannot_be_is_one_line():
    for wrong in [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 1.1, 1), (1.0, math.nan, 1), (1.0, 0.1, -1)]:
        with pytest.raises(ValueError, match="allowed are"):
            accounting.composed([(1.0, 0.1, 1), wrong], 1e-3)


@pytest.mark.parametrize("rate, steps", [(0.05, 200), (0.2, 12), (0.5, 60), (1.0, 3)])
def test_noise_for_an_epsilon_is_just_enough(rate, steps):
    for target in (0.5, 2.0, 8.0, 50.0, 5000.0):
        noise = accounting.noise_for(target, rate, steps, 1e-3)
        assert 0.995 * target < accounting.epsilon(noise, rate, steps, 1e-3) <= target


def test_an_epsilon_that_no_noise_reaches_is_one_line():
    for target in (1e-5, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"no noise reaches ε = {target} .* in 1000 steps"):
            accounting.noise_for(target, 1.0, 1000, 1e-9)
    assert accounting.epsilon(accounting.noise_for(1.0, 1e-4, 1, 1e-2), 1e-4, 1, 1e-2) == 0.0  # δ allows it all


def test_who_counts_no_privacy_waits_for_no_library():
    code = "import sys, fedllm_helpers.privacy.accounting; print({'dp_accounting', 'scipy', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
