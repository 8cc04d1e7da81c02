"""Every attack on one adapter: the areas are those of the scores."""

import numpy as np

from fedllm_helpers import attacks
from fedllm_helpers.attacks import battery


def test_areas_are_those_of_the_scores():
    rng = np.random.default_rng(0)
    found, before = rng.uniform(10, 30, 40), rng.uniform(20, 40, 40)
    found[:20] -= 8
    nothing, tokens = np.zeros(0), np.full(40, 10)
    rest = (nothing, nothing, nothing, 0.0)
    one = battery.Audit(found, tokens, -found, -2 * found, *rest)
    three = battery.areas(one, battery.Audit(before, tokens, -before, -before, *rest), 20)
    assert three["loss"].auc == attacks.membership(-found[:20] / 10, -found[20:] / 10).auc
    assert three["min-k"].auc.value == three["loss"].auc.value > 0.7
    assert three["min-k++"].auc.value == three["min-k"].auc.value
    assert three["difference"].auc == attacks.membership((before - found)[:20], (before - found)[20:]).auc
    assert three["ratio"].auc == attacks.membership(-(found / before)[:20], -(found / before)[20:]).auc
