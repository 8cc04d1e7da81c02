"""What a federation does for one hospital: its own held-out cards under four adapters, round by round, kept at home.

A node with ``report=FOLDER`` writes ``own.csv`` there, and nothing of it is sent. Rows have the run, the round, the
number of cards, and nats per answer token: ``untuned``; ``received``, the average as it came; ``trained``, after the
hospital's own training on it; and, with ``alone=true`` (which doubles the hospital's work), ``alone``: an adapter of
the same rounds and cards that never left the house and never met another.
"""

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Context, Message, RecordDict
from omegaconf import DictConfig

from fedllm_helpers import evaluation, models
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.updates import PASSING, kind_of
from fedllm_helpers.aggregation import edits
from fedllm_helpers.config.schema import EDITING

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
FILE = "own.csv"
COLUMNS = ("run", "round", "cards", "untuned", "received", "trained", "alone")
ALONE = f"{PASSING}alone"
Next = Callable[[Message, Context], Message]
Cards = Callable[[Context], tuple["Dataset", "Dataset"]]


def mod_for(settings: Callable[[Context], DictConfig], cards: Cards) -> Callable[[Message, Context, Next], Message]:
    """A Flower client mod that scores at home; it stands innermost, where adapters are whole.

    Args:
        settings: of a run.
        cards: (train, test) of this node.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        """Score what came, what was trained and, if wanted, what training alone gives."""
        folder = context.node_config.get("report")
        test = cards(context)[1] if folder is not None and kind_of(message) == "train" else ()
        if not len(test):
            return call_next(message, context)
        cfg, received = settings(context), from_record(message.content["arrays"])
        alone = _alone(cfg, message, context, call_next) if context.node_config.get("alone") else None
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        seen = {"received": received, "trained": from_record(reply.content["arrays"])}
        seen |= {} if alone is None else {"alone": alone}
        rows = {name: _nll(cfg, test, {**received, **adapter}, message) for name, adapter in seen.items()}
        number = int(message.content["config"]["server-round"])
        rows = {"run": context.run_id, "round": number, "cards": len(test), "untuned": _untuned(cfg, test), **rows}
        _write(Path(str(folder)).expanduser() / FILE, rows)
        return reply

    return mod


def _alone(cfg: DictConfig, message: Message, context: Context, call_next: Next) -> Adapter | None:
    """The adapter that this hospital trained alone, this round included; None where it missed the first one."""
    first = int(message.content["config"]["server-round"]) == 1
    if cfg.federation.aggregation in EDITING or not (first or ALONE in context.state):
        logger.warning("no adapter is trained alone: the rule edits the base, or this run began without this node")
        return None
    content = RecordDict({**message.content})
    if ALONE in context.state:
        content["arrays"] = context.state[ALONE]
    reply = call_next(Message(content, dst_node_id=message.metadata.dst_node_id, message_type="train"), context)
    trained: ArrayRecord = reply.content["arrays"]
    context.state[ALONE] = to_record({**from_record(content["arrays"]), **from_record(trained)})
    return from_record(context.state[ALONE])


def _nll(cfg: DictConfig, test: "Dataset", adapter: Adapter, message: Message) -> float:
    model, tokenizer = models.process.base_model(cfg)
    models.set_adapter(model, adapter)
    with models.process.cpu_threads(cfg), models.editing.edited(model, edits.edit_of(message)):
        scores = evaluation.score_answers(model, tokenizer, test, cfg)
    return float(scores.nll.sum() / scores.tokens.sum())


def _untuned(cfg: DictConfig, test: "Dataset") -> float:
    model, tokenizer = models.process.base_model(cfg)
    with models.process.cpu_threads(cfg), model.disable_adapter():
        scores = evaluation.score_answers(model, tokenizer, test, cfg)
    return float(scores.nll.sum() / scores.tokens.sum())


def _write(path: Path, row: dict[str, float]) -> None:
    try:
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(
                {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
            )
    except OSError as error:  # a report is no reason to miss a round
        logger.error("the report cannot be written: %s", error)
