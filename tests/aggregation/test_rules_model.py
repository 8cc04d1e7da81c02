"""The rules on the real model: each learns, leaves the base model as it was, and does the same on Ray."""

import numpy as np
import pytest
import torch
from families import write_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedllm_helpers import config, data, models
from fedllm_helpers.adapters import factors
from fedllm_helpers.aggregation import rules
from fedllm_helpers.attacks import poisoning
from fedllm_helpers.config.schema import RULES
from fedllm_helpers.evaluation.scoring import score_answers
from fedllm_helpers.federation import client_app, simulation
from fedllm_helpers.models import editing, embedded
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.study import lab

SMALL = (
    "federation.num_clients=2 federation.num_rounds=2 federation.training_arguments.max_steps=1 federation.threads=1 "
    "federation.training_arguments.per_device_train_batch_size=2 dataset.max_cards_per_specialty=6 "
    "train.evaluate_split=0.34 federation.evaluate_cards=6 federation.fraction_evaluate=1.0 "
    "dataset.specialties=[ear,eye,metabolism/homeostasis] train.seq_length=64 "
    "federation.evaluate_every=5"  # before the first round and after the last
)

EXACT = ("FedIT", "FedEx-LoRA", "LoRA-XS")  # an adapter, one with edits, and one of cores: opened again, in float32


def small(rule, *more):
    return config.load("cpu", *SMALL.split(), f"federation.aggregation={rule}", *more)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=() if rule in EXACT else pytest.mark.processes) for rule in RULES]
)
def test_every_rule_learns_and_leaves_the_base_model_alone(rule, tmp_path):
    cfg = small(rule, *(["model.dtype=float32"] if rule in EXACT else []))
    model, tokenizer = base_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    record = simulation.run(cfg, folder=tmp_path, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    start, history = first_adapter(cfg), record.history
    moved = {
        part for part in (factors.A, factors.B) for k in start if part in k and (start[k] != record.adapter[k]).any()
    }
    wanted = {"FedSA-LoRA": {factors.A}, "FLoRA": {factors.A}, "LoRA-XS": {factors.B}}
    assert moved == wanted.get(rule, {factors.A, factors.B})
    assert bool(record.edit) == (rule in ("FLoRA", "FedEx-LoRA")) and bool(record.personal) == (rule == "FedSA-LoRA")
    if rule == "FedSA-LoRA":
        assert history["nll"].isna().all() and len(record.personal) == 2
        whole, parts = lab.score(cfg, record), []
        for hospital in range(2):
            own = client_app.own_cards(cfg, hospital)[1]
            models.set_adapter(model, record.personal[hospital])
            parts.append(score_answers(model, tokenizer, own, cfg).nll.sum())
        assert whole.nll.sum() == pytest.approx(sum(parts), rel=1e-4) and (whole.tokens > 0).all()
    else:
        assert history["nll"].iloc[-1] < history["nll"].iloc[0] - 0.02
        assert history["nll"].iloc[-1] == pytest.approx(history["client_nll"].iloc[-1], abs=0.5)
        if rule in EXACT:
            _opens_in_plain_peft(cfg, record, tmp_path / "adapter", tokenizer)


def _opens_in_plain_peft(cfg, record, folder, tokenizer):
    """What lies on disk, opened without this package, scores as the server did."""
    test = data.load(cfg)[1].select(range(cfg.federation.evaluate_cards))
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(embedded.fetch(), dtype=torch.float32), folder
    )
    scores = score_answers(again.eval(), tokenizer, test, cfg)
    assert scores.nll.sum() / scores.tokens.sum() == pytest.approx(record.history["nll"].iloc[-1], rel=1e-4)


@pytest.mark.processes
@pytest.mark.usefixtures("on_ray")
def test_edits_that_clients_keep_in_their_state_survive_on_ray(tmp_path):
    write_model(tmp_path, 0)  # a thin one: what a node keeps does not hang on the size
    few = ["federation.num_rounds=3", "federation.fraction_evaluate=0", f"model.name={tmp_path}"]
    cfg = small("FedEx-LoRA", *few)
    ours, ray = simulation.run(cfg, progress=False), simulation.run(cfg, "ray", progress=False)
    assert factors.rank(ours.edit) == 3 * 16, "one stack of (2 − 1) · 16 for each round"
    for one, other in ((ours.adapter, ray.adapter), (ours.edit, ray.edit)):
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert ours.clients["bytes_down"].tolist() == ray.clients["bytes_down"].tolist()
    with pytest.raises(ValueError, match="client: not on Ray"):
        simulation.run(cfg, "ray", client=poisoning.client({0}, "flipped"))


def test_a_hospital_without_held_out_cards_keeps_up_with_the_edits(monkeypatch):
    """Its evaluation scores nothing, and the server counts on it having the edits all the same."""
    whole = client_app.own_cards

    def some(cfg, hospital):
        train, test = whole(cfg, hospital)
        return train, test.select([]) if hospital == 1 else test

    monkeypatch.setattr(client_app, "own_cards", some)
    record = simulation.run(small("FLoRA", "federation.num_rounds=3", "federation.evaluate_every=0"), progress=False)
    assert record.history["used"].tolist() == [2, 2, 2] and record.history["client_nll"].notna().all()


def test_frozen_a_goes_with_dp_sgd_and_it_moves():
    cfg = small("FFA-LoRA", "federation.privacy.record.noise_multiplier=0.5", "federation.fraction_evaluate=0")
    record, start = simulation.run(cfg, progress=False), first_adapter(cfg)
    changed = {key for key, value in record.adapter.items() if not np.array_equal(value, start[key])}
    assert changed == set(start), "B by training, and A by the draw that is the same on every machine"
    frozen = rules.fresh(cfg.seed, 1, rules.shapes_of(start))
    assert all(np.allclose(record.adapter[key], value, rtol=1e-6) for key, value in frozen.items() if factors.A in key)


def test_an_edit_is_what_it_says_on_the_real_model():
    """W + B·A against the adapter itself, in float32: the same logits to rounding."""
    cfg = small("FedIT", "model.dtype=float32")
    model, _ = base_model(cfg)
    rng, start = np.random.default_rng(0), first_adapter(cfg)
    adapter = {key: value + rng.normal(0, 0.02, value.shape).astype(np.float32) for key, value in start.items()}
    scaled = {k: v * editing.scaling(cfg.model.lora) if factors.B in k else v for k, v in adapter.items()}
    tokens = torch.arange(5, 25, device=model.device)[None]
    with torch.no_grad():
        models.set_adapter(model, adapter)
        wanted = model(tokens).logits
        models.set_adapter(model, start)
        plain = model(tokens).logits
        with editing.edited(model, scaled):
            found = model(tokens).logits
        assert torch.equal(model(tokens).logits, plain)
    assert float((found - wanted).norm() / (wanted - plain).norm()) < 1e-4


def test_a_poisoned_hospital_is_used_and_does_harm_and_the_median_holds():
    three = ["federation.num_clients=3", "federation.num_rounds=1", "federation.fraction_evaluate=0"]
    cfg = small("FedIT", *three)
    honest = simulation.run(cfg, progress=False)
    for kind in poisoning.KINDS:
        bad = poisoning.client({0}, kind, 20.0)
        mean = simulation.run(cfg, progress=False, client=bad)
        median = simulation.run(config.load(cfg, "federation.strategy=FedMedian"), progress=False, client=bad)
        assert (mean.clients["status"] == "used").all()
        assert mean.history["nll"].iloc[-1] > honest.history["nll"].iloc[-1] + 0.1
        assert median.history["nll"].iloc[-1] < mean.history["nll"].iloc[-1] - 0.1
    with pytest.raises(ValueError, match="poison 'noise': allowed are flipped, garbage"):
        poisoning.client({0}, "noise")
