"""Words read from an update: a row space by hand, a card's tokens by one step of SGD, and what names nothing."""

import numpy as np
import pytest
import torch
from families import settings

from fedllm_helpers import config, models, training
from fedllm_helpers.attacks import words
from fedllm_helpers.study.views import masked_view
from fedllm_helpers.training import batches

ONE = {"max_steps": 1, "per_device_train_batch_size": 1}
FIRST = "base_model.model.model.layers.0.self_attn."
PROMPTS = ["The doctor examined the", "A disease of the"]


def with_b(model, scale=0.02):
    """An adapter like one after a first round, whose B is not zero."""
    rng, start = np.random.default_rng(0), models.get_adapter(model)
    noisy = {k: rng.normal(0, scale, v.shape).astype(np.float32) for k, v in start.items() if "lora_B" in k}
    models.set_adapter(model, start | noisy)
    return start | noisy


def update_of(model, tokenizer, cards, cfg, start, **how):
    models.set_adapter(model, start)
    local = training.round_config(cfg, **ONE, **how)
    training.fine_tune(model, tokenizer, cards, local, learning_rate=0.1, description=None)
    return {key: value - start[key] for key, value in models.get_adapter(model).items()}


def tokens_of(tokenizer, cards, cfg):
    return {one for row in batches.encode(cards, tokenizer, 128, cfg.dataset.prompt) for one in row["input_ids"]}


@pytest.fixture
def step(fresh, cards, cfg):
    """(model, tokenizer), one card, its distinct tokens, and its update by one step of SGD."""
    card = cards[0].select([3])
    update = update_of(*fresh, card, cfg, with_b(fresh[0]), optim="sgd")
    return fresh, card, tokens_of(fresh[1], card, cfg), update


def found(update, fresh, held):
    return len(held & set(words.named(update, *fresh, len(held))[0].tolist()))


def test_a_row_space_is_that_of_the_outer_products():
    rng = np.random.default_rng(0)
    inputs, grads = rng.normal(size=(7, 3)), rng.normal(size=(5, 3))
    basis = words.row_space(grads @ inputs.T)
    assert basis.shape == (7, 3) and np.allclose(basis.T @ basis, np.eye(3))
    assert np.allclose(basis @ (basis.T @ inputs), inputs)
    outside = rng.normal(size=7)
    assert np.linalg.norm(basis.T @ outside) < 0.99 * np.linalg.norm(outside)
    both = words.row_space(np.outer(grads[:, 0], inputs[:, 0]), 1e-4 * np.outer(grads[:, 1], inputs[:, 1]))
    assert both.shape == (7, 2) and np.allclose(both @ (both.T @ inputs[:, 1]), inputs[:, 1]), "however short"
    assert words.row_space(grads @ inputs.T, grads[:2] @ inputs.T, np.zeros((2, 7))).shape == (7, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "given are nothing"),
        ([np.ones(3)], r"given are \(3,\)"),
        ([np.ones((2, 3)), np.ones((2, 4))], "of one width"),
        ([np.full((2, 3), np.nan)], "not finite"),
        ([np.zeros((2, 3))], "all zero: A is frozen, or B was zero"),
    ],
)
def test_what_has_no_row_space_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        words.row_space(*given)


def test_the_first_layers_read_normed_embeddings(fresh):
    model, tokenizer = fresh
    layers = words.first_layers(model)
    assert layers == [f"{FIRST}q_proj", f"{FIRST}v_proj"]
    base, ids = model.get_base_model().model, np.array([5, 300, 40_000])
    with torch.no_grad():
        x = base.layers[0].input_layernorm(base.embed_tokens(torch.tensor(ids))).double().numpy()
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(x.shape[1], 9)))[0]
    by_hand = ((x @ basis) ** 2).sum(1) / (x**2).sum(1)
    assert np.allclose(words._shares(model, layers[0], basis, ids, batch=2), by_hand, atol=1e-3)


def test_one_step_on_one_card_names_most_of_its_tokens(step):
    fresh, _, held, update = step
    ids, shares = words.named(update, *fresh, len(held))
    assert (np.diff(shares) <= 0).all() and 0.98 < shares[0] <= 1 + 1e-6 and len(ids) == len(held)
    assert found(update, fresh, held) > 0.6 * len(held)
    sent = words.texts(fresh[1], ids)
    assert "Question" in sent and all(text == text.strip() and text for text in sent)
    few = words.named(update, *fresh, len(held), known=ids[:2])[0]
    assert not set(few) & set(ids[:2]) and set(few) >= set(ids[2:])


def test_noise_masks_and_a_rank_of_one_name_few(step, cards, cfg):
    fresh, card, held, update = step
    masked = [found(masked_view(update, 0, [60, 60, 60]), fresh, held) for _ in range(4)]  # fresh ones: 0 to 3 of 35
    assert np.mean(masked) <= 2
    noise = np.random.default_rng(0)
    loud = {key: value + noise.normal(0, value.std() * 10, value.shape) for key, value in update.items()}
    assert found(loud, fresh, held) < 0.2 * len(held) < found(update, fresh, held)
    small = models.load(config.load(cfg, "model.lora.peft_lora_r=1", "model.lora.peft_lora_alpha=4"))
    of_one = update_of(*small, card, cfg, with_b(small[0]), optim="sgd")
    assert found(of_one, small, held) < 0.4 * len(held) < 0.6 * found(update, fresh, held) + 1


def test_an_update_without_a_row_space_is_said_in_one_line(step, cfg):
    (model, tokenizer), card, _, update = step
    start = {key: value * ("lora_A" in key) for key, value in models.get_adapter(model).items()}
    first = update_of(model, tokenizer, card, cfg, start, optim="sgd")
    for given, said in (
        (first, "B was zero at a single step"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.core.weight": np.ones((4, 4))}, "LoRA-XS"),
        ({key: value for key, value in update.items() if "layers.0." not in key}, "other layers: .*q_proj is not in"),
    ):
        with pytest.raises(ValueError, match=said):
            words.named(given, model, tokenizer, 5)
    with pytest.raises(ValueError, match="count=0: allowed are whole numbers from 1"):
        words.named(update, model, tokenizer, 0)


@pytest.mark.parametrize(
    ("family", "found"), [("llama", 2), ("neox", 1), ("mixtral", 2), ("gpt2", 0), ("opt", 0), ("bloom", 1)]
)
def test_families_whose_first_layer_reads_tokens_alone(folder_of, family, found):
    """Rotary and ALiBi positions come later; learned ones are added to the embeddings, and hide the token."""
    own = ["model.lora.target_modules=[q_proj,v_proj]"] if family == "mixtral" else []  # PEFT knows no default for it
    model, _ = models.load(settings(folder_of(family), *own))
    if found:
        layers = words.first_layers(model)
        assert len(layers) == found and all(".0." in name for name in layers)
        return
    with pytest.raises(ValueError, match="^[A-Za-z0-9]+: no LoRA layer reads an input .* no positions are added$"):
        words.first_layers(model)


def test_gains_are_those_by_hand_and_the_model_keeps_its_adapter(fresh, cards, cfg):
    model, tokenizer = fresh
    start = with_b(model)
    by_eye = cards[0].filter(lambda card: card["specialty"] == "eye").select(range(2))
    updates = [update_of(*fresh, by_eye.select([k]), cfg, start, optim="sgd") for k in range(2)]
    updates.append({key: 0 * value for key, value in start.items()})
    models.set_adapter(model, start)
    gains = words.gained(model, tokenizer, updates, PROMPTS, 10)
    assert all(np.array_equal(start[key], value) for key, value in models.get_adapter(model).items())
    logs = []
    for update in updates:
        models.set_adapter(model, {key: start[key] + update[key] for key in start})
        with torch.no_grad(), models.autocast(model):
            rows = [model(input_ids=torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1] for p in PROMPTS]
        logs.append(np.mean([np.log(row.float().softmax(-1).numpy() + 1e-4) for row in rows], axis=0))
    for k, (ids, values) in enumerate(gains):
        by_hand = logs[k] - np.mean([logs[j] for j in range(3) if j != k], axis=0)
        assert np.allclose(values, by_hand[ids], atol=1e-5) and (values > 0).all() and len(ids) <= 10
        others = np.setdiff1d(np.arange(len(by_hand)), [*ids, *tokenizer.all_special_ids])
        assert values.min() >= by_hand[others].max() - 1e-5


def test_gains_of_a_broken_update_and_bad_arguments(fresh):
    model, tokenizer = fresh
    zero = {key: 0 * value for key, value in models.get_adapter(model).items()}
    broken = {key: value + np.nan for key, value in zero.items()}
    first, second = words.gained(model, tokenizer, [zero, broken], PROMPTS, 5)
    assert len(first[0]) == 5 and len(second[0]) == 0, "where nothing is likely, nothing is named"
    for updates, prompts, said in (
        ([zero], PROMPTS, "1 updates and 2 prompts"),
        ([zero, zero], [], "2 updates and 0 prompts"),
        ([zero, zero], "The doctor", "2 updates and 1 prompts"),
        ([zero, {"x": np.ones(2)}], PROMPTS, "another model"),
    ):
        with pytest.raises(ValueError, match=said):
            words.gained(model, tokenizer, updates, prompts, 5)
