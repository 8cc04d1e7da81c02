"""How many workers a machine holds: by its cores, its memory, and what a hospital's training takes."""

import os
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig

from fedllm_helpers import communication, limits, training
from fedllm_helpers.communication.estimates import architecture
from fedllm_helpers.models.lora import device_and_dtype

PROCESS = 700_000_000  # bytes: Python with its libraries and the cards, without weights and training
LIMIT, USED = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))  # of a container


def workers(cfg: DictConfig, asked: int | None = None) -> tuple[int, str]:
    """How many workers run, and in a line why so many.

    Args:
        cfg: of the federation, with ``federation.threads`` set.
        asked: by the user; None for one on a GPU, else as many as cores and memory allow, and hospitals a round asks.

    Raises:
        ValueError: more are asked for than the memory holds; the line says how many it does.
    """
    if asked is not None:
        limits.whole("workers", asked)
    device, dtype = device_and_dtype(cfg.model.device, cfg.model.dtype)
    weights = communication.parameter_counts(cfg.model.name, cfg.model.lora).total * dtype.itemsize
    on_gpu, threads = device.type != "cpu", cfg.federation.threads or 1
    each = worker_bytes(cfg, dtype.itemsize) + weights * on_gpu
    free = max(0, free_bytes(device) - weights)  # the server's; on a CPU all share these
    fit = free // each
    room = f"{fit} fit into {free / 1e9:.1f} GB of free memory, at about {each / 1e9:.1f} GB each"
    if asked is not None:
        if asked > fit:
            raise ValueError(f"workers={asked}: {room}")
        return asked, ""
    if on_gpu:
        return 1, "one for the GPU"
    hospitals = max(1, round(cfg.federation.fraction_train * cfg.federation.num_clients))
    number = max(1, min(cores() // threads, fit, hospitals))
    return number, f"{cores()} cores, {threads} for each; {hospitals} hospitals in a round; {room}"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; of a CPU's, what a container is allowed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        return min(free, int(LIMIT.read_text()) - int(USED.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def worker_bytes(cfg: DictConfig, size: int) -> int:
    """About what a worker needs for itself: libraries, cards and one training step, with ``size`` bytes a number.

    A step keeps for every token and layer about 16 vectors of the model's width, 4 of its inner one and 3 rows of
    attention weights (after Korthikanti et al. 2022, arXiv:2205.05198), or only one vector a layer where
    ``model.gradient_checkpointing`` is set, and for every token 12 bytes a word of the vocabulary.
    """
    shape = architecture(cfg.model.name).get_text_config()
    width, layers = shape.hidden_size, shape.num_hidden_layers
    inner, heads = getattr(shape, "intermediate_size", None) or 4 * width, getattr(shape, "num_attention_heads", 1)
    batch = training.round_config(cfg).train.training_arguments.get("per_device_train_batch_size", 8)
    tokens, layer = batch * cfg.train.seq_length, 16 * width + 4 * inner + 3 * heads * cfg.train.seq_length
    kept = layers * width + layer if cfg.model.gradient_checkpointing else layers * layer
    step = tokens * (kept * size + 12 * shape.vocab_size)
    return PROCESS + step
