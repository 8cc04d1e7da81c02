"""The audit log: the same hashes at both ends, and a change that shows."""

import json
import os

import pytest
import tiny

from fedllm_helpers.communication import compression
from fedllm_helpers.federation import chain, server_app
from fedllm_helpers.privacy import audit_log


def logged(tmp_path, app, *settings, grid=tiny.in_process.InProcessGrid):
    """A tiny federation of which server and hospital 0 keep a log."""
    cfg = tiny.settings(*settings, rounds=2)
    links = chain.compose(cfg)
    links.audited.begin(tmp_path / "server.jsonl", "7", "settings")

    def whole(message, context):
        if context.node_config["partition-id"] == 0:
            context.node_config["audit"] = str(tmp_path / "hospital.jsonl")
        return audit_log.mod(message, context, app)

    with grid(whole, 4, {"preset": "cpu"}) as nodes:
        server_app.federate(nodes, cfg, {key: value.copy() for key, value in tiny.START.items()}, chain=links)
    return [audit_log.check(tmp_path / f"{name}.jsonl") for name in ("server", "hospital")]


PACKED = "federation.compression.up=int4", "federation.compression.down=int8"


@pytest.mark.parametrize("grid", [tiny.in_process.InProcessGrid, tiny.Shuffled])  # the second packs arrays, as deployed
@pytest.mark.parametrize("settings", [(), PACKED], ids=["whole", "compressed"])
def test_both_ends_have_the_same_hashes(settings, grid, tmp_path):
    def app(message, context):
        return compression.mod(message, context, tiny.client())

    server, hospital = logged(tmp_path, app, *settings, grid=grid)
    mine = [entry for entry in hospital if entry["kind"] == "train"]
    theirs = [entry for entry in server if entry["hospital"] == 0]
    assert [entry["received"] for entry in mine] == [entry["sent"] for entry in theirs if "sent" in entry]
    assert [entry["sent"] for entry in mine] == [entry["received"] for entry in theirs if "received" in entry]
    assert len(server) == 2 * 2 * 4 and [entry["round"] for entry in mine] == [1, 2]
    assert "loss-after" in mine[0]["told"] and len(mine[0]["settings"]) == 64
    assert mine[0]["received"] != mine[0]["sent"] != mine[1]["sent"]


def test_a_refusal_stands_in_it_too(tmp_path):
    def broken(message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            raise PermissionError("not with us")
        return tiny.client()(message, context)

    server, hospital = logged(tmp_path, broken)
    assert [entry.get("refused") for entry in hospital if entry["kind"] == "train"] == ["PermissionError"] * 2
    assert [entry["received"] for entry in server if entry["hospital"] == 0 and "received" in entry] == ["", ""]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_was_changed_or_taken_out_shows(place, tmp_path):
    path = tmp_path / "log"
    for number in range(4):
        audit_log.append(path, {"round": number, "told": ["x" * 20_000]})  # longer together than what is read of it
    lines = path.read_text().splitlines()
    assert [entry["round"] for entry in audit_log.check(path)] == [0, 1, 2, 3]
    changed = [*lines]
    changed[place] = changed[place].replace(f'"round": {place}', '"round": 9')
    path.write_text("\n".join(changed) + "\n")
    with pytest.raises(ValueError, match=f"line {place + 2}: the line before it was changed"):
        audit_log.check(path)
    path.write_text("\n".join(lines[:place] + lines[place + 1 :]) + "\n")
    with pytest.raises(ValueError, match=f"line {place + 1}: the line before it was changed, or lines are missing"):
        audit_log.check(path)


def test_a_line_that_a_power_failure_cut_stays_and_counts(tmp_path):
    path = tmp_path / "log"
    audit_log.append(path, {"round": 1})
    path.write_bytes(path.read_bytes() + b'{"time": "20')
    audit_log.append(path, {"round": 2})
    assert [entry.get("round", "torn") for entry in audit_log.check(path)] == [1, "torn", 2]
    assert json.loads(path.read_text().splitlines()[-1])["round"] == 2 and oct(path.stat().st_mode)[-3:] == "600"


def test_nothing_leaves_where_the_log_cannot_be_written(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()

    def whole(message, context):
        context.node_config["audit"] = str(folder if context.node_config["partition-id"] == 0 else os.devnull)
        return tiny.client()(message, context) if message.metadata.message_type != "train" else one(message, context)

    def one(message, context):
        return (
            audit_log.mod(message, context, tiny.client())
            if context.node_config["partition-id"] == 0
            else tiny.client()(message, context)
        )

    _, tables = tiny.federate(tiny.settings(rounds=1), whole)
    status = tables.clients_frame().set_index("client")["status"]
    assert "audit log cannot be written" in status[0] and str(tmp_path) not in status[0]
    assert (status[1:] == "used").all() and str(folder) in caplog.text
