"""What happened in a federation: a row per round, a row per round and client, and the bar while it runs."""

import sys
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from tqdm import tqdm

from fedllm_helpers.training.schedule import Round

HISTORY = ["round", "learning_rate", "asked", "used", "examples", "tokens", "loss_before", "loss_after", "nll"]
HISTORY += ["client_nll", "bytes_down", "bytes_up", "client_seconds", "seconds"]
# what a client sends, and its column in the table of clients
NUMBERS = {
    "num-examples": "cards",
    "examples": "examples",
    "tokens": "tokens",
    "loss-before": "loss_before",
    "loss-after": "loss_after",
    "train-seconds": "train_seconds",
    "seconds": "seconds",
}
SCORES = ["round", "client", "cards", "nll", "noise"]
CLIENTS = ["round", "client", "status", "bytes_down", "bytes_up", *NUMBERS.values()]


@dataclass(frozen=True)
class Tables:
    """What happened: a row per round, and a row per round and client; ``own`` of a round has each hospital's score.

    Losses and ``nll`` are nats per answer token: before and after a hospital's training on its own cards, and of the
    average on the server's held-out cards (``client_nll``: on the hospitals' own). ``status`` is ``used`` or why not.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    clients: list[tuple] = field(default_factory=list)

    def history_frame(self) -> pd.DataFrame:
        """A row per round; round 0 is before any training."""
        return pd.DataFrame(self.history, columns=HISTORY)

    def clients_frame(self) -> pd.DataFrame:
        """A row per round and client, bytes in either direction included."""
        return pd.DataFrame(self.clients, columns=CLIENTS)

    def scores_frame(self) -> pd.DataFrame:
        """A row per round and hospital that scored the average: nats per answer token on its own held-out cards.

        ``noise`` is the standard deviation of what ``federation.privacy.scores`` added; 0 for none. With it a score is
        the mean over cards of each card's nats per token: :func:`fedllm_helpers.evaluation.told_scores.protected`.
        """
        rows = [(row["round"], *score) for row in self.history for score in row.get("own", ())]
        return pd.DataFrame(rows, columns=SCORES)


def summary(step: Round, rows: list[tuple], more_down: int = 0, more_up: int = 0) -> dict[str, Any]:
    """The row of a round from those of its hospitals; losses are NaN where no reply was used. ``more`` are bytes."""
    frame = pd.DataFrame(rows, columns=CLIENTS)
    used = frame[frame["status"] == "used"]
    weights = used["cards"] / used["cards"].sum()
    losses = {
        name: float((weights * used[name]).sum(skipna=False)) if len(used) else float("nan")
        for name in ("loss_before", "loss_after")
    }
    return {
        "round": step.number,
        "learning_rate": step.learning_rate,
        "asked": len(frame),
        "used": len(used),
        "examples": int(used["examples"].sum()),
        "tokens": int(used["tokens"].sum()),  # 0 where privacy is promised: hospitals do not tell
        **losses,
        "bytes_down": int(frame["bytes_down"].sum()) + more_down,
        "bytes_up": int(frame["bytes_up"].sum()) + more_up,
        "client_seconds": float(frame["seconds"].sum()),
    }


def numbers(tables: Tables) -> dict[str, float]:
    """What a tracker shows of the last round, by name: of the round, and of each hospital."""
    row = tables.history[-1]
    found = {f"round/{name}": value for name, value in row.items() if isinstance(value, (int, float))}
    for client in tables.clients_frame().query("round == @row['round']").to_dict("records"):
        found |= {f"hospital {client['client']}/{name}": client[name] for name in ("loss_before", "loss_after")}
    return found | {f"hospital {hospital}/own nll": nll for hospital, _, nll, _ in row.get("own", ())}


def bar(plan: list[Round], shown: bool) -> tqdm:
    """A progress bar over rounds × clients, on stdout."""
    total = sum(step.clients for step in plan)
    return tqdm(total=total, desc="federated", unit="client", file=sys.stdout, ncols=100, disable=not shown)


def report(row: dict[str, Any], total: int) -> str:
    """A row of the history as a line of a log."""
    line = f"round {row['round']} of {total}: {row['used']} of {row['asked']} hospitals"
    if row["loss_after"] == row["loss_after"]:  # where privacy is promised, they do not tell
        line += f", loss {row['loss_before']:.2f} before and {row['loss_after']:.2f} after their training"
    return f"{line}, held-out NLL of the average {row['nll']:.2f}" if "nll" in row else line
