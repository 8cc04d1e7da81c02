"""The lecturer's kit: versions of the notebooks and their grading, minutes, and pages; all from what is stored."""

import csv
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from kit import KIT, NOTEBOOKS, ROOT, part, read, spoken


@pytest.fixture(scope="module")
def versions():
    return part("versions")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_instructor_gets_everything(versions, path):
    book = read(path)
    exercises = set(re.findall(r"\*\*Exercise (\d)", "\n".join(cell.source for cell in book.cells)))
    answers = {str(piece.exercise) for piece in versions.pieces(book) if piece.part == "answer"}
    assert answers == exercises and len(exercises) >= 3
    instructor = versions.instructor(book)
    nbformat.validate(instructor)
    whole = "\n".join(cell.source for cell in instructor.cells)
    for solution in versions._solutions(book).values():
        assert solution in whole
        for fence in re.findall(r"```python\n(.*?)\n```", solution, re.S):
            assert whole.count(fence) == 2, "in its cell and in words"
    assert any(cell.get("outputs") for cell in instructor.cells)
    assert not {versions.BEGIN, versions.END, versions.HIDDEN, versions.SHOWN} & set(whole.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_learner_gets_no_solution(versions, path):
    pytest.importorskip("nbgrader", reason="the extra `teaching` is not installed")
    book = read(path)
    learner = versions.learner(book, path.stem)
    nbformat.validate(learner)
    text = "\n".join(cell.source for cell in learner.cells)
    assert "Solution</summary>" not in text and "SOLUTION" not in text and "HIDDEN" not in text
    assert not re.search(r"^right_\d =|^verdict =", text, re.M), "the check of a number would tell it"
    assert text.count(versions.STUB) == sum(p.part == "answer" and p.kind != "open" for p in versions.pieces(book))
    for solution in versions._solutions(book).values():
        assert not [fence for fence in re.findall(r"```python\n(.*?)\n```", solution, re.S) if fence in text]
    assert not any(cell.get("outputs") for cell in learner.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nbgrader_knows_each_answer_and_each_check(versions, path):
    cells = [cell.metadata.get("nbgrader") for cell in versions.source(read(path), path.stem).cells]
    nbformat.validate(versions.source(read(path), path.stem))
    known = [one for one in cells if one]
    assert len({one["grade_id"] for one in known}) == len(known) >= 5
    assert all(one["points"] > 0 for one in known if one["grade"]) and any(one["solution"] for one in known)


def test_a_sheet_brings_the_imports_that_it_needs(versions):
    book = read(ROOT / "notebooks" / "04_federated_aggregation.ipynb")
    made = versions.sheet(book, "04")
    assert "import numpy as np" in made.cells[0].source and "from_record" in made.cells[0].source
    assert "config" not in made.cells[0].source, "a parameter of that name is no import"
    assert versions.sheet(read(ROOT / "notebooks" / "07_analysis.ipynb"), "07") is None


ANSWERS = {
    "01_intro": "def word_overlap(question, options):\n    return 0",
    "05b_federated_privacy": "def total(gradients, patients, clip):\n    return gradients.sum(axis=0)",
}


@pytest.mark.processes
@pytest.mark.parametrize("stem", ANSWERS)
def test_a_right_answer_is_graded_full_and_a_wrong_one_zero(versions, tmp_path, stem):
    """nbgrader's own commands, on the sheet of one notebook: released, handed in three times, graded."""
    book, name = read(ROOT / "notebooks" / f"{stem}.ipynb"), f"{stem}_code"
    right = next(p.cell.source for p in versions.pieces(book) if p.part == "answer" and p.kind == "code")
    right = right.split(versions.BEGIN)[1].split(versions.END)[0]
    (tmp_path / "source" / name).mkdir(parents=True)
    nbformat.write(versions.sheet(book, stem), tmp_path / "source" / name / f"{name}.ipynb")
    (tmp_path / "nbgrader_config.py").write_text(part_config(versions))
    grader(tmp_path, "generate_assignment", name)
    released = read(tmp_path / "release" / name / f"{name}.ipynb")
    assert right.strip() not in "\n".join(cell.source for cell in released.cells)
    for student, answer in (("right", right), ("wrong", ANSWERS[stem]), ("empty", "")):
        mine = nbformat.from_dict(released)
        for cell in mine.cells:
            cell.source = cell.source.replace(versions.STUB, answer or versions.STUB)
        folder = tmp_path / "submitted" / student / name
        folder.mkdir(parents=True)
        nbformat.write(mine, folder / f"{name}.ipynb")
        released = read(tmp_path / "release" / name / f"{name}.ipynb")
    grader(tmp_path, "autograde", name)
    grader(tmp_path, "export", "--to", "grades.csv")
    with (tmp_path / "grades.csv").open() as stream:
        scores = {row["student_id"]: float(row["score"]) for row in csv.DictReader(stream)}
    assert scores == {"right": versions.POINTS["code"], "wrong": 0.0, "empty": 0.0}


def part_config(versions):
    text = re.search(r'^CONFIG = """(.*?)"""', (KIT / "bundle.py").read_text(), re.S | re.M)[1]
    return text.format(stub=versions.STUB)


def grader(folder, *words):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # nbgrader calls alembic by name
    command = [sys.executable, "-m", "nbgrader", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_minutes_are_counted_by_section_and_shown(tmp_path):
    minutes = part("minutes")
    new = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    begin, end = "2026-01-01T00:00:01.500000Z", "2026-01-01T00:00:04.000000Z"
    timed = new[1]("x", metadata={"execution": {"iopub.status.busy": begin, "shell.execute_reply": end}})
    book = nbformat.v4.new_notebook(
        cells=[new[0]("# 9. T"), new[0]("## 9.1 One\n\nwords"), timed, new[0]("## Recap"), new[1]("y")]
    )
    found = [(number or heading, sum(map(minutes.seconds, cells))) for number, heading, cells in minutes.sections(book)]
    assert found == [("opening", 0), ("9.1", 2.5), ("recap and exercises", 0)]
    measured = tmp_path / "minutes.json"
    measured.write_text('{"machine": "2 cores", "notebooks": {"01_intro": {"1.3": 12.5}}}')
    assert "| 1.3 The number: how surprised is the model? | 12.5 |" in minutes.table(measured)
    assert "not measured yet" in minutes.table(tmp_path / "none") and "2 cores" in minutes.table(measured)


def test_the_exam_has_twenty_questions_with_answers_and_its_points_add_up():
    exam, answers = ((KIT / name).read_text() for name in ("exam.md", "exam-answers.md"))
    asked = re.findall(r"^\*\*(\d+)\.\*\* \((\d)\)", exam, re.M)
    assert [int(number) for number, _ in asked] == list(range(1, 21))
    assert re.findall(r"^\*\*(\d+)\.\*\* ", answers, re.M) == [number for number, _ in asked]
    parts = re.split(r"^## ", exam, flags=re.M)[1:]
    for one in parts:
        points = [int(value) for value in re.findall(r"^\*\*\d+\.\*\* \((\d)\)", one, re.M)]
        assert sum(points) == int(re.search(r"\((\d+) points\)", one)[1])
    assert sum(int(points) for _, points in asked) == int(re.search(r"(\d+) points", exam)[1])


def test_pages_of_the_kit_are_there_and_their_links_lead_somewhere():
    assert (KIT / "marking.md").read_text().count("\n> ") >= 6 and len(
        re.findall(r"^\*\*\S+ of 4\.\*\*", (KIT / "marking.md").read_text(), re.M)
    ) == 6
    assert spoken((KIT / "law.md").read_text()) < 800 and "no legal advice" in (KIT / "law.md").read_text()
    for path in KIT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


RUN = """
import runpy, sys
for path in sys.argv[1:]:
    try:
        runpy.run_path(path)
        print("right")
    except AssertionError as error:
        print(error)
"""


def test_sheets_run_by_themselves_with_right_answers_and_say_so_where_none_is_given(versions, tmp_path):
    """Every exercise in code, with no line of the notebook above it; in one process, outside of nbgrader."""
    given, between = [], re.compile(rf"{versions.BEGIN}.*?{versions.END}", re.S)
    for path in NOTEBOOKS:
        sheet = versions.sheet(read(path), path.stem)
        code = "\n\n".join(cell.source for cell in sheet.cells if cell.cell_type == "code") if sheet else ""
        for kind, text in (("right", code), ("open", between.sub("", code))):
            given.append(tmp_path / f"{path.stem}_{kind}.py")
            given[-1].write_text(text or f"assert {kind == 'right'}, 'not answered yet'")
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, given)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["right", "not answered yet"] * len(NOTEBOOKS)


def test_the_whole_kit_is_one_file():
    """By the script that `make class` runs, where no address can be reached; the notebooks are left alone."""
    for name in ("nbgrader", "sphinx_revealjs"):
        pytest.importorskip(name, reason="the extras `site` and `teaching` are not installed")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    before = {path: path.stat().st_mtime_ns for path in NOTEBOOKS}
    command = [sys.executable, str(KIT / "bundle.py")]
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in NOTEBOOKS}
    with zipfile.ZipFile(ROOT / "build" / "fedllm-class.zip") as packed:
        names = set(packed.namelist())
        pages = {name: packed.read(name).decode() for name in names if name.endswith(".md")}
    wanted = {f"class/{kind}/{path.name}" for kind in ("learner", "instructor") for path in NOTEBOOKS}
    wanted |= {f"class/slides/{path.stem}.html" for path in (KIT / "slides").glob("*.yaml")}
    wanted |= {f"class/nbgrader/source/{path.stem}/{path.name}" for path in NOTEBOOKS}
    wanted |= {f"class/{path.name}" for path in KIT.glob("*.md")} | {"class/minutes.md"}
    assert wanted <= names and not [name for name in pages if "](../" in pages[name]], "links lead out of the zip"
