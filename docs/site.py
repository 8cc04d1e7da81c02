"""Build the course as static pages: ``python docs/site.py`` (``make site``), into ``build/site``.

From the stored notebooks, nothing is executed and nothing fetched, neither here nor by a reader's browser.
"""

import inspect
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
WIDE, WIDEST = 120, 130  # letters on one line beside the sidebar of a window of 1280 pixels: as set, and set smaller
CONF = """
project, author, copyright = {title!r}, "the authors", "the authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints, autodoc_member_order = "description", "bysource"
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme, html_title = "furo", {title!r}
html_static_path, html_css_files, html_js_files = ["_static"], ["site.css"], [("site.js", {{"defer": "defer"}})]
html_theme_options = {{"top_of_page_buttons": [], "light_css_variables": {{"code-font-size": "80%"}}}}
html_use_index = html_domain_indices = False
templates_path = ["_templates"]
"""
SEARCH = """{% extends "!search.html" %}{% block content %}<h1>Search</h1>{{ super() }}{% endblock %}"""
INDEX = """
# {title}

{abstract}

```{{toctree}}
:caption: Notebooks
:maxdepth: 1

{notebooks}
```

```{{toctree}}
:caption: Around them
:maxdepth: 1

course
data
project
pilot
pieces
names
further
glossary
```

```{{toctree}}
:caption: Teaching
:maxdepth: 1

teaching/README
teaching/law
teaching/reading
teaching/marking
teaching/exam
teaching/exam-answers
```
"""


ROOMS = ["adapters", "config", "data", "models", "training", "evaluation", "aggregation", "communication", "privacy"]
ROOMS += ["federation", "deployment", "attacks", "study", "plotting"]


def names() -> str:
    """The page of public names: of each room what its face shows, from the docstrings."""
    page = ["# The package, room by room", "The names that others may use; each room's face says which they are."]
    for room in ROOMS:
        face = import_module(f"fedllm_helpers.{room}")
        page += [f"## {room}", "```{eval-rst}", f".. automodule:: {face.__name__}", "   :no-members:", ""]
        for name in face.__all__:
            found = getattr(face, name)
            kind = "autoclass" if inspect.isclass(found) else "autofunction" if inspect.isroutine(found) else ""
            if kind and found.__module__.startswith("fedllm_helpers"):
                page += [f".. {kind}:: {found.__module__}.{found.__name__}", "   :no-index:", ""]
        page.append("```")
    return "\n\n".join(page[:2]) + "\n\n" + "\n".join(page[2:]) + "\n"


def described(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as its page wants it.

    The alternative text of a picture goes where MyST-NB looks for it, a picture from elsewhere gives way to its words,
    what a cell has printed is tagged by its shape, and the corner of a table is no heading without words.
    """
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        texts = [out.get("metadata", {}).get("image/png", {}).get("alt") for out in outputs]
        if any(texts):
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(filter(None, texts))}}
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"!\[([^]]*)\]\(https?://[^)]*\)", r"\1", cell.source)
        shown = [out.get("text", out.get("data", {}).get("text/plain", "")) for out in outputs]
        cell.metadata["tags"] = cell.metadata.get("tags", []) + shapes(shown)
        for out in outputs:
            if "text/html" in out.get("data", {}):
                out.data["text/html"] = out.data["text/html"].replace("<th></th>", "<td></td>")
    return notebook


def shapes(shown: list[str]) -> list[str]:
    """How texts are to be set: ``words`` may be wrapped, columns and bars may not, and these may be ``wide``."""
    lines = [line for line in "\n".join(shown).splitlines() if line.strip() and "%|" not in line]
    longest, aligned = max(map(len, lines), default=0), sum(bool(re.search(r"\S {2,}\S", line)) for line in lines)
    if 2 * aligned < len(lines) or longest > WIDEST:
        return ["words"]
    return ["wide"] * (longest > WIDE)


def main() -> int:
    """Assemble the sources, build, and return Sphinx's exit code; a warning is an error."""
    for folder in (SOURCE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        nbformat.write(described(nbformat.read(path, as_version=4)), SOURCE / path.name)
    for path in (ROOT / "docs").glob("*.md"):
        shutil.copy(path, SOURCE)
    (SOURCE / "teaching").mkdir()
    for path in (ROOT / "docs" / "teaching").glob("*.md"):
        shutil.copy(path, SOURCE / "teaching")
    (SOURCE / "_static").mkdir()
    for name in ("site.css", "site.js"):
        shutil.copy(ROOT / "docs" / name, SOURCE / "_static")
    (SOURCE / "_templates").mkdir()
    (SOURCE / "_templates" / "search.html").write_text(SEARCH, encoding="utf-8")
    (SOURCE / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.png", SOURCE / "docs")  # README's figure, at README's address
    title, rest = (ROOT / "README.md").read_text(encoding="utf-8").removeprefix("# ").split("\n", 1)
    abstract = re.split(r"^(?:```|##)", rest, maxsplit=1, flags=re.M)[0].strip()
    stems = "\n".join(path.stem for path in notebooks)
    (SOURCE / "names.md").write_text(names(), encoding="utf-8")
    (SOURCE / "index.md").write_text(INDEX.format(title=title, abstract=abstract, notebooks=stems), encoding="utf-8")
    (SOURCE / "conf.py").write_text(CONF.format(title=title.split(":")[0]), encoding="utf-8")
    return sphinx(["-q", "-W", "--keep-going", "-b", "html", str(SOURCE), str(SITE)])


if __name__ == "__main__":
    sys.exit(main())
