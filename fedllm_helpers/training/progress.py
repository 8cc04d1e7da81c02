"""The bar of a training: on stdout, where a notebook keeps its last line and no error stream."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments


class ProgressBar(TrainerCallback):
    """A bar over the steps of a Trainer, with the loss and the time left."""

    def __init__(self, description: str) -> None:
        self.description, self.bar = description, None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kw: Any) -> None:
        """Start the bar on stdout, where a notebook keeps its last line and no error stream."""
        style = {"unit": "step", "file": sys.stdout, "ncols": 100, "mininterval": 0.5}
        self.bar = tqdm(total=state.max_steps, desc=self.description, **style)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kw: Any) -> None:
        """One step on."""
        self.bar.update()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict | None = None, **kw: Any) -> None:
        """Show the loss beside the time left."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.2f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kw: Any) -> None:
        """Leave the finished line."""
        self.bar.close()
