"""The files around the package agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml

from fedllm_helpers import __version__
from fedllm_helpers import data as data_module

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


def test_badges_and_version_name_the_same_tag():
    for path in [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        tags = set(re.findall(r"colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/([^/]+)/", path.read_text()))
        assert tags <= {f"v{__version__}"}, path.name


def test_the_version_is_written_twice_and_is_one():
    assert PROJECT["version"] == __version__  # Flower reads the first, badges name the second


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert path.name in readme
    assert "PIP_ARGS" in readme and "medical advice" in readme


def test_prompts_hold_a_question_each():
    assert all(template.count("{question}") == 1 for template in data_module.PROMPTS.values())
