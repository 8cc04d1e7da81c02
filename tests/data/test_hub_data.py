"""Datasets of a hub: their own splits, and what is missing said in one line, without the client's minute of retries."""

import json
import os
import socket
import subprocess
import sys

import pytest
from hub import Hub

ROWS = [{"instruction": "Answer truthfully", "input": f"What is {i}?", "output": f"Number {i}."} for i in range(20)]
CODE = """
import json, logging, sys
from fedllm_helpers import config, data
logging.basicConfig(format="%(message)s")
for name in sys.argv[1:]:
    try:
        whole = ["dataset.specialties=null", "dataset.max_cards_per_specialty=null"]
        parts = data.load(config.load("cpu", f"dataset.name={name}", *whole))
        print(json.dumps([name, "read", *map(len, parts)]))
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
"""
CONFIGS = (
    "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n- config_name: hard\n  data_files: hard.jsonl\n---\n"
)


def load(folder, *names, **environment):
    """Outcomes by name, of a process of its own: the hub's client reads its address when it is imported."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", CODE, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = map(json.loads, done.stdout.splitlines())
    return {name: outcome for name, *outcome in found}, done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A hub's folder with datasets of four shapes."""
    root = tmp_path_factory.mktemp("hub")
    files = {
        "lab/plain/cards.jsonl": ROWS,
        "lab/halves/train.jsonl": ROWS,
        "lab/halves/test.jsonl": [{**row, "input": f"Q{i}?"} for i, row in enumerate(ROWS[:5])],
        "lab/exam/test.jsonl": ROWS,
        "lab/levels/easy.jsonl": ROWS,
        "lab/levels/hard.jsonl": ROWS,
        "lab/letters/train.jsonl": [{"a": "b"}],
    }
    for name, rows in files.items():
        path = root / "datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    (root / "datasets" / "lab" / "levels" / "README.md").write_text(CONFIGS)
    return root


def test_splits_configurations_and_misspelt_names(root, tmp_path):
    names = [f"lab/{name}" for name in ("plain", "halves", "exam", "levels", "letters", "misspelt")]
    with Hub(root) as hub:
        found, said = load(tmp_path, *names, HF_ENDPOINT=hub.url)
    assert found["lab/plain"] == ["read", 17, 3]
    assert found["lab/halves"] == ["read", 20, 5]
    assert found["lab/exam"][0] == "ValueError" and "no split to train on: there are test" in found["lab/exam"][1]
    assert found["lab/levels"][0] == "ValueError"
    assert all(part in found["lab/levels"][1] for part in ("easy", "hard", "to_parquet"))
    assert "lab/letters has the columns a; expected 'question'" in found["lab/letters"][1]
    assert (
        found["lab/misspelt"][0] == "FileNotFoundError" and "the hub has none of that name" in found["lab/misspelt"][1]
    )
    assert all("\n" not in str(outcome[1]) for outcome in found.values())
    gone, _ = load(tmp_path, "lab/plain", "lab/never", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone["lab/plain"] == ["read", 17, 3], "from the cache, with the hub gone"
    assert gone["lab/never"][0] == "ConnectionError"
    assert "the hub http://127.0.0.1:9 cannot be reached" in gone["lab/never"][1]


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        found, _ = load(tmp_path, "lab/plain", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert found["lab/plain"][0] == "ConnectionError"
    assert "check the network); no copy either; or set dataset.name to 'hpo'" in found["lab/plain"][1]
