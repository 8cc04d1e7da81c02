"""Rounds on disk: whole files only, the same settings only, and no bit lost when a run goes on."""

import json
import logging

import numpy as np
import pytest
import tiny
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.numpy import save_file

from fedllm_helpers import config, folders
from fedllm_helpers.federation import checkpoints

CLOCKS = ["client_seconds", "seconds"]


class Ended(Exception):
    """Stands for the end of a process between two rounds."""


def until(number):
    """An ``evaluate`` that ends the process in a round, after its training."""
    calls = []

    def evaluate(adapter):
        calls.append(1)
        if len(calls) == number + 1:  # the first call is round 0
            raise Ended
        return float(adapter["b.A"].sum())

    return evaluate


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedMedian"])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(tmp_path, name):
    extra = ["federation.strategy_arguments.server_momentum=0.9"] if name == "FedAvgM" else []
    cfg = tiny.settings(f"federation.strategy={name}", "federation.fraction_train=0.5", *extra, rounds=5)
    whole, tables = tiny.federate(cfg, evaluate=until(99), folder=tmp_path / "whole")
    for stop in (2, 1, 1):  # ended in round 2, in round 2 again, and in round 3
        with pytest.raises(Ended):
            tiny.federate(cfg, evaluate=until(stop), folder=tmp_path / "parts")
    resumed, again = tiny.federate(cfg, evaluate=until(99), folder=tmp_path / "parts")
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    assert list(whole) == list(resumed)
    first, second = tables.history_frame().drop(columns=CLOCKS), again.history_frame().drop(columns=CLOCKS)
    assert first.equals(second)
    assert tables.clients_frame().equals(again.clients_frame())


def test_a_finished_run_is_not_run_again(tmp_path):
    cfg, seen = tiny.settings(), []
    adapter, _ = tiny.federate(cfg, folder=tmp_path)
    again, tables = tiny.federate(cfg, tiny.client(seen=seen), folder=tmp_path)
    assert not seen and len(tables.history) == 3
    assert all(np.array_equal(adapter[key], again[key]) for key in adapter)


def header(path):
    """(its first 8 bytes and JSON as a dictionary, where the arrays begin)."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), 8 + size


def flipped(path, place, bit=1):
    raw = bytearray(path.read_bytes())
    raw[place] ^= bit
    path.write_bytes(raw)


def in_header(path, old, new):
    """Change text of the header, of the same length."""
    raw = path.read_bytes()
    assert raw.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new, 1))


def without(path, key):
    with safe_open(path, framework="numpy") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({name: value for name, value in kept.items() if name != key}, path, metadata=file.metadata())


DAMAGES = {  # of the newest round's file
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"x"),
    "text": lambda path: path.write_text("no arrays"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "no record": lambda path: save_file({"a": np.zeros(1)}, path),
    "a bit of an array": lambda path: flipped(path, -9),
    "a sign": lambda path: flipped(path, -1, 0x80),
    "first byte of the arrays": lambda path: flipped(path, header(path)[1]),
    "a bit of the length": lambda path: flipped(path, 0),
    "a zeroed page": lambda path: path.write_bytes(path.read_bytes()[:-64] + bytes(64)),
    "a loss in the record": lambda path: in_header(path, rb"\"loss_after\": 2.0", rb"\"loss_after\": 1.0"),
    "its settings": lambda path: in_header(path, rb"\"seed\": 0", rb"\"seed\": 1"),
    "its checksum": lambda path: in_header(path, b'"sha256":"', b'"sha257":"'),
    "name of an array": lambda path: in_header(path, b"adapter/b.A", b"adapter/c.A"),
    "type of an array": lambda path: in_header(path, b'"dtype":"F32"', b'"dtype":"I32"'),
    "shape of an array": lambda path: in_header(path, b'"shape":[2,5]', b'"shape":[5,2]'),
    "without an array": lambda path: without(path, "adapter/b.A"),
    "without a moment": lambda path: without(path, "strategy/m_t/b.A"),
    "the round before": lambda path: path.write_bytes(path.with_name("round-000003.safetensors").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_falls_back_to_the_round_before(tmp_path, caplog, damage):
    cfg = tiny.settings("federation.strategy=FedAdam", rounds=4)
    wanted, _ = tiny.federate(cfg, folder=tmp_path)
    files = sorted(tmp_path.glob("round-*"))
    assert [path.stem for path in files] == ["round-000003", "round-000004"], "the newest two are kept, nothing else"
    (tmp_path / "round-000004.damaged").write_text("of an earlier time")
    DAMAGES[damage](files[-1])
    bad, seen = files[-1].read_bytes(), []
    with caplog.at_level(logging.WARNING):
        adapter, _ = tiny.federate(cfg, tiny.client(seen=seen), folder=tmp_path)
    said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(said) == 1 and "\n" not in said[0] and "going back to the round before, 3" in said[0]
    assert {number for number, _, _ in seen} == {4}
    assert all(np.array_equal(wanted[key], adapter[key]) for key in adapter)
    assert (tmp_path / "round-000004.damaged").read_text() == "of an earlier time"
    assert (tmp_path / "round-000004.damaged1").read_bytes() == bad


def test_every_byte_of_a_round_counts(tmp_path):
    """One bit of each byte, all lengths, other lengths of the header: found in one line, or the very same content."""
    tiny.federate(tiny.settings("federation.strategy=FedAdam", rounds=1), folder=tmp_path)
    (path,) = tmp_path.glob("round-*")
    raw = path.read_bytes()
    changed = [raw[:n] + bytes([raw[n] ^ 1 << n % 8]) + raw[n + 1 :] for n in range(len(raw))]
    changed += [raw[:n] for n in range(0, len(raw), 31)] + [n.to_bytes(8, "little") + raw[8:] for n in (0, 9, 2**62)]
    changed += [raw[:n] + bytes(256) + raw[n + 256 :] for n in range(0, len(raw) - 256, 256)]
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - a dozen reasons
            checkpoints._read(path)
        assert "\n" not in str(error.value)


def test_a_round_of_an_earlier_version_is_named_and_left(tmp_path):
    path = tmp_path / "round-000001.safetensors"
    save_file({"adapter/a": np.zeros(1)}, path, metadata={"record": '{"number": 1}'})
    with pytest.raises(RuntimeError, match="of an earlier version, without checksum"):
        checkpoints.latest(tmp_path, OmegaConf.to_container(tiny.settings()))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_round_under_another_number_is_found(tmp_path, caplog):
    cfg = tiny.settings(rounds=4)
    wanted, _ = tiny.federate(cfg, folder=tmp_path)
    (tmp_path / "round-000004.safetensors").rename(tmp_path / "round-000009.safetensors")
    adapter, tables = tiny.federate(cfg, folder=tmp_path)
    assert "it is round-000004.safetensors, renamed" in caplog.text and len(tables.history) == 4
    assert all(np.array_equal(wanted[key], adapter[key]) for key in adapter)


def test_where_no_round_is_whole_nothing_is_begun_anew_or_renamed(tmp_path):
    cfg = tiny.settings(rounds=4)
    tiny.federate(cfg, folder=tmp_path)
    for path in tmp_path.glob("round-*"):
        flipped(path, -1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="no round in .* is whole .* move them away to begin anew") as error:
        tiny.federate(cfg, tiny.client({(1, 0): None}), folder=tmp_path)
    assert "\n" not in str(error.value) and before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_round_that_may_not_be_read_is_named_and_left(error, tmp_path, monkeypatch):
    cfg = tiny.settings(rounds=4)
    tiny.federate(cfg, folder=tmp_path)
    before, real = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, open

    def guarded(path, *given, **more):
        if str(path).endswith("round-000004.safetensors"):
            raise error
        return real(path, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", guarded)
        with pytest.raises(OSError, match=f"round-000004.* cannot be read .{error.strerror}.; nothing was changed"):
            tiny.federate(cfg, folder=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_longer_timeout_may_go_on_with_a_run(tmp_path):
    cfg, seen = tiny.settings(), []
    tiny.federate(cfg, folder=tmp_path)
    tiny.federate(config.load(cfg, "federation.timeout=99"), tiny.client(seen=seen), folder=tmp_path)
    assert not seen


def test_other_settings_are_named(tmp_path):
    cfg = tiny.settings()
    tiny.federate(cfg, folder=tmp_path)
    other = config.load(cfg, "seed=3", "train.learning_rate_max=0.01")
    with pytest.raises(
        ValueError, match="seed .0 there, 3 here., train.learning_rate_max .0.008 there, 0.01 here."
    ) as e:
        tiny.federate(other, folder=tmp_path)
    assert "\n" not in str(e.value) and "num_rounds" not in str(e.value)


def test_an_interrupted_write_leaves_the_last_whole_round(tmp_path, monkeypatch):
    cfg = tiny.settings()
    monkeypatch.setattr(folders.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        tiny.federate(cfg, folder=tmp_path)
    assert checkpoints.latest(tmp_path, OmegaConf.to_container(cfg)) is None
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_is_pickled(tmp_path):
    cfg = tiny.settings("federation.strategy=FedAdam")
    tiny.federate(cfg, folder=tmp_path)
    raw = sorted(tmp_path.glob("round-*"))[-1].read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {"adapter/b.A", "strategy/m_t/b.A", "strategy/v_t/b.A"} <= header.keys()
    assert json.loads(header["__metadata__"]["record"])["config"]["seed"] == 0
