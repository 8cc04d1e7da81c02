"""LoRA-XS in a model: factors against LAPACK, updates against PEFT, and what does not fit."""

import numpy as np
import pytest
import scipy.linalg
import torch
from families import CARDS, make, settings
from peft import LoraConfig, PeftModel, PsoftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedllm_helpers import communication, config, models, training
from fedllm_helpers.models import cores
from fedllm_helpers.models.process import base_model, first_adapter

XS = ("federation.aggregation=LoRA-XS", "model.lora.peft_lora_r=5", "model.lora.peft_lora_alpha=15")
TARGETS = {"llama": "q_proj,down_proj", "gpt2": "c_attn,c_fc", "neox": "query_key_value,dense_4h_to_h"}
MATRICES = {
    "square": ((12, 12), 4),
    "wide": ((5, 9), 2),
    "tall": ((9, 5), 5),
    "large": ((70, 40), 4),  # by ARPACK
    "large and wide": ((40, 90), 9),
    "one": ((30, 20), 1),
}


def matrix(shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}
    quiet = {"gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}}

    def get(family):
        if family not in made:
            made[family] = make(root / family, family, quiet.get(family))
        return made[family]

    return get


def loaded(folder, family, *more):
    cfg = settings(folder, f"model.lora.target_modules=[{TARGETS[family]}]", *XS, *more)
    return cfg, *models.load(cfg)


def moved(model, seed=1):
    """Some cores that are not zero."""
    rng, start = np.random.default_rng(seed), models.get_adapter(model)
    models.set_adapter(model, {k: rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in start.items()})
    return models.get_adapter(model)


@torch.no_grad()
def says(model):
    return model(input_ids=torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("name", MATRICES)
def test_factors_are_the_best_approximation_with_signs_that_every_library_finds(name):
    shape, size = MATRICES[name]
    weight = matrix(shape)
    basis, first = cores.bases(weight, size)
    assert basis.shape == (shape[0], size) and first.shape == (size, shape[1])
    assert np.allclose(first @ first.T, np.eye(size), atol=1e-6)
    u, s, vt = scipy.linalg.svd(weight, full_matrices=False, lapack_driver="gesvd")
    assert np.allclose(basis @ first, (u[:, :size] * s[:size]) @ vt[:size], atol=1e-5)
    assert np.allclose(np.linalg.norm(basis, axis=0), s[:size], rtol=1e-6), "the largest first"
    signs = np.sign([row[np.abs(row).argmax()] for row in vt[:size]])
    assert np.abs(first - vt[:size] * signs[:, None]).max() < 1e-6
    assert np.abs(basis - u[:, :size] * s[:size] * signs).max() < 1e-5


def test_weights_of_a_lower_rank_and_of_nothing_have_factors_too():
    low = matrix((60, 2)) @ matrix((2, 30))
    basis, first = cores.bases(low, 4)
    assert np.allclose(basis @ first, low, atol=1e-4) and np.isfinite(first).all()
    basis, first = cores.bases(np.zeros((40, 30)), 3)
    assert not basis.any() and np.allclose(first @ first.T, np.eye(3))


@pytest.mark.parametrize("family", TARGETS)
def test_updates_are_those_of_peft_once_they_are_saved_and_come_back(folder_of, family, tmp_path):
    cfg, model, tokenizer = loaded(folder_of(family), family)
    untuned = says(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(".lora_B.default.core.weight") for name in trained)
    start = models.get_adapter(model)
    assert all(value.shape == (5, 5) and not value.any() for value in start.values()) and len(start) == len(trained)
    training.fine_tune(model, tokenizer, CARDS, cfg, learning_rate=0.05, description=None)
    learned, tuned = models.get_adapter(model), says(model)
    assert all(value.any() for value in learned.values()) and (tuned - untuned).abs().max() > 1e-3
    models.save_adapter(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder_of(family))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert torch.allclose(says(theirs), tuned, atol=1e-5)
    models.set_adapter(model, start)
    assert torch.equal(says(model), untuned)
    models.load_adapter(model, tmp_path / "adapter")
    assert all(np.allclose(value, learned[key], atol=1e-5) for key, value in models.get_adapter(model).items())
    assert torch.allclose(says(model.merge_and_unload()), tuned, atol=1e-5)


def test_the_same_core_moves_the_model_as_pefts_own(folder_of):
    """PSOFT without orthogonality is W + P·(R − I)·A, whose factors have signs of their own."""
    _, model, _ = loaded(folder_of("llama"), "llama")
    learned = moved(model)
    how = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}
    plain = AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    theirs = get_peft_model(plain, PsoftConfig(r=5, target_modules=TARGETS["llama"].split(","), **how)).eval()
    layers = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "psoft_R")}
    for name, layer in layers.items():
        ours = model.get_submodule(name).lora_A["default"].weight
        signs = torch.sign((layer._psoft_A_cache["default"] * ours).sum(1))
        core = torch.from_numpy(learned[f"{name}.lora_B.core.weight"]) * 15 / 5
        layer.psoft_R["default"].weight.data = torch.eye(5) + signs[:, None] * core * signs
    assert len(layers) == len(learned) and torch.allclose(says(theirs), says(model), atol=2e-5)
    with theirs.disable_adapter():
        assert (says(theirs) - says(model)).abs().max() > 1e-2


def test_nothing_but_cores_is_trained_after_the_adapter_was_off(folder_of):
    _, model, _ = loaded(folder_of("llama"), "llama")
    untuned = says(model)
    moved(model)
    with model.disable_adapter():
        assert torch.equal(says(model), untuned)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".core." in name for name in trained) and not torch.equal(says(model), untuned)


@pytest.mark.parametrize("how", ["model.dtype=bfloat16", "model.dtype=float16", "model.quantization=4"])
def test_a_machine_that_holds_the_model_otherwise_has_the_same_factors(folder_of, how):
    """Bit for bit: they come from the weights as they are stored."""
    _, whole, _ = loaded(folder_of("llama"), "llama")
    _, other, _ = loaded(folder_of("llama"), "llama", how)
    found = [
        {name: value for name, value in model.named_buffers() if ".lora_" in name and "base" not in name.split(".")[-2]}
        for model in (whole, other)
    ]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * len(models.get_adapter(whole))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    moved(other)
    assert torch.isfinite(says(other)).all()


def test_cores_are_counted_without_weights_and_shared_in_a_process(folder_of):
    cfg = settings(folder_of("llama"), f"model.lora.target_modules=[{TARGETS['llama']}]", *XS)
    assert communication.parameter_counts(cfg.model.name, cfg.model.lora).trainable == 4 * 25
    real = config.load("cpu", "federation.aggregation=LoRA-XS")
    assert communication.parameter_counts(real.model.name, real.model.lora).trainable == 60 * 16 * 16
    assert len(first_adapter(cfg)) == 4 and base_model(cfg)[0] is base_model(cfg)[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.lora.peft_lora_r=33"], "peft_lora_r=33: model.layers.0.self_attn.q_proj is 32 × 32, .* up to 32"),
        (["model.lora.target_modules=[embed_tokens]"], "LoRA-XS: model.embed_tokens is no linear layer"),
        (["model.lora.target_modules=[nowhere]"], "no layer is named nowhere"),
        (["federation.aggregation=FedIT", "model.lora.core=true"], "set federation.aggregation=LoRA-XS"),
        (["federation.ranks=[1,2,2,2,2,2]"], "federation.ranks: LoRA-XS needs equal ranks"),
    ],
)
def test_what_does_not_fit_is_one_line(folder_of, overrides, says):
    with pytest.raises(ValueError, match=says) as caught:
        models.load(settings(folder_of("llama"), *XS, *overrides))
    assert "\n" not in str(caught.value)


def test_weights_held_in_few_bits_need_the_whole_ones(folder_of):
    model, _ = models.load(settings(folder_of("llama"), "model.quantization=4", "model.lora.peft_lora_r=4"))
    with pytest.raises(ValueError, match="whole weights, and model.layers.0.self_attn.q_proj is held in few bits"):
        cores.put_in(model)
    cores.put_in(model, str(folder_of("llama")))
    assert {value.shape for value in models.get_adapter(model).values()} == {(4, 4)}


def test_adapters_of_another_kind_rank_or_start_are_refused(folder_of, tmp_path):
    cfg, model, _ = loaded(folder_of("llama"), "llama")
    before, plain = (
        moved(model),
        models.load(config.load(cfg, "federation.aggregation=FedIT", "model.lora.core=false"))[0],
    )
    with pytest.raises(ValueError, match="this model trains cores, the adapter has LoRA factors: LoRA-XS is for all"):
        models.set_adapter(model, models.get_adapter(plain))
    with pytest.raises(ValueError, match="this model trains LoRA factors, the adapter has cores"):
        models.set_adapter(plain, before)
    with pytest.raises(ValueError, match=r"of another size or rank: .* has shape \(4, 4\), this model's is \(5, 5\)"):
        models.set_adapter(model, {key: value[:4, :4] for key, value in before.items()})
    models.save_adapter(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="no core makes this adapter: model.layers.0.self_attn.q_proj has"):
        models.load_adapter(model, tmp_path / "plain")
    assert all(np.array_equal(value, before[key]) for key, value in models.get_adapter(model).items())


def test_a_checkpoint_of_the_trainer_opens_as_a_plain_adapter(folder_of, tmp_path):
    folder = tmp_path / "kept"
    saved = ("save_strategy=steps", "save_steps=2", f"output_dir={folder}")
    cfg, model, tokenizer = loaded(
        folder_of("llama"), "llama", *(f"train.training_arguments.{argument}" for argument in saved)
    )
    training.fine_tune(model, tokenizer, CARDS, cfg, learning_rate=0.05, description=None)
    plain = AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    theirs = PeftModel.from_pretrained(plain, next(folder.glob("checkpoint-*"))).eval()
    assert torch.allclose(says(theirs), says(model), atol=1e-5)


def test_a_model_of_somebody_else_gets_cores_by_one_line(folder_of):
    base = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    untuned = says(model)
    cores.put_in(model)
    assert torch.equal(says(model), untuned) and {v.shape for v in models.get_adapter(model).values()} == {(3, 3)}
    moved(model)
    assert (says(model) - untuned).abs().max() > 1e-3
