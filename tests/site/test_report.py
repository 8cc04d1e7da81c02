"""The report of a run, the hospital's own, and the model card: every number held against the tables."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from fedllm_helpers import config
from fedllm_helpers.federation.provenance import provenance
from fedllm_helpers.federation.tables import CLIENTS, HISTORY, SCORES
from fedllm_helpers.privacy import audit_log
from fedllm_helpers.site import card, commands, kept, report


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two rounds, in which hospital 1 missed one."""
    cfg = config.load(
        "cpu", "federation.num_clients=2", "federation.num_rounds=2", "federation.privacy.record.epsilon=8"
    )
    rows = [{"round": 0, "nll": 3.1}]
    rows += [{"round": n, "nll": 3 - n / 4, "bytes_up": 4e6, "bytes_down": 8e6, "seconds": 10.0} for n in (1, 2)]
    pd.DataFrame(rows, columns=HISTORY).to_csv(tmp_path / "history.csv", index=False)
    clients = [(1, 0, "used"), (1, 1, "it failed: <script>alert(1)</script>"), (2, 0, "used"), (2, 1, "used")]
    rows = [{"round": a, "client": b, "status": c, "bytes_up": 1, "bytes_down": 2} for a, b, c in clients]
    pd.DataFrame(rows, columns=CLIENTS).to_csv(tmp_path / "clients.csv", index=False)
    rows = [(1, 0, 40, 2.75, 0.0), (2, 0, 40, 2.5, 0.0), (1, 1, 30, 2.5, 0.0), (2, 1, 30, 2.625, 0.25)]
    pd.DataFrame(rows, columns=SCORES).to_csv(tmp_path / "scores.csv", index=False)
    origin = provenance(cfg, fingerprint={"cards": "c" * 64, "model": "d" * 64})
    (tmp_path / "provenance.json").write_text(json.dumps(origin))
    (tmp_path / "adapter").mkdir()
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_with_every_number(run):
    page = Page(report.write(run).read_text())
    text = " ".join(page.text.split())
    for said in ("2 of 2", "8.0 MB up, 16.0 MB down", "2.500 nats per token", "ε = 8 at δ = 0.001", "smollm2-135m"):
        assert said in text, said
    assert not [tag for tag, _ in page.tags if tag == "script"] and "<script>alert(1)</script>" in page.text
    loads = [value for _, given in page.tags for name, value in given.items() if name in ("src", "href")]
    assert loads and all(value.startswith("data:") for value in loads)
    assert all(given.get("alt") for tag, given in page.tags if tag == "img")
    assert sum(given.get("class") == "missed" for _, given in page.tags) == 1
    assert "2.625" in text and "noise of a standard deviation of up to 0.25" in text and "num_rounds: 2" in page.text


def test_the_hospitals_own_report(tmp_path):
    rows = [(7, 1, 20, 3.0, 3.0, 2.75, None), (7, 2, 20, 3.0, 2.5, 2.25, None)]
    columns = ["run", "round", "cards", "untuned", "received", "trained", "alone"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "own.csv", index=False)
    text = " ".join(Page(report.write(tmp_path, tmp_path / "ours.html").read_text()).text.split())
    assert "held-out cards 20" in text and "received, at the end 2.500" in text and "alone, at the end" not in text


def test_the_card_is_one_that_the_hub_reads(run):
    found = ModelCard.load(card.write(run))
    assert found.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and found.data.library_name == "peft"
    values = {one.dataset_name: one.metric_value for one in found.data.eval_results}
    assert values["the server's held-out cards, at the end"] == 2.5 and values["the same cards, untuned"] == 3.1
    assert values["hospital 1, its own 30 held-out cards, with noise of 0.25"] == 2.625
    assert "| hospitals that missed a round | 1 (1) |" in found.text and "ε = 8" in found.text
    assert "not medical advice" in found.text and "cards cccccccccccccccc…" in found.text
    card.write(run)  # again, over its own
    (run / "adapter" / "README.md").write_text("my own notes")
    with pytest.raises(ValueError, match="is there already, and is no card of a federation"):
        card.write(run)
    assert (run / "adapter" / "README.md").read_text() == "my own notes"


PROMISES = {
    "federation.privacy.client.noise_multiplier=0.5": "noise on the average (noise multiplier 0.5",
    "federation.secure_aggregation.threshold=4": "sums of 4 hospitals",
    "federation.privacy.scores.epsilon=4 federation.fraction_evaluate=1": "for each held-out card, ε = 4 at δ = 0.001",
    "seed=0": "none: neither noise nor masks",
}


@pytest.mark.parametrize("setting", PROMISES)
def test_what_was_promised_is_said(setting, run):
    given = provenance(config.load("cpu", *setting.split()))
    (run / "provenance.json").write_text(json.dumps(given))
    assert PROMISES[setting] in kept.read(run).promised()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("provenance.json", "{", "damaged"),
        ("provenance.json", "[]", "damaged"),
        ("history.csv", "x\n1\n", "damaged"),
        ("clients.csv", "", "damaged"),
        ("history.csv", None, "has no history.csv: name the folder of a run that has ended"),
    ],
)
def test_a_folder_that_is_no_finished_run(name, text, said, run, capsys):
    (run / name).unlink() if text is None else (run / name).write_text(text)
    for command in ("report", "card"):
        with pytest.raises(SystemExit) as ended:
            commands.main([command, str(run)])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_the_commands(run, capsys):
    commands.main(["report", str(run)]), commands.main(["card", str(run)])
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "adapter" / "README.md")]
    audit_log.append(run / "log", {"round": 1, "sent": "a" * 64}), audit_log.append(run / "log", {"round": 2})
    commands.main(["log", str(run / "log")])
    out = capsys.readouterr().out
    assert "round=1  sent=aaaaaaaaaaaa\n" in re.sub("time=[^ ]+  ", "", out) and "whole: no line was changed" in out
    (run / "log").write_text((run / "log").read_text().replace('"round": 1', '"round": 3'))
    with pytest.raises(SystemExit) as ended:
        commands.main(["log", str(run / "log")])
    assert ended.value.code == 2 and "line 2: the line before it was changed" in capsys.readouterr().err
