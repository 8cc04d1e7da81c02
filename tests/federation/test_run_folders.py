"""A run folder goes on with the cards and the model with which it began, and what a kill left there is cleared."""

import json
import logging
import shutil
import subprocess

import pytest
from families import write_model

from fedllm_helpers import config, folders
from fedllm_helpers.federation import client_app, run_folders, simulation
from fedllm_helpers.federation.provenance import fingerprint
from fedllm_helpers.models import embedded

SMALL = (
    "federation.num_clients=2 federation.num_rounds=2 federation.training_arguments.max_steps=1 federation.threads=1 "
    "federation.training_arguments.per_device_train_batch_size=2 dataset.specialties=null federation.partition=iid "
    "dataset.max_cards_per_specialty=null train.evaluate_split=0.25 federation.evaluate_every=0 model.dtype=float32 "
    "train.save_every_round=1"
)


def write_cards(path, more=""):
    rows = [{"question": f"What is plant {n}?", "answer": f"It is herb number {n}{more}."} for n in range(16)]
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(settings, folder of the run, file of cards, folder of the model) of a run of two rounds."""
    home = tmp_path_factory.mktemp("run")
    write_cards(home / "cards.json")
    write_model(home / "model", 0)
    cfg = config.load("cpu", *SMALL.split(), f"dataset.name={home / 'cards.json'}", f"model.name={home / 'model'}")
    simulation.run(cfg, folder=home / "run", progress=False)
    return cfg, home / "run", home / "cards.json", home / "model"


def go_on(cfg, folder, train=lambda: pytest.fail("it trained")):
    """A run in which nobody is to train."""

    def app(message, context):
        return train() if message.metadata.message_type == "train" else client_app.app(message, context)

    return simulation.run(cfg, folder=folder, progress=False, client=app)


@pytest.fixture
def little_disk(tmp_path):
    """A file system of a quarter of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("only root on Linux mounts a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_without_room_is_said_before_anyone_trains(finished, little_disk):
    cfg, _, _, _ = finished
    with pytest.raises(OSError, match=r"MB are free, and the adapters of a run take about .* MB: make room") as error:
        go_on(config.load(cfg, "model.lora.peft_lora_r=1024", "model.lora.peft_lora_alpha=1024"), little_disk / "run")
    assert "\n" not in str(error.value)


def test_other_cards_are_refused_and_nothing_is_touched(finished):
    cfg, folder, cards, _ = finished
    before, names = cards.read_text(), sorted(p.name for p in folder.iterdir())
    go_on_from = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for change in (lambda: write_cards(cards, "!"), lambda: cards.write_text(before.replace("plant 3", "plant 33"))):
        change()
        with pytest.raises(ValueError, match="the cards changed since round 2 of the run .*bring them back") as error:
            go_on(cfg, folder)
        assert "\n" not in str(error.value)
    cards.write_text(before)
    assert sorted(p.name for p in folder.iterdir()) == names
    assert go_on_from == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    go_on(cfg, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_model_in_the_same_place_is_refused(finished, name):
    cfg, folder, _, model = finished
    before = (model / name).read_bytes()
    if name == "config.json":
        (model / name).write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 1e-4}))
    elif name == "tokenizer.json":
        (model / name).write_bytes(before + b"\n")
    else:
        write_model(model, 1)
    with pytest.raises(ValueError, match="the model changed since round 2"):
        go_on(cfg, folder)
    (model / name).write_bytes(before)
    go_on(cfg, folder)


def test_other_settings_are_named_before_other_cards(finished):
    cfg, folder, cards, _ = finished
    (cards.parent / "others.json").write_text(cards.read_text().replace("herb", "tree"))
    other = config.load(cfg, f"dataset.name={cards.parent / 'others.json'}")
    with pytest.raises(ValueError, match="holds a run with other settings: dataset.name"):
        go_on(other, folder)


def test_another_device_or_version_is_said_in_one_line(finished, caplog):
    cfg, folder, *_ = finished
    path = folder / run_folders.ORIGIN
    before = path.read_text()
    origin = json.loads(before)
    origin["versions"]["torch"], origin["machine"]["dtype"] = "1.0", "bfloat16"
    path.write_text(json.dumps(origin))
    caplog.set_level(logging.WARNING)
    go_on(cfg, folder)
    (said,) = [r.getMessage() for r in caplog.records if "perhaps with other bits" in r.getMessage()]
    assert "torch 1.0 there" in said and "dtype bfloat16 there, float32 here" in said and "\n" not in said
    path.write_text(before)
    caplog.clear()
    go_on(cfg, folder)
    assert not caplog.records
    path.unlink()
    go_on(cfg, folder)
    assert "it says nothing of its cards and model" in caplog.text
    for damaged in ("{", "[]", '{"fingerprint": []}', '{"versions": null, "fingerprint": {}}', "\0"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="provenance.json is damaged") as error:
            go_on(cfg, folder)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps({"fingerprint": {"cards": "0" * 64}}))
    with pytest.raises(ValueError, match="the cards changed since round 2"):
        go_on(cfg, folder)
    path.write_text(before)


LEFT = [".adapter-x1y2z3a4/new/adapter_model.safetensors", ".round-000003-abcdefgh/x", "round-000003.part",
        "adapter/.adapter_model-999999-abcdefgh.part/y", "adapters/.round-000002-abcdefgh/new/z",
        ".history-999999-abc_efgh.part/history.csv"]  # fmt: skip
KEPT = [
    ".adapter",
    "round.part",
    "mine.part",
    ".mine-abc/x",
    "adapter/notes.part",
    "adapters/.hidden/x",
    ".history-of-mine/x",
]


def test_what_a_kill_left_is_cleared_by_the_next_run_alone(finished):
    cfg, folder, *_ = finished
    for name in [*LEFT, *KEPT]:
        folders.write(folder / name, name)
    go_on(cfg, folder)
    assert not any((folder / name).exists() for name in LEFT) and all((folder / name).exists() for name in KEPT)


def test_a_run_that_never_finished_a_round_begins_anew(finished, tmp_path):
    """Its provenance is there and is its own; a stranger's is not."""
    cfg = config.load(finished[0], "federation.num_rounds=1")

    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go_on(cfg, tmp_path, dies)
    assert (tmp_path / run_folders.ORIGIN).is_file()
    assert len(simulation.run(cfg, folder=tmp_path, progress=False).history) == 1
    folders.write(tmp_path / "other" / run_folders.ORIGIN, '{"from": "grandmother"}')
    folders.write(tmp_path / "folder" / run_folders.ORIGIN / "mine", "mine")
    for name in ("other", "folder"):
        with pytest.raises(ValueError, match="provenance.json of something else"):
            go_on(cfg, tmp_path / name)


def test_a_fingerprint_is_of_cards_and_model_alone(finished):
    cfg = finished[0]
    known = fingerprint(cfg)
    assert all(len(text) == 64 for text in known.values())
    assert fingerprint(config.load(cfg, "federation.num_rounds=5", "model.dtype=bfloat16")) == known
    assert fingerprint(cfg, cards=False) == {"cards": "", "model": known["model"]}
    for name in ("nobody/nothing", "not a name", "/no/folder"):
        assert fingerprint(config.load(cfg, f"model.name={name}"), cards=False)["model"] == ""


def test_the_fingerprint_of_a_model_is_the_same_on_every_machine(tmp_path, monkeypatch):
    """The cached model's own list of checksums has times: it is another after every conversion."""
    monkeypatch.setattr(embedded, "cache_folder", lambda: tmp_path)
    folder = tmp_path / embedded.NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    cfg, found = config.load("cpu"), set()
    for time in (1, 2):
        (folder / embedded.MANIFEST).write_text(f'{{"model.safetensors": {{"time": {time}}}}}')
        found.add(fingerprint(cfg, cards=False)["model"])
    assert len(found) == 1 and "" not in found
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint(cfg, cards=False)["model"] not in found
