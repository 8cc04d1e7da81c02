"""Models and tokenizers as people bring them: those that fit train and answer; each that does not is one line."""

import json
import shutil

import families
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from families import CARDS, change, make, settings
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedllm_helpers import config, data, evaluation, models, training
from fedllm_helpers.models import fitting

CFG = config.load("cpu")


@pytest.fixture
def copied(folder_of, tmp_path):
    """A copy of a family's folder, to be changed."""
    return lambda family: shutil.copytree(folder_of(family), tmp_path / "mine")


def one_line(error, match, call, *arguments, **options):
    """The call raises one line."""
    with pytest.raises(error, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", None),
        ("tied", "lm_head,q_proj"),
        ("gpt2", None),
        ("opt", "q_proj,v_proj,fc1,fc2"),
        ("neox", None),
        ("bloom", None),
        ("mixtral", "q_proj,v_proj,gate"),
        ("mamba", "in_proj"),
        ("gemma3", "q_proj,v_proj"),
        ("decoder", None),
        ("llama", "embed_tokens,q_proj"),
    ],
)
def test_families_train_answer_save_and_reopen(folder_of, tmp_path, family, targets):
    cfg = settings(folder_of(family), *([f"model.lora.target_modules=[{targets}]"] if targets else []))
    model, tokenizer = models.load(cfg)
    record = training.fine_tune(model, tokenizer, CARDS, cfg, description=None, proximal_mu=0.1)
    assert np.isfinite(record.history["loss"]).all() and len(record.history) == 2
    assert len(evaluation.generate(model, tokenizer, ["What is 3?", "And?"], CFG, max_new_tokens=3)) == 2
    saved, again = models.save_adapter(model, tmp_path / "adapter"), models.load(cfg)[0]
    models.load_adapter(again, saved)
    ours, theirs = models.get_adapter(model), models.get_adapter(again)
    assert ours and all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("bert", r"made for another task \(BertForMaskedLM\)"),
        ("bert as decoder", "reads ahead"),
        ("roberta as decoder", "reads ahead"),
        ("xlnet", "reads ahead"),
        ("t5", "is an encoder-decoder"),
        ("bart", "is an encoder-decoder"),
        ("classifier", "made for another task"),
        ("images", "not a causal language model"),
    ],
)
def test_what_does_not_read_left_to_right_is_refused(folder_of, family, says):
    one_line(ValueError, says, models.load, settings(folder_of(family)))


@pytest.mark.parametrize(
    ("family", "side", "says"),
    [
        ("bart decoder", "left", r"it changes what model .* \(bart\) says of a text; set train.padding_side=right"),
        ("rwkv", "left", r"\(rwkv\) says of a text; set train.padding_side=right"),
        ("roberta decoder", "left", "set train.padding_side=right"),
        ("bart decoder", "right", None),
        ("rwkv", "right", None),
        ("roberta decoder", "right", None),
        ("llama", "right", None),
    ],
)
def test_padding_changes_no_score_and_no_answer_or_is_refused(folder_of, family, side, says):
    targets = "[key,value]" if family == "rwkv" else "null"
    cfg = settings(folder_of(family), f"train.padding_side={side}", f"model.lora.target_modules={targets}")
    if says:
        one_line(ValueError, says, models.load, cfg)
        return
    model, tokenizer = models.load(cfg)
    questions = ["It?", "What is it, and why is it a thing?", "Is it?"]
    one_by_one = [evaluation.generate(model, tokenizer, [each], CFG, max_new_tokens=8)[0] for each in questions]
    assert evaluation.generate(model, tokenizer, questions, CFG, max_new_tokens=8) == one_by_one and any(one_by_one)
    training.fine_tune(model, tokenizer, CARDS, cfg, learning_rate=0.1, description=None)
    together, alone = (evaluation.score_answers(model, tokenizer, CARDS, CFG, batch_size=n).nll for n in (6, 1))
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "override", "says"),
    [
        ("llama", "train.seq_length=65", "train.seq_length=65: model .* has 64 positions"),
        ("gpt2", "train.seq_length=128", "has 64 positions"),
        ("opt", "train.seq_length=128", "has 64 positions"),
        ("llama", "model.lora.target_modules=[q_proj,nope]", r"no layer is named nope; layers here: down_proj"),
        ("llama", "model.lora.target_modules=[q_prj,v_prj]", "no layer is named q_prj, v_prj"),
        ("llama", "model.lora.target_modules=[input_layernorm]", "layers here: down_proj"),
        ("gpt2", "model.lora.target_modules=[q_proj]", "layers here: c_attn, c_fc, c_proj"),
        ("mamba", "model.lora.lora_dropout=0", "layers here: dt_proj, in_proj, out_proj, x_proj"),
    ],
)
def test_settings_that_do_not_fit_a_model_are_refused(folder_of, family, override, says):
    one_line(ValueError, says, models.load, settings(folder_of(family), override))


def without(*keys):
    """Take arrays out of a checkpoint."""

    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if name not in keys}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def fewer_bits(method):
    """A configuration that says how weights were quantised."""
    return lambda folder: change(folder, "config.json", quantization_config={"quant_method": method, "bits": 4})


def shard_gone(folder):
    """Two shards, of which one is not there."""
    weights = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, (name, _) in enumerate(weights)}
    first = {name: value for name, value in weights if "-00001-" in files[name]}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def pickled(content):
    """Weights as a pickle that is none."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def cut_short(folder):
    """Half of the weights' file."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_finite(folder):
    """Weights that overflow."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def all_zero(folder):
    """Weights of whole numbers, such as a wrong conversion writes: what was below 1 is gone."""
    weights = {name: value.to(torch.int8) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "no output layer": (without("lm_head.weight"), ValueError, "1 of its arrays are in no file, .*'lm_head.weight'"),
    "no layer": (without("model.layers.1.mlp.up_proj.weight"), ValueError, "would be random"),
    "no embeddings": (without("model.embed_tokens.weight"), ValueError, "model.embed_tokens.weight"),
    "fewer layers": (lambda f: change(f, "config.json", num_hidden_layers=1), ValueError, "model.layers.1.* is stored"),
    "more layers": (lambda f: change(f, "config.json", num_hidden_layers=3), ValueError, "would be random"),
    "other width": (lambda f: change(f, "config.json", hidden_size=64), FileNotFoundError, "is not whole"),
    "shard gone": (shard_gone, FileNotFoundError, "is not whole: .*00002-of-00002"),
    "cut short": (cut_short, FileNotFoundError, "is not whole"),
    "a pickle": (pickled(b"cos\nsystem\n(S'echo'\ntR."), FileNotFoundError, "its weights are no plain arrays"),
    "not finite": (not_finite, ValueError, "not finite in torch.float32; some of its weights are none; fetch"),
    "zeros": (all_zero, ValueError, "says of all tokens the same: its weights are zeros"),
    "end as text": (lambda f: change(f, "generation_config.json", eos_token_id="</s>"), ValueError, "a token's number"),
    "own code": (
        lambda f: change(f, "config.json", model_type="ours", auto_map={"AutoConfig": "ours.Config"}),
        ValueError,
        "needs code of its own, which is not run",
    ),
    "unknown family": (lambda f: change(f, "config.json", model_type="ours"), FileNotFoundError, "ours"),
    "gptq": (fewer_bits("gptq"), ValueError, "needs a library that is not here"),
    "awq": (fewer_bits("awq"), ValueError, "needs a library that is not here"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), FileNotFoundError, "is not whole"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tok*")], FileNotFoundError, "is not whole"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ValueError, "holds an adapter: set model"),
    "no end": (lambda f: endless(f, None), ValueError, "names an end-of-text token"),
    "end beyond": (lambda f: endless(f, 500), ValueError, "names an end-of-text token"),
    "end is a word": (lambda f: endless(f, 40), ValueError, "names an end-of-text token"),
}


def endless(folder, end):
    """No end token in the tokenizer, and this one in the model's settings."""
    families.tokenizer(folder, eos_token=None, pad_token=None)
    change(folder, "config.json", eos_token_id=end)
    text = json.loads((folder / "config.json").read_text()) | {"eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(text))
    change(folder, "generation_config.json", eos_token_id=end)


@pytest.mark.parametrize("name", DAMAGES)
def test_folders_that_are_not_whole_are_one_line(copied, capfd, name):
    damage, error, says = DAMAGES[name]
    folder = copied("llama")
    damage(folder)
    one_line(error, says, models.load, settings(folder))
    assert "y/N" not in capfd.readouterr().out


def test_an_empty_vocabulary_and_another_models_tokenizer_are_refused(copied, tmp_path):
    folder = copied("gpt2")
    for path in folder.glob("tok*"):
        path.unlink()
    one_line(ValueError, "its tokenizer knows no words", models.load, settings(folder))
    small = make(tmp_path / "small", "llama", {"vocab_size": 200})
    one_line(ValueError, "are beyond the model's 200 embeddings; it is another model's", models.load, settings(small))


def test_code_of_ones_own_beside_a_known_family_is_not_run(copied):
    folder = copied("llama")
    change(folder, "config.json", auto_map={"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"})
    (folder / "ours.py").write_text("raise SystemExit('run')")
    model, _ = models.load(settings(folder))
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("beyond", [False, True])
def test_padding_and_end_are_filled_from_what_the_model_has(tmp_path, caplog, beyond):
    """No end in the tokenizer, no padding or padding beyond the embeddings: the loss is that of the whole tokenizer."""
    folder = make(tmp_path / "mine", "llama", {"vocab_size": 280}, eos_token=None, pad_token=None)
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.add_tokens([f"word{i}" for i in range(280 - len(tokens))])
    if beyond:
        tokens.add_special_tokens({"pad_token": "[PAD]"})
        assert tokens.pad_token_id == 280
    tokens.save_pretrained(folder)
    losses = []
    for name in (folder, make(tmp_path / "whole", "llama", {"vocab_size": 280})):
        model, tokenizer = models.load(settings(name))
        assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id in (2, 3)
        losses.append(evaluation.score_answers(model, tokenizer, CARDS, CFG).nll)
        assert evaluation.generate(model, tokenizer, ["What is it, and how?", "It"], CFG, max_new_tokens=2)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and "the model's own is taken, '</s>'" in caplog.text


def test_markers_beyond_the_embeddings_are_no_fault(copied):
    """As in Gemma 3's text model, whose tokenizer knows a marker for images that the model lacks."""
    folder = copied("llama")
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.add_tokens([f"word{i}" for i in range(400 - len(tokens))])
    tokens.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokens.save_pretrained(folder)
    assert tokens.convert_tokens_to_ids("<image>") == 400
    assert models.load(settings(folder))[1].pad_token_id == 3


def test_an_answer_ends_at_either_end_and_prints_nothing_after(copied, caplog, capfd):
    """Whatever token a model says first, made an end of its generation settings, leaves an empty answer."""
    folder = copied("llama")
    model, tokenizer = models.load(settings(folder))
    questions = ["What is it?", "And what is a thing, and why?"]
    assert evaluation.generate(model, tokenizer, questions, CFG, max_new_tokens=12)[0]
    with torch.no_grad():
        first = model(**tokenizer(data.format_prompt(questions[0]), return_tensors="pt")).logits[0, -1].argmax()
    change(folder, "generation_config.json", eos_token_id=[2, int(first)], do_sample=True, temperature=0.6, top_p=0.9,
           top_k=20, min_p=0.1, typical_p=0.9, max_length=20)  # fmt: skip
    model, tokenizer = models.load(settings(folder))
    capfd.readouterr()
    answers = [evaluation.generate(model, tokenizer, questions, CFG, max_new_tokens=12) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][0] == ""
    assert fitting.end_tokens(model, tokenizer) == [2, int(first)] and tokenizer.eos_token_id == 2
    assert not caplog.text and not capfd.readouterr().err, "sampling settings of an instruct model are no warning"


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"bad_words_ids": [[70], [71], [72], [73]], "suppress_tokens": list(range(40, 200))},
        {"forced_bos_token_id": 50, "forced_eos_token_id": 50},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 9.0},
        {"guidance_scale": 3.0, "return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["e", "a"], "max_time": 0.0, "min_new_tokens": 5},
        {"sequence_bias": [[[70], 50.0]], "exponential_decay_length_penalty": [1, 5.0]},
        {"prompt_lookup_num_tokens": 2, "use_cache": False},
    ],
)
def test_a_models_generation_settings_do_not_bend_greedy_answers(copied, given):
    folder, questions = copied("llama"), ["What is it?", "And what is a thing, and why?"]
    plain = evaluation.generate(*models.load(settings(folder)), questions, CFG, max_new_tokens=12)
    change(folder, "generation_config.json", **given)
    assert evaluation.generate(*models.load(settings(folder)), questions, CFG, max_new_tokens=12) == plain
    assert all(plain)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"questions": None}, "questions=None: expected a list of texts"),
        ({"questions": 3}, "expected a list of texts"),
        ({"questions": {"question": "it"}}, "expected a list of texts"),
        ({"questions": [{"foo": "it"}]}, "or of cards with a 'question'"),
        ({"questions": [{"question": None}]}, "or of cards with a 'question'"),
        ({"questions": ["it"], "max_new_tokens": True}, "max_new_tokens=True: allowed are whole numbers from 1"),
        ({"questions": ["it"], "max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"questions": "What is it?"}, "expected a list of texts"),
        ({"questions": [None]}, "expected a list of texts"),
        ({"questions": ["it"], "max_new_tokens": 0}, "max_new_tokens=0: allowed are whole numbers from 1"),
        ({"questions": ["it"], "max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"questions": ["it"], "max_new_tokens": 60}, "the answer may have 60: the model has 64 positions for both"),
        ({"questions": ["word " * 9000]}, "the longest prompt has .* the model has 64 positions"),
    ],
)
def test_questions_that_cannot_be_answered_are_one_line(folder_of, call, says):
    model, tokenizer = models.load(settings(folder_of("llama")))
    one_line(ValueError, says, evaluation.generate, model, tokenizer, cfg=CFG, **call)
    assert evaluation.generate(model, tokenizer, [], CFG) == []


@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ((Dataset.from_list(CARDS), Dataset.from_list(CARDS)), "a tuple of 2; unpack it: train, test = data.load"),
        (DatasetDict(train=Dataset.from_list(CARDS)), "given are rows of type str"),
        (Dataset.from_list([{"prompt": "a", "answer": "b"}]), "given are the columns prompt, answer"),
        ([("a", "b")], "given are rows of type tuple"),
        (["a", "b"], "given are rows of type str"),
        (None, "cards: expected rows with 'question' and 'answer', given is None"),
        (3, "given is 3"),
        ([*CARDS, {"question": None, "answer": "b"}], "card 7: its question is None, expected a text"),
        ([*CARDS, {"question": "a", "answer": 5}], "card 7: its answer is 5, expected a text"),
        ([*CARDS, {"question": "a"}], "card 7: its answer is None"),
        ("cards.csv", "given are rows of type str"),
        (Dataset.from_list(CARDS).to_pandas(), "given are rows of type str"),
    ],
)
def test_cards_that_are_none_are_one_line(folder_of, cards, says):
    cfg = settings(folder_of("llama"))
    model, tokenizer = models.load(cfg)
    before = models.get_adapter(model)
    one_line(ValueError, says, training.fine_tune, model, tokenizer, cards, cfg)
    one_line(ValueError, says, evaluation.score_answers, model, tokenizer, cards, CFG)
    one_line(ValueError, "none to train on", training.fine_tune, model, tokenizer, [], cfg)
    assert all(np.array_equal(before[key], value) for key, value in models.get_adapter(model).items())
    assert len(evaluation.score_answers(model, tokenizer, [], CFG).nll) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"proximal_mu": -1}, "proximal_mu=-1: allowed are numbers from 0"),
        ({"proximal_mu": float("nan")}, "proximal_mu=nan"),
        ({"proximal_mu": "1"}, "proximal_mu='1'"),
        ({"learning_rate": True}, "learning_rate=True: allowed are numbers above 0"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3'"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"batch_size": -1}, "batch_size=-1: allowed are whole numbers from 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"batch_size": None}, "batch_size=None"),
    ],
)
def test_numbers_out_of_bounds_in_direct_calls_are_one_line(folder_of, call, says):
    cfg = settings(folder_of("llama"))
    does = evaluation.score_answers if "batch_size" in call else training.fine_tune
    one_line(ValueError, says, does, *models.load(cfg), CARDS, cfg, **call)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha_pattern": {"q_proj": 1}}, "its alpha_pattern is {'q_proj': 1}, here {}"),
        ({"rank_pattern": {"q_proj": 1}}, "its rank_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model's own weights"),
        ({"init_lora_weights": "olora"}, "changes the base model's own weights"),
        ({"use_dora": True}, "its use_dora is True, here False"),
        ({"lora_alpha": 1}, "its lora_alpha is 1, here 64"),
        ({"alora_invocation_tokens": [1, 2]}, "its alora_invocation_tokens is"),
        ({"init_lora_weights": "gaussian"}, None),
    ],
)
def test_an_adapter_of_another_formula_is_refused(folder_of, tmp_path, values, says):
    model, _ = models.load(settings(folder_of("llama")))
    saved = models.save_adapter(model, tmp_path / "adapter")
    change(saved, "adapter_config.json", **values)
    if says:
        one_line(ValueError, says, models.load_adapter, model, saved)
    else:
        models.load_adapter(model, saved)


def test_an_adapter_finds_its_base_model_where_it_moved(copied, tmp_path, caplog):
    folder = copied("llama")
    model, _ = models.load(settings(folder))
    saved = models.save_adapter(model, tmp_path / "adapter")
    moved = folder.rename(tmp_path / "elsewhere")
    models.load_adapter(models.load(settings(moved))[0], saved)
    assert f"its base model was {folder}, here is {moved}, of the same form" in caplog.text
    deeper = models.load(settings(make(tmp_path / "other", "llama", {"num_hidden_layers": 3})))[0]
    one_line(ValueError, "its num_hidden_layers is 2; here", models.load_adapter, deeper, saved)
    wider = make(tmp_path / "wider", "llama", {"intermediate_size": 96})  # the adapter's own shapes are the same
    one_line(ValueError, "its intermediate_size is 64", models.load_adapter, models.load(settings(wider))[0], saved)
    before = json.loads((saved / "adapter_config.json").read_text())
    change(saved, "adapter_config.json", auto_mapping=None, base_model_name_or_path=str(moved))  # as PEFT writes it
    one_line(ValueError, "its num_hidden_layers is 2", models.load_adapter, deeper, saved)
    more = models.load(settings(moved, "model.lora.target_modules=[q_proj]"))[0]
    one_line(ValueError, "other layers: 4 keys differ", models.load_adapter, more, saved)
    (saved / "adapter_config.json").write_text("{")
    one_line(ValueError, "adapter_config.json cannot be read", models.load_adapter, model, saved)
    (saved / "adapter_config.json").write_text(json.dumps(before | {"peft_type": "IA3"}))
    one_line(ValueError, "does not fit: its peft_type is", models.load_adapter, model, saved)
