"""Nothing of a user is lost: own files are replaced whole or not at all, and a folder of something else is refused."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from fedllm_helpers import config, folders, models, training
from fedllm_helpers.deployment import runs as deployed_runs
from fedllm_helpers.federation import run_folders, simulation
from fedllm_helpers.models import editing

WEIGHTS = folders.ADAPTER[-1]


@pytest.fixture
def model():
    """An adapter of a few numbers on a linear layer."""
    torch.manual_seed(0)
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"])).eval()


def contents(folder):
    """Every file below a folder, with what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def moved(model):
    """The model with another adapter, of another scale: weights and configuration both differ."""
    models.set_adapter(model, {key: value + 1 for key, value in models.get_adapter(model).items()})
    model.peft_config["default"].lora_alpha += 1
    return model


def save(how, model, folder):
    if how == "adapter":
        return models.save_adapter(model, folder)
    return editing.save_update(model, models.get_adapter(model), folder)


OTHER = {  # folders of something else, by the files in them
    "base model": ["config.json", "model.safetensors", "tokenizer.json"],
    "base model in pieces": ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    "notes": ["notes.txt"],
    "hidden": [".git/config"],
    "cards": ["train.jsonl", "test.jsonl"],
    "folder in it": ["adapters/round-000001/adapter_model.safetensors"],
    "adapter of another format": ["adapter_config.json", "adapter_model.bin"],
    "weights are a folder": ["adapter_config.json", "adapter_model.safetensors/part-1"],
    "config is a folder": ["adapter_config.json/part-1"],
}


@pytest.mark.parametrize("how", ["adapter", "update"])
@pytest.mark.parametrize("kind", OTHER)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(kind, how, model, tmp_path):
    for name in OTHER[kind]:
        folders.write(tmp_path / "mine" / name, f"{name} of somebody")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="name another folder") as error:
        save(how, model, tmp_path / "mine")
    assert "\n" not in str(error.value) and "mine" in str(error.value) and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the name of a folder is empty"),
        ("  ", "the name of a folder is empty"),
        ("file", "is a file: name a folder"),
        ("link to file", "is a file: name a folder"),
        ("link to nowhere", "is a link to nowhere"),
        ("file/adapter", "Not a directory"),
        ("x" * 300, "File name too long"),
        (".", "is a folder of something else"),
        ("nul\0byte", "null byte"),
    ],
)
def test_names_that_are_no_folder_are_one_line(name, said, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("link to file").symlink_to("file")
    Path("link to nowhere").symlink_to("nowhere")
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError), match=said) as error:
        models.save_adapter(model, name)
    assert "\n" not in str(error.value) and contents(tmp_path) == before


def test_own_files_are_replaced_and_others_stay(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine", "deep/er/mine", "mine/", "./mine/../mine", "~/home", Path("path")):
        for _ in range(2):
            folder = models.save_adapter(moved(model), name)
            assert sorted(p.name for p in folder.iterdir() if "adapter" in p.name) == sorted(folders.ADAPTER)
            (folder / "README.md").write_text("what I wrote")
            (folder / "notes").mkdir(exist_ok=True)
        assert (folder / "README.md").read_text() == "what I wrote" and (folder / "notes").is_dir()
        assert not any(p.name.startswith(".") for p in folder.iterdir())
    assert (tmp_path / "home" / WEIGHTS).is_file() and not (tmp_path / "~").exists()
    usual = tmp_path / "usual"
    usual.touch()
    assert (tmp_path / "mine" / WEIGHTS).stat().st_mode == usual.stat().st_mode, "readable as any new file"
    models.save_adapter(model, (tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_a_link_to_a_folder_stays_a_link(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    models.save_adapter(model, tmp_path / "link")
    models.save_adapter(moved(model), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(contents(tmp_path / "real")) == sorted(folders.ADAPTER)


def failing(call, number, error):
    """A function of ``os`` that fails from its n-th call on; an interruption comes once."""
    calls = []

    def fail(*given):
        calls.append(given)
        if len(calls) == number or (len(calls) > number and isinstance(error, OSError)):
            raise error
        return call(*given)

    return fail


@pytest.mark.parametrize("name", ["rename", "replace", "fsync"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_what_fails_on_the_way_leaves_the_old_adapter_whole(name, number, error, model, tmp_path, monkeypatch):
    folder = models.save_adapter(model, tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(folders.os, name, failing(getattr(os, name), number, error))
        with pytest.raises(type(error), match="the adapter cannot be kept in .*No space" if error.args else None):
            models.save_adapter(moved(model), folder)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patched:
        patched.setattr(folders.os, "replace", failing(os.replace, number, error))
        with pytest.raises(type(error)):
            models.save_adapter(model, tmp_path / "new" / "adapter")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists(), "nor does a folder stay behind"


KILLED = """
import os, sys
from pathlib import Path
from fedllm_helpers import folders

def put(folder, version):
    with folders.replaced(folder, *folders.ADAPTER) as scratch:
        for name in folders.ADAPTER:
            (scratch / name).write_text(version)

def killed(name, number, after):
    call, left = getattr(os, name), [number]
    def last(*given, **more):
        left[0] -= 1
        if left[0] or after:
            done = call(*given, **more)
        return done if left[0] else os._exit(9)
    setattr(os, name, last)

for name, after in [(n, a) for n in ("fsync", "chmod", "rename", "replace", "unlink", "rmdir") for a in (0, 1)]:
    for number in (1, 2):
        folder = Path(sys.argv[1]) / f"{name}-{after}-{number}"
        put(folder, "old")
        (folder / "README.md").write_text("mine")
        if not os.fork():
            killed(name, number, after)
            put(folder, "new")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        for again in range(2):  # killed anew while the old one is brought back
            if not os.fork():
                killed("replace", 1, again)
                folders.for_adapter(folder)
                os._exit(0)
            os.wait()
        folders.for_adapter(folder)
        print(folder.name, *sorted(f"{p.name}:{p.read_text()}" for p in folder.iterdir()))
"""


@pytest.mark.skipif(os.name == "nt", reason="processes that fork")
def test_whenever_a_process_is_killed_the_old_adapter_is_whole_or_the_new_one(tmp_path):
    """Killed before and after every call that changes a file, and once more while the old one is brought back."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 24, done.stderr
    for line in done.stdout.splitlines():
        kill, *files = line.split()
        version = "new" if kill.startswith(("replace-1-2", "unlink", "rmdir")) else "old"
        assert files == ["README.md:mine", *(f"{name}:{version}" for name in sorted(folders.ADAPTER))], line


def test_config_and_weights_of_two_versions_never_stand_together(model, tmp_path, monkeypatch):
    """Whenever a process is killed: with the new configuration there are the new weights, or none."""
    folder, seen = models.save_adapter(model, tmp_path / "adapter"), []
    old = contents(folder)
    for name in ("rename", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(folders.os, name, lambda *a, call=call: (call(*a), seen.append(dict(now())))[0])

    def now():
        return {n: (folder / n).read_bytes() for n in folders.ADAPTER if (folder / n).is_file()}

    models.save_adapter(moved(model), folder)
    new = now()
    assert len(seen) == 4 and all(new[n] != old[n] for n in folders.ADAPTER)
    for some in seen:
        versions = {n: "new" if some[n] == new[n] else "old" for n in some}
        assert WEIGHTS not in some or len(set(versions.values())) == 1


LIMITED = """
import resource, sys, torch
from peft import LoraConfig, get_peft_model
from fedllm_helpers import models
net = torch.nn.Sequential(torch.nn.Linear(400, 300))
model = get_peft_model(net, LoraConfig(r=64, target_modules=["0"]))
models.save_adapter(model, sys.argv[1])
if sys.argv[2] == "full":
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
else:
    import os
    os.chmod(sys.argv[1], 0o555)
    os.geteuid() or os.seteuid(65534)
model.peft_config["default"].lora_alpha = 3
try:
    models.save_adapter(model, sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of a POSIX process")
@pytest.mark.parametrize(("how", "said"), [("full", "File too large"), ("read-only", "Permission denied")])
def test_a_full_disk_and_a_read_only_folder_are_one_line(how, said):
    with tempfile.TemporaryDirectory() as home:  # other users may look into, as they may not into pytest's
        os.chmod(home, 0o755)
        folder = Path(home) / "adapter"
        done = subprocess.run([sys.executable, "-c", LIMITED, folder, how], capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert len(lines) == 1 and said in lines[0] and "what was there is as it was" in lines[0], done.stderr
        assert sorted(p.name for p in folder.iterdir()) == sorted(folders.ADAPTER)
        assert '"lora_alpha": 8' in (folder / folders.ADAPTER[0]).read_text()


def test_two_trainings_do_not_take_each_others_checkpoints(tmp_path, monkeypatch, caplog):
    """The second one keeps its own elsewhere and says so; `save_total_limit` deletes only what it wrote itself."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))

    def train(steps):
        """What `AdapterTrainer` does at its steps."""
        trainer = training.AdapterTrainer.__new__(training.AdapterTrainer)
        trainer.args, trainer.kept = SimpleNamespace(output_dir="checkpoints", save_total_limit=1), []
        trainer.model, trainer.state = small, SimpleNamespace(global_step=0)
        for trainer.state.global_step in steps:
            trainer._save_checkpoint(moved(small), None)

    train([2])
    Path("checkpoints/checkpoint-2/notes.txt").write_text("mine")
    before = contents(tmp_path)
    with caplog.at_level(logging.WARNING):
        train([2, 4])
    now = contents(tmp_path)
    assert {name: now[name] for name in before} == before and "are kept in checkpoints-2" in caplog.text
    assert {name for name in now if name not in before} == {f"checkpoints-2/checkpoint-4/{n}" for n in folders.ADAPTER}


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "history.csv", "clients.csv", "adapter/notes"])
def test_a_run_does_not_replace_results_of_something_else(name, tmp_path):
    folders.write(tmp_path / name, "somebody's")
    cfg = config.load("cpu", "dataset.max_cards_per_specialty=6", "train.evaluate_split=0.34")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="of something else") as error:
        simulation.run(cfg, folder=tmp_path, progress=False, client=lambda *given: pytest.fail("it ran"))
    assert "\n" not in str(error.value) and contents(tmp_path) == before


@pytest.mark.parametrize(("name", "said"), [("", "is empty"), ("file", "is a file"), ("adapters", "is a file")])
def test_a_run_needs_a_folder(name, said, tmp_path):
    folders.write(tmp_path / "file", "mine")
    folders.write(tmp_path / "x" / "adapters", "mine")
    cfg = config.load("cpu", "dataset.max_cards_per_specialty=6", "train.evaluate_split=0.34")
    where = {"": "", "file": tmp_path / "file", "adapters": tmp_path / "x"}[name]
    with pytest.raises(ValueError, match=said):
        simulation.run(cfg, folder=where, progress=False, client=lambda *given: pytest.fail("it ran"))


def test_a_users_files_beside_a_run_stay(tmp_path):
    for name in ("notes.txt", "round-notes.safetensors", "round-1.safetensors", ".adapter", "adapters/pooled/x"):
        folders.write(tmp_path / name, name)
    before = contents(tmp_path)
    tiny.federate(tiny.settings(rounds=4), folder=tmp_path)
    run_folders.check_folder(tmp_path)
    now = contents(tmp_path)
    assert {name: now[name] for name in before} == before


NAMES = ["/elsewhere", "..", ".", "", "a/b", "../server", "a\\b", ".hidden", "-rf", "CON", "nul.txt", "com1", "x" * 65,
         "tab\there", "line\n", "blank here", "é", "end.", "a:b", "*", "~", None, 3, Path("run")]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_a_deployed_run_has_a_plain_name_or_is_refused(name, tmp_path):
    server = tmp_path / "server"
    folders.write(server / "server.key", "secret")
    running = SimpleNamespace(folder=tmp_path, hospitals=6)
    name = f"{tmp_path}{name}" if name == "/elsewhere" else name
    folders.write(tmp_path / "elsewhere" / "mine", "mine")
    before, cfg = contents(tmp_path), config.load("cpu")
    for call in (
        lambda: deployed_runs.run_folder(running, name),
        lambda: deployed_runs.bundle(running, cfg, name),
        lambda: deployed_runs.submit(running, cfg, name),
        lambda: deployed_runs.submit(running, cfg, name, app=tmp_path),
        lambda: deployed_runs.run(running, cfg, name),
        lambda: deployed_runs.collect(running, cfg, name),
    ):
        with pytest.raises(ValueError, match="is no name for a run") as error:
            call()
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_a_bundle_replaces_only_bundles(tmp_path):
    running, cfg = SimpleNamespace(folder=tmp_path, hospitals=6), config.load("cpu")
    for name in ("run", "Run_2.1-b", "7"):
        app = deployed_runs.bundle(running, cfg, name)
        (app / "fedllm_helpers" / "more.py").touch()
        assert deployed_runs.bundle(running, cfg, name) == app and not (app / "fedllm_helpers" / "more.py").exists()
    mine = folders.write(tmp_path / "server" / "apps" / "mine" / "pyproject.toml", "[project]\n")
    (tmp_path / "server" / "apps" / "link").symlink_to(app)
    for name in ("mine", "link"):
        with pytest.raises(ValueError, match="was not made by bundle: move it away"):
            deployed_runs.bundle(running, cfg, name)
    assert mine.read_text() == "[project]\n" and (app / "pyproject.toml").is_file()


def test_the_recipe_of_the_readme_saves_before_it_scores(tmp_path, monkeypatch):
    """No card is held out, so that there is nothing to score; what was trained is there all the same."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    (recipe,) = [part.split("```")[0] for part in text.split("```python\n") if "save_adapter" in part]
    few = '"train.evaluate_split=0", "train.training_arguments.max_steps=1"]'
    recipe = recipe.replace('"dataset.max_cards_per_specialty=null"]', f'"dataset.max_cards_per_specialty=null", {few}')
    assert few in recipe
    monkeypatch.chdir(tmp_path)
    Path("cards.csv").write_text("question,answer\nWhat is dill?,A herb.\nWhat is sage?,A shrub.\nWhat is oak?,Wood.\n")
    with pytest.raises(ValueError, match="no card was scored: train.evaluate_split"):
        exec(compile(recipe, "README.md", "exec"), {})
    assert sorted(contents(tmp_path / "my-adapter")) == sorted(folders.ADAPTER)
