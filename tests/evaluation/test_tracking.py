"""Rounds in TensorBoard and MLflow, read back by those libraries."""

import math

import pytest
import tiny
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedllm_helpers import config
from fedllm_helpers.evaluation import tracking
from fedllm_helpers.federation import tables

BOTH = ["tensorboard", "mlflow"]


def test_both_have_every_round_of_a_federation(tmp_path):
    cfg = tiny.settings("federation.fraction_evaluate=1.0")
    with tracking.tracked(BOTH, tmp_path, {"config": "x"}) as log:
        _, found = tiny.federate(cfg, track=log)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = board.Scalars("round/loss_after")
    assert [(event.step, round(event.value, 4)) for event in losses] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert [event.value for event in board.Scalars("hospital 3/own nll")] == [3.0] * 3
    assert [event.value for event in board.Scalars("round/bytes_up")] == found.history_frame()["bytes_up"].tolist()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("federations").experiment_id])
    assert run.data.metrics["hospital_3/own_nll"] == 3.0 and run.data.params == {"config": "x"}
    assert len(client.get_metric_history(run.info.run_id, "round/used")) == 3 and run.info.status == "FINISHED"


def test_a_run_that_goes_on_is_one_run(tmp_path):
    for step in (1, 2):
        with tracking.tracked(BOTH, tmp_path, {"seed": 0}) as log:
            log({"round/nll": float(step), "round/loss": math.nan}, step)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("federations").experiment_id])
    assert [point.value for point in client.get_metric_history(run.info.run_id, "round/nll")] == [1.0, 2.0]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("round/nll")] == [1, 2]
    assert "round/loss" not in board.Tags()["scalars"]


@pytest.mark.parametrize("name", BOTH)
def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(name, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=f"report_to={name}: it cannot be begun in"),
        tracking.tracked([name], tmp_path / "file", {}),
    ):
        pass
    with pytest.raises(ValueError, match="needs a folder to write to"), tracking.tracked([name], None, {}):
        pass


def test_what_cannot_be_written_later_ends_no_run(tmp_path, caplog, monkeypatch):
    def full(*words, **more):
        raise OSError("No space left on device")

    with tracking.tracked(["mlflow"], tmp_path, {}) as log:
        monkeypatch.setattr(MlflowClient, "log_metric", full)
        log({"nll": 1.0}, 1), log({"nll": 1.0}, 2)
    assert caplog.text.count("mlflow cannot be written (No space left on device); the run goes on") == 1


@pytest.mark.parametrize("value", ["wandb", "[tensorboard,x]", "3"])
def test_an_unknown_tracker_is_refused(value):
    with pytest.raises(ValueError, match="federation.report_to=.*: allowed are null, tensorboard, mlflow"):
        config.load("cpu", f"federation.report_to={value}")


def test_numbers_of_a_round_have_names():
    found = tables.numbers(tables.Tables([{"round": 1, "nll": 2.5, "own": [(0, 3, 1.5, 0.0)]}], []))
    assert found == {"round/round": 1, "round/nll": 2.5, "hospital 0/own nll": 1.5}
