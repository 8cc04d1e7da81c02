"""Killed after a round and gone on with: the same bits, on the real model, for every rule and all that a node keeps."""

import json

import numpy as np
import pytest
from families import write_model

from fedllm_helpers import config
from fedllm_helpers.config.schema import BY_PRODUCT, EDITING, MIXED, RULES
from fedllm_helpers.federation import client_app, resumed, simulation

SMALL = (
    "federation.num_clients=2 federation.num_rounds=2 federation.training_arguments.max_steps=1 federation.threads=1 "
    "federation.training_arguments.per_device_train_batch_size=1 dataset.max_cards_per_specialty=4 "
    "dataset.specialties=[eye,ear] train.seq_length=64 train.evaluate_split=0.25 "
    "federation.evaluate_every=0 train.save_every_round=9 model.lora.peft_lora_r=4 model.lora.peft_lora_alpha=16"
)
KINDS = {
    "plain": "",
    "int4": "federation.compression.up=int4",  # with error feedback, which is the default
    "DP-SGD": "federation.privacy.record.noise_multiplier=0.5 federation.privacy.noise_seed=1 "
    "federation.training_arguments.per_device_train_batch_size=2",
    "masks": "federation.secure_aggregation.threshold=2",
}
NO_FEEDBACK = "federation.compression.error_feedback=false"
CLOCKS = ["seconds", "train_seconds", "bytes_down"]  # a node that went on has lost its edits, and gets them all again
REAL = [("FedIT", "plain"), ("FFA-LoRA", "int4"), ("RoLoRA", "masks"), ("FLoRA", "plain"), ("FedEx-LoRA", "int4")]
REAL += [
    ("FlexLoRA", "DP-SGD"),
    ("FedSA-LoRA", "DP-SGD"),
    ("LoRA-XS", "int4"),
]  # each rule and each kind; the whole table on a thin model
TABLE = [(rule, kind) for rule in RULES for kind in KINDS if kind != "masks" or rule not in BY_PRODUCT]


def settings(rule, kind, *more):
    rounds = 3 if rule in EDITING else 2  # the third is the first that starts from two edits
    changes = [*KINDS[kind].split(), f"federation.aggregation={rule}", f"federation.num_rounds={rounds}", *more]
    if kind == "int4" and rule in MIXED:  # its factors are others in every round
        changes.append(NO_FEEDBACK)
    return config.load("cpu", *SMALL.split(), *changes)


def killed(number, place):
    """The package's ClientApp, whose process is ended when in a round the hospital of a place (from 0) is to train."""
    asked = []

    def app(message, context):
        orders = message.content.config_records.get("config", {})
        if message.metadata.message_type == "train" and orders["server-round"] == number:
            asked.append(context.node_id)
            if len(asked) > place:
                raise KeyboardInterrupt
        return client_app.app(message, context)

    return app


def same(one, other):
    assert one.keys() == other.keys()
    assert all(np.array_equal(value, other[key]) for key, value in one.items())


def check(cfg, folder, *moments):
    """A run that was killed at some (round, place in it), one after the other, against one that was not."""
    whole = simulation.run(cfg, folder=folder / "whole", progress=False)
    for moment in moments:
        with pytest.raises(KeyboardInterrupt):
            simulation.run(cfg, folder=folder / "parts", progress=False, client=killed(*moment))
    again = simulation.run(cfg, folder=folder / "parts", progress=False)
    if cfg.federation.secure_aggregation.threshold:  # the round that was cut off is another attempt, of other updates
        tried = json.loads((folder / "parts" / resumed.ATTEMPTS).read_text())
        assert tried == {str(n): 2 if n == moments[-1][0] else 1 for n in range(1, cfg.federation.num_rounds + 1)}
        assert any((value != again.adapter[key]).any() for key, value in whole.adapter.items())
    else:
        same(whole.adapter, again.adapter), same(whole.edit, again.edit)
        for hospital, own in whole.personal.items():
            same(own, again.personal[hospital])
        assert whole.clients.drop(columns=CLOCKS).equals(again.clients.drop(columns=CLOCKS))
    names = [sorted(path.name for path in (folder / part).glob("*.safetensors")) for part in ("whole", "parts")]
    edits = cfg.federation.num_rounds if cfg.federation.aggregation in EDITING else 0
    assert names[0] == names[1] and len(names[0]) == 2 + edits
    return again


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A language model of one thin layer, with random weights and the real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, 0)
    return f"model.name={folder}"


@pytest.mark.parametrize(("rule", "kind"), TABLE)
def test_every_rule_goes_on_to_the_same_bits(rule, kind, small_model, tmp_path):
    cfg = settings(rule, kind, small_model)
    check(cfg, tmp_path, (cfg.federation.num_rounds, 1))


@pytest.mark.processes
@pytest.mark.parametrize(("rule", "kind"), REAL)
def test_every_rule_goes_on_to_the_same_bits_on_the_real_model(rule, kind, tmp_path):
    cfg = settings(rule, kind)
    check(cfg, tmp_path, (cfg.federation.num_rounds, 1))


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.processes)])
@pytest.mark.parametrize("rule", EDITING)
def test_edits_over_five_rounds_killed_again_and_again_with_some_absent(rule, real, small_model, tmp_path):
    more = ["federation.num_rounds=5", "federation.num_clients=3", "federation.fraction_train=0.67"]
    cfg = settings(rule, "plain", *more, "federation.partition=iid", *([] if real else [small_model]))
    check(cfg, tmp_path, (2, 0), (4, 1), (5, 0))
