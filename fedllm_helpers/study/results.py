"""Tables of finished arms on disk, with their provenance: written whole or not at all, checked when read."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import config, data, folders
from fedllm_helpers.adapters.screening import printable
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.study.arms import Result

logger = logging.getLogger(__name__)
RESULTS = ["arm", "seed", "learning_rate", "nll", "cards", "choice", "bytes_up", "bytes_down", "seconds"]


def stored(name: str) -> Path:
    """A file of the grids that come with the notebooks: from ``results`` here, the repository, or the package.

    Raises:
        FileNotFoundError: no grid of that name was stored.
    """
    here = Path(__file__).resolve().parents[1]
    for folder in (Path("results"), here.parent / "notebooks" / "results", here / "stored"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no results/{name}: `python -m fedllm_helpers.experiments` makes the grids")


def write(stem: Path, cfg: DictConfig, keys: list, done: dict[tuple, Result], rates: dict, **more: Any) -> None:
    """Write ``stem``.csv (a row per arm and seed), ``stem``_cards.csv (a row per seed and card) and ``stem``.json.

    Args:
        stem: path without its ending.
        cfg: settings that all arms share.
        keys: (arm, seed) of the rows, in order.
        done: the result of each, in nats per card.
        rates: the learning rate of each.
        more: further facts for the provenance.
    """
    rows, cards = [], [pd.DataFrame()]
    for name, seed in keys:
        result = done[name, seed]
        nll = result.scores.nll.sum() / result.scores.tokens.sum()
        choice = round(float(result.right.mean()), 4) if len(result.right) else float("nan")
        row = (name, seed, rates[name, seed], round(float(nll), 4), len(result.scores.nll), choice)
        rows.append((*row, result.bytes_up, result.bytes_down, round(result.seconds, 1)))
    for seed in sorted({seed for _, seed in keys}):
        of_seed = {name: done[name, other] for name, other in keys if other == seed}
        test = data.load(config.load(cfg, f"seed={seed}"))[1].select_columns(["card_id", "specialty"]).to_pandas()
        test = test.assign(seed=seed, tokens=next(iter(of_seed.values())).scores.tokens)
        test = test.assign(**{name: result.scores.nll.round(3) for name, result in of_seed.items()})
        asked = {f"right: {name}": result.right.astype(int) for name, result in of_seed.items() if len(result.right)}
        cards.append(test.assign(**asked))
    folders.write(stem.with_suffix(".csv"), pd.DataFrame(rows, columns=RESULTS).to_csv(index=False))
    folders.write(stem.with_name(f"{stem.name}_cards.csv"), pd.concat(cards).to_csv(index=False))
    origin = provenance(cfg, **more, fingerprint=fingerprint(cfg, seeds=more.get("seeds", ())))
    folders.write(stem.with_suffix(".json"), json.dumps(origin, indent=1) + "\n")


def publish(stem: Path, target: Path) -> None:
    """Put the three tables in place of older ones, unless those have rows that these have not."""
    keys = [
        set(pd.read_csv(path)[["arm", "seed"]].itertuples(index=False, name=None)) if path.is_file() else set()
        for path in (stem.with_suffix(".csv"), target.with_suffix(".csv"))
    ]
    if keys[1] - keys[0]:
        print(f"{target}.csv has {len(keys[1] - keys[0])} rows more and stays; the new tables are {stem}*")
        return
    endings = ("_cards.csv", ".json", ".csv")
    with folders.replaced(target.parent, *(target.name + ending for ending in endings)) as scratch:
        for ending in endings:
            shutil.copy(stem.with_name(stem.name + ending), scratch / (target.name + ending))


def origin_of(path: Path) -> dict[str, Any]:
    """The provenance of a stored grid.

    Raises:
        ValueError: the file is damaged.
    """
    with _whole(path):
        origin = json.loads(path.read_text(encoding="utf-8"))
        for part in ("versions", *(("config", "fingerprint") if "fingerprint" in origin else ())):
            origin[part].items()
        return origin


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        said = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} is damaged ({said}): make it again") from None


def same_origin(path: Path, origin: dict[str, Any]) -> None:
    """See that cards and model are those of a stored grid; one that has no fingerprint, or a model not here, passes.

    Raises:
        ValueError: what changed, in one line.
    """
    known = origin.get("fingerprint")
    if known:
        here = fingerprint(config.load(OmegaConf.create(origin["config"])), seeds=origin.get("seeds", ()))
        changed = [name for name, text in known.items() if text and here[name] and here[name] != text]
        if changed:
            raise ValueError(f"{path}: the {' and the '.join(changed)} changed since it was made: make it again")


def read(path: Path, columns: Iterable[str] = RESULTS) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A stored table and its provenance, the ``.json`` of the same stem.

    Args:
        path: of the ``.csv``.
        columns: that it must have; ``choice`` alone may have gaps.

    Raises:
        FileNotFoundError: there is no such table, or no provenance.
        ValueError: one of both is damaged, a column or a value is missing, or cards or model are others than it was
            made with.
    """
    beside = path.with_name(path.stem.removesuffix("_cards") + ".json")
    for file in (path, beside):
        if not file.is_file():
            raise FileNotFoundError(f"no results at {file}: make them with python -m fedllm_helpers.experiments")
    with _whole(path):
        table = pd.read_csv(path)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("its rows are longer than its header")
    origin = origin_of(beside)
    same_origin(path, origin)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}: make it again with this version of the package")
    if not len(table):
        raise ValueError(f"{path} holds no rows: make it again")
    gaps = table[list(columns)].drop(columns="choice", errors="ignore").isna()
    if gaps.any(axis=None):
        column = gaps.any().idxmax()
        line = gaps[column].idxmax() + 2
        raise ValueError(f"{path}, line {line}: {column!r} has no value; the grid goes on where it was interrupted")
    here = provenance(config.load("cpu"))["versions"]
    other = [
        f"{name} {there} there, {here.get(name)} here"
        for name, there in origin["versions"].items()
        if there != here.get(name)
    ]
    if other:
        logger.info("%s was made with other versions: %s", path, "; ".join(other))
    return table, origin
