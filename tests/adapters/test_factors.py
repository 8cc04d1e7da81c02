"""Low-rank algebra against float64 products, on layers that are not square, mixed ranks and unequal weights."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from fedllm_helpers.adapters import factors

SHAPES = {"m.q": (11, 7), "m.v": (3, 9)}  # (outputs, inputs): a wide one and a tall one


def adapter(rank, seed, shapes=None):
    rng = np.random.default_rng(seed)
    made = {}
    for layer, (outputs, inputs) in (shapes or SHAPES).items():
        made[f"{layer}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
        made[f"{layer}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    return made


def mean_of_products(adapters, weights):
    p = np.asarray(weights, float) / np.sum(weights)
    parts = [factors.product(one) for one in adapters]
    return {layer: sum(w * part[layer] for w, part in zip(p, parts, strict=True)) for layer in parts[0]}


def apart(first, second):
    norm = np.sqrt(sum(np.square(value).sum() for value in second.values()))
    return np.sqrt(sum(np.square(first[layer] - second[layer]).sum() for layer in second)) / norm


CASES = [([2], [5]), ([2, 2], [1, 1]), ([2, 2, 2], [200, 1, 77.5]), ([3, 3, 3, 3, 3], [1, 2, 3, 4, 5])]


def test_a_product_is_that_of_numpy_by_layer():
    one = adapter(2, 0)
    made = factors.product(one, 4.0)
    wanted = 4.0 * one["m.v.lora_B.weight"].astype(float) @ one["m.v.lora_A.weight"].astype(float)
    assert list(made) == list(SHAPES) and made["m.q"].shape == (11, 7)
    np.testing.assert_allclose(made["m.v"], wanted, rtol=1e-12)


@pytest.mark.parametrize(("ranks", "weights"), [*CASES, ([1, 2, 4], [3, 1, 2]), ([4, 1], [1e-3, 1e6])])
def test_a_stack_is_the_mean_of_products(ranks, weights):
    given = [adapter(rank, seed) for seed, rank in enumerate(ranks)]
    stack = factors.stacked(given, weights)
    assert factors.rank(stack) == sum(ranks) and list(stack) == list(given[0])
    assert apart(factors.product(stack), mean_of_products(given, weights)) < 1e-6


@pytest.mark.parametrize(("ranks", "weights"), CASES)
def test_mean_and_residual_are_the_mean_of_products(ranks, weights):
    given = [adapter(rank, seed) for seed, rank in enumerate(ranks)]
    mean, residual = factors.mean_and_residual(given, weights)
    assert factors.rank(residual) == (len(ranks) - 1) * ranks[0]
    whole = factors.together([mean, residual])
    assert apart(factors.product(whole), mean_of_products(given, weights)) < 1e-6
    for key, value in mean.items():
        np.testing.assert_allclose(value, np.average([g[key] for g in given], axis=0, weights=weights), rtol=1e-5)


def test_the_residual_is_the_covariance_of_the_factors():
    """And no other split: the mean of the products minus the product of the means, written out."""
    given, weights = [adapter(2, seed) for seed in range(4)], np.array([4, 3, 2, 1]) / 10
    mean, residual = factors.mean_and_residual(given, weights)
    a, b = (np.stack([one[f"m.q.lora_{kind}.weight"] for one in given]).astype(float) for kind in "AB")
    centred = (np.tensordot(weights, part, 1) for part in (b, a))
    b_mean, a_mean = centred
    wanted = sum(w * (second - b_mean) @ (first - a_mean) for w, first, second in zip(weights, a, b, strict=True))
    np.testing.assert_allclose(factors.product(residual)["m.q"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_truncation_has_the_error_of_the_best_one(size):
    """Eckart and Young: what is left over is the root of the squared singular values that were cut."""
    stack = factors.stacked([adapter(rank, seed) for seed, rank in enumerate((1, 2, 4))], [3, 1, 2])
    best = factors.truncated(stack, size)
    assert factors.rank(best) == size
    for layer, full in factors.product(stack).items():
        left = np.linalg.norm(full - factors.product(best)[layer])
        wanted = np.sqrt(np.square(np.linalg.svd(full, compute_uv=False)[size:]).sum())
        assert left == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        first, second = factors.pairs(best)[layer]
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=0), rtol=1e-4)


def test_the_first_ranks_of_a_truncation_are_the_smaller_truncation():
    stack = factors.stacked([adapter(2, seed) for seed in range(3)], [1, 2, 3])
    small, large = factors.truncated(stack, 2), factors.cut(factors.truncated(stack, 3), 2)
    assert apart(factors.product(large), factors.product(small)) < 1e-6


def test_a_truncation_finds_known_singular_values_whatever_their_size():
    left, right = ortho_group.rvs(11, random_state=0)[:, :3], ortho_group.rvs(7, random_state=1)[:3]
    for values in ([3.0, 2.0, 1.0], [1e4, 1.0, 1e-4], [1.0, 0.0, 0.0]):
        one = {"m.q.lora_A.weight": right, "m.q.lora_B.weight": left * values}
        first, second = factors.pairs(factors.truncated(one, 3))["m.q"]
        found = np.linalg.norm(second.astype(float), axis=0) * np.linalg.norm(first.astype(float), axis=1)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(first, axis=1).min() > 1e-3, "a rank whose factors are both 0 is dead"


def test_zero_updates_stay_zero_and_can_still_learn():
    zero = [{key: value * 0 if "lora_B" in key else value for key, value in adapter(2, s).items()} for s in range(2)]
    best = factors.truncated(factors.stacked(zero, [1, 1]), 2)
    assert not any(value.any() for key, value in best.items() if "lora_B" in key)
    assert all(np.linalg.norm(value, axis=1).min() > 0.99 for key, value in best.items() if "lora_A" in key)
    assert factors.relative_error(zero[0], zero[1]) == 0.0 and factors.relative_error(adapter(1, 0), zero[0]) == np.inf


def test_cut_and_padded_are_inverse_and_keep_the_product():
    one = adapter(2, 0)
    grown = factors.padded(one, 5)
    assert factors.rank(grown) == 5 and apart(factors.product(grown), factors.product(one)) == 0
    assert all(np.array_equal(value, one[key]) for key, value in factors.cut(grown, 2).items())
    assert factors.padded(one, 1)["m.q.lora_A.weight"].shape == (2, 7), "nothing is cut"


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
def test_relative_error_against_full_matrices(ranks):
    first, second = adapter(ranks[0], 5), adapter(ranks[1], 6)
    wanted = apart(factors.product(first), factors.product(second))
    assert factors.relative_error(first, second) == pytest.approx(wanted, rel=1e-6)
    near = {key: value * 1.001 if "lora_B" in key else value for key, value in first.items()}
    assert factors.relative_error(near, first) == pytest.approx(1e-3, rel=1e-3)
    for layer, error in factors.relative_errors(first, second).items():
        full = [factors.product(one)[layer] for one in (first, second)]
        assert error == pytest.approx(np.linalg.norm(full[0] - full[1]) / np.linalg.norm(full[1]), rel=1e-6)
    for layer, size in factors.norms(first).items():
        assert size == pytest.approx(np.linalg.norm(factors.product(first)[layer]), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: factors.stacked([], []), "nothing to combine: no adapter"),
        (lambda: factors.stacked([adapter(1, 0)], [0]), "weights that sum to 0"),
        (lambda: factors.stacked([adapter(1, 0)] * 2, [1, -1]), "a weight of -1.0: allowed are finite numbers from 0"),
        (lambda: factors.mean_and_residual([adapter(1, 0)], [float("nan")]), "a weight of nan"),
        (lambda: factors.stacked([adapter(1, 0)], [1, 2]), "1 adapters and 2 weights"),
        (lambda: factors.mean_and_residual([adapter(1, 0), adapter(2, 0)], [1, 1]), "ranks 1, 2: .* needs equal ranks"),
        (lambda: factors.truncated(adapter(2, 0), 4), "rank 4: layer 'm.v' is 3 × 9, allowed are 1 to 3"),
        (lambda: factors.truncated(adapter(2, 0), 0), "rank 0: layer"),
        (lambda: factors.pairs({"m.q.lora_A.weight": np.ones((1, 2))}), "'m.q.lora_A.weight' has no partner"),
        (lambda: factors.pairs({"weight": np.ones((1, 2))}), "'weight' has no partner: a LoRA layer has the keys"),
        (
            lambda: factors.pairs({"x.lora_A.weight": np.ones((1, 2)), "x.lora_B.weight": np.ones((2, 2))}),
            "'x': A has rank 1, B has rank 2",
        ),
    ],
)
def test_what_cannot_be_combined_is_one_line(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()
