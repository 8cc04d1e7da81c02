"""The arms of the experiments: how each trains its adapter, and how it is scored. Finished arms are read back."""

import hashlib
import io
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from fedllm_helpers import config, data, folders, models, training
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.config.schema import Federation
from fedllm_helpers.evaluation import multiple_choice
from fedllm_helpers.evaluation.scoring import AnswerScores, score_answers
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.grids.serving import end_with_parent
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.privacy import noise

logger = logging.getLogger(__name__)
KEPT = Path("build") / "experiments"


@dataclass(frozen=True)
class Result:
    """What an arm reached: nats per card, right picks (empty where not asked), bytes over all rounds, seconds."""

    scores: AnswerScores
    right: np.ndarray
    bytes_up: int
    bytes_down: int
    seconds: float


def train_arm(cfg: DictConfig, arm: str, rate: float) -> tuple[Adapter, pd.DataFrame]:
    """The adapter of an arm, and the history of its rounds, empty where it has none.

    *Same work*: an arm takes as many steps, of the same batch, as each hospital does in the federation.
    *Same examples*: it sees as many cards as all hospitals together, in batches twice as large.

    Args:
        cfg: of the federation.
        arm: ``untuned``; ``federated/`` and a partition; or ``same work/`` or ``same examples/`` and ``pooled``,
            ``tenth`` (a tenth of the pooled cards) or ``one hospital/`` and its number.
        rate: largest learning rate; it falls along a cosine, in a federation over the rounds.
    """
    kind, *rest = arm.split("/")
    adapter, history = first_adapter(cfg), pd.DataFrame({"bytes_up": [], "bytes_down": []})
    if kind == "federated":
        rates = [f"train.learning_rate_max={rate}", f"train.learning_rate_min={rate / 10}"]
        federated = config.load(cfg, f"federation.partition={rest[0]}", "federation.evaluate_every=0", *rates)
        record = simulation.run(federated, progress=False)
        return record.adapter, record.history
    if kind != "untuned":
        how = cfg.federation
        steps, batch = (
            how.training_arguments.max_steps * how.num_rounds,
            how.training_arguments.per_device_train_batch_size,
        )
        if kind == "same examples":
            steps, batch = steps * how.num_clients // 2, batch * 2
        local = training.round_config(
            cfg, max_steps=steps, per_device_train_batch_size=batch, lr_scheduler_type="cosine"
        )
        model, tokenizer = base_model(cfg)
        models.set_adapter(model, adapter)
        training.fine_tune(model, tokenizer, _cards(cfg, rest), local, learning_rate=rate, description=None)
        adapter = models.get_adapter(model)
    return adapter, history


def _cards(cfg: DictConfig, owner: list[str]) -> Dataset:
    train = data.load(cfg)[0]
    if owner[0] == "one hospital":
        return client_app.own_cards(cfg, int(owner[1]))[0]
    tenth = len(train) // 10 // len(set(train["specialty"]))
    return data.choose(train, None, tenth, cfg.seed) if owner[0] == "tenth" else train


def score_arm(cfg: DictConfig, arm: str, rate: float, choices: bool = False) -> Result:
    """Train an arm and score it on the held-out cards of its configuration; results of an earlier call are read back.

    Args:
        cfg, arm, rate: of :func:`train_arm`.
        choices: whether to ask a four-way question about each held-out card, too.
    """
    before = finished(cfg, arm, rate, choices)
    if before:
        return before
    test, start = data.load(cfg)[1], time.perf_counter()
    (adapter, history), (model, tokenizer) = train_arm(cfg, arm, rate), base_model(cfg)
    seconds = time.perf_counter() - start
    models.set_adapter(model, adapter)
    scores = score_answers(model, tokenizer, test, cfg)
    right = np.zeros(0, dtype=bool)
    if choices:
        questions = multiple_choice.from_cards(test, pool=test, seed=cfg.seed)
        right = multiple_choice.choose(model, tokenizer, questions, cfg)
    numbers = {"bytes_up": history["bytes_up"].sum(), "bytes_down": history["bytes_down"].sum(), "seconds": seconds}
    keep(_path(cfg, arm, rate, choices), nll=scores.nll, tokens=scores.tokens, right=right, **numbers)
    return finished(cfg, arm, rate, choices)


def finished(cfg: DictConfig, arm: str, rate: float, choices: bool = False) -> Result | None:
    """The result that an earlier :func:`score_arm` left, with the same cards and versions; None where there is none."""
    found = kept(_path(cfg, arm, rate, choices))
    if found is None:
        return None
    numbers = (int(found["bytes_up"]), int(found["bytes_down"]), float(found["seconds"]))
    return Result(AnswerScores(found["nll"], found["tokens"]), found["right"], *numbers)


def keep(path: Path, **arrays: Any) -> None:
    """Write arrays as an ``.npz`` file, whole or not at all."""
    with folders.replaced(path.parent, path.name) as scratch:
        np.savez(scratch / path.name, **arrays)


def kept(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of such a file; None where there is none, or a damaged one, which is named and set aside.

    Raises:
        OSError: it may not be read.
    """
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as found:
            arrays = dict(found)
        if len(arrays) != int.from_bytes(raw[-12:-10], "little"):  # what the end of the archive says
            raise ValueError(f"{len(arrays)} arrays are not all")
        return arrays
    except Exception as error:  # changed bytes raise a dozen types
        logger.warning("%s is damaged (%s) and is made anew", path, error)
        folders.aside(path)
        return None


def tuning_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """The same federation on its training cards alone, a tenth of them held out: no test card is in it."""
    path = folder / "training_cards.json"
    folders.write(path, json.dumps(data.load(cfg)[0].to_list()))
    whole = [*data.WHOLE_FILE, "train.evaluate_split=0.1"]
    return config.load(cfg, f"dataset.name={path}", *whole)


def run_all(workers: ProcessPoolExecutor, jobs: dict, description: str) -> Iterator[tuple[tuple, Any]]:
    """(name, result) of the jobs as they finish, with a bar; the first failure stops what has not begun."""
    waiting = {workers.submit(job): name for name, job in jobs.items()}
    try:
        for future in tqdm(as_completed(waiting), total=len(jobs), desc=description, file=sys.stdout):
            yield waiting[future], future.result()
    except BaseException:  # an arm failed, or the grid is interrupted: what has not begun need not begin
        workers.shutdown(cancel_futures=True)
        raise


def pool(processes: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which end with the one that started them, however it ends."""
    folders.clear(KEPT), folders.clear(KEPT, folders.LEFT_BY_GRIDS)  # of grids that were killed
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def key_of(cfg: DictConfig, *parts: Any) -> str:
    """A name for a result with these settings, parts, versions of packages and this model, and on a GPU with its name.

    Sections that are switched off are left out of it, so that results from before such a section existed count.
    """
    settings = OmegaConf.to_container(cfg)
    for later in ("test", "columns"):
        if settings["dataset"][later] is None:
            del settings["dataset"][later]
    if cfg.federation.min_share == Federation().min_share:
        del settings["federation"]["min_share"]
    del settings["federation"]["report_to"]
    if not cfg.model.lora.core:
        del settings["model"]["lora"]["core"]
    if not noise.silent(cfg):
        del settings["federation"]["privacy"], settings["federation"]["secure_aggregation"]
    origin = provenance(cfg)
    other = [] if origin["machine"]["device"] == "cpu" else [origin["machine"]["device"], origin["machine"]["dtype"]]
    other.append(fingerprint(cfg, cards=False)["model"])
    text = json.dumps([OmegaConf.to_yaml(OmegaConf.create(settings)), *parts, origin["versions"], *other])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _path(cfg: DictConfig, arm: str, rate: float, choices: bool) -> Path:
    cards = [part.to_list() for part in data.load(cfg)]
    return KEPT / f"{key_of(cfg, arm, rate, choices, cards)}.npz"
