"""Rounds as they happen, in TensorBoard or MLflow, by those libraries' own writers."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # what each needs
Log = Callable[[Mapping[str, float], int], None]


@contextlib.contextmanager
def tracked(names: list[str], folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Log]:
    """A function that writes the numbers of a round, by name, to every tracker; NaN is left out.

    TensorBoard's files lie in ``folder/tensorboard``; MLflow's server is that of ``MLFLOW_TRACKING_URI``, or the
    database ``folder/mlflow.db``. What cannot be written later is said once and ends no run.

    Args:
        names: ``tensorboard``, ``mlflow``, both or none.
        folder: of the run.
        settings: by name, kept with an MLflow run.

    Raises:
        ValueError: there is no folder to write to, it cannot be written, or a package is missing.
    """
    if names and folder is None:
        raise ValueError(f"federation.report_to={names}: the run needs a folder to write to")
    with contextlib.ExitStack() as stack:
        logs = [_begun(name, folder, settings, stack) for name in names]
        said: set[str] = set()

        def log(numbers: Mapping[str, float], step: int) -> None:
            """Write the numbers of a round."""
            finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
            for name, one in zip(names, logs, strict=True):
                try:
                    one(finite, step)
                except Exception as error:  # a full disk, a server that is away
                    if name not in said:
                        logger.warning("%s cannot be written (%s); the run goes on without it", name, error)
                    said.add(name)

        yield log


def _begun(name: str, folder: Path, settings: Mapping[str, Any], stack: contextlib.ExitStack) -> Log:
    if not find_spec(PACKAGES[name]):
        raise ValueError(f"federation.report_to={name}: not installed; pip install 'fedllm-helpers[track]'")
    try:
        return (_tensorboard if name == "tensorboard" else _mlflow)(folder, settings, stack)
    except Exception as error:  # of either library
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"federation.report_to={name}: it cannot be begun in {folder} ({said})") from None


def _tensorboard(folder: Path, settings: Mapping[str, Any], stack: contextlib.ExitStack) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))

    def log(numbers: Mapping[str, float], step: int) -> None:
        """Write and flush."""
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _mlflow(folder: Path, settings: Mapping[str, Any], stack: contextlib.ExitStack) -> Log:
    import os

    from mlflow import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("federations")
    number = experiment.experiment_id if experiment else client.create_experiment("federations")
    found = client.search_runs([number], f"tags.folder = '{folder}'")  # a run that goes on
    run = found[0].info.run_id if found else client.create_run(number, run_name=folder.name).info.run_id
    client.set_tag(run, "folder", str(folder))
    for name, value in settings.items() if not found else ():
        client.log_param(run, name, str(value)[:500])
    stack.callback(client.set_terminated, run)

    def log(numbers: Mapping[str, float], step: int) -> None:
        """Write."""
        for name, value in numbers.items():
            client.log_metric(run, name.replace(" ", "_"), value, step=step)

    return log
