"""What combining costs the server: 20 clients' adapters of Mistral-7B, 27 MB each (``make bench``).

Rank 16 on the query and value projections, in float32. Seconds per rule, and as a ratio to reading the same bytes once
from memory (a sum over all of them): that is the least that any rule must do. "memory" is by how much the largest size
of the process exceeds its size with the adapters alone, in adapters; every rule has a process of its own. The error of
the truncation is held against the singular values of one layer's full matrix. Cores (LoRA-XS) of 100 clients come last:
what their mean costs, beside reading them, and what a client pays once for the factors of a layer.
"""

import gc
import multiprocessing
import resource
import time
from collections.abc import Callable

import numpy as np

from fedllm_helpers import aggregation
from fedllm_helpers.adapters import factors
from fedllm_helpers.models import cores

CLIENTS, LAYERS, RANK = 20, 32, 16
SHAPES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}


def adapter(seed: int) -> dict[str, np.ndarray]:
    """A trained one's shapes, with random values."""
    rng, made = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in SHAPES.items():
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            made[f"{where}.lora_A.weight"] = rng.standard_normal((RANK, inputs), np.float32)
            made[f"{where}.lora_B.weight"] = rng.standard_normal((outputs, RANK), np.float32)
    return made


def timed(call: Callable) -> tuple[float, object]:
    """Seconds of the faster of two calls, and what it gave."""
    seconds, result = [], None
    for _ in range(2):
        result = None
        gc.collect()
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def measured(name: str) -> tuple[float, float, float]:
    """Seconds of reading, seconds of a rule, and its memory in adapters; in a process of its own."""
    given, weights = [adapter(seed) for seed in range(CLIENTS)], list(range(1, CLIENTS + 1))
    size = sum(value.nbytes for value in given[0].values())
    read, _ = timed(lambda: sum(float(value.sum()) for one in given for value in one.values()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = timed(lambda: RULES[name](given, weights))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / size
    return read, seconds, grown


RULES = {
    "FedIT: mean of factors": lambda given, w: aggregation.weighted_mean(zip(given, w, strict=True)),
    "FLoRA: stack": factors.stacked,
    "FedEx-LoRA: mean and residual": factors.mean_and_residual,
    "FlexLoRA: stack, QR, small SVD": lambda given, w: factors.truncated(factors.stacked(given, w), RANK),
}


def main() -> None:
    """The table."""
    size = sum(value.nbytes for value in adapter(0).values())
    print(f"{CLIENTS} adapters of {size / 1e6:.1f} MB, read once from memory: the last column")
    print(f"{'rule':32s} {'seconds':>8s} {'ratio':>7s} {'memory':>7s} {'read':>7s}")
    for name in RULES:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            read, seconds, grown = alone.apply(measured, (name,))
        print(f"{name:32s} {seconds:8.2f} {seconds / read:7.1f} {grown:7.1f} {read:7.2f}", flush=True)
    layer = "base_model.model.model.layers.0.self_attn.v_proj"
    given = [{key: value for key, value in adapter(seed).items() if key.startswith(layer)} for seed in range(CLIENTS)]
    one = factors.stacked(given, range(1, CLIENTS + 1))
    full, best = factors.product(one)[layer], factors.product(factors.truncated(one, RANK))[layer]
    start = time.perf_counter()
    singular = np.linalg.svd(full, compute_uv=False)
    whole = time.perf_counter() - start
    least = np.sqrt(np.square(singular[RANK:]).sum())
    seconds, _ = timed(lambda: factors.truncated(one, RANK))
    print(f"error of rank {RANK}: {np.linalg.norm(full - best) / least - 1:+.1e} of the least possible")
    print(f"one layer of 1024 × 4096: {seconds:.3f} s by its factors, {whole:.2f} s for the full matrix's values alone")
    cores_table()


def cores_table(clients: int = 100) -> None:
    """LoRA-XS at rank 16: the mean of so many clients' cores, and the factors of single layers."""
    rng = np.random.default_rng(0)
    keys = [f"{layer}.{name}.lora_B.core.weight" for layer in range(LAYERS) for name in SHAPES]
    given = [{key: rng.standard_normal((RANK, RANK), np.float32) for key in keys} for _ in range(clients)]
    size = sum(value.nbytes for value in given[0].values())
    read, _ = timed(lambda: sum(float(value.sum()) for one in given for value in one.values()))
    seconds, _ = timed(lambda: aggregation.weighted_mean((one, 1) for one in given))
    print(f"LoRA-XS, {clients} clients of {size / 1e3:.0f} kB: mean {seconds:.3f} s, {seconds / read:.1f} × reading")
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape)
        seconds, _ = timed(lambda weight=weight: cores.bases(weight, RANK))
        whole, _ = timed(lambda weight=weight: np.linalg.svd(weight, full_matrices=False))
        print(f"factors of {name}, {shape[0]} × {shape[1]}: {seconds:.2f} s, {whole / seconds:.0f} × faster than all")


if __name__ == "__main__":
    main()
