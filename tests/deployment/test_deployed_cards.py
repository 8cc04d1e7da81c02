"""A folder that was deployed before: its cards are those of the settings, or the start is refused, unless said."""

import pytest

from fedllm_helpers import config, folders
from fedllm_helpers.deployment import hosts

SMALL = (
    "federation.num_clients=2 dataset.max_cards_per_specialty=6 dataset.specialties=[eye,ear] train.evaluate_split=0.34"
)


class Ready(Exception):
    """Everything that a start checks is as it should be; no process is needed for that."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``hosts.start`` up to where the first process would start."""
    cfg = config.load("cpu", *SMALL.split())

    def ready(*given, **more):
        raise Ready

    monkeypatch.setattr(hosts.subprocess, "Popen", ready)

    def begin(*overrides, folder=tmp_path / "trial", **more):
        with pytest.raises(Ready):
            hosts.start(config.load(cfg, *overrides), folder, **more)

    begin()
    return begin


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_settings_start_again_and_missing_cards_are_made(start, tmp_path):
    before = contents(tmp_path)
    assert {"trial/hospital-1/data/train.jsonl", "trial/hospital-1/data/test.jsonl"} <= before.keys()
    start()
    assert contents(tmp_path) == before
    (tmp_path / "trial" / "hospital-1" / "data" / "test.jsonl").unlink()
    start()
    assert contents(tmp_path) == before


SETTINGS = ["seed=1", "dataset.max_cards_per_specialty=5", "train.evaluate_split=0", "federation.partition=iid",
            "dataset.specialties=[eye,limbs]"]  # fmt: skip


@pytest.mark.parametrize("change", SETTINGS)
def test_other_settings_are_refused_unless_said(change, start, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds other cards, not those that these settings give") as error:
        start(change)
    assert "\n" not in str(error.value) and "keep_cards=True" in str(error.value) and contents(tmp_path) == before
    start(change, keep_cards=True)
    assert contents(tmp_path) == before


DAMAGES = {  # what is done to the text of the cards, and what is said with keep_cards=True; None where they can be used
    "cut": (lambda raw: raw[:-9], "cannot be read|row|is the file whole"),
    "cut at a line": (lambda raw: b"".join(raw.splitlines(True)[:-1]), None),
    "empty": (lambda raw: b"", "empty"),
    "a byte": (lambda raw: raw.replace(b"W", b"V", 1), None),
    "not text": (lambda raw: bytes(range(256)), "not UTF-8 text"),
    "a list": (lambda raw: b"[1, 2]\n", "expected a list of rows with names"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cards_are_refused(damage, start, tmp_path):
    file = tmp_path / "trial" / "hospital-1" / "data" / "train.jsonl"
    change, said = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{file} holds .*, not those that these settings give") as error:
        start()
    assert ("cut or damaged" in str(error.value)) == (damage in ("cut", "cut at a line"))
    if said is None:
        start(keep_cards=True)
    else:
        with pytest.raises(ValueError, match=said) as error:
            start(keep_cards=True)
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_a_folder_that_is_none_is_refused(start, tmp_path):
    folders.write(tmp_path / "file", "mine")
    for name, said in (("", "is empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=said):
            start(folder=name)
