"""Batches, the Trainer underneath, and what a training returns, on the real model."""

import json
import logging

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedllm_helpers import config, data, evaluation, models, training
from fedllm_helpers.models import embedded
from fedllm_helpers.training import batches

CFG = config.load("cpu")


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_on_the_answer_alone_whatever_the_padding(loaded, cards, side):
    """The batch's loss against a plain forward of each card by itself, logits everywhere."""
    model, tokenizer = loaded
    rows = batches.encode(cards[0].select(range(5)), tokenizer, 128)
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        batch = batches.collate(rows, tokenizer)
    finally:
        tokenizer.padding_side = before
    total, count = 0.0, 0
    with torch.no_grad():
        loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss.item()
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]], device=model.device), torch.tensor(row["labels"])[1:]
            log_p = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).cpu()
            wanted = labels != batches.IGNORED
            total -= log_p[wanted, labels[wanted]].sum().item()
            count += int(wanted.sum())
    assert batch["logits_to_keep"].numel() < batch["input_ids"].shape[1]
    assert loss == pytest.approx(total / count, rel=0.01)


def test_labels_cover_the_answer_and_its_end(loaded):
    tokenizer = loaded[1]
    card = {"question": "What is ataxia?", "answer": "Impaired coordination."}
    row = batches.encode([card], tokenizer, 64)[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != batches.IGNORED]
    assert tokenizer.decode(learned) == " Impaired coordination." + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"]).startswith(data.format_prompt(card["question"]) + " Imp")


def test_seq_length_says_how_many_cards_it_cuts(loaded, cards, caplog):
    tokenizer, some = loaded[1], cards[0].select(range(10))
    with pytest.raises(ValueError, match="train.seq_length=4 cuts 10 of 10 cards .* leaves 10 of them no token"):
        batches.encode(some, tokenizer, 4)
    with caplog.at_level(logging.WARNING):
        batches.encode(some, tokenizer, 30)
    assert "train.seq_length=30 cuts" in caplog.text and "of 10 cards" in caplog.text


@pytest.mark.parametrize("n", [0, 1, 7, 8, 103])
def test_length_batches_visit_every_card_once(n):
    lengths = np.random.default_rng(0).integers(10, 80, n).tolist()
    sampler = batches.LengthBatches(lengths, 8, seed=1)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(n)) and len(sampler) == n
    assert n <= 8 or first != second


def test_padding_waste_is_at_most_a_tenth(loaded, cfg):
    """Of all cards of the default run, in batches of 8; in random order it would be several times as much."""
    train, _ = data.load(config.load("cpu"))
    rows = batches.encode(train, loaded[1], 128)

    def waste(order):
        parts = [batches.collate([rows[i] for i in order[s : s + 8]], loaded[1]) for s in range(0, len(order), 8)]
        return 1 - sum(int(p["attention_mask"].sum()) for p in parts) / sum(p["input_ids"].numel() for p in parts)

    ours = waste(list(batches.LengthBatches([len(row["input_ids"]) for row in rows], 8)))
    assert ours <= 0.10 < waste(list(range(len(rows))))


def test_same_seed_same_adapter_to_the_last_bit_and_it_learns(fresh, cards, cfg):
    model, tokenizer = fresh
    start = models.get_adapter(model)
    first = training.fine_tune(model, tokenizer, cards[0], cfg, description=None)
    tuned = models.get_adapter(model)
    models.set_adapter(model, start)
    second = training.fine_tune(model, tokenizer, cards[0], cfg, description=None)
    again = models.get_adapter(model)
    assert all(np.array_equal(tuned[key], again[key]) for key in tuned)
    assert first.history.equals(second.history) and len(first.history) == 4
    assert first.examples == 32 and first.tokens == second.tokens > 32 * 15 and 0 <= first.padding_share < 0.25
    assert sum((tuned[key] != start[key]).any() for key in tuned) > 100, "the adapter did not move"


def test_tuned_is_better_on_held_out_cards_than_untuned(fresh, cards, cfg):
    model, tokenizer = fresh
    untuned = evaluation.score_answers(model, tokenizer, cards[1], CFG)
    training.fine_tune(
        model, tokenizer, cards[0], config.load(cfg, "train.training_arguments.max_steps=12"), description=None
    )
    gain = evaluation.nll_difference(untuned, evaluation.score_answers(model, tokenizer, cards[1], CFG))
    assert gain.low > 0.1


def test_a_loss_that_is_not_finite_stops_and_puts_the_adapter_back(fresh, cards, cfg):
    model, tokenizer = fresh
    broken = {key: np.full_like(array, np.inf) for key, array in models.get_adapter(model).items()}
    models.set_adapter(model, broken)
    with pytest.raises(FloatingPointError, match="lower the rate"):
        training.fine_tune(model, tokenizer, cards[0], cfg, description=None)
    assert all(np.isinf(array).all() for array in models.get_adapter(model).values())


def test_training_arguments_mean_what_they_say(fresh, cards, cfg, tmp_path, capsys):
    """Kept adapters are PEFT folders, the newest only; accumulation, logging and schedule show in the history."""
    model, tokenizer = fresh
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 2,
                 "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant",
                 "output_dir": str(tmp_path)}  # fmt: skip
    changed = config.load(cfg, *(f"train.training_arguments.{key}={value}" for key, value in arguments.items()))
    record = training.fine_tune(model, tokenizer, cards[0], changed, learning_rate=3e-4, description="here")
    assert record.history["step"].tolist() == [2, 4, 6] and record.history["learning_rate"].unique().tolist() == [3e-4]
    assert record.examples == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}, "nothing pickled"
    base = AutoModelForCausalLM.from_pretrained(embedded.fetch(), dtype=torch.float32)
    kept = models.get_adapter(PeftModel.from_pretrained(base, tmp_path / "checkpoint-6"))
    assert all(np.array_equal(array, kept[key]) for key, array in models.get_adapter(model).items())
    shown = capsys.readouterr()
    assert "here: 100%" in shown.out and "loss" in shown.out and "here" not in shown.err


def test_checkpointing_and_right_padding_train_to_the_same_loss(cards, cfg):
    first = {}
    for name, overrides in {
        "plain": [],
        "checkpointing": ["model.gradient_checkpointing=true"],
        "right": ["train.padding_side=right"],
    }.items():
        changed = config.load(cfg, "train.training_arguments.max_steps=3", *overrides)
        model, tokenizer = models.load(changed)
        first[name] = training.fine_tune(model, tokenizer, cards[0], changed, description=None).history["loss"]
    assert first["checkpointing"].tolist() == pytest.approx(first["plain"].tolist(), rel=5e-3)
    assert first["right"].tolist() == pytest.approx(first["plain"].tolist(), rel=0.02)


def test_real_rows_train_by_file_name(wikidoc, fresh):
    model, tokenizer = fresh
    cfg = config.load("cpu", f"dataset.name={wikidoc}", "dataset.specialties=null", "train.seq_length=96",
                      "train.training_arguments.max_steps=2", "dataset.prompt=course",
                      "dataset.max_cards_per_specialty=null")  # fmt: skip
    train, _ = data.load(cfg)
    assert len(train) > 4_500, "all rows, less the held-out ones"
    record = training.fine_tune(model, tokenizer, train, cfg, description=None)
    assert record.examples == 16 and np.isfinite(record.history["loss"]).all()


def test_rows_of_one_file_as_a_learner_writes_them(tmp_path, fresh, cfg):
    (tmp_path / "mine.json").write_text(
        json.dumps([{"question": f"What is {i}?", "answer": "A number."} for i in range(9)])
    )
    mine = config.load(
        cfg, f"dataset.name={tmp_path / 'mine.json'}", "dataset.specialties=null", "train.evaluate_split=0"
    )
    train, test = data.load(mine)
    assert (len(train), len(test)) == (9, 0)
    record = training.fine_tune(*fresh, train, mine, description=None)
    assert record.examples == 18 and record.history["loss"].iloc[-1] < record.history["loss"].iloc[0]
