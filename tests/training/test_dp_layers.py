"""DP-SGD on layers of many families: a step is the clipped gradients of single cards, or it is not taken."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from families import CARDS, settings

from fedllm_helpers import models, training
from fedllm_helpers.privacy import accounting
from fedllm_helpers.training import batches, dp_sgd


def prepare(folder, targets, *overrides):
    """(settings of one step of plain descent on all cards, model, tokenizer), no matrix of the adapter zero."""
    plain = ("max_steps=1", "optim=sgd", "lr_scheduler_type=constant", f"per_device_train_batch_size={len(CARDS)}")
    arguments = [f"train.training_arguments.{argument}" for argument in plain]
    cfg = settings(folder, f"model.lora.target_modules=[{targets}]", *arguments, *overrides)
    model, tokenizer = models.load(cfg)
    rng = np.random.default_rng(0)
    adapter = {key: rng.normal(0, 0.1, value.shape) for key, value in models.get_adapter(model).items()}
    models.set_adapter(model, {key: value.astype(np.float32) for key, value in adapter.items()})
    return cfg, model, tokenizer


def one_by_one(model, tokenizer):
    """Gradients of single cards, each from a backward pass of its own; zeros where a layer has none."""
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for row in batches.encode(CARDS, tokenizer, 48):
        model.zero_grad()
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels, ignore_index=batches.IGNORED).backward()
        found.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]))
    model.zero_grad()
    return torch.stack(found)


def step(cfg, model, tokenizer, limit, noise=0.0):
    """What one step of DP-SGD moves at a rate of 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in trained])
    plan = accounting.RecordPrivacy(noise, limit, 1.0, 1, 1e-3, math.inf)
    private = dp_sgd.trainer(plan, np.random.SeedSequence(0))
    training.fine_tune(model, tokenizer, CARDS, cfg, learning_rate=1.0, trainer=private, description=None)
    return before - torch.cat([p.detach().flatten() for p in trained])


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "q_proj,v_proj,down_proj"),
        ("opt", "q_proj,v_proj,out_proj"),
        ("gpt2", "c_attn,c_fc,c_proj"),
        ("bloom", "query_key_value,dense_h_to_4h"),
        ("mixtral", "q_proj,v_proj"),
        ("tied", "lm_head,q_proj"),
        ("gemma3", "q_proj,v_proj"),  # and those of its tower for images, through which no card goes
    ],
)
@pytest.mark.parametrize("rule", ["FedIT", "LoRA-XS"])
def test_a_step_is_the_clipped_gradients_of_single_cards(folder_of, family, targets, rule):
    cfg, model, tokenizer = prepare(
        folder_of(family), targets, f"federation.aggregation={rule}", "model.lora.peft_lora_r=8"
    )
    single = one_by_one(model, tokenizer)
    norms, limit = single.norm(dim=1), float(single.norm(dim=1).median())
    clipped = (single * (limit / norms).clamp(max=1)[:, None]).sum(0) / len(CARDS)
    moved = step(cfg, model, tokenizer, limit)
    assert (norms > limit).any() and float((moved - clipped).norm() / clipped.norm()) < 1e-3
    assert float(moved.norm()) <= limit


@pytest.mark.parametrize(
    ("family", "targets", "layer"),
    [
        ("opt", "fc1,fc2", "model.decoder.layers.0.fc1"),
        ("opt", "q_proj,fc2", "model.decoder.layers.0.fc2"),
        ("mixtral", "gate,q_proj", "model.layers.0.mlp.gate"),
        ("llama", "embed_tokens", "model.embed_tokens"),
        ("gpt2", "wte,c_attn", "transformer.wte"),
    ],
)
def test_layers_that_mix_cards_or_have_no_gradients_of_single_ones_are_refused(folder_of, family, targets, layer):
    """Before any noise: the adapter is what it was, and the model is left without hooks."""
    cfg, model, tokenizer = prepare(folder_of(family), targets)
    before = models.get_adapter(model)
    with pytest.raises(ValueError, match=f"DP-SGD: layer {layer} does not give one gradient for each of 6") as caught:
        step(cfg, model, tokenizer, 1.0, noise=1.0)
    assert "\n" not in str(caught.value)
    assert all(np.array_equal(before[key], value) for key, value in models.get_adapter(model).items())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_one_layer_in_two_places_and_layers_computed_twice_are_refused(folder_of):
    cfg, model, tokenizer = prepare(folder_of("llama"), "q_proj")
    layers = model.get_base_model().model.layers
    layers[1].self_attn = layers[0].self_attn
    with pytest.raises(ValueError, match="layer model.layers.1.self_attn.q_proj does not give one gradient"):
        step(cfg, model, tokenizer, 1.0)
    cfg, model, tokenizer = prepare(folder_of("llama"), "q_proj", "model.gradient_checkpointing=true")
    with pytest.raises(ValueError, match="goes without gradient_checkpointing"):
        step(cfg, model, tokenizer, 1.0)


def test_as_many_tokens_as_cards_are_still_no_cards(folder_of):
    """Rows are told by their axes, not by their number: six tokens of a batch would pass for six cards."""
    _, model, _ = prepare(folder_of("llama"), "q_proj")
    plan = accounting.RecordPrivacy(0.0, 1.0, 1.0, 1, 1e-3, math.inf)
    private = partial(dp_sgd.PrivateTrainer, plan=plan, seed=np.random.SeedSequence(0))
    trainer = private(
        model, {"output_dir": "unused", "use_cpu": True, "report_to": "none", "max_steps": 1}, list, CARDS, []
    )
    trainer.cards = 6
    trainer._check_rows("some", torch.nn.Identity(), (torch.zeros(6, 4, 32),))
    for rows in (torch.zeros(6, 32), torch.zeros(24, 32), torch.zeros(4, 6, 32)):
        with pytest.raises(ValueError, match="layer some does not give one gradient for each of 6 cards"):
            trainer._check_rows("some", torch.nn.Identity(), (rows,))


@pytest.mark.parametrize(
    ("family", "targets"), [("gemma3", "q_proj,v_proj"), ("llama", "embed_tokens"), ("opt", "fc1")]
)
def test_fedprox_passes_over_layers_without_a_gradient(folder_of, family, targets):
    """Two steps of plain descent against w ← w − η (g + μ (w − w₀)) by hand, at w₀ = where the first began."""
    cfg, model, tokenizer = prepare(folder_of(family), targets, "train.training_arguments.max_steps=2")
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    batch = batches.collate(batches.encode(CARDS, tokenizer, 48), tokenizer, batches.takes_logits_to_keep(model))
    expected = start
    for _ in range(2):
        with torch.no_grad():
            for p, value in zip(trained, expected, strict=True):
                p.copy_(value)
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        expected = [
            (p - 0.1 * (grad + 0.5 * (p - begin))).detach().clone()
            for p, grad, begin in zip(trained, grads, start, strict=True)
        ]
    with torch.no_grad():
        for p, value in zip(trained, start, strict=True):
            p.copy_(value)
    model.zero_grad()
    training.fine_tune(model, tokenizer, CARDS, cfg, learning_rate=0.1, proximal_mu=0.5, description=None)
    for p, value in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-3, atol=1e-5)
