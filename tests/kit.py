"""The lecturer's kit for its tests: where it lies, its scripts as modules, and words counted."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "docs" / "teaching"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def part(name: str) -> ModuleType:
    """A script of the kit, as a module."""
    spec = importlib.util.spec_from_file_location(f"teaching_{name}", KIT / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> nbformat.NotebookNode:
    """A stored notebook."""
    return nbformat.read(path, as_version=4)


def spoken(text: str) -> int:
    """Words of a text."""
    return len(re.findall(r"\w[\w'-]*", text))
