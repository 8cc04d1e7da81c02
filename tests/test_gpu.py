"""What changes on a GPU: where it computes, 4 bits, and memory; the answers do not. `make test-gpu`, some minutes."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_helpers import communication, config, data, evaluation, models, training
from fedllm_helpers.federation import simulation
from fedllm_helpers.models import embedded
from fedllm_helpers.training import batches

CFG = config.load("cpu")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# the preset for a GPU as it is, but for its model and its cards, which are those that come from the package index
PRESET = "model.name=smollm2-135m dataset.name=hpo dataset.max_cards_per_specialty=60"
TRAINING = "train.training_arguments.save_strategy=no train.training_arguments.logging_steps=1"
MISTRAL = "mistralai/Mistral-7B-v0.1"


@pytest.fixture(scope="module")
def preset():
    return config.load("gpu", *PRESET.split(), *TRAINING.split())


def test_auto_means_the_gpu_and_its_own_number_format():
    device, dtype = models.device_and_dtype()
    native = torch.cuda.get_device_capability()[0] >= 8
    assert device.type == "cuda" and dtype == (torch.bfloat16 if native else torch.float32)


def test_the_same_seed_is_the_same_adapter_on_either_device(loaded, cfg):
    assert loaded[0].device.type == "cuda"
    here, there = (models.get_adapter(models.load(config.load(cfg, f"model.device={d}"))[0]) for d in ("cuda", "cpu"))
    assert here.keys() == there.keys() and all(np.array_equal(here[key], there[key]) for key in here)


def test_scores_are_those_of_the_cpu(cfg, cards):
    """In float32, where both compute the same; every card, padded beside others of other lengths."""
    scores = {}
    for device in ("cuda", "cpu"):
        model, tokenizer = models.load(config.load(cfg, "model.dtype=float32", f"model.device={device}"))
        scores[device] = evaluation.score_answers(model, tokenizer, cards[1], CFG)
    assert scores["cuda"].tokens.tolist() == scores["cpu"].tokens.tolist()
    assert scores["cuda"].nll == pytest.approx(scores["cpu"].nll, rel=1e-3)


def test_half_precision_is_as_near_to_the_cpu_as_it_is_there(loaded, cards):
    """bfloat16 here, float32 on the CPU; batches of 64 tokens too, which break another attention kernel's gradients."""
    model, tokenizer = loaded
    exact = models.load(config.load("cpu", "model.dtype=float32", "model.device=cpu"))[0]
    here, there = (evaluation.score_answers(m, tokenizer, cards[1], CFG) for m in (model, exact))
    assert abs(evaluation.nll_difference(here, there).value) < 0.01
    for length in (60, 64, 68, 192):
        text = " ".join(card["answer"] for card in cards[0])
        rows = [{"question": "What is it?", "answer": text[: 8 * n]} for n in range(length // 4, length, 4)]
        batch = batches.collate(batches.encode(rows, tokenizer, length), tokenizer)
        assert batch["input_ids"].shape[1] == length and not batch["attention_mask"].all()
        with models.autocast(model):
            model(**{key: part.to(model.device) for key, part in batch.items()}).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.isfinite(gradient).all() for gradient in gradients), length
        model.zero_grad()


def test_training_goes_where_it_goes_on_the_cpu(cfg, cards):
    """A dozen steps in float32, from the same start on the same batches: losses agree, and so does what is learnt."""
    losses, scores = {}, {}
    for device in ("cuda", "cpu"):
        changed = config.load(
            cfg, "model.dtype=float32", f"model.device={device}", "train.training_arguments.max_steps=12"
        )
        model, tokenizer = models.load(changed)
        losses[device] = training.fine_tune(model, tokenizer, cards[0], changed, description=None).history["loss"]
        scores[device] = evaluation.score_answers(model, tokenizer, cards[1], CFG)
    assert losses["cuda"].tolist() == pytest.approx(losses["cpu"].tolist(), rel=0.01)
    difference = evaluation.nll_difference(scores["cpu"], scores["cuda"])
    assert abs(difference.value) < 0.01


def test_the_preset_learns_in_4_bits_and_its_adapter_opens_with_plain_peft(preset, tmp_path):
    cfg = config.load(preset, "train.training_arguments.max_steps=30")
    train, test = data.load(cfg)
    model, tokenizer = models.load(cfg)
    base = model.get_base_model()
    assert base.is_loaded_in_4bit and base.is_gradient_checkpointing and model.device.type == "cuda"
    score = functools.partial(evaluation.score_answers, model, tokenizer, test, cfg)
    untuned = score()
    record = training.fine_tune(model, tokenizer, train, cfg, description=None)
    assert record.examples == 30 * 16 and np.isfinite(record.history["loss"]).all()
    tuned = score()
    assert evaluation.nll_difference(untuned, tuned).low > 0.1
    models.save_adapter(model, tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(embedded.fetch(), dtype=torch.bfloat16).to("cuda")
    opened = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    other = evaluation.score_answers(opened, tokenizer, test, cfg)
    assert evaluation.nll_difference(untuned, other).low > 0.1, "16 bits, an adapter that was trained on 4"


@pytest.mark.parametrize("backend", ["in-process", "side-by-side", "ray"])
def test_the_preset_federates(preset, backend, tmp_path):
    if backend == "ray":
        pytest.importorskip("ray", reason="the extra `sim` (Ray) is not installed")
    few = "federation.num_rounds=3 federation.fraction_train=0.2 federation.training_arguments.max_steps=4"
    cfg = config.load(preset, *few.split(), "federation.evaluate_every=1", "federation.evaluate_cards=48")
    record = simulation.run(cfg, backend, folder=tmp_path / "rounds", progress=False)
    nll = record.history["nll"].to_numpy()
    assert record.history["round"].tolist() == [0, 1, 2, 3] and (record.clients.groupby("round").size() == 4).all()
    assert record.history["used"].tolist()[1:] == [4, 4, 4], "nobody's loss was NaN"
    assert np.isfinite(nll).all() and nll[-1] < nll[0]
    assert record.provenance["machine"]["device"] == torch.cuda.get_device_name()
    again = simulation.run(cfg, backend, folder=tmp_path / "rounds", progress=False)
    assert all(np.array_equal(record.adapter[key], again.adapter[key]) for key in record.adapter), "kept, not run again"


def test_differential_privacy_on_the_gpu(cards):
    """DP-SGD in a federation: steps of per-card gradients are finite, and the adapter moves."""
    cfg = config.load(
        "cpu", "federation.num_rounds=2", "federation.training_arguments.max_steps=3",
        "federation.privacy.record.epsilon=8", "federation.evaluate_cards=12", "dataset.max_cards_per_specialty=60",
    )  # fmt: skip
    record = simulation.run(cfg, progress=False)
    assert any((value != 0).any() for key, value in record.adapter.items() if "lora_B" in key)
    assert all(np.isfinite(value).all() for value in record.adapter.values())
    assert np.isfinite(record.history["nll"]).all()


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """Mistral-7B's shape with random weights, and the embedded model's tokenizer, as a folder of 14 GB."""
    folder = tmp_path_factory.mktemp("7b")
    if shutil.disk_usage(folder).free < 20e9:
        pytest.skip("a 7B in 16 bits needs 20 GB of disk")
    tokenizer = AutoTokenizer.from_pretrained(embedded.fetch())
    shape = communication.architecture(MISTRAL)
    shape.vocab_size = len(tokenizer)  # the tokenizer's own; half as much again as Mistral's: more memory, not less
    torch.manual_seed(0)
    room = torch.cuda.get_device_properties(0).total_memory > 20e9  # made on the CPU it takes minutes
    with torch.device("cuda" if room else "cpu"):
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.cuda.empty_cache()
    yield folder
    shutil.rmtree(folder)


def long_cards(n):
    """Cards whose answers are those of several cards in a row: longer than the preset's 512 tokens."""
    answers = [f"{card['question']} {card['answer']}" for card in data.load_flashcards("hpo").select(range(40 * n))]
    return [{"question": "What do these mean?", "answer": " ".join(answers[40 * i : 40 * i + 40])} for i in range(n)]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_7b_trains_within_16_gb(seven_billion, dtype):
    """The preset's 4 bits, batch of 16 and 512 tokens, each row full; memory does not depend on what weights say."""
    cfg = config.load(
        "gpu", f"model.name={seven_billion}", f"model.dtype={dtype}", *TRAINING.split(),
        "train.training_arguments.max_steps=3", "train.training_arguments.warmup_steps=0",
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, tokenizer = models.load(cfg)
    loaded = torch.cuda.memory_allocated()
    rows = batches.encode(long_cards(48), tokenizer, cfg.train.seq_length, cfg.dataset.prompt)
    assert all(len(row["input_ids"]) == 512 for row in rows)
    record = training.fine_tune(model, tokenizer, long_cards(48), cfg, description=None)
    numbers = {
        "weights, GB": round(loaded / 1e9, 2),
        "most allocated, GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "most reserved, GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "tokens per second": round(record.tokens / record.seconds),
        "dtype": dtype,
        "device": torch.cuda.get_device_name(),
    }
    print(json.dumps(numbers))
    assert record.tokens == 3 * 16 * 512 and np.isfinite(record.history["loss"]).all()
    assert torch.cuda.max_memory_reserved() < 15e9, "a card of 16 GB keeps one for itself"
