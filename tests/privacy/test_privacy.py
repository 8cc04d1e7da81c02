"""Clipping and noise against arithmetic, DP-SGD on the real model."""

import math
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from fedllm_helpers import config, models, training
from fedllm_helpers.federation import simulation
from fedllm_helpers.privacy import accounting, noise
from fedllm_helpers.training import batches, dp_sgd, fine_tuning, guarantees

EXACT = accounting.RecordPrivacy(0.0, 1e9, 1.0, 1, 1e-3, math.inf)  # all cards, no clipping, no noise


def test_clipping_bounds_the_norm_and_leaves_what_is_shorter():
    rng = np.random.default_rng(0)
    update = {"a": rng.normal(size=(30, 5)).astype(np.float32), "b": rng.normal(size=7).astype(np.float32)}
    whole = math.sqrt(sum((value.astype(float) ** 2).sum() for value in update.values()))
    assert noise.norm(update) == pytest.approx(whole)
    for limit in (1e-6, 0.5, 0.99 * whole, (1 - 3e-7) * whole):  # also by less than float32 can tell
        short = noise.clip(update, limit)
        assert 0.999 * limit < noise.norm(short) <= limit
        np.testing.assert_allclose(short["a"] / short["a"][0, 0], update["a"] / update["a"][0, 0], rtol=1e-4)
    assert noise.clip(update, 2 * whole) is update
    zero = {"a": np.zeros(3, np.float32)}
    assert noise.clip(zero, 1.0)["a"].tolist() == [0, 0, 0]


def test_noise_has_the_size_that_the_largest_weight_asks_for():
    mean, free = {"a": np.zeros((400, 500), np.float32)}, tiny.settings()
    drawn = (np.random.default_rng(noise.noise_seed(free, 0, 1)) for _ in range(2))
    first, second = (noise.noisy(mean, 3 * 0.25, 0.5, generator)["a"] for generator in drawn)
    assert first.std() == pytest.approx(0.5 * 3 * 0.25, rel=0.02) and abs(first.mean()) < 0.01
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02  # from the system, another each time
    seeded = config.load(free, "federation.privacy.noise_seed=7")
    again = [np.random.default_rng(noise.noise_seed(seeded, 0, number)).normal(size=99) for number in (1, 1, 2)]
    assert (again[0] == again[1]).all() and (again[0] != again[2]).all()


@pytest.mark.parametrize("weights", ["uniform", "cards"])
def test_a_round_adds_this_noise_to_the_clipped_mean(weights):
    """Against arithmetic: Σ pₖ clip(uₖ) + z C max pₖ times the standard normals of the seed."""
    settings = ["federation.privacy.client.clipping_norm=0.5", f"federation.privacy.client.weights={weights}"]
    settings += ["federation.privacy.client.noise_multiplier=0.3", "federation.privacy.noise_seed=5"]
    cfg = tiny.settings(*settings, rounds=1)
    adapter, _ = tiny.federate(cfg)
    given = [1 / 4] * 4 if weights == "uniform" else [0.1, 0.2, 0.3, 0.4]
    mean = {key: start.astype(np.float64) for key, start in tiny.START.items()}
    for hospital, share in enumerate(given):
        new = tiny.update(tiny.START, hospital, 1)
        short = noise.clip({key: new[key] - tiny.START[key] for key in new}, 0.5)
        mean = {key: mean[key] + share * short[key] for key in mean}
    drawn = np.random.default_rng(noise.noise_seed(cfg, 0, 1))
    for key in mean:
        expected = mean[key] + drawn.normal(0, 0.3 * 0.5 * max(given), mean[key].shape)
        np.testing.assert_allclose(adapter[key], expected, atol=2e-6)


def test_nobody_shares_noise():
    cfg = tiny.settings("federation.privacy.noise_seed=5")
    seeds = [(0, 1), (0, 2), (1, 1, 0), (1, 1, 1), (1, 2, 0), (0, 1, 0)]
    states = {tuple(noise.noise_seed(cfg, *numbers).generate_state(4)) for numbers in seeds if len(numbers) > 1}
    assert len(states) >= len(seeds) - 1  # (0, 1) and (0, 1, 0) are one: no purpose uses both
    free = tiny.settings()
    assert noise.noise_seed(free, 0, 1).entropy != noise.noise_seed(free, 0, 1).entropy
    assert max(noise.noise_seed(free, 0, 1).entropy for _ in range(8)) > 2**120


@pytest.mark.parametrize("weights, share", [("uniform", 1 / 4), ("cards", 40 / 100)])
def test_clipped_and_weighted_as_configured(weights, share):
    settings = ["federation.privacy.client.clipping_norm=0.05", f"federation.privacy.client.weights={weights}"]
    cfg = tiny.settings("federation.privacy.client.noise_multiplier=1e-9", *settings, rounds=1)
    adapter, _ = tiny.federate(cfg)
    parts = {}
    for hospital in range(4):
        new = tiny.update(tiny.START, hospital, 1)
        parts[hospital] = noise.clip({key: new[key] - tiny.START[key] for key in new}, 0.05)
    given = [1 / 4] * 4 if weights == "uniform" else [0.1, 0.2, 0.3, 0.4]
    assert max(given) == share
    for key, start in tiny.START.items():
        np.testing.assert_allclose(adapter[key], start + sum(p * parts[k][key] for k, p in enumerate(given)), atol=1e-6)


def test_noise_with_a_seed_survives_a_resume(tmp_path):
    cfg = tiny.settings("federation.privacy.client.noise_multiplier=0.1", "federation.privacy.noise_seed=3")
    whole, _ = tiny.federate(cfg, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tiny.federate(cfg, tiny.client({(3, 0): stop}), folder=tmp_path / "cut")
    on, _ = tiny.federate(cfg, folder=tmp_path / "cut")
    assert all((on[key] == whole[key]).all() for key in whole)


def stop(adapter, numbers):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def exact():
    """The settings and the model in float32, with an adapter whose B is not zero."""
    cfg = config.load("cpu", "model.dtype=float32", "dataset.max_cards_per_specialty=4", "model.lora.peft_lora_r=4")
    model, tokenizer = models.load(cfg)
    rng = np.random.default_rng(0)
    adapter = {
        key: value if "lora_A" in key else rng.normal(0, 0.01, value.shape).astype(np.float32)
        for key, value in models.get_adapter(model).items()
    }
    models.set_adapter(model, adapter)
    return cfg, model, tokenizer, adapter


def one_by_one(model, tokenizer, rows):
    """The gradient of each card's mean loss, from a backward pass of its own; shape (cards, values)."""
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for row in rows:
        batch = {key: part.to(model.device) for key, part in batches.collate([row], tokenizer).items()}
        labels = batch.pop("labels")
        del batch["shift_labels"]
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch, use_cache=False).logits[0].float(), labels[0]).backward()
        found.append(torch.cat([p.grad.flatten() for p in trained]))
    model.zero_grad()
    return torch.stack(found)


def test_a_step_is_the_sum_of_clipped_gradients_of_single_cards(exact, cards):
    """Plain gradient descent, so that the step shows what went into it; cards of very different lengths."""
    cfg, model, tokenizer, adapter = exact
    some = cards[0].select(range(6))
    single = one_by_one(model, tokenizer, batches.encode(some, tokenizer, 128))
    norms, limit = single.norm(dim=1), float(single.norm(dim=1).median())
    assert (norms > limit).any() and (norms < limit).any()
    clipped = (single * (limit / norms).clamp(max=1)[:, None]).sum(0) / 6
    plan = accounting.RecordPrivacy(0.0, limit, 1.0, 1, 1e-3, math.inf)
    local = training.round_config(
        cfg, max_steps=1, per_device_train_batch_size=6, optim="sgd", lr_scheduler_type="constant"
    )
    training.fine_tune(
        model,
        tokenizer,
        some,
        local,
        learning_rate=0.1,
        trainer=dp_sgd.trainer(plan, np.random.SeedSequence(0)),
        description=None,
    )
    moved = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    models.set_adapter(model, adapter)
    before = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    step = (before - moved) / 0.1
    assert float((step - clipped).norm() / clipped.norm()) < 0.01  # an order of magnitude below one card's share


def test_a_step_clips_the_mean_gradient_of_each_patient(exact, cards):
    """Six cards of three patients, one of whom has three: against sums of gradients of single cards."""
    cfg, model, tokenizer, adapter = exact
    some, whose = cards[0].select(range(6)), np.array([0, 1, 0, 2, 0, 1])
    single = one_by_one(model, tokenizer, batches.encode(some, tokenizer, 128))
    means = torch.stack([single[whose == patient].mean(0) for patient in range(3)])
    norms, limit = means.norm(dim=1), float(means.norm(dim=1).median())
    clipped = (means * (limit / norms).clamp(max=1)[:, None]).sum(0) / 3
    plan = accounting.RecordPrivacy(0.0, limit, 1.0, 1, 1e-3, math.inf)
    local = training.round_config(
        cfg, max_steps=1, per_device_train_batch_size=3, optim="sgd", lr_scheduler_type="constant"
    )
    trainer = dp_sgd.trainer(plan, np.random.SeedSequence(0), whose)
    training.fine_tune(model, tokenizer, some, local, learning_rate=0.1, trainer=trainer, description=None)
    moved = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    models.set_adapter(model, adapter)
    step = (torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]) - moved) / 0.1
    assert float((step - clipped).norm() / clipped.norm()) < 0.01
    with pytest.raises(ValueError, match="owners: 5 numbers for 6 examples"):
        wrong = dp_sgd.trainer(plan, np.random.SeedSequence(0), whose[:5])
        training.fine_tune(model, tokenizer, some, local, learning_rate=0.1, trainer=wrong, description=None)


def test_a_step_takes_patients_with_all_of_their_cards(exact, cards):
    cfg, model, tokenizer, _ = exact
    plan, whose = accounting.RecordPrivacy(1.0, 1.0, 0.3, 400, 1e-3, 1.0), np.arange(20) // 4
    arguments = fine_tuning._training_arguments(training.round_config(cfg, max_steps=400), "cpu", None, "unused")
    rows, whole = [{"n": n} for n in range(20)], lambda rows: {"rows": [row["n"] for row in rows]}
    given = {"plan": plan, "seed": np.random.SeedSequence(1), "owners": whose}
    trainer, taken = dp_sgd.PrivateTrainer(model, arguments, whole, rows, [], **given), []
    for batch in trainer.get_train_dataloader():
        drawn = set(batch.get(dp_sgd.OWNERS, []))
        assert batch.get("rows", []) == [n for n in range(20) if n // 4 in drawn]
        assert batch.get(dp_sgd.OWNERS, []) == [n // 4 for n in batch.get("rows", [])]
        taken.append(len(drawn))
    assert np.mean(taken) == pytest.approx(5 * 0.3, abs=0.15)


def test_a_patient_has_so_many_cards_and_the_rest_is_said(caplog):
    cfg = config.load("cpu", "federation.privacy.record={epsilon: 8, cards_per_patient: 2, delta: 1.0e-3}")
    names = ["ann", "bob", "ann", "", "ann", "bob", "", "cy"]
    table = Dataset.from_list(
        [{"question": f"q{n}", "answer": "a", "patient_id": name} for n, name in enumerate(names)]
    )
    small = config.load(cfg, "federation.training_arguments.per_device_train_batch_size=2")
    plan, some, owners = guarantees.planned(small, table)
    kept = [names[int(card["question"][1:])] for card in some]
    assert sorted(kept) == ["", "", "ann", "ann", "bob", "bob", "cy"] and len(set(owners)) == 5
    assert all((owners[i] == owners[j]) == (i == j or kept[i] == kept[j] != "") for i in range(7) for j in range(7))
    assert "cards_per_patient=2: 1 of 8 cards are left out" in caplog.text
    assert plan.sample_rate == 2 / 5 and plan.epsilon <= 8
    assert guarantees.planned(small, table)[1]["question"] == some["question"], "the same ones in every round"
    alone = guarantees.planned(config.load(small, "federation.privacy.record.cards_per_patient=null"), table)
    assert alone[2] is None and len(alone[1]) == 8 and alone[0].sample_rate == 2 / 8
    with pytest.raises(ValueError, match="cards_per_patient=2: the cards have no column patient_id"):
        guarantees.planned(small, table.remove_columns("patient_id"))
    with pytest.raises(ValueError, match="says whom DP-SGD protects: set epsilon"):
        config.load("cpu", "federation.privacy.record.cards_per_patient=2")


def test_a_federation_protects_patients_of_a_file(tmp_path):
    """The column comes with the file; a batch of all patients is more than there are cards of one kind."""
    path = tmp_path / "cards.csv"
    rows = [f"What is sign {n}?,Answer number {n}.,eye,p{n % 4}" for n in range(24)]
    path.write_text("question,answer,specialty,patient_id\n" + "\n".join(rows))
    given = [f"dataset.name={path}", "dataset.specialties=null", "federation.num_clients=1", "federation.num_rounds=1"]
    given += ["federation.training_arguments={max_steps: 1, per_device_train_batch_size: 2}", "federation.threads=1"]
    given += ["train.evaluate_split=false", "federation.evaluate_every=0", "train.seq_length=64"]
    private = "federation.privacy.record={noise_multiplier: 1, cards_per_patient: 3, delta: 1.0e-3}"
    record = simulation.run(config.load("cpu", *given, private), progress=False)
    assert record.clients["status"].tolist() == ["used"] and record.clients["examples"].tolist() == [2]
    with pytest.raises(ValueError, match="per_device_train_batch_size=5: a hospital has 4 patients"):
        many = "federation.training_arguments.per_device_train_batch_size=5"
        simulation.run(config.load("cpu", *given, private, many), progress=False)


def test_adapters_move_and_the_model_is_left_as_it_was_found(exact, cards):
    cfg, model, tokenizer, adapter = exact
    plan = accounting.RecordPrivacy(1.0, 1.0, 0.5, 2, 1e-3, 5.0)
    local = training.round_config(cfg, max_steps=2, per_device_train_batch_size=4)
    record = training.fine_tune(
        model,
        tokenizer,
        cards[0].select(range(8)),
        local,
        learning_rate=1e-3,
        trainer=dp_sgd.trainer(plan, np.random.SeedSequence(0)),
        description=None,
    )
    after = models.get_adapter(model)
    assert all((after[key] != adapter[key]).any() for key in adapter)  # Opacus issue 820: ε spent, nothing moved
    assert len(record.history) == 2 and record.history["loss"].between(0, 20).all()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters()) and not hasattr(
        model, "autograd_grad_sample_hooks"
    )
    models.set_adapter(model, adapter)


def test_an_empty_batch_takes_its_step_by_noise_of_the_promised_size(exact, cards):
    """Plain gradient descent on nothing: what is left is z C / B times standard normals, other ones in every step."""
    cfg, model, tokenizer, adapter = exact
    plan, some = accounting.RecordPrivacy(0.7, 2.0, 1e-12, 1, 1e-3, 1.0), cards[0].select(range(4))
    local = training.round_config(
        cfg, max_steps=1, per_device_train_batch_size=4, optim="sgd", lr_scheduler_type="constant"
    )
    steps = []
    for seed in (0, 1):
        models.set_adapter(model, adapter)
        trainer = dp_sgd.trainer(plan, np.random.SeedSequence(seed))
        record = training.fine_tune(model, tokenizer, some, local, learning_rate=1.0, trainer=trainer, description=None)
        after = models.get_adapter(model)
        steps.append(np.concatenate([(after[key] - adapter[key]).ravel() for key in adapter]))
        assert record.examples == 0 and steps[-1].std() == pytest.approx(0.7 * 2.0 / 4, rel=0.01)
    assert abs(np.corrcoef(*steps)[0, 1]) < 0.01
    models.set_adapter(model, adapter)


def test_a_training_that_was_stopped_leaves_a_model_that_trains(exact, cards):
    cfg, model, tokenizer, adapter = exact
    plan = accounting.RecordPrivacy(1.0, 1.0, 0.9, 2, 1e-3, 5.0)
    few, more = cards[0].select(range(2)), cards[0].select(range(8))

    class Stopped(dp_sgd.PrivateTrainer):
        def compute_loss(self, *arguments, **more):
            super().compute_loss(*arguments, **more)
            raise KeyboardInterrupt  # between the forward and the backward pass

    local = training.round_config(cfg, max_steps=2, per_device_train_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        stopped = partial(Stopped, plan=plan, seed=np.random.SeedSequence(0))
        training.fine_tune(model, tokenizer, few, local, learning_rate=1e-3, trainer=stopped, description=None)
    after = models.get_adapter(model)
    assert all((after[key] == adapter[key]).all() for key in adapter)
    again = dp_sgd.trainer(plan, np.random.SeedSequence(0))
    record = training.fine_tune(model, tokenizer, more, local, learning_rate=1e-3, trainer=again, description=None)
    assert record.examples > 8
    models.set_adapter(model, adapter)


def test_poisson_batches_vary_around_the_expected_size(exact, cards):
    cfg, model, tokenizer, _ = exact
    plan, sizes = accounting.RecordPrivacy(1.0, 1.0, 0.3, 400, 1e-3, 1.0), []
    local = training.round_config(cfg, max_steps=400, per_device_train_batch_size=6)
    arguments = fine_tuning._training_arguments(local, model.device.type, None, "unused")
    rows, whole = [{"n": n} for n in range(20)], lambda rows: {"rows": rows}
    trainer = dp_sgd.PrivateTrainer(model, arguments, whole, rows, [], plan=plan, seed=np.random.SeedSequence(1))
    sizes = [batch.get(dp_sgd.EXAMPLES, 0) for batch in trainer.get_train_dataloader()]
    assert len(sizes) == 400 and np.mean(sizes) == pytest.approx(6, abs=0.4)
    assert np.var(sizes) == pytest.approx(20 * 0.3 * 0.7, rel=0.3)


SMALL = (
    "federation.num_clients=2 federation.num_rounds=1 federation.training_arguments.max_steps=2 "
    "federation.training_arguments.per_device_train_batch_size=2 dataset.max_cards_per_specialty=6 "
    "federation.threads=1 train.evaluate_split=0.34 federation.evaluate_cards=4 federation.privacy.noise_seed=0"
)


def test_a_private_and_masked_federation_tells_no_losses():
    changes = ["federation.privacy.record.epsilon=8", "federation.secure_aggregation.threshold=2"]
    record = simulation.run(config.load("cpu", *SMALL.split(), *changes), progress=False)
    numbers = record.clients[["tokens", "loss_before", "loss_after"]]
    assert numbers.isna().all(axis=None) and (record.clients["status"] == "used").all()
    assert record.history["nll"].notna().all()  # on the server's own cards
    assert (record.clients["bytes_up"] < 1.01 * 4 * sum(value.size for value in record.adapter.values())).all()
    start = models.process.first_adapter(config.load("cpu"))
    assert all((record.adapter[key] != start[key]).any() for key in start)
    table = guarantees.per_hospital(config.load("cpu", *SMALL.split(), *changes), [12, 12])
    assert (table["epsilon"] <= 8).all() and (table["epsilon"] > 7.9).all() and (table["sample_rate"] == 2 / 12).all()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["federation.privacy.record.epsilon=8", "federation.privacy.record.noise_multiplier=1"], "are both set"),
        (["federation.privacy.record.clipping_norm=0"], "allowed is from 1e-09"),
        (["federation.privacy.client.noise_multiplier=0"], "allowed is from 1e-09 to 1000000.0, or null"),
        (["federation.privacy.record.delta=2"], "allowed is from"),
        (["federation.privacy.record.epsilon=8", "federation.strategy=FedProx"], "pull would be added"),
        (["federation.privacy.record.epsilon=8", "model.gradient_checkpointing=true"], "need the activations"),
        (["federation.privacy.record.epsilon=8", "federation.training_arguments.max_steps=-1"], "set it from 1"),
        (["federation.privacy.record.epsilon=inf"], "allowed is from"),
        (
            ["federation.privacy.record.epsilon=8", "federation.fraction_evaluate=0.5"],
            "scores would leave unprotected; set federation.privacy.scores.epsilon",
        ),
        (
            ["federation.privacy.client.noise_multiplier=1", "federation.fraction_evaluate=0.5"],
            "promises to hide a hospital; set this to 0",
        ),
        (
            [
                "federation.privacy.client.noise_multiplier=1",
                "federation.fraction_evaluate=0.5",
                "federation.privacy.scores.epsilon=1",
            ],
            "hides one card, and federation.privacy.client promises to hide a hospital",
        ),
        (["federation.privacy.scores.epsilon=1"], "no hospital scores; set federation.fraction_evaluate, too"),
        (["federation.privacy.scores.largest_nll=4"], "nothing is protected without epsilon"),
        (["federation.privacy.client.noise_multiplier=1", "federation.strategy=QFedAvg"], "stay at home"),
        (["federation.privacy.client.noise_multiplier=1", "federation.strategy=Krum"], "compares replies"),
    ],
)
def test_settings_that_contradict(overrides, said):
    with pytest.raises(ValueError, match=said):
        simulation.run(config.load("cpu", *SMALL.split(), *overrides), progress=False)


def test_what_a_hospital_cannot_follow():
    def plan(*changes, cards=50):
        return guarantees.record_privacy(config.load("cpu", "federation.privacy.record.epsilon=4", *changes), cards)

    assert guarantees.record_privacy(config.load("cpu"), 50) is None
    assert plan().epsilon <= 4 and plan().steps == 32
    with pytest.raises(ValueError, match="per_device_train_batch_size=4: a hospital has 3 cards"):
        plan(cards=3)
    with pytest.raises(ValueError, match="record.delta=0.05 is not below 1 / 50 cards"):
        plan("federation.privacy.record.delta=0.05")
    with pytest.raises(ValueError, match="client.delta=0.4 is not below 1 / 6 hospitals"):
        config.load("cpu", "federation.privacy.client.noise_multiplier=1", "federation.privacy.client.delta=0.4")
    assert guarantees.client_epsilon(config.load("cpu")) == math.inf
    assert 0 < guarantees.client_epsilon(config.load("cpu", "federation.privacy.client.noise_multiplier=2")) < 20
