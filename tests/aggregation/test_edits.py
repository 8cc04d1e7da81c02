"""Edits of the base model: the same bits at every node whenever it got them, and files that are written once."""

import logging

import numpy as np
import pytest
from lora_rounds import client, federate, plan

from fedllm_helpers.adapters import factors
from fedllm_helpers.config.schema import EDITING
from fedllm_helpers.grids import in_process


def by_hand(base, until):
    """ΔW after some rounds: each round's product added in float32, from the first on."""
    full = {}
    for number in sorted(base.edits):
        if number <= until:
            for layer, (a, b) in factors.pairs(base.edits[number]).items():
                update = b.astype(np.float64) @ a.astype(np.float64)
                full[layer] = update.astype(np.float32) if layer not in full else np.float32(full[layer] + update)
    return full


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


class Forgetful(in_process.InProcessGrid):
    """The node of hospital 1 is started anew before round 3, and nobody tells the server."""

    def _deliver(self, message):
        node, orders = message.metadata.dst_node_id, message.content.config_records.get("config", {})
        if orders.get("server-round") == 3 and node == in_process.FIRST_CLIENT_NODE + 1:
            self.states.pop(node, None)
        return super()._deliver(message)


@pytest.mark.parametrize("rule", EDITING)
@pytest.mark.parametrize("how", ["all there", "absent once", "absent twice", "started anew", "sampled", "evaluated"])
def test_a_node_has_the_same_bits_whenever_it_got_the_edits(rule, how):
    more = {"sampled": ["federation.fraction_train=0.67"], "evaluated": ["federation.fraction_evaluate=1.0"]}
    faults = {"absent once": {(2, 1)}, "absent twice": {(2, 1), (3, 1)}}.get(how)
    cfg, seen = plan(rule, *more.get(how, []), rounds=6), []
    grid = Forgetful if how == "started anew" else in_process.InProcessGrid
    _, _, base = federate(cfg, client(faults, seen=seen), grid=grid)
    assert len(base.edits) >= 5 and len({number for _, number, *_ in seen}) == 6
    for kind, number, _, _, edit in seen:
        assert same(edit, by_hand(base, number if kind == "evaluate" else number - 1)), (kind, number)
    assert same(base.summed(), by_hand(base, 6)), "and so has the server, which scores with it"


@pytest.mark.parametrize("rule", EDITING)
def test_an_edit_is_written_once_and_a_round_does_not_grow(rule, tmp_path):
    federate(plan(rule, rounds=3), folder=tmp_path)
    old = tmp_path / "edit-000001.safetensors"
    before = old.read_bytes(), old.stat().st_mtime_ns
    sizes = {}
    for rounds in (3, 9):
        where = tmp_path / str(rounds)
        federate(plan(rule, rounds=rounds), folder=where)
        assert len(list(where.glob("edit-*.safetensors"))) == rounds and len(list(where.glob("round-*"))) == 2
        path = where / f"round-{rounds:06d}.safetensors"
        header = int.from_bytes(path.read_bytes()[:8], "little")
        sizes[rounds] = path.stat().st_size - header
    assert sizes[3] == sizes[9], "the arrays; the tables in the header have a row more a round"
    assert (old.read_bytes(), old.stat().st_mtime_ns) == before


def damaged(path):
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 4
    path.write_bytes(raw)


EDITS = {
    "a bit": damaged,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "another round's": lambda path: path.write_bytes(path.with_name("edit-000002.safetensors").read_bytes()),
    "of another run": None,
}


@pytest.mark.parametrize("damage", EDITS)
def test_a_damaged_edit_is_found(damage, tmp_path, caplog):
    cfg = plan("FLoRA", rounds=4)
    whole, _, base = federate(cfg, folder=tmp_path)
    newest, oldest = tmp_path / "edit-000004.safetensors", tmp_path / "edit-000001.safetensors"
    kept = oldest.read_bytes()
    if damage == "of another run":
        federate(plan("FLoRA", "seed=5", rounds=4), folder=tmp_path / "other")
        change = lambda path: path.write_bytes((tmp_path / "other" / path.name).read_bytes())  # noqa: E731
    else:
        change = EDITS[damage]
    change(newest)
    with caplog.at_level(logging.WARNING):
        again, _, other = federate(cfg, folder=tmp_path)
    assert caplog.text.count("is damaged (edit-000004.safetensors, which belongs to it") == 1
    assert same(whole, again) and all(same(base.edits[n], other.edits[n]) for n in range(1, 5))
    change(oldest)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="no round in .* is whole .*edit-000001.safetensors, which belongs to it"):
        federate(cfg, folder=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    oldest.write_bytes(kept)
    assert same(whole, federate(cfg, folder=tmp_path)[0])
