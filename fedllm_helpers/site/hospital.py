"""A look at a hospital before the first round: its settings, key, way to the server, policy, cards, and one step."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig

from fedllm_helpers import config
from fedllm_helpers.federation import client_app, node_settings
from fedllm_helpers.privacy import policy
from fedllm_helpers.privacy.ledger import ROUND, Ledger
from fedllm_helpers.site import machine, reading
from fedllm_helpers.site.findings import FAULT, NOTE, OK, Finding, Look, overheard

FLAGS = ("--superlink", "--root-certificates", "--auth-supernode-private-key", "--node-config")


def of_hospital(flags: Mapping[str, str], cfg: DictConfig, step: bool = True) -> dict[str, Look]:
    """What is looked at, by name, for :func:`fedllm_helpers.site.findings.look`.

    Args:
        flags: of ``flower-supernode``, such as ``--superlink``.
        cfg: of the run that is planned.
        step: whether to train one step, which loads the model.
    """
    own = reading.node_config(flags.get("--node-config", ""))
    parts: dict[str, Look] = {"versions": machine.versions, "settings": partial(_settings, flags, own)}
    if authority := flags.get("--root-certificates"):
        parts["authority"] = partial(machine.lasting, "authority", authority)
        if link := flags.get("--superlink"):
            parts["server"] = lambda: machine.server(*reading.address(link), authority)
    if private := flags.get("--auth-supernode-private-key"):
        parts["key"] = partial(machine.key, "key", private)
    if "policy" in own:
        parts["policy"] = partial(_policy, str(own["policy"]))
    parts["disk"] = lambda: machine.disk(machine.flower_home())
    parts["model"] = partial(machine.model, cfg)
    if "data" in own:
        parts["cards"] = partial(_cards, str(own["data"]), cfg)
        if step:
            parts["step"] = partial(_step, str(own["data"]), cfg)
    return parts


def _settings(flags: Mapping[str, str], own: Mapping[str, Any]) -> Iterator[Finding]:
    missing = [name for name in FLAGS if not flags.get(name)]
    if missing:
        yield Finding(FAULT, "settings", f"{', '.join(missing)} is not set: the node cannot start without it")
    unknown = sorted(set(own) - set(node_settings.KNOWN))
    if unknown:
        known = ", ".join(node_settings.KNOWN)
        yield Finding(FAULT, "settings", f"--node-config: unknown {', '.join(unknown)}; known are {known}")
    place, count = own.get("partition-id"), own.get("num-partitions")
    if not isinstance(place, int) or not isinstance(count, int) or not 0 <= place < count:
        said = "hospitals are numbered from 0 to num-partitions − 1"
        yield Finding(FAULT, "settings", f"partition-id={place}, num-partitions={count}: {said}")
    elif not missing and not unknown:
        yield Finding(OK, "settings", f"hospital {place} of {count} (from 0); every hospital has another number")
    if own.get("simulated"):
        yield Finding(NOTE, "settings", "simulated=true is for demonstrations: it takes cards of the run's data set")
    elif "data" not in own:
        yield Finding(FAULT, "settings", '--node-config names no cards: data="FOLDER"')
    if "policy" not in own:
        yield Finding(NOTE, "policy", "none: whatever the server orders is done; python -m fedllm_helpers.policy --new")


def _policy(path: str) -> Iterator[Finding]:
    found = policy.load(path)
    ledger = Ledger(found.ledger)
    rounds, spent = len(ledger.entries(ROUND)), ledger.epsilon(found.delta)
    with ledger.held():
        pass
    said = f"{path}: {rounds} rounds answered so far, ε spent {spent:.3g}"
    if found.most_rounds is not None and rounds >= found.most_rounds:
        yield Finding(
            FAULT, "policy", f"{said}; most_rounds={found.most_rounds} leaves none: nothing would be answered"
        )
    elif found.largest_epsilon is not None and spent >= found.largest_epsilon:
        yield Finding(FAULT, "policy", f"{said}; largest_epsilon={found.largest_epsilon} leaves nothing to spend")
    elif found.rules == []:
        yield Finding(FAULT, "policy", f"{said}; rules=[] allows none: nothing would be answered")
    else:
        yield Finding(OK, "policy", said)


def _read(folder: str) -> tuple[Any, Any]:
    from fedllm_helpers import data

    if not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"no folder at {folder}: it is to hold train.* and perhaps test.*")
    return data.load_parts(str(Path(folder).expanduser().absolute()))


def _cards(folder: str, cfg: DictConfig) -> Iterator[Finding]:
    with overheard("fedllm_helpers.data") as said:
        train, test = _read(folder)
    held_out = f", {len(test)} held out" if test is not None else ", none held out (no test.*): nothing is scored here"
    groups = len(set(train["specialty"]))
    yield Finding(OK, "cards", f"{folder}: {len(train)} to train on, in {groups} specialties{held_out}")
    for line in said:
        yield Finding(NOTE, "cards", line)
    batch = _batch(cfg)
    if len(train) < batch:
        state = FAULT if batch > client_app.TIMES * len(train) else NOTE
        yield Finding(state, "cards", f"a batch of {batch} is more than there are cards ({len(train)})")


def _batch(cfg: DictConfig) -> int:
    from fedllm_helpers import training

    return training.round_config(cfg).train.training_arguments.get("per_device_train_batch_size", 8)


def _step(folder: str, cfg: DictConfig) -> Iterator[Finding]:
    from fedllm_helpers import models, training
    from fedllm_helpers.models import embedded
    from fedllm_helpers.training import batches

    folder_of_model = embedded.folder_of(cfg.model.name)
    if folder_of_model is None:
        yield Finding(NOTE, "step", "not tried: the model is not here")
        return
    if cfg.model.name != embedded.NAME:  # by its name, the hub would be asked for it
        cfg = config.load(cfg, f"model.name={folder_of_model}")
    with overheard("fedllm_helpers.data"):
        train = _read(folder)[0]
    model, tokenizer = models.load(cfg)
    with overheard("fedllm_helpers.training") as said:
        rows = batches.encode(train, tokenizer, cfg.train.seq_length, cfg.dataset.prompt)
    longest = max(len(row["input_ids"]) for row in rows)
    yield Finding(OK, "length", f"the longest card has {longest} tokens; train.seq_length={cfg.train.seq_length}")
    for line in said:
        yield Finding(NOTE, "length", line)
    one = training.round_config(cfg, 1, 0, max_steps=1)
    start = time.perf_counter()
    training.fine_tune(model, tokenizer, train.select(range(min(len(train), _batch(cfg)))), one, description=None)
    seconds, held = time.perf_counter() - start, psutil.Process().memory_info().rss / 1e9
    free = psutil.virtual_memory().available / 1e9
    yield Finding(
        OK, "step", f"one step took {seconds:.1f} s; this process holds {held:.1f} GB, {free:.0f} GB are free"
    )
