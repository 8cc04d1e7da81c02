"""A hospital's own table: four adapters on its held-out cards, kept at home."""

import numpy as np
import pandas as pd
import pytest

from fedllm_helpers import config, data, evaluation, models
from fedllm_helpers.evaluation import at_home
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.models.process import base_model

SMALL = [
    "federation.num_clients=2",
    "federation.num_rounds=2",
    "federation.threads=1",
    "federation.evaluate_every=0",
    "federation.training_arguments={max_steps: 1, per_device_train_batch_size: 2, lr_scheduler_type: constant}",
    "dataset.specialties=[eye,ear]",
    "dataset.max_cards_per_specialty=12",
    "train.evaluate_split=0.34",
    "train.seq_length=64",
]


def test_the_table_has_what_each_adapter_gives(tmp_path):
    cfg, messages = config.load("cpu", *SMALL, "federation.fraction_evaluate=1"), []

    def app(message, context):
        if context.node_config["partition-id"] == 1:
            context.node_config.update({"report": str(tmp_path), "alone": True})
        reply = client_app.app(message, context)
        messages.append((message, reply))
        return reply

    record = simulation.run(cfg, progress=False, client=app)
    table = pd.read_csv(tmp_path / at_home.FILE)
    plain = simulation.run(cfg, progress=False)
    assert all(np.array_equal(record.adapter[key], plain.adapter[key]) for key in plain.adapter), "it changes nothing"
    assert table["round"].tolist() == [1, 2] and table["cards"].nunique() == 1

    test = client_app.own_cards(cfg, 1)[1]
    model, tokenizer = base_model(cfg)

    def nll(adapter):
        models.set_adapter(model, adapter)
        scores = evaluation.score_answers(model, tokenizer, test, cfg)
        return float(scores.nll.sum() / scores.tokens.sum())

    assert table["untuned"].tolist() == pytest.approx([table["received"][0]] * 2, abs=1e-4), "B begins at zero"
    own = record.scores.set_index(["round", "client"])["nll"]
    assert table["received"][1] == pytest.approx(own[1, 1], abs=1e-4), "what round 1 gave is what round 2 gets"
    assert own[2, 1] == pytest.approx(nll(record.adapter), abs=1e-4)
    assert record.scores["cards"].tolist() == [len(client_app.own_cards(cfg, h)[1]) for h in (0, 1)] * 2

    lone = config.load(cfg, "federation.min_share=0", "federation.fraction_evaluate=0")

    def only_it(message, context):
        if context.node_config["partition-id"] == 0 and message.metadata.message_type == "train":
            raise RuntimeError("not here")
        return client_app.app(message, context)

    alone = simulation.run(lone, progress=False, client=only_it)
    assert table["alone"][1] == pytest.approx(nll(alone.adapter), abs=1e-4), "as if it were the only one"
    assert table["trained"][0] == pytest.approx(table["alone"][0], abs=1e-4), "in round 1 they are the same"
    assert len(data.load(cfg)[1]) > len(test)


def test_a_report_that_cannot_be_written_ends_no_round(tmp_path, caplog):
    (tmp_path / at_home.FILE).mkdir()
    at_home._write(tmp_path / at_home.FILE, {"run": 1})
    assert "the report cannot be written" in caplog.text
