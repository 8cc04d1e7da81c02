"""Configuration: the course's YAML keys, typed and checked before anything is downloaded or trained."""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedllm_helpers.config import contradictions, prompts, training_arguments
from fedllm_helpers.config.schema import Config, settings_of
from fedllm_helpers.config.sealing import sealed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["checked", "explain", "load"]

PRESETS = ("cpu", "course", "gpu")
FLAGS = {"true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0"}
CONF = Path(str(files("fedllm_helpers") / "conf"))


def load(source: str | Path | DictConfig = "cpu", *overrides: str, **named: Any) -> DictConfig:
    """Read a configuration and check every value. Taught in notebook 02.

    Args:
        source: a preset (``cpu``, ``course``, ``gpu``), the path of a YAML file, or a configuration to change.
        overrides: ``"key.path=value"``, applied last.
        named: nothing; whoever writes ``seed=3`` here is told how to say it.

    Returns:
        A read-only, typed ``DictConfig`` with the fields of :class:`Config`.

    Raises:
        ValueError: unknown preset or key, wrong type, impossible value, values that contradict each other, or one that
            would have no effect: one line that names what is allowed.
        FileNotFoundError: the YAML file does not exist.
    """
    if named:
        key, value = next(iter(named.items()))
        raise ValueError(f"{key}={value!r}: settings are given as texts, as in config.load('cpu', 'seed=3')")
    changes = _changes(overrides)
    given, config = _merged(source, changes, overrides)
    said = set(_leaves(changes))
    _check(config, Config)
    if config.dataset.prompt != prompts.CHAT:
        prompts.template(config.dataset.prompt)
    _settle(config, said)
    core = config.federation.aggregation == "LoRA-XS"  # the rule decides, unless somebody says otherwise
    changed = isinstance(source, DictConfig) or "federation.aggregation" in said
    if "model.lora.core" not in said and (core or changed):
        config.model.lora.core = core
    own_file = isinstance(source, (str, Path)) and str(source) not in PRESETS
    if own_file and not any(".training_arguments." in key for key in said):
        said |= set(_leaves(given))
    contradictions.check(config, said)
    OmegaConf.set_readonly(config, True)
    return sealed(config)


def _merged(
    source: str | Path | DictConfig, changes: DictConfig, overrides: tuple[str, ...]
) -> tuple[DictConfig, DictConfig]:
    """What the source gives, and the whole of it with its changes, typed."""
    try:
        given = source if isinstance(source, DictConfig) else _read(source)
        config = OmegaConf.structured(Config)
        config = OmegaConf.merge(config, given, changes)
        OmegaConf.set_readonly(config, False)  # merged from a configuration that is
        OmegaConf.resolve(config)
        _check_given(given, changes)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from None
    except TypeError:
        raise ValueError(f"{source}, {' '.join(overrides)}: a list and named settings meet in one place") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read as YAML settings: {' '.join(str(error).split())}") from None
    return given, config


def _settle(config: DictConfig, said: set[str]) -> None:
    """Let training arguments that were said stand before those of a preset, and check them all."""
    for section in ("train", "federation"):
        arguments, where = config[section].training_arguments, f"{section}.training_arguments."
        try:
            training_arguments.settle(arguments, {key.removeprefix(where) for key in said if key.startswith(where)})
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        training_arguments.check(arguments, section)


def checked(cfg: DictConfig) -> DictConfig:
    """The configuration itself; for functions that take one.

    Raises:
        ValueError: it is something else, such as the name of a preset, or a part of a configuration.
    """
    if not isinstance(cfg, DictConfig) or not {"dataset", "model", "train", "federation"} <= cfg.keys():
        given = f"a part of a configuration, {cfg.keys()}" if isinstance(cfg, DictConfig) else repr(cfg)
        raise ValueError(f"expected a whole configuration, as config.load('cpu') makes it, not {given[:80]}")
    return cfg


def explain(config: DictConfig) -> "pd.DataFrame":
    """One row per setting: its key, its value here, and what it means. Taught in notebook 02.

    Args:
        config: from :func:`load`.

    Returns:
        A table with the columns ``key``, ``value`` and ``meaning``.

    Raises:
        ValueError: it is no configuration.
    """
    config, rows, meanings = checked(config), [], OmegaConf.load(CONF / "training_arguments.yaml")
    for key, setting in settings_of(Config):
        value = OmegaConf.select(config, key)
        if isinstance(value, DictConfig):
            rows += [
                (f"{key}.{name}", item, meanings.get(name, setting.metadata["meaning"])) for name, item in value.items()
            ]
        else:
            rows.append((key, value, setting.metadata["meaning"]))
    import pandas as pd  # half a second that a small message need not wait

    return pd.DataFrame(rows, columns=["key", "value", "meaning"])


def _nearest(word: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _changes(overrides: tuple) -> DictConfig:
    changes, right = OmegaConf.create(), "expected 'key.path=value', as in 'seed=3'"
    for override in overrides:
        if not isinstance(override, str):
            raise ValueError(f"override {str(override)[:80]!r}: {right}, each a text of its own")
        key, equals, value = override.partition("=")
        key, value = key.strip(), value if key.strip() == "dataset.prompt" else value.strip()
        if not equals or key.startswith("-") or not all(key.split(".")):
            raise ValueError(f"override {override!r}: {right}")
        try:
            changes.merge_with_dotlist([f"{key}={_verbatim(key, value)}"])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"override {override!r}: {' '.join(str(error).split())}") from None
    return changes


def _verbatim(key: str, value: str) -> str:
    """A path, a column or a template as it was typed: YAML would cut it at " #" and read "Answer: x" as a mapping."""
    text = key in ("dataset.name", "dataset.test", "dataset.prompt") or key.startswith("dataset.columns.")
    text = text or " #" in value and key in ("model.name", "train.training_arguments.output_dir")
    as_it_is = not text or value in ("", "null") or value.startswith(("'", '"', "${"))
    return value if as_it_is else json.dumps(value)


def _leaves(part: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys of what a call gave."""
    for key in part:
        node = part._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _read(source: str | Path) -> DictConfig:
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"source {str(source)[:80]!r}: expected {', '.join(PRESETS)}, the path of a .yaml file, or a configuration"
        )
    path = Path(source).expanduser()
    if path.suffix.lower() not in {".yaml", ".yml"}:
        if str(source) not in PRESETS:
            raise ValueError(
                f"unknown preset {str(source)!r}{_nearest(str(source), list(PRESETS))} (or a path to a .yaml file)"
            )
        path = CONF / f"{source}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        found = OmegaConf.load(path)
    except OSError as error:  # OmegaConf's word for a file that holds a single value
        raise ValueError(f"{path} cannot be read as YAML settings: {error}") from None
    if not found:
        raise ValueError(f"{path} is empty: expected settings, as in {CONF / 'cpu.yaml'}")
    return found


def _one_line(error: OmegaConfBaseException) -> str:
    key, first = error.full_key or "", str(error).splitlines()[0]
    if "not in" in first:
        names = [name for name, _ in settings_of(Config)]
        names += [f"train.training_arguments.{name}" for name in training_arguments.TAKEN]
        where, dot, last = key.rpartition(".")
        homes = [name for name in names if name.split(".")[-1] == last]
        known = {name.removeprefix(where + dot).split(".")[0] for name in names if name.startswith(where + dot)}
        return f"unknown key {key!r}" + (
            f"; did you mean {homes[0]!r}?" if homes else _nearest(last, sorted(known), where + dot)
        )
    if not key:  # a section that is none
        return f"the settings do not fit into {', '.join(item.name for item in fields(Config))}: {first[:120]}"
    wanted = dict(settings_of(Config)).get(key)
    kind = getattr(wanted, "type", None)
    kind = kind.__name__ if isinstance(kind, type) else kind
    return f"{key}: {first}" + (f"; expected {kind} ({wanted.metadata['meaning']})" if wanted else "")


def _check_given(*parts: DictConfig) -> None:
    """What OmegaConf takes in silence: any number for a flag (3, -1 and "2" are all true), and ??? for a default."""
    if open_ := sorted(key for part in parts for key in OmegaConf.missing_keys(part)):
        raise ValueError(f"{open_[0]}=???: it is left open; give it a value, or leave it out")
    given, flags = OmegaConf.merge(*parts), [item for item in settings_of(Config) if item[1].type is bool]
    for key, setting in flags:
        value = OmegaConf.select(given, key, throw_on_resolution_failure=False)
        if value is not None and str(value).lower() not in FLAGS:
            raise ValueError(f"{key}={value}: allowed are true and false ({setting.metadata['meaning']})")


def _check(config: DictConfig, schema: type) -> None:
    for key, setting in settings_of(schema):
        value, limits = OmegaConf.select(config, key), setting.metadata
        if limits["choices"] and value not in limits["choices"]:
            allowed = ", ".join("null" if choice is None else str(choice) for choice in limits["choices"])
            raise ValueError(f"{key}={value}: allowed are {allowed}")
        items = value if isinstance(value, ListConfig) else [value]
        if not len(items) or any(isinstance(item, str) and not item.strip() for item in items):
            raise ValueError(f"{key}={value}: it is empty; expected {setting.metadata['meaning']}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low, high = limits["low"], limits["high"]
        fits = math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)
        if not fits:
            between = f"from {low} to {high}" if high is not None else f"{low} or more"
            between += "" if setting.default is not None else ", or null"
            raise ValueError(f"{key}={value}: allowed is {between}")
