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


FORMULAS = r"""# Of $x < y$

Inline $a < b$ and $\bar w_k$, code `$not$`, a price of $5 and $6, and

$$\begin{bmatrix} 1 & 2 \end{bmatrix}$$

$$
u < v
$$

| a | b |
|---|---|
| $z_1$ | none |

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


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FETCHED = ("src", "srcset", "href", "xlink:href", "data", "poster", "background", "action")


def loaded(soup):
    """What a browser fetches of itself when it opens a page, or runs: all but where a link leads."""
    given = [tag.get(name) for tag in soup.find_all(True) if tag.name != "a" for name in FETCHED]
    styles = [*(tag.get_text() for tag in soup.find_all("style")), *(tag["style"] for tag in soup.select("[style]"))]
    given += [found for style in styles for found in re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]*)", style)]
    return [one for one in given if one and not one.startswith(("data:", "#"))] + soup.find_all("script")


def prose(soup):
    """The text of Markdown, without code."""
    for code in soup.select(".jp-RenderedMarkdown :is(code, pre), .anchor-link"):
        code.extract()
    return "\n".join(text.get_text() for text in soup.select(".jp-RenderedMarkdown"))


def made(source, *outputs):
    """The page of a notebook with this text and a cell with these outputs: data, and an alternative text or None."""
    code = nbformat.v4.new_code_cell("draw()")
    for data, alt in outputs:
        more = {} if alt is None else {"image/png": {"alt": alt}}
        code.outputs.append(nbformat.v4.new_output("display_data", data, metadata=more))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source), code])
    soup = BeautifulSoup(pages().page(book), "html.parser")
    assert book.cells[0].source == source and book.cells[1] == code, "the notebook itself stays as it was"
    return soup


def test_a_page_has_formulas_and_the_words_of_pictures_and_loads_nothing():
    soup = made(FORMULAS, ({"image/png": PIXEL}, 'Two "arrows", and 3 < 4.'), ({"image/png": PIXEL}, None))
    kinds = [formula["display"] for formula in soup.find_all("math")]
    assert kinds == ["inline", "inline", "inline", "block", "block", "inline"] and len(soup.select("mtd")) == 2
    texts = [formula.get_text() for formula in soup.find_all("math")]
    assert (texts[:2], texts[4:]) == (["x<y", "a<b"], ["u<v", "z1"]) and len(soup.select("td math msub")) == 1
    assert "$not$" in soup.find("code").text and "$neither$" in soup.find("pre").text
    assert [picture["alt"] for picture in soup.find_all("img")] == ['Two "arrows", and 3 < 4.', ""]
    assert loaded(soup) == [] and soup.find("a", href="https://elsewhere.example/open").text.strip() == "Open"
    assert "a price of $5 and $6, and" in prose(soup) and prose(soup).count("$") == 2


def test_what_a_page_would_load_is_found():
    """The check of pages itself, on what it should find."""
    tags = '<script>run()</script><link href="https://a/x.css"><img src="//a/x.png"><video poster="x.png"></video>'
    found = loaded(BeautifulSoup(f"{tags}<style>@import 'https://a'; b {{c: url(https://a/f)}}</style>", "html.parser"))
    assert len(found) == 6
    kept = '<a href="https://a">a</a><img src="data:image/png;base64,AA"><style>b {c: url(data:x)}</style>'
    assert loaded(BeautifulSoup(kept, "html.parser")) == []


def test_a_line_break_of_a_formula_before_its_end_is_no_price():
    assert len(made("$$\na \\\\$$ and $b$, for \\$5").find_all("math")) == 2


def test_a_dollar_behind_a_backslash_is_no_formula():
    soup = made(r"Between \$5 and \$6, with $x$; but `\$HOME` in code.")
    assert soup.find("code").text == r"\$HOME"
    assert "Between $5 and $6, with" in prose(soup) and [one.get_text() for one in soup.find_all("math")] == ["x"]


@pytest.mark.parametrize(
    "other",
    [
        {"text/html": f"<img alt='a logo' src='data:image/png;base64,{PIXEL}'>"},
        {"text/html": "<b>a table</b>", "image/png": PIXEL},
    ],
    ids=["in HTML", "beside HTML"],
)
def test_a_picture_keeps_its_words_beside_other_outputs(other):
    soup = made("Text.", (other, "first" if "image/png" in other else None), ({"image/png": PIXEL}, "second"))
    assert soup.find_all("img")[-1]["alt"] == "second"


@pytest.mark.parametrize(
    "tag",
    [
        '<img src="//a/x.png">',
        '<iframe src="https://a"></iframe>',
        '<link href="https://a">',
        '<video><source src="https://a/v.mp4"></video>',
        '<input type="image" src="x.png">',
        "<style>@import 'https://a'; b {c: url(https://a/f)}</style>",
    ],
)
def test_html_that_a_cell_put_out_loads_nothing(tag):
    assert loaded(made("Text.", ({"text/html": tag}, None))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_is_whole_without_a_network(path):
    book = nbformat.read(path, as_version=4)
    soup = BeautifulSoup(pages().page(book), "html.parser")
    assert loaded(soup) == [] and "--jp-" in soup.find("style").text, "and it keeps its looks"
    texts = pages().alternatives(book)
    assert [picture["alt"] for picture in soup.select(".jp-OutputArea img")] == texts
    assert all(len(text) > 40 for text in texts)
    sources = [
        re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S) for cell in book.cells if cell.cell_type != "code"
    ]
    written = sum(len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", source, re.S)) for source in sources)
    assert len(soup.find_all("math")) == written and not soup.find_all("merror")
    assert "$" not in prose(soup), "a formula is left as it was typed"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_words_of_pictures_are_words(path):
    texts = pages().alternatives(nbformat.read(path, as_version=4))
    assert [text for text in texts if re.search(r"_nolegend_|_child|mathdefault|\\frac", text)] == []


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
    assert done.stdout.count("cell  2 of 2") == 1 and "\r" not in done.stdout, "the live line is for terminals"
    assert "answer 42" in done.stdout and "01_good.html" in done.stdout
    assert "answer 42" in (tmp_path / "build" / "01_good.html").read_text()
    executed = json.loads((tmp_path / "build" / "01_good.ipynb").read_text())
    assert executed["cells"][0]["execution_count"] == 1
    assert [out["output_type"] for out in executed["cells"][1]["outputs"]] == ["stream"], "sliders are not stored"
    assert "widgets" not in executed["metadata"]
    assert json.loads((tmp_path / "notebooks" / "01_good.ipynb").read_text())["cells"][0]["outputs"] == []
