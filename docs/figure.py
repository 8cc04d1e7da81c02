"""Draw README's figure from the stored grid of notebook 3: ``python docs/figure.py``, a part of ``make site``."""

from pathlib import Path

import matplotlib
import pandas as pd

from fedllm_helpers import evaluation, plotting
from fedllm_helpers.study import results

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"work": "the same work per hospital", "examples": "the same examples in all"}


def main(folder: Path = ROOT / "docs") -> pd.DataFrame:
    """Write ``results.png``; returns what it shows: ``budget``, ``label``, ``arm``, ``value``, ``low``, ``high``."""
    cards, origin = results.read(results.stored("federated_cards.csv"), ["tokens", "untuned", "federated/specialty"])
    tokens = cards["tokens"].to_numpy(dtype=int)

    def scores(columns: list[str]) -> evaluation.AnswerScores:
        """Nats per card, the mean over some columns."""
        return evaluation.AnswerScores(cards[columns].mean(axis=1).to_numpy(), tokens)

    federated, rows = scores(["federated/specialty"]), []
    for what, budget in BUDGETS.items():
        alone = [name for name in cards if name.startswith(f"same {what}/one hospital")]
        arms = {"one hospital": alone, "pooled": [f"same {what}/pooled"], "federated": ["federated/specialty"]}
        for arm, columns in arms.items():
            apart = evaluation.nll_difference(scores(columns), federated)
            rows.append((budget, arm, arm, apart.value, apart.low, apart.high))
    table = pd.DataFrame(rows, columns=["budget", "label", "arm", "value", "low", "high"])
    untuned = evaluation.nll_difference(scores(["untuned"]), federated).value
    title = f"Six hospitals, {len(cards)} held-out cards of {cards['seed'].nunique()} seeds (untuned: {untuned:+.2f})"
    panels = {budget: table[table["budget"] == budget] for budget in BUDGETS.values()}
    figure = plotting.budgets(panels, "NLL minus the federation's (nats per token)", title)
    figure.savefig(folder / "results.png", dpi=110, metadata={"Software": None})
    return table


if __name__ == "__main__":
    print(main().round(2).to_string(index=False))
