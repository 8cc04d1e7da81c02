"""What a run left in its folder, read for a report or a model card."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedllm_helpers.federation.run_folders import ORIGIN
from fedllm_helpers.federation.tables import SCORES


@dataclass(frozen=True)
class Kept:
    """The tables of a run, and where it comes from; ``scores`` is empty where no hospital scored the average."""

    folder: Path
    history: pd.DataFrame
    clients: pd.DataFrame
    scores: pd.DataFrame
    origin: dict[str, Any]

    @property
    def rounds(self) -> pd.DataFrame:
        """The rounds, without the scores of the untuned model before them."""
        return self.history[self.history["round"] > 0]

    def promised(self) -> str:
        """What privacy the settings promise, in words."""
        how = self.origin["config"]["federation"]
        record, client = how["privacy"]["record"], how["privacy"]["client"]
        said = []
        whom = "patient" if record["cards_per_patient"] else "card"
        if record["epsilon"] is not None or record["noise_multiplier"] is not None:
            given = f"ε = {record['epsilon']:g}" if record["epsilon"] is not None else ""
            given = given or f"a noise multiplier of {record['noise_multiplier']:g} a step"
            said.append(f"for each {whom}, {given} at δ = {record['delta']:g}, by DP-SGD at the hospitals")
        if client["noise_multiplier"] is not None:
            given = f"noise multiplier {client['noise_multiplier']:g}, clipping norm {client['clipping_norm']:g}"
            said.append(f"for each hospital, noise on the average ({given}, δ = {client['delta']:g})")
        if how["secure_aggregation"]["threshold"]:
            said.append(f"masks: the server opens sums of {how['secure_aggregation']['threshold']} hospitals or more")
        if (scores := how["privacy"]["scores"])["epsilon"] is not None:
            given = f"ε = {scores['epsilon']:g} at δ = {scores['delta']:g}"
            said.append(f"for each held-out {whom}, {given}, by noise on the hospitals' scores")
        if said and how["privacy"]["noise_seed"] is not None:
            said.append("but the noise has a known seed, and whoever knows it can take the noise off")
        return "; ".join(said) or "none: neither noise nor masks"


def read(folder: str | Path) -> Kept:
    """The tables of a finished run.

    Raises:
        FileNotFoundError: the folder is none of a finished run.
        ValueError: a file of it is damaged.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in (ORIGIN, "history.csv", "clients.csv") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: name the folder of a run that has ended")
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        tables = [pd.read_csv(folder / name) for name in ("history.csv", "clients.csv")]
        scores = folder / "scores.csv"
        found = pd.read_csv(scores) if scores.is_file() else pd.DataFrame(columns=SCORES)
        kept = Kept(folder, *tables, found, origin)
        kept.promised(), kept.rounds, origin["versions"].items(), origin["date"]
        tables[1][["round", "client", "status", "bytes_up", "bytes_down"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: a file of the run is damaged ({type(error).__name__}: {error})") from None
    return kept
