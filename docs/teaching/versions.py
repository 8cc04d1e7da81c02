"""A notebook's exercises in three forms, from one source: for learners, for the instructor, and for nbgrader.

The source is the notebook itself: an exercise is a bold ``**Exercise N``, its solution is folded below it, and a cell
with ``name = None`` is where an answer goes. nbgrader clears and grades; nothing is executed here.
"""

import ast
import copy
import re
from dataclasses import dataclass

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from traitlets.config import Config

SOLUTION = re.compile(r"<details><summary>Solution</summary>\s*(.*?)\s*</details>", re.S)
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HIDDEN, SHOWN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
POINTS = {"number": 1, "code": 3, "open": 4}
STUB = "# your work"


@dataclass(frozen=True)
class Piece:
    """A cell and its part: text, solution (in words), answer or check; its exercise; and number, code or open."""

    part: str
    cell: NotebookNode
    exercise: int = 0
    kind: str = ""


def pieces(book: NotebookNode) -> list[Piece]:
    """The notebook with its exercises taken apart: text, a cell for the answer, a cell that checks it, the solution."""
    found: list[Piece] = []
    number, answered, begun = 0, True, False
    told = _solutions(book)
    for cell in book.cells:
        begun = begun or (cell.cell_type == "markdown" and "## Exercises" in cell.source)
        if not begun:
            found.append(Piece("text", cell))
        elif cell.cell_type == "code":
            answered = True
            found += _coded(cell, number, told[number])
        else:
            for words, is_solution in _split(cell.source):
                named = [] if is_solution else re.findall(r"\*\*Exercise (\d)", words)
                if not answered and (is_solution or named or words.startswith("**Next")):
                    found.append(Piece("answer", new_markdown_cell("*Your answer.*"), number, "open"))
                    answered = True
                if named:
                    number, answered = int(named[-1]), False
                found.append(Piece("solution" if is_solution else "text", new_markdown_cell(words), number))
    return found


def _solutions(book: NotebookNode) -> dict[int, str]:
    """Number of each exercise to its folded solution."""
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    tasks = re.split(r"\*\*Exercise (\d)", prose)
    folded = ((int(number), SOLUTION.search(text)) for number, text in zip(tasks[1::2], tasks[2::2], strict=True))
    return {number: found[1] for number, found in folded if found}


def _split(source: str) -> list[tuple[str, bool]]:
    """A cell of prose, cut at its folded solutions: (text, whether it is a solution)."""
    parts = SOLUTION.split(source)
    return [(text.strip(), place % 2 == 1) for place, text in enumerate(parts) if text.strip()]


def _coded(cell: NotebookNode, number: int, solution: str) -> list[Piece]:
    """The two cells of an exercise that checks itself: one for the answer with its solution, and one for the check."""
    tree, lines = ast.parse(cell.source), cell.source.splitlines()
    stub = next(node for node in tree.body if isinstance(node, ast.Assign) and _is_none(node.value))
    name, head, rest = stub.targets[0].id, lines[: stub.end_lineno], lines[stub.end_lineno :]
    fence = re.search(r"```python\n(.*?)\n```", solution, re.S)
    if fence:
        kind, told = "code", fence[1]
        call = next(node.value.args[0] for node in ast.walk(tree) if isinstance(node, ast.Expr))
        check = f'said = {ast.unparse(call)}\nassert said == "right", said'
    else:
        kind, told = "number", f"{_sides(tree, name)[0]}{name} = {_sides(tree, name)[1]}"
        shown = next(node.lineno for node in tree.body if isinstance(node, ast.Expr))
        kept = "\n".join(rest[: shown - stub.end_lineno - 1])
        check = f'assert {name} is not None, "not answered yet"\n{HIDDEN}\n{kept}\nassert verdict, "wrong"\n{SHOWN}'
    answer = "\n".join([*head, BEGIN, told, END])
    return [
        Piece("answer", new_code_cell(answer), number, kind),
        Piece("check", new_code_cell(check), number, kind),
    ]


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _sides(tree: ast.Module, name: str) -> tuple[str, str]:
    """What has to be computed for the right number, as code, and its name or expression."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("right"):
            return f"{ast.unparse(node)}\n", node.targets[0].id
    compared = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)
    )
    return "", ast.unparse(compared.comparators[0])


def _tagged(piece: Piece, stem: str) -> NotebookNode:
    """A cell with what nbgrader wants to know of it."""
    cell = copy.deepcopy(piece.cell)
    if piece.part in ("answer", "check"):
        by_hand = piece.kind == "open"
        graded = piece.part == "check" or by_hand
        what = {"grade": graded, "solution": piece.part == "answer", "locked": piece.part == "check", "task": False}
        what |= {"schema_version": 3, "grade_id": f"{stem}-{piece.exercise}-{piece.part}", "cell_type": cell.cell_type}
        cell.metadata["nbgrader"] = what | ({"points": POINTS[piece.kind]} if graded else {})
    return cell


def source(book: NotebookNode, stem: str) -> NotebookNode:
    """What nbgrader takes as an assignment: solutions and hidden tests are in it, marked; outputs are not."""
    made = copy.deepcopy(book)
    made.cells = [_tagged(piece, stem) for piece in pieces(book) if piece.part != "solution"]
    return _cleaned(made)


def learner(book: NotebookNode, stem: str) -> NotebookNode:
    """Without solutions and outputs, so that one predicts before one looks; a place to write in each exercise."""
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions  # what else is here does without nbgrader

    made, settings = source(book, stem), Config()
    settings.ClearSolutions.code_stub = {"python": STUB}
    settings.ClearSolutions.text_stub = "*Your answer.*"
    for step in (ClearSolutions(config=settings), ClearHiddenTests(config=settings)):
        made, _ = step.preprocess(made, {})
    return made


def instructor(book: NotebookNode) -> NotebookNode:
    """Everything: stored outputs, answers in their cells, checks that run, and the solutions in words."""
    made = copy.deepcopy(book)
    made.cells = [copy.deepcopy(piece.cell) for piece in pieces(book)]
    marks = {BEGIN, END, HIDDEN, SHOWN}
    for cell in made.cells:
        cell.source = "\n".join(line for line in cell.source.split("\n") if line not in marks)
    return made


def sheet(book: NotebookNode, stem: str) -> NotebookNode | None:
    """The exercises in code alone, with the imports that they need: graded in seconds, where a notebook takes minutes.

    Returns:
        A source for nbgrader as :func:`source` makes it, or None where the notebook has no exercise in code.
    """
    cut = pieces(book)
    coded = {piece.exercise for piece in cut if piece.kind == "code"}
    if not coded:
        return None
    kept = [p for p in cut if p.exercise in coded and p.part != "solution" and not p.cell.source.startswith("**Next")]
    code = "\n".join(piece.cell.source for piece in kept if piece.cell.cell_type == "code")
    made = copy.deepcopy(book)
    made.cells = [new_code_cell("\n".join(needed(book, code)))] if needed(book, code) else []
    made.cells += [_tagged(piece, f"{stem}_code") for piece in kept]
    for cell in (cell for cell in made.cells if cell.cell_type == "markdown"):
        cell.source = re.sub(r"\A.*?(?=\*\*Exercise)", "", cell.source, flags=re.S)
    return _cleaned(made)


def needed(book: NotebookNode, code: str) -> list[str]:
    """The notebook's own import lines of the names that some code uses and does not make."""
    tree = ast.parse(code)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    there = {one.asname or one.name.split(".")[0] for node in ast.walk(tree) for one in _imported(node)}
    there |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    lines = {}
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        for node in ast.parse(cell.source).body:
            for one in _imported(node):
                name = one.asname or one.name.split(".")[0]
                if name in used - there:
                    module = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                    lines.setdefault(name, f"{module}import {ast.unparse(one)}")
    return list(dict.fromkeys(lines.values()))


def _imported(node: ast.AST) -> list[ast.alias]:
    return node.names if isinstance(node, ast.Import | ast.ImportFrom) else []


def _cleaned(book: NotebookNode) -> NotebookNode:
    """Without outputs and counts, with an id for each cell that lasts from build to build."""
    for place, cell in enumerate(book.cells):
        cell.id = f"cell-{place}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return book
