"""LoRA-XS in a model: factors against LAPACK, updates against PEFT, and what does not fit."""

import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from families import CARDS, change, settings
from peft import LoraConfig, PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedllm_helpers import communication, config, data, models, training
from fedllm_helpers.federation import client_app, simulation
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


def pruned():
    weight = matrix((64, 64))
    weight[:, 4:] = 0
    return weight


def blocks():
    """The largest lie in blocks that a start of ones would miss."""
    weight = 0.01 * matrix((80, 80))
    for place in range(8):
        weight[2 * place : 2 * place + 2, 2 * place : 2 * place + 2] = (place + 1) * np.array([[1, -1], [-1, 1]])
    return weight


ODD = {  # weight, size of the core, rank of what it can hold
    "low rank": (matrix((60, 2)) @ matrix((2, 30)), 4, 2),
    "pruned inputs": (pruned(), 8, 4),
    "blocks": (blocks(), 4, 4),
    "one direction": (np.outer(np.eye(40)[0] - np.eye(40)[1], np.eye(30)[0] - np.eye(30)[1]), 4, 1),
    "nothing": (np.zeros((40, 30)), 3, 0),
    "large numbers": (1e30 * matrix((50, 40)), 4, 4),
}


@pytest.mark.parametrize("name", ODD)
def test_factors_of_odd_weights_are_the_same_at_every_call(name):
    """Rows of A that any vector would do for are zero; what is kept is the best approximation."""
    weight, size, rank = ODD[name]
    basis, first = cores.bases(weight, size)
    assert all(np.array_equal(one, other) for one, other in zip(cores.bases(weight, size), (basis, first), strict=True))
    assert first[:rank].any(axis=1).all() and not first[rank:].any() and not basis[:, rank:].any()
    u, s, vt = scipy.linalg.svd(weight, lapack_driver="gesvd")
    wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.linalg.norm(basis.astype(float) @ first - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (0.02 * np.eye(30), "its singular values number 1 and 2 are equal"),
        (np.diag([5.0, 4, 3, 3, 2, 1]), "its singular values number 3 and 4 are equal"),
        (np.full((9, 9), np.nan), "its weight is not finite"),
        (np.diag([np.inf, 1.0]), "its weight is not finite"),
    ],
)
def test_weights_whose_factors_could_be_any_are_refused(weight, says):
    with pytest.raises(ValueError, match=says):
        cores.bases(weight, min(3, len(weight)))


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


def its_factors(model):
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            found |= {f"{name} A": layer.lora_A["default"].weight, f"{name} P": layer.lora_B["default"].basis}
    return found


@pytest.mark.parametrize("how", ["model.dtype=bfloat16", "model.dtype=float16", "model.quantization=4"])
@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_machine_that_holds_the_model_otherwise_has_the_same_factors(folder_of, tmp_path, family, said, how):
    """Bit for bit: they come from the weights as they are stored, whatever their configuration says of them."""
    folder = shutil.copytree(folder_of(family), tmp_path / "model")
    change(folder, "config.json", dtype=said)
    found = [its_factors(loaded(folder, family, one)[1]) for one in ("model.dtype=float32", how)]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 8
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_weights_under_other_names_are_read_from_a_second_copy(folder_of, tmp_path):
    whole = its_factors(loaded(folder_of("llama"), "llama")[1])
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(arrays, folder / "pytorch_model.bin")
    other = its_factors(loaded(folder, "llama", "model.dtype=bfloat16")[1])
    assert all(torch.equal(value, other[name]) for name, value in whole.items())


def test_a_sketch_tells_other_factors_from_rounding(folder_of):
    model = loaded(folder_of("llama"), "llama")[1]
    ours = cores.sketch(model)
    assert (
        len(ours) == 4 and np.isfinite(ours).all() and cores.sketch(models.load(settings(folder_of("llama")))[0]) == []
    )
    cores.check(model, None), cores.check(model, ours), cores.check(model, [value + 1e-5 for value in ours])
    moved(model)
    assert cores.sketch(model) == ours, "what is learned plays no part in it"
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_A["default"].weight[2] *= -1
    for theirs in (ours, ours[:3], []):
        with pytest.raises(ValueError, match="this node's factors are not the server's, .*: another base model"):
            cores.check(model, theirs)


def test_a_hospital_with_another_base_model_is_left_out(folder_of, tmp_path, caplog):
    """In the package's own apps: the federation goes on with the others."""
    texts = data.load(config.load("cpu"))[0].select(range(24))
    path = tmp_path / "cards.json"
    path.write_text(json.dumps([{"question": card["question"], "answer": card["answer"]} for card in texts]))
    small = ("federation.num_clients=3", "federation.num_rounds=1", "federation.training_arguments.max_steps=1",
             "federation.training_arguments.per_device_train_batch_size=2", f"dataset.name={path}", *data.WHOLE_FILE,
             "federation.partition=iid", "federation.evaluate_every=0")  # fmt: skip
    cfg = settings(folder_of("llama"), *XS, *small)
    other = shutil.copytree(folder_of("llama"), tmp_path / "model")
    arrays = load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays[name] = arrays[name] + 0.02 * torch.randn(arrays[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(arrays, other / "model.safetensors", {"format": "pt"})

    def app(message, context):
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            text = context.run_config["config"].replace(str(folder_of("llama")), str(other))
            context.run_config = {**context.run_config, "config": text}
        return client_app.app(message, context)

    record = simulation.run(cfg, progress=False, client=app)
    status = record.clients.set_index("client")["status"]
    assert status[[0, 2]].tolist() == ["used", "used"] and "another base model" in status[1]


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
        (["federation.aggregation=FedIT", "model.lora.core=true"], "core=true beside .*FedIT: cores go with LoRA-XS"),
        (["model.lora.core=false"], "model.lora.core=false beside federation.aggregation=LoRA-XS"),
        (["federation.ranks=[1,2,2,2,2,2]"], "federation.ranks: LoRA-XS needs equal ranks"),
    ],
)
def test_what_does_not_fit_is_one_line(folder_of, overrides, says):
    with pytest.raises(ValueError, match=says) as caught:
        models.load(settings(folder_of("llama"), *XS, *overrides))
    assert "\n" not in str(caught.value)


def test_the_rule_decides_whether_there_are_cores(tmp_path):
    cfg = config.load("cpu", "federation.aggregation=LoRA-XS")
    assert cfg.model.lora.core and not config.load(cfg, "federation.aggregation=FedSA-LoRA").model.lora.core
    assert config.load(cfg, "seed=3").model.lora.core and config.load(config.load(cfg)).model.lora.core
    path = tmp_path / "own.yaml"
    path.write_text("federation: {aggregation: LoRA-XS}\n")
    assert config.load(path).model.lora.core
    path.write_text("model: {lora: {core: true}}\n")
    with pytest.raises(ValueError, match="core=true beside federation.aggregation=FedIT"):
        config.load(path)
    assert config.load(path, "federation.aggregation=LoRA-XS").model.lora.core


def test_weights_held_in_few_bits_need_the_whole_ones(folder_of):
    model, _ = models.load(settings(folder_of("llama"), "model.quantization=4", "model.lora.peft_lora_r=4"))
    with pytest.raises(ValueError, match="whole weights; model.layers.0.self_attn.q_proj is held in few bits"):
        cores.put_in(model)
    cores.put_in(model, str(folder_of("llama")))
    assert {value.shape for value in models.get_adapter(model).values()} == {(4, 4)}


def test_adapters_of_another_kind_rank_or_start_are_refused(folder_of, tmp_path):
    cfg, model, _ = loaded(folder_of("llama"), "llama")
    before, plain = (
        moved(model),
        models.load(config.load(cfg, "federation.aggregation=FedIT"))[0],
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
    models.save_adapter(model, tmp_path / "cores")
    path = tmp_path / "cores" / "adapter_model.safetensors"
    arrays, first = load_file(path), "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for changed, wrong in (
        ({k: v for k, v in arrays.items() if k != first}, "q_proj has other sizes, or is not in it"),
        (arrays | {first: arrays[first][:9]}, "q_proj has other sizes"),
        (arrays | {first: torch.full_like(arrays[first], torch.nan)}, "q_proj has other factors"),
        (arrays | {"base_model.model.more.lora_A.weight": torch.ones(5, 3)}, "1 arrays are of other layers, such as"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"no core makes this adapter: .*{wrong}"):
            models.load_adapter(model, tmp_path / "cores")
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


def somebodys(folder, **settings):
    base = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(**{"r": 3, "target_modules": ["q_proj"], **settings}))


def test_a_model_of_somebody_else_gets_cores_by_one_line_and_saves_itself(folder_of, tmp_path):
    model = somebodys(folder_of("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    untuned = says(model)
    cores.put_in(model)
    assert torch.equal(says(model), untuned) and {v.shape for v in models.get_adapter(model).values()} == {(3, 3)}
    moved(model)
    assert (says(model) - untuned).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder_of("gpt2")), tmp_path).eval()
    assert torch.allclose(says(again), says(model), atol=1e-5)
    with pytest.raises(ValueError, match="LoRA-XS: the model has cores already"):
        cores.put_in(model)


def trained_one(folder):
    model = somebodys(folder)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data += 0.1
    return model


def merged_one(folder):
    model = somebodys(folder)
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (trained_one, "starts from a fresh adapter, and B of model.layers.0.self_attn.q_proj is not zero"),
        (merged_one, "one LoRA adapter of PEFT, named 'default' and not merged"),
        (
            lambda folder: somebodys(folder, use_dora=True),
            "cores alone, and .*lora_magnitude_vector.* is trained",
        ),
        (lambda folder: somebodys(folder, modules_to_save=["lm_head"]), "and .*lm_head.* is trained, too"),
        (lambda folder: somebodys(folder, init_lora_weights="pissa"), "starts from a fresh adapter, and B of"),
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder), "one LoRA adapter of PEFT"),
        (
            lambda folder: get_peft_model(
                AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=3, target_modules=["q_proj"]), "mine"
            ),
            "one LoRA adapter of PEFT, named 'default'",
        ),
    ],
)
def test_what_is_no_fresh_adapter_alone_is_refused(folder_of, make, says):
    with pytest.raises(ValueError, match=says) as caught:
        cores.put_in(make(folder_of("llama")))
    assert "\n" not in str(caught.value)


def test_a_layer_that_cannot_have_factors_is_named(folder_of, caplog):
    model = somebodys(folder_of("llama"))
    weights = [layer.self_attn.q_proj.get_base_layer().weight.data for layer in model.get_base_model().model.layers]
    weights[0][:, 2:] = 0
    weights[1][:] = 0.02 * torch.eye(32)
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj: its singular values number 1 and 2 are equal"):
        cores.put_in(model)
    assert "the weight of model.layers.0.self_attn.q_proj has rank 2" in caplog.text
    assert cores.tensors(model) == {} and len(models.get_adapter(model)) == 4, "no layer was changed"
