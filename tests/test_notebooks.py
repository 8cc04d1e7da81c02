"""Notebooks as stored: whole, run in order, and held by a check that bites. nbval itself runs beside these tests."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [
        cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_whole_run(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert not [out for out in outputs if "\r" in out.get("text", "")], "a bar that is not finished"
    assert path.stat().st_size < 400_000
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert sum("headline" in cell.metadata.get("tags", []) for cell in cells) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ignored_outputs_are_followed_by_a_claim(path):
    """Numbers that differ from machine to machine may be skipped by nbval, but the notebook must assert on them."""
    skipped = [cell for cell in code_cells(path) if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    asserts = [cell for cell in code_cells(path) if re.search(r"^assert ", cell.source, re.M)]
    assert len(asserts) >= 5 and not [c for c in asserts if "nbval-skip" in c.metadata.get("tags", [])]
    strict = [
        cell
        for cell in code_cells(path)
        if cell not in skipped and any(o.output_type == "stream" for o in cell.outputs)
    ]
    assert len(strict) >= 5, "counts, shapes and sizes stay strict"


def test_the_set_up_cell_is_one_and_short():
    """The same cell in every notebook, eight lines of code, and what it prints are versions and a device."""
    cells = [code_cells(path)[0] for path in NOTEBOOKS]
    assert len({cell.source for cell in cells}) == 1
    assert sum(bool(line.strip()) for line in cells[0].source.splitlines()) <= 8
    assert all(re.match(r"torch \S+, transformers \S+, on \w+ in torch\.\w+\n$", c.outputs[0].text) for c in cells)


def tiny_notebook(path, stored):
    """A one-cell notebook that counts the adapter's parameters, with a stored output."""
    cell = nbformat.v4.new_code_cell(
        "from fedllm_helpers import communication, config\n"
        "cfg = config.load('course')\n"
        "print(communication.parameter_counts(cfg.model.name, cfg.model.lora).trainable)",
        execution_count=1,
        outputs=[nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")],
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)


@pytest.mark.processes
@pytest.mark.parametrize(("stored", "status"), [(196_608, 0), (196_609, 1)])
def test_a_changed_count_makes_nbval_fail(tmp_path, stored, status):
    tiny_notebook(tmp_path / "count.ipynb", stored)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path / "count.ipynb")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stdout
    assert ("mismatch" in done.stdout.lower()) == bool(status)


@pytest.mark.processes
def test_a_failing_notebook_stops_with_its_name_cell_and_error(tmp_path):
    """The runner itself, copied beside a notebook that fails in its second cell."""
    (tmp_path / "notebooks").mkdir()
    runner = tmp_path / "notebooks" / "run.py"
    for name in ("run.py", "pages.py"):
        (runner.parent / name).write_text((ROOT / "notebooks" / name).read_text())
    cells = [nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("x / 0"), nbformat.v4.new_code_cell("x")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_bad.ipynb")
    done = subprocess.run([sys.executable, str(runner)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "01_bad.ipynb failed in cell 2 of 3" in done.stderr and "ZeroDivisionError" in done.stderr
    done = subprocess.run([sys.executable, str(runner), "09"], capture_output=True, text=True)
    assert done.returncode == 2 and "no notebook named 09" in done.stderr
    done = subprocess.run([sys.executable, str(runner), "01", "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and "no notebook named nope: there are 01_bad" in done.stderr


@pytest.mark.processes
def test_of_two_notebooks_at_a_time_the_first_that_fails_ends_the_other(tmp_path):
    (tmp_path / "notebooks").mkdir()
    runner, mark = tmp_path / "notebooks" / "run.py", tmp_path / "pid"
    for name in ("run.py", "pages.py"):
        (runner.parent / name).write_text((ROOT / "notebooks" / name).read_text())
    waits = f"import os, pathlib, time\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    fails = f"import pathlib, time\nwhile not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.1)\n1 / 0"
    for name, source in (("01_waits", waits), ("02_fails", fails)):
        cell = nbformat.v4.new_code_cell(source)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / f"{name}.ipynb")
    command = [sys.executable, str(runner), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "02_fails.ipynb failed in cell 1 of 1" in done.stderr
    assert "01_waits" not in done.stderr and not psutil.pid_exists(int(mark.read_text())), "no kernel is left"


FORMULAS = r"""Inline $a < b$ and $\bar w_k$, code `$not$`, and

$$\begin{bmatrix} 1 & 2 \end{bmatrix}$$

[![Open](https://elsewhere.example/badge.svg)](https://elsewhere.example/open)

```
$neither$
```"""


def pages():
    sys.path.insert(0, str(ROOT / "notebooks"))
    try:
        import pages as module
    finally:
        sys.path.pop(0)
    return module


def loaded(soup):
    """What a browser fetches of itself when it opens a page."""
    found = [tag.get("src") or tag.get("href") for tag in soup.find_all(["script", "link", "img", "iframe"])]
    return [address for address in found if address and not address.startswith("data:")]


def test_a_page_has_formulas_and_the_words_of_pictures_and_loads_nothing():
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    code = nbformat.v4.new_code_cell("draw()")
    for alt in ({"image/png": {"alt": "Two arrows, and 3 < 4."}}, {}):
        code.outputs.append(nbformat.v4.new_output("display_data", {"image/png": pixel}, metadata=alt))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(FORMULAS), code])
    soup = BeautifulSoup(pages().page(book), "html.parser")
    kinds = [formula["display"] for formula in soup.find_all("math")]
    assert kinds == ["inline", "inline", "block"] and len(soup.select("mtd")) == 2
    assert "$not$" in soup.find("code").text and "$neither$" in soup.find("pre").text
    assert [picture["alt"] for picture in soup.find_all("img")] == ["Two arrows, and 3 < 4.", ""]
    assert loaded(soup) == [] and soup.find("a", href="https://elsewhere.example/open").text.strip() == "Open"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_is_whole_without_a_network(path):
    book = nbformat.read(path, as_version=4)
    soup = BeautifulSoup(pages().page(book), "html.parser")
    assert loaded(soup) == [] and "url(http" not in str(soup)
    raw = [cell.get_text() for cell in soup.select(".jp-RenderedMarkdown")]
    formulas = sum(len(re.findall(r"\$[^$`\n]+\$", text)) for text in raw)
    assert not formulas, "a formula is left as it was typed"
    texts = pages().alternatives(book)
    assert len(texts) == len(soup.select(".jp-OutputArea img")) and all(len(text) > 40 for text in texts)


@pytest.mark.processes
def test_the_runner_writes_notebook_page_and_headline(tmp_path):
    (tmp_path / "notebooks").mkdir()
    runner = tmp_path / "notebooks" / "run.py"
    for name in ("run.py", "pages.py"):
        (runner.parent / name).write_text((ROOT / "notebooks" / name).read_text())
    cell = nbformat.v4.new_code_cell("print('answer 42')", metadata={"tags": ["headline"]})
    sliders = nbformat.v4.new_code_cell("import ipywidgets\nprint('moved')\nipywidgets.IntSlider()")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, sliders]), tmp_path / "notebooks" / "01_good.ipynb")
    done = subprocess.run([sys.executable, str(runner)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cell  2 of 2" in done.stdout and "answer 42" in done.stdout and "01_good.html" in done.stdout
    assert "answer 42" in (tmp_path / "build" / "01_good.html").read_text()
    executed = json.loads((tmp_path / "build" / "01_good.ipynb").read_text())
    assert executed["cells"][0]["execution_count"] == 1
    assert [out["output_type"] for out in executed["cells"][1]["outputs"]] == ["stream"], "sliders are not stored"
    assert "widgets" not in executed["metadata"]
    assert json.loads((tmp_path / "notebooks" / "01_good.ipynb").read_text())["cells"][0]["outputs"] == []
