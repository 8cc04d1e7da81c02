"""The course's own configuration, unchanged, through the real hub client, against a small hub on loopback."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from hub import Hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_helpers import communication, data, embedded

COURSE = """
from fedllm_helpers import config, data, models, training, evaluation
cfg = config.load("course")
train, test = data.load(cfg)
model, tokenizer = models.load(cfg)
print(*model.get_nb_trainable_parameters(), len(train), len(test))
record = training.fine_tune(model, tokenizer, train, cfg, progress=False)
scores = evaluation.score_answers(model, tokenizer, test, prompt=cfg.dataset.prompt)
print(record.examples, evaluation.mean_nll(scores).n)
"""


def run_course(folder, code=COURSE, **environment):
    """Run the course's configuration in a process and a folder of its own."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@pytest.fixture(scope="module")
def course_hub(tmp_path_factory):
    """A checkpoint of pythia-70m's shape with random weights, and ontology cards in medical-meadow's columns."""
    root = tmp_path_factory.mktemp("hub")
    model_folder = root / "models" / "EleutherAI" / "pythia-70m"
    torch.manual_seed(0)
    shape = communication.architecture("EleutherAI/pythia-70m")
    AutoModelForCausalLM.from_config(shape, dtype=torch.float16).save_pretrained(model_folder)
    AutoTokenizer.from_pretrained(embedded.fetch()).save_pretrained(model_folder)
    data_folder = root / "datasets" / "medalpaca" / "medical_meadow_medical_flashcards"
    data_folder.mkdir(parents=True)
    rows = [
        {"instruction": "Answer this question truthfully", "input": card["question"], "output": card["answer"]}
        for card in data.load_flashcards("hpo").select(range(60))
    ]
    (data_folder / "medical_meadow_wikidoc_medical_flashcards.json").write_text(json.dumps(rows))
    with Hub(root) as hub:
        yield hub


def test_the_course_configuration_runs_unchanged(course_hub, tmp_path):
    done = run_course(tmp_path, HF_ENDPOINT=course_hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["196608", "70623232", "54", "6", "10", "6"]
    assert any("pythia-70m/resolve" in line for line in course_hub.asked), "the weights came over HTTP"
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["checkpoint-5"], "save_steps: the adapter of the last step"
    again = run_course(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, "from the cache, with the hub gone: " + again.stderr[-1000:]


def test_an_unreachable_hub_says_what_to_set_instead(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = {
        "models.load(cfg)": "set model.name to 'smollm2-135m' or to a local folder",
        "data.load(cfg)": "set dataset.name to 'hpo' or to a local .json",
    }
    for call, says in lines.items():
        code = f"from fedllm_helpers import config, data, models\ncfg = config.load('course')\n{call}"
        done = run_course(tmp_path, code, HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HUB_OFFLINE="1")
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ConnectionError") and says in last
