"""Every example in README and docs, as it stands: programs run, settings are loaded, commands name what there is."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_helpers import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SLOW = ("simulation.run(", "deployment.start(")  # federations of minutes: among the tests of real processes
FEWER = '"federation.training_arguments.max_steps=1", "federation.evaluate_cards=6"'  # of the cpu preset's 8 and 48
CARDS = [(f"What is a {name}?", f"A {name} is number {i} of these words.") for i, name in enumerate("abcdefghijkl")]


def examples(kind):
    """(page and number of the block, its text), those of a kind."""
    found = [
        (f"{page.name}-{number}", text)
        for page in PAGES
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if language == kind
    ]
    assert found, f"README and docs have no block of {kind}"
    return found


def is_settings(text):
    """Whether a block is nothing but settings, as they stand among the arguments of ``config.load``."""
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if line.strip()]
    return all(re.fullmatch(r'("[\w.]+=[^"]*",? ?)+', line) for line in lines)


def is_slow(text):
    return any(call in text for call in SLOW)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with the file of cards that README names."""
    (tmp_path / "cards.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in CARDS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_programs_of_a_page_run_as_they_stand(page, folder, capsys):
    """One after the other, as a reader would; and a block of text beneath one is what that one printed."""
    names, printed = {}, None
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "python" and not is_settings(text) and not is_slow(text):
            exec(compile(text, page.name, "exec"), names)
            printed = capsys.readouterr().out
        elif kind == "text" and printed is not None:
            assert printed == text


@pytest.mark.processes
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in examples("python") if is_slow(text)])
def test_a_federation_of_a_page_runs_to_its_end(text, folder):
    """As it stands, but for one step a round; other settings of its own come after and hold."""
    text = text.replace('"cpu",', f'"cpu", {FEWER},')
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=f"{name}-{number}")
        for name, text in examples("python")
        if is_settings(text)
        for number, line in enumerate(filter(str.strip, text.splitlines()))
    ],
)
def test_settings_are_taken_as_they_stand(line):
    given = ast.literal_eval(f"[{line.split('  #')[0]}]")
    cfg = config.load("cpu", "federation.num_clients=4", *given)
    for override in given:
        key, value = override.split("=", 1)
        here = json.dumps(config.explain(cfg).set_index("key")["value"].astype(str).to_dict())
        assert key in here and value.replace(",", ", ") in here


def test_commands_name_what_there_is():
    """Modules of ``python -m`` and settings of ``flwr run``; what machines need beside it, other tests hold."""
    seen = 0
    for _, text in examples("bash"):
        for module in re.findall(r"python -m (\S+)", text):
            seen += 1
            done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
            assert done.returncode == 0 and "usage" in done.stdout
        for preset, overrides in re.findall(r'preset="(\w+)" overrides="([^"]*)"', text):
            seen += 1
            config.load(preset, *shlex.split(overrides))
        for target in re.findall(r"^make (\S+)", text, re.M):
            seen += 1
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert seen >= 5
