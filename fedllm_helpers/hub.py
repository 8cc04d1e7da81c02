"""Models and data sets on the hub: asked for once, within seconds, before a library asks for each file with retries."""

import contextlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name, try_to_load_from_cache

SECONDS = 3.0
INSTEAD = "set model.name to 'smollm2-135m' or to a local folder"


@lru_cache(maxsize=64)
def check(name: str) -> bool:
    """Whether the hub has a model of that name, such as ``EleutherAI/pythia-70m``; asked once in a process.

    Returns:
        True; False where the hub does not give it now, but a copy lies in this machine's cache: read that.

    Raises:
        ValueError: no hub id.
        ConnectionError: the hub knows no such name or keeps it private, or cannot be reached; and there is no copy.
    """
    error = ask("model", name)
    if isinstance(error, HFValidationError):
        raise ValueError(f"model {name!r}: {reason(error)}, and no folder here has that name")
    if error is None:
        return True
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    if kept.is_dir() and any(kept.iterdir()):
        return False
    raise ConnectionError(f"model {name!r}: {reason(error)}, and there is no copy here: {INSTEAD}") from None


def ask(kind: str, name: str) -> Exception | None:
    """What came of asking for a ``model`` or ``dataset``; None where it is there.

    In a thread, because nothing else bounds the time that a name server may take.
    """
    found: list[Exception | None] = []

    def try_it() -> None:
        """Ask, and keep what came of it."""
        try:
            (HfApi().model_info if kind == "model" else HfApi().dataset_info)(name, timeout=SECONDS)
            found.append(None)
        except Exception as error:  # the client's own, its transport's, the system's
            found.append(error)

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    return found[0] if found else TimeoutError(f"no answer within {SECONDS + 1:.0f} s")


def reason(error: Exception) -> str:
    """Why the hub did not give it, in words."""
    if isinstance(error, GatedRepoError):
        return "its owner asks for consent first (give it on the hub's page, then `hf auth login`)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of that name, or keeps it private (check the name; `hf auth login`)"
    if isinstance(error, HFValidationError):
        return "it is no hub id such as 'owner/name'"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"the hub {constants.ENDPOINT} cannot be reached ({said[:120]}; check the network)"


def kept(name: str) -> Path | None:
    """The folder that the hub's client keeps of a model on this machine; None where there is none of that name."""
    with contextlib.suppress(ValueError):  # a name that is none on the hub
        found = try_to_load_from_cache(name, "config.json")
        return Path(found).parent if isinstance(found, str) else None
    return None


def from_pretrained(kind: type, where: str, **options: Any) -> Any:
    """``kind.from_pretrained``, with one line for what cannot be read. Code that comes with a model is never run."""
    local = Path(where).is_dir()
    if not local and not check(where) and (copy := kept(where)):  # as a folder: by its name, files are asked for yet
        where, local = str(copy), True
    try:
        return kind.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # a dozen types, by family, library and file format
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__
        if "weights_only" in reason:
            reason = "its weights are no plain arrays"
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {where!r} needs code of its own, which is not run here; set another model.name"
            ) from None
        if isinstance(error, ImportError):
            raise ValueError(f"model {where!r} needs a library that is not here: {reason[:200]}") from error
        if local:
            raise FileNotFoundError(f"model folder {where} is not whole: {reason[:300]}") from error
        raise ConnectionError(
            f"model {where!r} cannot be read from the hub ({reason[:300]}): check the name and the network, "
            f"or {INSTEAD}"
        ) from error
