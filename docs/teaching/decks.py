"""Slides of the notebooks: ``python docs/teaching/decks.py [NAME ...]`` (``make slides``), into ``build/slides``.

A file in ``slides/`` says what stands on each slide and what one says beside it. Figures, outputs, headings and numbers
come from the stored notebook, so a new run changes them here, too. A deck is one page that loads nothing.
"""

import html
import re
import sys
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import yaml
from latex2mathml.converter import convert
from nbconvert.filters import markdown2html

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "slides"
SETTINGS = (
    '{width: 1280, height: 720, margin: 0.03, center: false, hash: true, slideNumber: "c/t", '
    'transition: "none", controls: false, plugins: [RevealNotes]}'
)
LARGEST, SMALLEST = 40, 16  # pixels of an output's letters, on a slide of 1280 by 720
WIDE, HIGH = 1120, 390  # pixels that an output may take
LONGEST = 84  # letters of a line of code before it is folded
KEYS = {"kind", "section", "title", "text", "bullets", "figure", "output", "code", "values", "notes"}


@dataclass(frozen=True)
class Book:
    """A stored notebook: its cells by id, and the heading of each section by its number."""

    name: str
    cells: dict[str, nbformat.NotebookNode]
    headings: dict[str, str]

    def cell(self, key: str) -> nbformat.NotebookNode:
        """The cell with this id (in quotes, if it is all digits); a ValueError where the notebook has none."""
        if key not in self.cells:
            raise ValueError(f"{self.name} has no cell {key}: look up the id of the cell that took its place")
        return self.cells[key]

    def part(self, pattern: str) -> str:
        """The first group of a pattern in the notebook's prose; a ValueError where it stands nowhere."""
        prose = "\n\n".join(cell.source for cell in self.cells.values() if cell.cell_type == "markdown")
        found = re.search(pattern, prose, re.M | re.S)
        if not found:
            raise ValueError(f"{self.name} has no text like {pattern!r}")
        return found[1].strip()


def read(path: Path) -> Book:
    """A stored notebook."""
    cells = {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}
    headings = {}
    for cell in cells.values():
        if cell.cell_type == "markdown":
            headings |= dict(re.findall(r"^#+ (\d+\.\d+) (.+)$", cell.source, re.M))
    return Book(path.stem, cells, headings)


def figure(book: Book, key: str) -> str:
    """The picture that a cell has put out, with its words."""
    for out in book.cell(key).get("outputs", []):
        if "image/png" in out.get("data", {}):
            words = out["metadata"].get("image/png", {}).get("alt", "")
            data = "".join(out["data"]["image/png"].split())
            return f'<img class="figure" alt="{html.escape(words)}" src="data:image/png;base64,{data}">'
    raise ValueError(f"{book.name}: cell {key} has no picture")


def printed(book: Book, key: str) -> list[str]:
    """The lines that a cell has put out, without bars of progress."""
    lines = []
    for out in book.cell(key).get("outputs", []):
        text = out.get("text") or out.get("data", {}).get("text/plain", "")
        lines += [line.rstrip() for line in text.splitlines() if not re.search(r"\d%\|", line)]
    return lines


def output(book: Book, wanted: dict[str, Any]) -> str:
    """What a cell has put out: ``keep``, a pattern, picks ``lines``; ``change`` has pairs of pattern and text."""
    lines = [line for line in printed(book, wanted["cell"]) if re.search(wanted.get("keep", ""), line)]
    for pattern, text in wanted.get("change", []):
        lines = "\n".join(re.sub(pattern, text, line) for line in lines).split("\n")
    lines = lines[: wanted.get("lines", len(lines))]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{book.name}: cell {wanted['cell']} has put out nothing like {wanted.get('keep', 'text')!r}")
    return block(book, wanted["cell"], lines, "output")


def code(book: Book, wanted: dict[str, Any]) -> str:
    """So many ``lines`` of a cell's code, from the one that begins with ``start``."""
    given = book.cell(wanted["cell"]).source.splitlines()
    first = next((i for i, line in enumerate(given) if line.startswith(wanted.get("start", ""))), None)
    if first is None:
        raise ValueError(f"{book.name}: cell {wanted['cell']} has no line that begins with {wanted['start']!r}")
    shown = []
    for line in given[first : first + wanted.get("lines", len(given))]:
        indent = " " * (len(line) - len(line.lstrip()) + 8)
        fold = textwrap.TextWrapper(LONGEST, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        shown += fold.wrap(line) or [""]
    return block(book, wanted["cell"], shown, "code")


def block(book: Book, key: str, lines: list[str], kind: str) -> str:
    """Lines as large as the slide allows; a ValueError where that is too small to read."""
    fits = min(LARGEST, WIDE / (0.61 * max(map(len, lines))), HIGH / (1.35 * len(lines)))
    if fits < SMALLEST:
        size = f"{len(lines)} lines of {max(map(len, lines))} letters"
        raise ValueError(f"{book.name}: {size} of cell {key} are too many for a slide; keep fewer")
    return f'<pre class="{kind}" style="font-size: {fits:.0f}px">{html.escape(chr(10).join(lines))}</pre>'


def values(book: Book, wanted: dict[str, dict[str, str]]) -> dict[str, str]:
    """Name to what a cell has put out: the first group of a pattern."""
    found = {}
    for name, place in wanted.items():
        match = re.search(place["find"], "\n".join(printed(book, place["cell"])))
        if not match:
            raise ValueError(f"{book.name}: cell {place['cell']} has put out nothing like {place['find']!r}")
        found[name] = match[1]
    return found


def marked(text: str, known: dict[str, str]) -> str:
    """Markdown with formulas and with ``{names}`` of values, as HTML."""
    for name, value in known.items():
        text = text.replace(f"{{{name}}}", value)
    left = re.search(r"\{\w+\}", re.sub(r"\$[^$\n]+\$|`[^`]*`", "", text))
    if left:
        raise ValueError(f"no value is given for {left[0]}")
    return re.sub(r"\$([^$\n]+)\$", lambda found: convert(html.unescape(found[1])), markdown2html(text))


def filled(book: Book, slide: dict[str, Any]) -> dict[str, Any]:
    """A slide of one of the three common kinds, filled from the notebook: its title, what one learns, its recap."""
    if slide.get("kind") == "title":
        question = book.part(r"^# .+?\n\n\*\*(.+?)\*\*$")
        return slide | {"title": book.part(r"^# (.+?)$"), "text": question}
    if slide.get("kind") == "abilities":
        return slide | {"title": "After this you can", "text": book.part(r"After this notebook you can\n\n(.+?)\n\n\*")}
    if slide.get("kind") == "recap":
        points = book.part(r"^## Recap\n\n(.+?)(?:\n\n|\Z)").splitlines()
        return slide | {"title": "Recap", "text": "\n".join(map(gist, points))}
    return slide


def gist(point: str) -> str:
    """The first sentence of a point, and the next ones while it has fewer than ten words: a slide wants no more."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=\.) ", point):
        if len(" ".join(kept).split()) < 10:
            kept.append(sentence)
    return " ".join(kept)


def section(book: Book, given: dict[str, Any]) -> str:
    """One slide with its notes, as HTML."""
    unknown = set(given) - KEYS
    if unknown or not given.get("notes"):
        what = f"has an unknown {sorted(unknown)[0]!r}" if unknown else "has no notes"
        raise ValueError(f"{book.name}: the slide {given.get('title') or given.get('kind')!r} {what}")
    slide, known = filled(book, given), values(book, given.get("values", {}))
    number = slide.get("section", "")
    if number and number not in book.headings:
        raise ValueError(f"{book.name} has no section {number}")
    parts = [f'<p class="place">{number} {html.escape(book.headings[number])}</p>' if number else ""]
    title = re.sub(r"</?p>", "", marked(re.sub(r"^(\w+)\. ", r"\1\\. ", slide["title"]), known)).strip()
    parts.append(f"<h2>{title}</h2>")
    bullets = "\n".join(f"- {line}" for line in slide.get("bullets", []))
    words = "\n\n".join(filter(None, [slide.get("text", ""), bullets]))
    parts.append(f'<div class="words">{marked(words, known)}</div>' if words else "")
    shown = [make(book, slide[name]) for name, make in MAKERS.items() if name in slide]
    look = slide.get("kind") or ("shown" if shown else "spoken")
    notes = f'<aside class="notes">{marked(slide["notes"], known)}</aside>'
    return f'<section><div class="frame {look}">{"".join(parts + shown)}</div>{notes}</section>'


MAKERS = {"code": code, "output": output, "figure": figure}


def reveal() -> Path:
    """Where reveal.js lies: sphinx-revealjs carries all of it."""
    found = find_spec("sphinx_revealjs")
    if found is None:
        raise FileNotFoundError("reveal.js is not there: install the extra `site` (pip install -e '.[site]')")
    return Path(found.origin).parent / "_static" / "revealjs"


def deck(path: Path) -> str:
    """The page of one file of slides.

    Args:
        path: of the file; it names the notebook and has a list of slides.

    Raises:
        ValueError: where a slide names a cell, a section, a line or a value that the notebook does not have.
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    book = read(ROOT / "notebooks" / f"{plan['notebook']}.ipynb")
    slides, home = "\n".join(section(book, slide) for slide in plan["slides"]), reveal()
    styles = "\n".join(p.read_text(encoding="utf-8") for p in (home / "dist/reveal.css", HERE / "slides/slides.css"))
    scripts = [(home / name).read_text(encoding="utf-8") for name in ("dist/reveal.js", "plugin/notes/notes.js")]
    scripts.append(f"Reveal.initialize({SETTINGS});")
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(book.name)}</title>',
            '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{styles}</style></head>",
            f'<body><div class="reveal"><div class="slides">\n{slides}\n</div></div>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def main(names: list[str], folder: Path = BUILD) -> int:
    """Write the decks whose names begin so, or all; 1 and a line where a slide and its notebook do not agree."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((HERE / "slides").glob("*.yaml")):
        if not names or path.stem.startswith(tuple(names)):
            try:
                page = deck(path)
            except (ValueError, FileNotFoundError) as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
            (folder / f"{path.stem}.html").write_text(page, encoding="utf-8")
            print(f"{folder / path.stem}.html: {page.count('<section>')} slides")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
