"""Minutes of each section, measured: ``python docs/teaching/minutes.py [NAME ...]`` runs the notebooks one by one.

Nothing is stored in the notebooks. Seconds go into ``minutes.json`` beside this file, with the machine; run it where
nothing else computes. :func:`table` puts them beside the words of the text and of the slides' notes.
"""

import json
import os
import platform
import re
import sys
from datetime import datetime
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOKS = HERE.parents[1] / "notebooks"
MEASURED = HERE / "minutes.json"
PACE = 130  # words a minute, spoken without haste
HEADING = re.compile(r"^##+ (\d+\.\d+) (.+)$", re.M)


def sections(book: nbformat.NotebookNode) -> list[tuple[str, str, list[nbformat.NotebookNode]]]:
    """Number, heading and cells of each section; what stands before the first is the opening."""
    found: list[tuple[str, str, list[nbformat.NotebookNode]]] = [("", "opening", [])]
    for cell in book.cells:
        if cell.cell_type == "markdown":
            found += [(number, heading, []) for number, heading in HEADING.findall(cell.source)]
            if re.search(r"^## (Recap|Exercises)$", cell.source, re.M) and found[-1][1] != "recap and exercises":
                found.append(("", "recap and exercises", []))
        found[-1][2].append(cell)
    return found


def seconds(cell: nbformat.NotebookNode) -> float:
    """How long a cell was executed, from the times that nbclient wrote into it; 0 for text."""
    times = cell.metadata.get("execution", {})
    ends = [times.get(name) for name in ("iopub.status.busy", "shell.execute_reply")]
    if None in ends:
        return 0.0
    begin, end = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in ends)
    return max(0.0, (end - begin).total_seconds())


def measure(path: Path) -> dict[str, float]:
    """Run a notebook in a copy, and add up the seconds of each section: number, or heading, to seconds."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=None, record_timing=True, resources={"metadata": {"path": str(path.parent)}}).execute()
    return {
        number or heading: round(sum(map(seconds, cells)), 1)
        for number, heading, cells in sections(book)
        if any(cell.cell_type == "code" for cell in cells)
    }


def words(text: str) -> int:
    """Words of prose, without code, formulas and addresses."""
    return len(re.findall(r"\w[\w'-]*", re.sub(r"```.*?```|\$[^$]*\$|\]\([^)]*\)|<[^>]+>", " ", text, flags=re.S)))


def spoken(stem: str) -> dict[str, int]:
    """Words of the slides' notes, by section; of others, of the opening or of the recap."""
    found: dict[str, int] = {}
    for path in (HERE / "slides").glob("*.yaml"):
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        for slide in plan["slides"] if plan["notebook"] == stem else ():
            place = slide.get("section") or ("recap and exercises" if slide.get("kind") == "recap" else "opening")
            found[place] = found.get(place, 0) + words(slide["notes"])
    return found


def table(measured: Path = MEASURED) -> str:
    """A page of Markdown: for each section its computing, if it was measured, its words, and minutes of talk."""
    known = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {"notebooks": {}}
    where = f"Computing was measured on {known['machine']}." if measured.exists() else "Computing was not measured yet."
    page = [
        "# Minutes of each section",
        f"{where} Talk is the slides' notes at {PACE} words a minute, without questions.",
    ]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        took, said = known["notebooks"].get(path.stem, {}), spoken(path.stem)
        rows = ["| section | seconds of computing | words to read | minutes of talk |", "|---|---|---|---|"]
        for number, heading, cells in sections(nbformat.read(path, as_version=4)):
            read = sum(words(cell.source) for cell in cells if cell.cell_type == "markdown")
            of_notes, computing = said.get(number or heading, 0), took.get(number or heading, "–")
            talk = f"{of_notes / PACE:.1f}" if of_notes else "–"
            rows.append(f"| {number} {heading} | {computing} | {read} | {talk} |")
        page += [f"## {path.stem}", "\n".join(rows)]
    return "\n\n".join(page) + "\n"


def main(names: list[str]) -> int:
    """Measure the notebooks whose names begin so, or all, and store the seconds; others keep theirs."""
    known = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {"notebooks": {}}
    known["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.stem.startswith(tuple(names)):
            known["notebooks"][path.stem] = measure(path)
            print(f"{path.stem}: {sum(known['notebooks'][path.stem].values()) / 60:.1f} minutes", flush=True)
            beside = MEASURED.with_suffix(".part")
            beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            beside.replace(MEASURED)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
