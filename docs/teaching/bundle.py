"""All for a class in one file: ``python docs/teaching/bundle.py`` (``make class``), into ``build/class`` and a zip.

Slides, learner's and instructor's notebooks, a course folder for nbgrader, and the pages of this folder. Nothing is
executed and nothing fetched.
"""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import decks
import minutes
import nbformat
import versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLASS = ROOT / "build" / "class"
CONFIG = """c = get_config()
c.CourseDirectory.course_id = "fedllm"
c.ClearSolutions.code_stub = {{"python": "{stub}"}}
c.ClearSolutions.text_stub = "*Your answer.*"
c.ExecutePreprocessor.timeout = 900
"""


def notebooks(folder: Path) -> None:
    """Each notebook for learners, for the instructor, and as nbgrader's assignments: the whole, and its code alone."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book, stem = nbformat.read(path, as_version=4), path.stem
        made = {f"learner/{stem}": versions.learner(book, stem), f"instructor/{stem}": versions.instructor(book)}
        made[f"nbgrader/source/{stem}/{stem}"] = versions.source(book, stem)
        if (code := versions.sheet(book, stem)) is not None:
            made[f"nbgrader/source/{stem}_code/{stem}_code"] = code
        for name, version in made.items():
            target = folder / f"{name}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(version, target)
    (folder / "nbgrader" / "nbgrader_config.py").write_text(CONFIG.format(stub=versions.STUB), encoding="utf-8")


def pages(folder: Path) -> None:
    """The pages of this folder; links that lead out of it go to the repository, at this version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = f"{project['urls']['Repository']}/blob/v{project['version']}/docs/"
    for path in HERE.glob("*.md"):
        text = re.sub(r"\]\(\.\./", f"]({there}", path.read_text(encoding="utf-8"))
        (folder / path.name).write_text(text, encoding="utf-8")
    (folder / "minutes.md").write_text(minutes.table(), encoding="utf-8")


def main(folder: Path = CLASS) -> int:
    """Make the folder anew and its zip beside it; 1 where slides and notebooks do not agree."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pages(folder)
    notebooks(folder)
    if decks.main([], folder / "slides"):
        return 1
    if not minutes.MEASURED.exists():
        print("computing is not measured yet: .venv/bin/python docs/teaching/minutes.py, where nothing else computes")
    packed = Path(shutil.make_archive(str(folder.parent / "fedllm-class"), "zip", folder.parent, folder.name))
    print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
