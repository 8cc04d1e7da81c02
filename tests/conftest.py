"""Shared parts: the real embedded model, real cards, and a folder of real rows where it is at hand."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from families import make
from filelock import FileLock

from fedllm_helpers import config, data, models

WIKIDOC = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikidoc_patient_information.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def cfg():
    """The default configuration with few steps and few cards: the real parts, for seconds."""
    return config.load(
        "cpu", "train.training_arguments.max_steps=4", "dataset.max_cards_per_specialty=24", "train.evaluate_split=0.25"
    )


@pytest.fixture(scope="session")
def cards(cfg):
    """(train, test) cards of the ontology."""
    return data.load(cfg)


@pytest.fixture(scope="session")
def loaded(cfg):
    """(model, tokenizer), loaded once; a test that trains puts the adapter back."""
    model, tokenizer = models.load(cfg)
    return model.eval(), tokenizer


@pytest.fixture
def fresh(loaded):
    """(model, tokenizer) whose adapter is restored after the test."""
    model, tokenizer = loaded
    before = models.get_adapter(model)
    yield model, tokenizer
    models.set_adapter(model, before)


@pytest.fixture(scope="session")
def wikidoc():
    """5,942 real rows in the medical-meadow format, which are not part of the project."""
    if not WIKIDOC.is_file():
        pytest.skip("the WikiDoc rows lie outside the project and are not here")
    return WIKIDOC


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A family of small models to its folder, made once, without dropout; a test that changes one copies it."""
    root, made = tmp_path_factory.mktemp("families"), {}
    quiet = {"gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, "opt": {"dropout": 0.0}}

    def get(family):
        if family not in made:
            made[family] = make(root / family.replace(" ", "-"), family, quiet.get(family))
        return made[family]

    return get


@pytest.fixture
def on_ray(tmp_path_factory):
    """One test at a time has Ray: its node gives up when it is not up within 30 seconds."""
    if find_spec("ray") is None:
        pytest.skip("the extra `sim` (Ray) is not installed")
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):  # a folder that all workers of a run share
        yield


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, from the system: $CHROMIUM or the first of the usual names."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, f"no browser: install one of {', '.join(BROWSERS)}, or set CHROMIUM to its path"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
