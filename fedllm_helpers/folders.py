"""Files of ours in folders that may hold a user's own: replaced whole or not at all, and all else there stays."""

import contextlib
import filecmp
import itertools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError

logger = logging.getLogger(__name__)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's names; the last makes the folder an adapter
# what a process that was killed leaves behind: of this version with its number, and of earlier ones
PART = re.compile(r"\.[\w-]+-(?P<process>\d+)-\w{8}\.part")
LEFT = re.compile(rf"{PART.pattern}|\.(adapter|adapter_model|round|edit)-.+|(round|edit)-\d{{6}}\.part")
OLD = ".old"  # in such a folder: what was set aside
LEFT_BY_GRIDS = re.compile(r"[\w-]+\.(?P<process>\d+)\.part(\.npz)?")


def place(folder: str | Path, *names: str) -> Path:
    """A folder to be written, ``~`` expanded; ``names`` are of files to be put there.

    Raises:
        ValueError: it has no name, or a file or a link to nowhere has it; or a folder has one of the names.
    """
    if not str(folder).strip():
        raise ValueError("the name of a folder is empty: '.' is the one where this runs")
    path = Path(folder).expanduser()
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        what = "a file" if path.is_file() else "a link to nowhere" if path.is_symlink() else "no folder"
        raise ValueError(f"{path} is {what}: name a folder, or one that is not there yet")
    blocked = next((path / name for name in names if (path / name).is_dir()), None)
    if blocked:
        raise ValueError(f"{blocked} is a folder, where a file belongs: name another folder")
    return path


def for_adapter(folder: str | Path) -> Path:
    """A folder for an adapter: a new one, an empty one, or one that has an adapter.

    Where a process was killed while it replaced one, the old adapter is brought back first.

    Raises:
        ValueError: as :func:`place`, or it is a folder of something else, such as a base model.
    """
    path = place(folder, *ADAPTER)
    clear(path, PART)
    there = sorted(one.name for one in path.iterdir() if not LEFT.fullmatch(one.name)) if path.is_dir() else []
    odd = [name for name in there if name not in ADAPTER]
    if odd and ADAPTER[-1] not in there:
        raise ValueError(f"{path} is a folder of something else ({odd[0]}, {len(there)} in all): name another folder")
    return path


@contextlib.contextmanager
def replaced(folder: str | Path, *names: str, private: tuple[str, ...] = ()) -> Iterator[Path]:
    """Put files into a folder, whole or not at all: what the block writes under ``names`` takes the place of those.

    They are written on the same disk and forced to it, then moved. Of several that change, the old ones are set aside
    first, the last name before the others, and it comes back last: at no moment does it stand beside another version
    of the rest. What fails puts everything back.

    Args:
        folder: made where it is not there; files of other names in it are not touched.
        names: of the files; each has to be written.
        private: those of them that keep the permissions they were written with; others get those of any new file.

    Yields:
        An empty folder to write into.

    Raises:
        ValueError: as :func:`place`.
        OSError: something cannot be written; all is as it was.
    """
    folder = place(folder, *names)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f".{names[-1].split('.')[0]}-{os.getpid()}-"
    try:
        with tempfile.TemporaryDirectory(".part", prefix, folder) as scratch:
            yield Path(scratch)
            _swap(folder, Path(scratch), names, private)
    except BaseException:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise


def _swap(folder: Path, new: Path, names: tuple[str, ...], private: tuple[str, ...]) -> None:
    old, usual = new / OLD, new / ".usual"
    usual.touch()
    for name in names:
        if name not in private:  # safetensors writes files that nobody else may read
            os.chmod(new / name, usual.stat().st_mode)
        with open(new / name, "rb+") as file:
            os.fsync(file.fileno())
    changed = [name for name in names if not _same(new / name, folder / name)]
    if len(changed) > 1:
        old.mkdir()
    try:
        for name in reversed(changed if len(changed) > 1 else []):
            if os.path.lexists(folder / name):
                os.rename(folder / name, old / name)
        for name in changed:
            os.replace(new / name, folder / name)
    except BaseException:
        for name in changed if len(changed) > 1 else []:
            if not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
            if os.path.lexists(old / name):
                shutil.move(old / name, folder / name)  # where renaming fails, it copies
        raise


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and os.access(old, os.R_OK) and filecmp.cmp(new, old, shallow=False)


def write(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, as :func:`replaced`."""
    with replaced(path.parent, path.name) as scratch:
        (scratch / path.name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


@contextlib.contextmanager
def said(what: str, folder: str | Path, advice: str = "what was there is as it was") -> Iterator[None]:
    """Say in one line what cannot be written, as on a full disk or without the right to.

    Raises:
        OSError: instead of whatever the writer raised.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(f"{what} cannot be kept in {folder}: {error}; {advice}") from None


def unused(folder: str | Path, kind: str) -> Path:
    """The folder, or ``folder-2``, ``folder-3``, … where it has entries ``kind-…`` already; a change is logged."""
    first = free = place(folder)
    for number in itertools.count(2):
        if not any(free.glob(f"{kind}-*")):
            break
        free = first.with_name(f"{first.name}-{number}")
    if free != first:
        logger.warning("%s holds %ss of another run: those of this one are kept in %s", first, kind, free)
    return free


def aside(path: Path, ending: str = ".damaged") -> Path:
    """Rename a file out of the way, to a name that nothing has."""
    free = next(p for n in range(10**6) if not os.path.lexists(p := path.with_suffix(f"{ending}{n or ''}")))
    return path.rename(free)


def remove(folder: Path, *names: str) -> None:
    """Delete files of these names, and the folder if nothing else is in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def clear(folder: Path, left: re.Pattern = LEFT, alone: bool = False) -> None:
    """Delete what processes that were killed have left in a folder; old files that one had set aside come back.

    Args:
        folder: of ours.
        left: names of such files and folders; a number in the group ``process`` says whose they are.
        alone: nobody else is at work here, so those of processes that are there belong to others of these numbers.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        found = left.fullmatch(path.name)
        if found and (alone or not found["process"] or not psutil.pid_exists(int(found["process"]))):
            _bring_back(folder, path / OLD)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _bring_back(folder: Path, old: Path) -> None:
    """Undo a replacement that was cut off: as long as one of the old files is missing, the new ones are not all there.

    Missing ones come last, so that a second kill is found, too.
    """
    kept = sorted(old.iterdir(), key=lambda one: not os.path.lexists(folder / one.name)) if old.is_dir() else []
    if not all(os.path.lexists(folder / one.name) for one in kept):
        for one in kept:
            os.replace(one, folder / one.name)
