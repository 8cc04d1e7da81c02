"""Draw README's figure from the stored grid of notebook 7: ``python docs/figure.py``, a part of ``make site``."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from fedllm_helpers import evaluation, plotting
from fedllm_helpers.study import results

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
ARMS = {"untuned": ["untuned"], "one hospital": ["one hospital, first", "one hospital, second"]}
ARMS |= {"federated": ["federated"], "pooled": ["pooled 100 %"]}


def main(folder: Path = ROOT / "docs") -> pd.DataFrame:
    """Write ``results.png``; returns what it shows: ``label``, ``arm``, ``value``, ``low``, ``high``."""
    cards, origin = results.read(results.stored("analysis_cards.csv"), ["tokens", *sum(ARMS.values(), [])])
    rows = []
    for arm, columns in ARMS.items():
        scores = evaluation.AnswerScores(cards[columns].mean(axis=1).to_numpy(), cards["tokens"].to_numpy(dtype=int))
        nll = evaluation.mean_nll(scores)
        rows.append((arm, arm, nll.value, nll.low, nll.high))
    table = pd.DataFrame(rows, columns=["label", "arm", "value", "low", "high"])
    title = f"Six hospitals, {len(cards)} held-out cards of {len(np.unique(cards['seed']))} seeds, {origin['date']}"
    figure = plotting.intervals(table, "NLL in nats per answer token (lower is better)", title)
    figure.savefig(folder / "results.png", dpi=110, metadata={"Software": None})
    return table


if __name__ == "__main__":
    print(main().round(2).to_string(index=False))
