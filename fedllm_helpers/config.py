"""Configuration: the course's YAML keys, typed and checked before anything is downloaded or trained."""

import difflib
import json
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedllm_helpers.schema import Config

PRESETS = ("cpu", "course", "gpu")
WHOLE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")  # training arguments from 1
FROM_ZERO = ("logging_steps", "save_steps", "save_total_limit", "warmup_steps")  # and from 0
CONF = Path(str(files("fedllm_helpers") / "conf"))


def load(source: str | Path | DictConfig = "cpu", *overrides: str) -> DictConfig:
    """Read a configuration and check every value. Taught in notebook 02.

    Args:
        source: a preset (``cpu``, ``course``, ``gpu``), the path of a YAML file, or a configuration to change.
        overrides: ``"key.path=value"``, applied last.

    Returns:
        A read-only, typed ``DictConfig`` with the fields of :class:`Config`.

    Raises:
        ValueError: unknown preset or key, wrong type or impossible value: one line that names what is allowed.
        FileNotFoundError: the YAML file does not exist.
    """
    changes = OmegaConf.create()
    for override in map(_verbatim, overrides):
        try:
            changes.merge_with_dotlist([override if "=" in override else f"{override}="])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"override {override!r}: {' '.join(str(error).split())}") from None
        if "=" not in override:
            raise ValueError(f"override {override!r}: expected 'key.path=value'")
    try:
        given = source if isinstance(source, DictConfig) else OmegaConf.load(_path_of(source))
        config = OmegaConf.structured(Config)
        config = OmegaConf.merge(config, given, changes)
        OmegaConf.set_readonly(config, False)  # merged from a configuration that is
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{source} cannot be read as YAML settings: {' '.join(str(error).split())}") from None
    _check(config, Config)
    _check_training_arguments(config.train.training_arguments, "train")
    _check_training_arguments(config.federation.training_arguments, "federation")
    _check_prompt(config.dataset.prompt)
    if config.train.learning_rate_min > config.train.learning_rate_max:
        raise ValueError(
            f"train.learning_rate_min={config.train.learning_rate_min} is above "
            f"train.learning_rate_max={config.train.learning_rate_max}: the rate falls over the rounds"
        )
    OmegaConf.set_readonly(config, True)
    return config


def explain(config: DictConfig) -> pd.DataFrame:
    """One row per setting: its key, its value here, and what it means. Taught in notebook 02.

    Args:
        config: from :func:`load`.

    Returns:
        A table with the columns ``key``, ``value`` and ``meaning``.
    """
    rows, meanings = [], OmegaConf.load(CONF / "training_arguments.yaml")
    for key, setting in _settings(Config):
        value = OmegaConf.select(config, key)
        if isinstance(value, DictConfig):
            rows += [
                (f"{key}.{name}", item, meanings.get(name, setting.metadata["meaning"])) for name, item in value.items()
            ]
        else:
            rows.append((key, value, setting.metadata["meaning"]))
    return pd.DataFrame(rows, columns=["key", "value", "meaning"])


def _settings(schema: type, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for item in fields(schema):
        found += (
            _settings(item.type, f"{prefix}{item.name}.") if is_dataclass(item.type) else [(prefix + item.name, item)]
        )
    return found


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _path_of(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise FileNotFoundError(f"no configuration file at {path}")
        return path
    if source not in PRESETS:
        raise ValueError(
            f"unknown preset {str(source)!r}{_nearest(str(source), list(PRESETS))} (or a path to a .yaml file)"
        )
    return CONF / f"{source}.yaml"


def _one_line(error: OmegaConfBaseException) -> str:
    key, first = error.full_key or "", str(error).splitlines()[0]
    if "not in" in first:
        names = [name for name, _ in _settings(Config)]
        homes = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
        depth = key.count(".") + 1  # 'modle' is compared with 'model', not with 'model.name'
        known = {".".join(name.split(".")[:depth]) for name in names if name.count(".") >= depth - 1}
        return f"unknown key {key!r}" + (f"; did you mean {homes[0]!r}?" if homes else _nearest(key, sorted(known)))
    wanted = dict(_settings(Config)).get(key)
    return f"{key}: {first}" + (f"; expected {wanted.type} ({wanted.metadata['meaning']})" if wanted else "")


def _verbatim(override: str) -> str:
    """A path, a column or a template as it was typed: YAML would cut it at " #" and read "Answer: x" as a mapping."""
    key, _, value = override.partition("=")
    text = key in ("dataset.name", "dataset.test", "dataset.prompt") or key.startswith("dataset.columns.")
    as_it_is = not text or value in ("", "null") or value.startswith(("'", '"', "${"))
    return override if as_it_is else f"{key}={json.dumps(value)}"


def _check_prompt(prompt: str) -> None:
    if prompt not in ("short", "course", "chat"):
        from fedllm_helpers.data import format_prompt  # here, because importing datasets takes a second

        format_prompt("", prompt)


def _check(config: DictConfig, schema: type) -> None:
    for key, setting in _settings(schema):
        value, limits = OmegaConf.select(config, key), setting.metadata
        if limits["choices"] and value not in limits["choices"]:
            allowed = ", ".join("null" if choice is None else str(choice) for choice in limits["choices"])
            raise ValueError(f"{key}={value}: allowed are {allowed}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low, high = limits["low"], limits["high"]
        if not (low is None or value >= low) or not (high is None or value <= high):
            between = f"from {low} to {high}" if high is not None else f"{low} or more"
            raise ValueError(f"{key}={value}: allowed is {between}")


def _check_training_arguments(arguments: DictConfig, section: str) -> None:
    # here, because importing transformers takes seconds
    from transformers import SchedulerType, TrainingArguments
    from transformers.trainer_utils import SaveStrategy

    known = [item.name for item in fields(TrainingArguments) if item.init]
    for name, value in arguments.items():
        if name == "save_strategy" and value is False:  # what YAML makes of an unquoted no
            arguments[name] = value = "no"
        where = f"{section}.training_arguments.{name}={value}"
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "transformers.TrainingArguments lists what it knows"
            raise ValueError(f"unknown key '{section}.training_arguments.{name}'; {hint}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in WHOLE and (not isinstance(value, int) or value < 1) and (name, value) != ("max_steps", -1):
            raise ValueError(f"{where}: allowed are whole numbers from 1")
        if name in FROM_ZERO and value is not None and not (number and value >= 0):
            raise ValueError(f"{where}: allowed are numbers from 0")
        if name == "learning_rate" and not (number and value > 0):
            raise ValueError(f"{where}: allowed are numbers above 0")
        kind = {"lr_scheduler_type": SchedulerType, "save_strategy": SaveStrategy}.get(name)
        if kind and value not in [item.value for item in kind]:
            raise ValueError(f"{where}: allowed are {', '.join(item.value for item in kind)}")
