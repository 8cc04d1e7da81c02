"""The course's own configuration, unchanged, through the real hub client, against a small hub on loopback."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
from hub import Hub, _Handler
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_helpers import communication, config, data, models
from fedllm_helpers import hub as asking
from fedllm_helpers.models import embedded

COURSE = """
from fedllm_helpers import config, data, evaluation, models, training
cfg = config.load("course")
train, test = data.load(cfg)
model, tokenizer = models.load(cfg)
print(*model.get_nb_trainable_parameters(), len(train), len(test))
record = training.fine_tune(model, tokenizer, train, cfg, description=None)
scores = evaluation.score_answers(model, tokenizer, test, cfg)
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


@pytest.mark.processes
def test_the_course_configuration_runs_unchanged(course_hub, tmp_path):
    done = run_course(tmp_path, HF_ENDPOINT=course_hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["196608", "70623232", "54", "6", "10", "6"]
    assert any("pythia-70m/resolve" in line for line in course_hub.asked), "the weights came over HTTP"
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["checkpoint-5"], "save_steps: the adapter of the last step"
    again = run_course(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, "from the cache, with the hub gone: " + again.stderr[-1000:]


@pytest.mark.processes
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


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has asked no hub yet, and whose cache is empty; takes the address to ask."""
    monkeypatch.setattr(asking.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asking.check.cache_clear()
    yield lambda url: monkeypatch.setattr(asking.constants, "ENDPOINT", url)
    asking.check.cache_clear()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("RepoNotFound", "the hub has none of that name, or keeps it private"),
        ("GatedRepo", "its owner asks for consent first"),
    ],
)
def test_a_misspelt_or_closed_name_is_one_request_and_one_line(tmp_path, monkeypatch, fresh, code, says):
    monkeypatch.setattr(_Handler, "missing", lambda self, _: self.reply({}, {"X-Error-Code": code}, 404))
    with Hub(tmp_path) as hub:
        fresh(hub.url)
        with pytest.raises(ConnectionError, match=f"model 'nobody/mistake': {says}.*set model.name to") as caught:
            models.load(config.load("cpu", "model.name=nobody/mistake"))
        asked = [line for line in hub.asked if "nobody" in line]  # the client has questions of its own, too
        assert asked == ["GET /api/models/nobody/mistake"] and "\n" not in str(caught.value)
        with pytest.raises(ConnectionError, match=says):
            communication.architecture("nobody/mistake")


def test_a_hub_that_is_silent_refuses_or_stammers_is_one_line(fresh, monkeypatch):
    """The socket listens and never answers; the time until then is bounded by what the client is told."""
    monkeypatch.setattr(asking, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fresh(closed)
        with pytest.raises(ConnectionError, match=r"the hub http.* cannot be reached \(.*timed out.*no copy here"):
            asking.check("some/model")
    for address in (closed, "http://no-such-host.invalid", "nonsense"):
        fresh(address)
        with pytest.raises(ConnectionError, match="cannot be reached") as caught:
            asking.check("some/model")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    monkeypatch.setattr(
        asking.HfApi, "model_info", lambda *a, **k: threading.Event().wait(30)
    )  # a name server's silence
    with pytest.raises(ConnectionError, match="no answer within 1 s"):
        asking.check("some/model")


@pytest.mark.parametrize("name", ["a/b/c", "no blanks/here", "-/-", "models/../else"])
def test_names_that_no_hub_has_are_one_line(fresh, name):
    with pytest.raises((ValueError, ConnectionError), match="it is no hub id such as .* no folder here") as caught:
        models.load(config.load("cpu", f"model.name={name}"))
    assert "\n" not in str(caught.value)


@pytest.mark.processes
def test_a_copy_in_the_cache_is_read_where_the_hub_cannot_be_asked(course_hub, tmp_path):
    """No HF_HUB_OFFLINE, no network: the copy is loaded, and after the first refusal no file is asked for."""
    code = (
        "from fedllm_helpers import config, models\n"
        "model, tokenizer = models.load(config.load('course'))\n"
        "print(sum(float(p.detach().double().sum()) for p in model.parameters()))"
    )
    first = run_course(tmp_path, code, HF_ENDPOINT=course_hub.url)
    asked = "import socket\nconnect, asked = socket.socket.connect, []\n"
    asked += "def counted(self, address): asked.append(address); return connect(self, address)\n"
    asked += f"socket.socket.connect = counted\n{code}\nprint(len(asked))"
    again = run_course(tmp_path, asked, HF_ENDPOINT="http://127.0.0.1:9")
    assert first.returncode == 0, first.stderr[-2000:]
    total, connections = again.stdout.split()
    assert total == first.stdout.strip() and int(connections) <= 2, again.stderr[-2000:]


SKETCH = """
from fedllm_helpers import config, models
from fedllm_helpers.models import cores
how = ["federation.aggregation=LoRA-XS", "model.name={name}", "model.dtype={dtype}"]
model, _ = models.load(config.load("course", "model.quantization=null", *how))
print(*cores.sketch(model))
"""


@pytest.mark.processes
def test_factors_of_a_hub_model_come_from_its_files(course_hub, tmp_path):
    """Held in bfloat16 they are those of the folder, held in float32; also where the hub is gone and a copy is left."""
    folder = course_hub.root / "models" / "EleutherAI" / "pythia-70m"
    wanted = run_course(tmp_path, SKETCH.format(name=folder, dtype="float32"), HF_ENDPOINT="http://127.0.0.1:9")
    for endpoint in (course_hub.url, "http://127.0.0.1:9"):
        code = SKETCH.format(name="EleutherAI/pythia-70m", dtype="bfloat16")
        found = run_course(tmp_path, code, HF_ENDPOINT=endpoint)
        assert found.returncode == 0, found.stderr
        ours, theirs = (torch.tensor([float(one) for one in done.stdout.split()]) for done in (wanted, found))
        assert len(ours) == 6 and torch.allclose(ours, theirs, atol=1e-6)
