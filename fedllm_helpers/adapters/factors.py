"""The algebra of low-rank updates: products, stacks, residuals and truncations of LoRA factors, as pure functions.

A layer's update is ΔW = B·A, B of shape (outputs, r) and A of shape (r, inputs); the scale α/r is a number of its own.
Everything here works on the factors: no function but :func:`product` ever holds an outputs × inputs matrix.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.linalg

from fedllm_helpers.adapters.records import Adapter

A, B = ".lora_A.", ".lora_B."  # in the middle of PEFT's key names


def pairs(adapter: Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) by layer, in the order of the keys.

    Raises:
        ValueError: a factor without its partner, or two whose ranks differ.
    """
    found = {}
    for key in adapter:
        layer, kind, rest = next((key.partition(k) for k in (A, B) if k in key), (key, "", ""))
        partner = f"{layer}{B if kind == A else A}{rest}"
        if partner not in adapter:
            raise ValueError(f"{key!r} has no partner: a LoRA layer has the keys '…{A}weight' and '…{B}weight'")
        first, second = adapter[f"{layer}{A}{rest}"], adapter[f"{layer}{B}{rest}"]
        if first.shape[0] != second.shape[1]:
            raise ValueError(f"{layer!r}: A has rank {first.shape[0]}, B has rank {second.shape[1]}")
        found[layer] = (first, second)
    return found


def joined(layers: dict[str, tuple[np.ndarray, np.ndarray]], like: Adapter) -> Adapter:
    """The inverse of :func:`pairs`: float32, with the keys of ``like`` in their order."""
    found = {}
    for key in like:
        layer, kind, _ = next(key.partition(k) for k in (A, B) if k in key)
        found[key] = np.ascontiguousarray(layers[layer][0 if kind == A else 1], dtype=np.float32)
    return found


def shares(weights: Sequence[float]) -> np.ndarray:
    """Weights divided by their sum, in float64.

    Raises:
        ValueError: there are none, one is negative or not finite, or all are 0.
    """
    given = np.asarray(weights, dtype=np.float64)
    odd = next((w for w in given.tolist() if not math.isfinite(w) or w < 0), None)
    if odd is not None:
        raise ValueError(f"a weight of {odd}: allowed are finite numbers from 0, such as the hospitals' cards")
    if not given.any():
        raise ValueError("there is nothing to combine: no adapter, or weights that sum to 0")
    given = given / given.max()  # a sum of very large ones would not be finite
    return given / given.sum()


def rank(adapter: Adapter) -> int:
    """The largest rank of an adapter's layers."""
    return max((first.shape[0] for first, _ in pairs(adapter).values()), default=0)


def cut(adapter: Adapter, size: int) -> Adapter:
    """The first ``size`` ranks of every factor: rows of A, columns of B. Other keys, and smaller factors, stay."""
    return {k: v[:size] if A in k else np.ascontiguousarray(v[:, :size]) if B in k else v for k, v in adapter.items()}


def padded(adapter: Adapter, size: int) -> Adapter:
    """Every factor with ``size`` ranks, the new ones 0: the product stays as it was."""
    grown = {}
    for key, value in adapter.items():
        missing = size - value.shape[0 if A in key else 1] if A in key or B in key else 0
        room = ((0, missing), (0, 0)) if A in key else ((0, 0), (0, missing))
        grown[key] = np.pad(value, room) if missing > 0 else value
    return grown


def product(adapter: Adapter, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The update scale · B·A of each layer, shape (outputs, inputs), in float64: for small models and for checks."""
    return {
        layer: scale * (second.astype(np.float64) @ first.astype(np.float64))
        for layer, (first, second) in pairs(adapter).items()
    }


def stacked(adapters: Iterable[Adapter], weights: Sequence[float]) -> Adapter:
    """Factors whose product is Σ pₖ BₖAₖ, exactly: A = [A₁; …; A_K], B = [p₁B₁, …, p_K B_K]. Taught in notebook 04.

    FLoRA's aggregation (Wang et al. 2024, arXiv:2409.05976). Ranks may differ; the stack has their sum. It holds all
    adapters: memory grows with the number of clients.

    Args:
        adapters: of the same layers.
        weights: one each, such as numbers of cards; pₖ are their shares.

    Raises:
        ValueError: as :func:`shares` and :func:`pairs`, or another number of weights than of adapters.
    """
    given, p = list(adapters), shares(weights)
    parts = [pairs(adapter) for adapter in given]
    if len(parts) != len(p):
        raise ValueError(f"{len(parts)} adapters and {len(p)} weights")
    layers = {
        layer: (
            np.concatenate([part[layer][0] for part in parts]),
            np.concatenate([share * part[layer][1] for share, part in zip(p, parts, strict=True)], axis=1),
        )
        for layer in parts[0]
    }
    return joined(layers, given[0])


def mean_and_residual(adapters: Iterable[Adapter], weights: Sequence[float]) -> tuple[Adapter, Adapter]:
    """The mean of the factors, and factors of what their product misses. Taught in notebook 04.

    FedEx-LoRA's aggregation (Singhal et al. 2024, arXiv:2410.09432): Σ pₖ BₖAₖ = B̄Ā + residual. The residual is the
    covariance of the factors over the clients, Σ pₖ (Bₖ − B̄)(Aₖ − Ā). As Σ pₖ (Bₖ − B̄) = 0, any one A may take the
    place of Ā: with the last one, its own term vanishes, and the residual has rank (K − 1)·r. It holds all adapters.

    Args:
        adapters: of the same layers and rank.
        weights: one each.

    Returns:
        (mean, residual); with one client the residual has rank 0.

    Raises:
        ValueError: as :func:`stacked`, or ranks that differ.
    """
    given, p = list(adapters), shares(weights)
    if len(given) != len(p):
        raise ValueError(f"{len(given)} adapters and {len(p)} weights")
    ranks = sorted({rank(adapter) for adapter in given})
    if len(ranks) > 1:
        raise ValueError(f"ranks {', '.join(map(str, ranks))}: a mean of factors needs equal ranks")
    mean = {
        key: sum(share * one[key].astype(np.float64) for share, one in zip(p, given, strict=True)) for key in given[0]
    }
    centred = [
        {key: value - (mean[key] if B in key else given[-1][key]) for key, value in one.items()} for one in given[:-1]
    ]
    empty = {key: value[:0] if A in key else value[:, :0] for key, value in given[0].items()}
    weighted = [
        {key: share * value if B in key else value for key, value in one.items()}
        for share, one in zip(p[:-1], centred, strict=True)
    ]
    return {key: value.astype(np.float32) for key, value in mean.items()}, together([empty, *weighted])


def together(adapters: Sequence[Adapter]) -> Adapter:
    """Factors whose product is the sum of the products: a stack without weights. {} where there are none."""
    if not adapters:
        return {}
    return {
        key: np.concatenate([one[key] for one in adapters], axis=0 if A in key else 1).astype(np.float32)
        for key in adapters[0]
    }


def truncated(adapter: Adapter, size: int) -> Adapter:
    """Factors of the best approximation of rank ``size`` to each layer's B·A (Eckart & Young 1936). In notebook 04.

    FlexLoRA's redistribution (Bai et al. 2024, arXiv:2402.11505), without its outputs × inputs matrix: QR of both
    factors, and the singular values of the small core. B = U·√S and A = √S·Vᵀ, largest first, so that the first s ranks
    are the best approximation of rank s. Another split, such as A = Vᵀ and B = U·S, has the same product, and yet the
    next training differs. Where a singular value is 0, B is 0 and A has rows of length 1: were both 0, neither would
    ever move. In float64.

    Args:
        adapter: such as a stack; a smaller rank than ``size`` stays.
        size: from 1.

    Raises:
        ValueError: ``size`` is below 1, or above what some layer can have.
    """
    found = {}
    for layer, (first, second) in pairs(adapter).items():
        largest = min(second.shape[0], first.shape[1])
        if not 1 <= size <= largest:
            shape = f"{second.shape[0]} × {first.shape[1]}"
            raise ValueError(f"rank {size}: layer {layer!r} is {shape}, allowed are 1 to {largest}")
        left, left_core = _qr(second)
        right, right_core = _qr(first.T)
        u, s, vt = scipy.linalg.svd(left_core @ right_core.T, full_matrices=False, check_finite=False)
        s = s[:size]
        nothing = s <= np.finfo(np.float64).eps * max(second.shape[0], first.shape[1]) * s.max(initial=0)
        root, weight = np.sqrt(np.where(nothing, 0, s)), np.sqrt(np.where(nothing, 1, s))
        found[layer] = (weight[:, None] * (vt[:size] @ right.T), left @ (u[:, :size] * root))
    return joined(found, adapter)


def norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of B·A by layer, from the cores of two QR decompositions, in float64."""
    cores = {layer: [_core(factor) for factor in (b, a.T)] for layer, (a, b) in pairs(adapter).items()}
    return {layer: float(np.linalg.norm(left @ right.T)) for layer, (left, right) in cores.items()}


def relative_error(approximation: Adapter, exact: Adapter) -> float:
    """‖X − Y‖ / ‖Y‖ over all layers (Frobenius), X and Y the products of two adapters of any ranks. In notebook 04.

    0 where both are 0, infinite where ``exact`` alone is.
    """
    apart, size = (math.hypot(*norms(some).values()) for some in (_minus(approximation, exact), exact))
    return apart / size if size else (math.inf if apart else 0.0)


def relative_errors(approximation: Adapter, exact: Adapter) -> dict[str, float]:
    """:func:`relative_error` by layer."""
    first, second = pairs(approximation), pairs(exact)
    keys = {layer: (f"{layer}{A}weight", f"{layer}{B}weight") for layer in first}
    ours = {layer: dict(zip(keys[layer], first[layer], strict=True)) for layer in first}
    return {
        layer: relative_error(one, dict(zip(keys[layer], second[layer], strict=True))) for layer, one in ours.items()
    }


def _minus(first: Adapter, second: Adapter) -> Adapter:
    parts = [first, {key: -value if B in key else value for key, value in second.items()}]
    return {
        key: np.concatenate([part[key].astype(np.float64) for part in parts], axis=0 if A in key else 1)
        for key in first
    }


def _qr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return scipy.linalg.qr(matrix.astype(np.float64), mode="economic", check_finite=False, overwrite_a=True)


def _core(matrix: np.ndarray) -> np.ndarray:
    if not matrix.shape[1]:
        return np.zeros((0, 0))
    return scipy.linalg.qr(matrix.astype(np.float64), mode="r", check_finite=False)[0][: min(matrix.shape)]
