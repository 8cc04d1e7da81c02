"""Build the course as static pages: ``python docs/site.py`` (``make site``), into ``build/site``.

From the stored notebooks, nothing is executed and nothing fetched, neither here nor by a reader's browser.
"""

import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
CONF = """
project, author, copyright = {title!r}, "the authors", "the authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme, html_title = "furo", {title!r}
"""
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
pieces
teaching
glossary
```
"""


def main() -> int:
    """Assemble the sources, build, and return Sphinx's exit code; a warning is an error."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in [*notebooks, *(ROOT / "docs").glob("*.md")]:
        shutil.copy(path, SOURCE)
    (SOURCE / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.png", SOURCE / "docs")  # README's figure, at README's address
    title, rest = (ROOT / "README.md").read_text(encoding="utf-8").removeprefix("# ").split("\n", 1)
    abstract = re.split(r"^(?:```|##)", rest, maxsplit=1, flags=re.M)[0].strip()
    names = "\n".join(path.stem for path in notebooks)
    (SOURCE / "index.md").write_text(INDEX.format(title=title, abstract=abstract, notebooks=names), encoding="utf-8")
    (SOURCE / "conf.py").write_text(CONF.format(title=title.split(":")[0]), encoding="utf-8")
    return sphinx(["-q", "-W", "--keep-going", "-b", "html", str(SOURCE), str(SITE)])


if __name__ == "__main__":
    sys.exit(main())
