"""The grid: arms that are read back, tables that are whole, and what is said where they are not."""

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from fedllm_helpers import config
from fedllm_helpers.evaluation.scoring import AnswerScores
from fedllm_helpers.study import arms, experiments, results
from fedllm_helpers.study.arms import Result

STORED = Path(__file__).resolve().parents[2] / "notebooks" / "results"


@pytest.fixture
def small(cfg):
    """A federation of a few steps on a few cards."""
    tiny = ["dataset.max_cards_per_specialty=24", "federation.num_rounds=1", "federation.num_clients=2"]
    more = ["federation.training_arguments.max_steps=1", "dataset.specialties=[eye,cardiovascular system]"]
    return config.load("cpu", *tiny, *more, "federation.threads=1")


def test_every_arm_of_the_analysis_is_a_configuration(cfg):
    for name, (arm, changes) in experiments.ANALYSIS.items():
        config.load(cfg, *changes.split())
        assert arm.split("/")[0] in ("untuned", "federated", "same examples"), name


def test_an_arm_is_trained_once_and_then_read_back(small, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "KEPT", tmp_path)
    first = arms.score_arm(small, "federated/specialty", 8e-3, choices=True)
    assert first.bytes_up > 2 * 3_686_400 and first.bytes_down > 2 * 3_686_400
    assert len(first.scores.nll) == len(first.right) == 8
    monkeypatch.setattr(arms, "train_arm", lambda *given: pytest.fail("trained again"))
    again = arms.score_arm(small, "federated/specialty", 8e-3, choices=True)
    assert np.array_equal(again.scores.nll, first.scores.nll) and again.bytes_up == first.bytes_up
    assert arms.finished(small, "federated/specialty", 4e-3, True) is None, "another rate is another arm"
    assert not list(tmp_path.glob("*.part*"))


def test_a_tenth_and_a_lone_hospital_train_on_their_own_cards():
    cfg = config.load("cpu")
    tenth, alone = arms._cards(cfg, ["tenth"]), arms._cards(cfg, ["one hospital", "2"])
    assert len(tenth) == 120 and set(np.unique(tenth["specialty"], return_counts=True)[1]) == {20}
    assert len(alone) == 200 and len(set(alone["specialty"])) == 1
    assert len(arms._cards(cfg, ["pooled"])) == 1200


def _result(cfg, nll):
    """A result for the test cards of a configuration."""
    n = len(experiments.data.load(cfg)[1])
    return Result(AnswerScores(np.full(n, nll), np.full(n, 10)), np.zeros(0, bool), 5, 6, 1.0)


def test_stored_grids_are_found_from_any_folder_and_ones_own_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(results.read(results.stored("analysis.csv"))[0]) > 10
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "analysis.csv").touch()
    assert results.stored("analysis.csv").resolve() == tmp_path / "results" / "analysis.csv"
    with pytest.raises(FileNotFoundError, match="no results/other.csv"):
        results.stored("other.csv")


def test_tables_are_written_whole_and_read_with_their_provenance(small, tmp_path, caplog):
    done = {("untuned", 0): _result(small, 30.0), ("federated", 0): _result(small, 20.0)}
    results.write(tmp_path / "grid", small, list(done), done, dict.fromkeys(done, 0.0), seeds=[0])
    table, origin = results.read(tmp_path / "grid.csv")
    assert table["nll"].tolist() == [3.0, 2.0] and origin["seeds"] == [0] and not caplog.text
    cards, _ = results.read(tmp_path / "grid_cards.csv", ["card_id", "tokens", "federated"])
    assert (cards["federated"] == 20.0).all() and not list(tmp_path.glob("*.part"))
    origin["versions"]["torch"] = "1.0"
    (tmp_path / "grid.json").write_text(json.dumps(origin))
    caplog.set_level("INFO")
    results.read(tmp_path / "grid.csv")
    assert "made with other versions: torch 1.0 there" in caplog.text


def test_results_with_gaps_are_refused_in_one_line(tmp_path):
    (tmp_path / "grid.json").write_text(json.dumps({"versions": {}}))
    whole = pd.DataFrame([dict.fromkeys(results.RESULTS, 1.0)] * 3)
    faults = {
        "no column 'bytes_up'": whole.drop(columns="bytes_up"),
        "line 3: 'nll' has no value": whole.assign(nll=[1.0, None, 2.0]),
        "holds no rows": whole[:0],
    }
    for said, table in faults.items():
        table.to_csv(tmp_path / "grid.csv", index=False)
        with pytest.raises(ValueError, match=said) as caught:
            results.read(tmp_path / "grid.csv")
        assert "\n" not in str(caught.value)
    whole.assign(choice=None).to_csv(tmp_path / "grid.csv", index=False)
    assert len(results.read(tmp_path / "grid.csv")[0]) == 3, "not every arm answers questions"
    with pytest.raises(FileNotFoundError, match="no results at .*other.csv: make them with"):
        results.read(tmp_path / "other.csv")


def test_the_stored_tables_agree_with_each_other():
    table, origin = results.read(STORED / "analysis.csv")
    cards, _ = results.read(STORED / "analysis_cards.csv", ["card_id", "seed", "tokens"])
    assert origin["embedded_model"] and len(origin["seeds"]) >= 3
    for (arm, seed), row in table.set_index(["arm", "seed"]).iterrows():
        mine = cards[cards["seed"] == seed]
        assert row["nll"] == pytest.approx(mine[arm].sum() / mine["tokens"].sum(), abs=1e-3), arm
        if f"right: {arm}" in mine:
            assert row["choice"] == pytest.approx(mine[f"right: {arm}"].mean(), abs=1e-4)
    assert table.groupby("arm")["seed"].nunique().min() == len(origin["seeds"]), "an arm lacks a seed"


def test_one_pool_runs_one_set_of_jobs_after_the_other():
    """The federated grid tunes, and trains with the rates that it found."""
    with arms.pool(1) as pool:
        for value in ("3", "4"):
            assert dict(arms.run_all(pool, {"a": partial(int, value)}, "jobs")) == {"a": int(value)}
        with pytest.raises(ValueError, match="invalid literal"):
            list(arms.run_all(pool, {"a": partial(int, "no number")}, "jobs"))


def test_an_unknown_arm_is_named():
    command = [sys.executable, "-m", "fedllm_helpers.experiments", "analysis", "--arms", "int2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown arm 'int2': known are federated" in done.stderr


DAMAGES = {
    "truncated": lambda raw: raw[:-30],
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "text": lambda raw: b"nothing of the kind",
    "a bit": lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
}


HEAD = ",".join(results.RESULTS) + "\n"
ODD = {  # .csv and .json
    "json cut": (HEAD, '{"versions": {'),
    "json empty": (HEAD, ""),
    "json list": (HEAD, "[]"),
    "json without versions": (HEAD, "{}"),
    "json without settings": (HEAD, '{"versions": {}, "fingerprint": {"cards": "x"}}'),
    "csv empty": ("", '{"versions": {}}'),
    "csv ragged": (HEAD + "1," * 30 + "\n", '{"versions": {}}'),
    "csv of zeros": ("\0" * 99, '{"versions": {}}'),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_damaged_table_or_provenance_is_named(kind, tmp_path):
    for name, text in zip(("x.csv", "x.json"), ODD[kind], strict=True):
        (tmp_path / name).write_text(text)
    said = "has no column" if kind == "csv of zeros" else f"{kind.split()[0]} is damaged .*: make it again"
    with pytest.raises(ValueError, match=said) as error:
        results.read(tmp_path / "x.csv")
    assert "\n" not in str(error.value)


def test_no_changed_byte_of_a_result_comes_out_as_another(tmp_path):
    path = tmp_path / "arm.npz"
    arms.keep(path, nll=np.arange(4.0), right=np.zeros(0, bool), seconds=1.5)
    raw, wanted = path.read_bytes(), arms.kept(path)
    for place, bit in itertools.product(range(len(raw)), (1, 128)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
        found = arms.kept(path)
        path.with_suffix(".damaged").unlink(missing_ok=True)
        assert found is None or {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in wanted.items()
        }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_named_and_made_anew(damage, tmp_path, caplog):
    path, wanted = tmp_path / "arm.npz", {"nll": np.arange(40.0), "tokens": np.arange(40)}
    arms.keep(path, **wanted)
    assert all(np.array_equal(arms.kept(path)[name], value) for name, value in wanted.items())
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert arms.kept(path) is None and f"{path} is damaged" in caplog.text
    assert not path.exists() and (tmp_path / "arm.damaged").exists()
    arms.keep(path, **wanted)
    assert arms.kept(path) is not None and sorted(p.name for p in tmp_path.iterdir()) == ["arm.damaged", "arm.npz"]


def test_an_arm_of_another_model_is_another_arm(small, tmp_path, monkeypatch):
    names = {arms.key_of(small, "arm")}
    for text in ("a", "b"):
        monkeypatch.setattr(arms, "fingerprint", lambda cfg, cards, text=text: {"cards": "", "model": text})
        names.add(arms.key_of(small, "arm"))
    assert len(names) == 3


def test_a_grid_of_other_cards_or_another_model_is_refused(small, tmp_path):
    done = {("untuned", 0): _result(small, 30.0)}
    results.write(tmp_path / "grid", small, list(done), done, dict.fromkeys(done, 0.0), seeds=[0])
    origin = json.loads((tmp_path / "grid.json").read_text())
    assert all(len(text) == 64 for text in origin["fingerprint"].values())
    for changed in ("cards", "model"):
        other = origin | {"fingerprint": origin["fingerprint"] | {changed: "0" * 64}}
        (tmp_path / "grid.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"grid.csv: the {changed} changed since it was made: make it again"):
            results.read(tmp_path / "grid.csv")
    del origin["fingerprint"]
    (tmp_path / "grid.json").write_text(json.dumps(origin))
    results.read(tmp_path / "grid.csv")


def test_what_killed_grids_left_is_cleared_and_what_others_write_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "KEPT", tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [f"abc.{gone.pid}.part.npz", f"views-1.{gone.pid}.part", f".abc-{gone.pid}-abcdefgh.part"]
    stay = [f"abc.{os.getpid()}.part.npz", f".abc-{os.getpid()}-abcdefgh.part", "abc.npz", "mine.part", "notes.12.txt"]
    for name in left + stay:
        (tmp_path / name).touch()
    with arms.pool(1):
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)


ABANDONED = """
import os, sys
from fedllm_helpers.study import arms
if __name__ == "__main__":
    with arms.pool(1) as workers:
        print(*{workers.submit(os.getpid).result() for _ in range(2)}, flush=True)
        sys.stdin.read()
"""


@pytest.mark.processes
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "grid.py").write_text(ABANDONED)
    command = [sys.executable, str(tmp_path / "grid.py")]
    grid = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    workers = [psutil.Process(int(pid)) for pid in grid.stdout.readline().split()]
    assert workers and all(worker.is_running() for worker in workers)
    grid.kill()
    grid.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "they would wait for work for ever"
    grid.stdin.close(), grid.stdout.close()


def test_the_command_says_what_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "--help"])
    with pytest.raises(SystemExit) as caught:
        experiments.main()
    said = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and all(name in said for name in [*experiments.ANALYSIS, *experiments.GRIDS])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["federated", "--processes", "0"], "--processes 0: allowed are whole numbers from 1"),
        (["federated", "--seeds", "-1"], "--seeds -1: allowed are different whole numbers"),
        (["privacy", "--seeds", "1", "1"], "--seeds 1 1: allowed are different"),
        (["views", "--quick"], "belong to analysis"),
        (["analysis", "--arms", "nope"], "unknown arm 'nope'"),
        (["federated", "--folder", __file__], "it is a file"),
        (["analysis", "--folder", "nowhere"], "it has no federated.json"),
        (["views", "--folder", f"{__file__}/in"], "Not a directory"),
        (["everything"], "invalid choice"),
    ],
)
def test_a_wrong_command_ends_at_once(given, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments", *given])
    with pytest.raises(SystemExit) as caught:
        experiments.main()
    assert caught.value.code == 2 and says in capsys.readouterr().err
