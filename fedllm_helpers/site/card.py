"""A model card for the adapter of a run, filled from what the run wrote down of itself."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedllm_helpers import folders
from fedllm_helpers.models import embedded
from fedllm_helpers.site import kept

TEXT = """
# LoRA adapter from a federation of {hospitals} hospitals

An adapter for [{base}](https://huggingface.co/{base}), trained by {hospitals} hospitals that kept their
records and sent adapters. It is research and teaching material. **It is not medical advice, and nobody has tested it
for use on patients.**

## How it was made

| | |
|---|---|
| rounds | {rounds} |
| rule and strategy | {rule}, {strategy} |
| adapter | rank {rank}, α {alpha} |
| learning rate, first round to last | {first_rate:g} to {last_rate:g} |
| training data | {data} |
| privacy promised | {promised} |
| sent in all | {up:,.1f} MB up, {down:,.1f} MB down |
| hospitals that missed a round | {missed} |
| seed | {seed} |

## What it reaches

{scores}

The numbers are nats per answer token on held-out cards; lower is better. They say nothing about cards of another kind.

## What to know before you use it

- An adapter that was trained on records can give away some of them. What was promised is in the table; attack *your*
  adapter before you publish it.
- Weights are averaged over hospitals: for one of them the adapter may be worse than one trained at home.
- The base model's licence and limits hold for the two together.

## Where it comes from

Made on {date} with {versions}. Checksums: {fingerprint}.
"""


def write(folder: str | Path) -> Path:
    """Write ``README.md`` into the adapter's folder of a run.

    Returns:
        The file.

    Raises:
        FileNotFoundError: the folder is none of a finished run, or it kept no adapter.
        ValueError: a file of it is damaged, or the adapter has a text of its own.
    """
    run = kept.read(folder)
    adapter = run.folder / "adapter"
    if not adapter.is_dir():
        raise FileNotFoundError(f"{run.folder} has no adapter: a rule that leaves B at the hospitals makes none")
    target, card = adapter / "README.md", str(make(run))
    if target.is_file() and "from a federation of" not in target.read_text(encoding="utf-8"):
        raise ValueError(f"{target} is there already, and is no card of a federation: move it away")
    folders.write(target, card)
    return target


def make(run: kept.Kept) -> ModelCard:
    """The card of a run."""
    cfg, how = run.origin["config"], run.origin["config"]["federation"]
    base = embedded.HUB_ID if cfg["model"]["name"] == embedded.NAME else cfg["model"]["name"]
    results = _results(run)
    facts = ModelCardData(
        base_model=base,
        library_name="peft",
        language="en",
        tags=["lora", "federated-learning", "flower"],
        model_name=f"adapter of {run.folder.name}",
        eval_results=results or None,
    )
    missed = run.clients[run.clients["status"] != "used"].groupby("client").size()
    text = TEXT.format(
        **{"base": base, "hospitals": how["num_clients"], "rounds": len(run.rounds), "rule": how["aggregation"]},
        **{"strategy": how["strategy"], "rank": cfg["model"]["lora"]["peft_lora_r"]},
        **{"alpha": cfg["model"]["lora"]["peft_lora_alpha"], "seed": cfg["seed"], "date": run.origin["date"]},
        first_rate=cfg["train"]["learning_rate_max"],
        last_rate=cfg["train"]["learning_rate_min"],
        data=_data(cfg),
        promised=run.promised(),
        up=run.rounds["bytes_up"].sum() / 1e6,
        down=run.rounds["bytes_down"].sum() / 1e6,
        missed=", ".join(f"{client} ({count})" for client, count in missed.items()) or "none",
        scores="\n".join(f"- {one.dataset_name}: {one.metric_value}" for one in results) or "It was not scored.",
        versions=", ".join(f"{name} {number}" for name, number in run.origin["versions"].items() if number),
        fingerprint=", ".join(f"{k} {v[:16]}…" for k, v in run.origin.get("fingerprint", {}).items() if v) or "none",
    )
    return ModelCard(f"---\n{facts.to_yaml()}\n---\n{text}")


def _data(cfg: dict[str, Any]) -> str:
    name = cfg["dataset"]["name"]
    return (
        "flashcards from the Human Phenotype Ontology" if name == "hpo" else f"`{name}`, or each hospital's own cards"
    )


def _results(run: kept.Kept) -> list[EvalResult]:
    found: list[tuple[str, float]] = []
    scored = run.history.dropna(subset=["nll"])
    if len(scored):
        found.append(("the server's held-out cards, at the end", scored["nll"].iloc[-1]))
        if scored["round"].iloc[0] == 0:
            found.append(("the same cards, untuned", scored["nll"].iloc[0]))
    last = run.scores[run.scores["round"] == run.scores["round"].max()]
    for row in last.itertuples():
        noisy = f", with noise of {row.noise:.2g}" if row.noise else ""
        found.append((f"hospital {int(row.client)}, its own {int(row.cards)} held-out cards{noisy}", row.nll))
    shared = {"task_type": "text-generation", "dataset_type": "flashcards", "metric_type": "nll"}
    return [  # by their config: the hub takes results on one data set for one
        EvalResult(**shared, dataset_config=name, dataset_name=name, metric_value=round(float(nll), 4))
        for name, nll in found
    ]
