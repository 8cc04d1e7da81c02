"""Whether the code that a process has imported is still the code that it would import now."""

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGE = __name__.partition(".")[0]
BROUGHT = ("**/*.py", "conf/*.yaml")  # of the package, what a run brings along: `fab-include` in pyproject.toml
State = tuple[tuple[str, int, int], ...]  # of files: path, bytes, time of the last change


def state(files: Sequence[Path]) -> State:
    """What tells that a file was changed: its size, and when. One that is not there has −1."""
    found = []
    for path in sorted(files):
        try:
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append((str(path), -1, -1))
    return tuple(found)


def imported() -> list[Path]:
    """Files that are replaced when what was imported is: all of this package, and the first file of each other one."""
    modules = [(name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items())]
    others = [Path(file) for name, file in modules if file and "." not in name and name != "__main__"]
    return [*others, *brought(Path(__file__).parents[1])]


def brought(folder: Path) -> list[Path]:
    """Files of the package in a folder that a run brings along, in order."""
    return sorted(path for pattern in BROUGHT for path in folder.glob(pattern))


def digest(folder: Path) -> str:
    """SHA-256 of the package in a folder: of names and contents of what a run brings along."""
    sums = hashlib.sha256()
    for path in brought(folder):
        content = path.read_bytes()
        sums.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return sums.hexdigest()


class Kept(MetaPathFinder, Loader):
    """Gives out this package's modules as they were imported, wherever the same package is found, to the last byte.

    A run brings its own copy of the package, which Python finds before the installed one and a new process would
    import. Where that copy is another, it is imported as in a new process.

    Args:
        known: :func:`digest` of the package, taken before its modules were imported.
    """

    def __init__(self, known: str) -> None:
        self.known, self.used = known, False
        self.modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}

    def put_aside(self) -> None:
        """Take the modules out of what is imported, until somebody asks for the package."""
        for name in self.modules:
            del sys.modules[name]
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """For the import system: where the package comes from."""
        if name != PACKAGE:
            return None
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(name)
        if found is None or not found.origin or digest(Path(found.origin).parent) != self.known:
            return None
        self.used = True
        return importlib.util.spec_from_loader(name, self, origin=found.origin, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """For the import system: the package, and all its rooms with it."""
        sys.modules.update(self.modules)
        return self.modules[PACKAGE]

    def exec_module(self, module: ModuleType) -> None:
        """For the import system: it was run before."""
