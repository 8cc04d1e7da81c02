"""What is loaded is set aside while a training collects its garbage, and is ordinary again afterwards."""

import gc
import subprocess
import sys
import weakref

import pytest
import tiny

from fedllm_helpers import config, training
from fedllm_helpers.training import memory


class Knot:
    """Refers to itself, so that only a collection ends it."""

    def __init__(self):
        self.own = self


@pytest.fixture
def by_hand():
    """No collection but those that are asked for."""
    gc.disable()
    yield
    gc.enable()


def test_garbage_of_the_block_is_collected_and_what_was_there_is_passed_over(by_hand):
    before = weakref.ref(Knot())
    with memory.loaded_set_aside():
        assert gc.get_freeze_count() > 100_000, "the libraries"
        within = weakref.ref(Knot())
        memory.release()
        assert within() is None and before() is not None
        with memory.loaded_set_aside():
            pass
        assert gc.get_freeze_count() > 100_000, "the inner block leaves it to the outer one"
    assert gc.get_freeze_count() < memory.FEW
    gc.collect()
    assert before() is None


def test_within_a_block_nobody_counts_what_is_set_aside(monkeypatch):
    with memory.loaded_set_aside():
        monkeypatch.setattr(gc, "get_freeze_count", lambda: pytest.fail("that walks all objects"))
        with memory.loaded_set_aside():
            pass
    monkeypatch.undo()
    assert gc.get_freeze_count() < memory.FEW


def test_a_federation_sets_aside_and_takes_up_again():
    seen = []

    def app(message, context):
        seen.append(gc.get_freeze_count())
        return tiny.client()(message, context)

    tiny.federate(tiny.settings(rounds=1), app)
    assert len(seen) >= 4 and min(seen) > 100_000 and gc.get_freeze_count() < memory.FEW


def test_a_program_that_froze_its_objects_finds_them_frozen():
    gc.freeze()
    try:
        with memory.loaded_set_aside():
            pass
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


def test_a_training_that_fails_leaves_nothing_set_aside(fresh, cards, cfg):
    model, tokenizer = fresh
    with pytest.raises(ValueError, match="leaves 108 of them no token"):
        training.fine_tune(model, tokenizer, cards[0], config.load(cfg, "train.seq_length=2"), description=None)
    assert gc.get_freeze_count() < memory.FEW


ONE_SIZE = """
import gc, resource, sys
import psutil, torch
from fedllm_helpers.training import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def large():
    torch.ones(1 << 23)  # 32 MiB: a logit of each of 49,152 tokens, at 170 positions

if sys.argv[1] == "frozen":  # by the program, before
    gc.freeze()
pages = (1 << 25) // resource.getpagesize()
with memory.loaded_set_aside():
    first = faults()
    for _ in range(24):  # glibc lays the first ones side by side: an aligned block takes more than one like it leaves
        large()
    before, held = faults(), psutil.Process().memory_info().rss
    assert before - first < 12 * pages, "256 MB stay free, and then they are used again"
    for _ in range(8):
        large()
    assert faults() - before < pages // 8, "64 times as many, if each took its pages anew"
assert held - psutil.Process().memory_info().rss > 0.9 * (1 << 25)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone takes and returns")
@pytest.mark.parametrize("before", ["frozen", "ordinary"])
def test_what_is_freed_within_a_block_is_used_again_and_given_back_at_its_end(before):
    """In a process of its own: what other tests left in the heap may lie in the way of a block that grows."""
    done = subprocess.run([sys.executable, "-c", ONE_SIZE, before], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
