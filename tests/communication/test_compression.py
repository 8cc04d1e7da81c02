"""Compressed messages: bounds on what is lost, and federations that send them."""

import numpy as np
import pytest
import tiny
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedllm_helpers import config
from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.communication import compression
from fedllm_helpers.communication.compression import BITS, decode, encode
from fedllm_helpers.federation import server_app
from fedllm_helpers.grids import in_process
from fedllm_helpers.models.process import first_adapter

FORMATS = sorted(BITS)


def adapter(seed=0, scale=1.0):
    """Awkward shapes: wide, tall, square, odd, a single number, a vector."""
    rng = np.random.default_rng(seed)
    shapes = {"z.A": (3, 7), "a.B": (11, 3), "m": (4, 4), "one": (1, 1), "v": (5,)}
    return {key: (scale * rng.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}


def rows(value):
    """Along the longer side."""
    matrix = value.reshape(1, -1) if value.ndim < 2 else value
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


@pytest.mark.parametrize("number_format", FORMATS)
def test_what_rounding_loses_is_bounded_row_by_row(number_format):
    given = adapter()
    back = decode(encode(given, number_format), given, number_format)
    assert list(back) == list(given)
    largest = max(np.abs(value).max() for value in given.values())
    for key, value in given.items():
        assert back[key].shape == value.shape and back[key].dtype == np.float32
        loss, high = np.abs(rows(back[key]) - rows(value)), np.abs(rows(value)).max(axis=1, keepdims=True)
        if number_format == "fp32":
            assert not loss.any()
        elif number_format == "fp16":
            assert (loss <= high * 2**-11).all()
        else:  # half a step, and what the scale in float16 lost
            assert (loss <= high * (0.5 / (2 ** (BITS[number_format] - 1) - 1) + 2**-10) + largest * 2**-24).all()


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize(
    "value",
    [np.zeros((2, 3)), np.full((3, 2), -0.25), np.full((2, 2), 1e30), np.array([[1e-30, 1e30]]), np.zeros((0, 3))],
    ids=["zero", "constant", "huge", "wide", "empty"],
)
def test_extreme_adapters_come_back_or_are_refused_in_one_line(number_format, value):
    given = {"only": value.astype(np.float32)}
    if number_format == "fp16" and np.abs(value).max(initial=0) > 65504:
        with pytest.raises(ValueError, match="too large for fp16: use int8 or fp32"):
            encode(given, number_format)
        return
    back = decode(encode(given, number_format), given, number_format)["only"]
    np.testing.assert_allclose(back, given["only"], atol=np.abs(value).max(initial=0) * 0.51 / 7, rtol=0)
    assert np.isfinite(back).all()


def test_no_array_at_all_is_an_empty_message():
    for number_format in FORMATS:
        assert decode(encode({}, number_format), {}, number_format) == {}


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("number_format", ["fp32", "int4"])
def test_top_k_sends_the_largest_and_nothing_else(keep, number_format):
    given = adapter(3)
    back = decode(encode(given, number_format, keep), given, number_format, keep)
    flat, sent = (np.concatenate([part[key].ravel() for key in sorted(given)]) for part in (given, back))
    count = max(1, round(keep * len(flat)))
    border = np.sort(np.abs(flat))[-count]
    assert not sent[np.abs(flat) < border].any()
    if number_format == "fp32":
        np.testing.assert_array_equal(sent[np.abs(flat) >= border], flat[np.abs(flat) >= border])


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 1001])
def test_int4_takes_odd_lengths_and_half_a_byte_each(size):
    given = {"v": np.linspace(-1, 1, size, dtype=np.float32)}
    encoded = encode(given, "int4")
    assert encoded["values"].nbytes == -(-size // 2)
    step = np.float64(encoded["scales"][0]) * encoded["unit"][0]
    back = decode(encoded, given, "int4")["v"]
    np.testing.assert_allclose(back, np.clip(np.rint(given["v"] / step), -7, 7) * step, atol=1e-6)


@pytest.mark.parametrize(("number_format", "keep"), [("int8", 1.0), ("int4", 1.0), ("fp32", 0.1), ("int4", 0.1)])
def test_error_feedback_loses_nothing_over_the_rounds(number_format, keep):
    late, asked, sent = {}, [], []
    for number in range(20):
        update = adapter(number)
        asked.append(update)
        update = {key: value + late.get(key, 0) for key, value in update.items()}
        sent.append(decode(encode(update, number_format, keep), update, number_format, keep))
        late = {key: value - sent[-1][key] for key, value in update.items()}
    for key in late:
        total = sum(update[key].astype(np.float64) for update in asked)
        np.testing.assert_allclose(sum(update[key] for update in sent) + late[key], total, atol=1e-4)
        assert np.abs(late[key]).max() < np.abs(total).max() + 20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("number_format", FORMATS)
def test_what_is_not_finite_is_refused(value, number_format):
    with pytest.raises(ValueError, match="^an adapter that is not finite cannot be compressed$"):
        encode({"a": np.array([1, value], np.float32)}, number_format)


def test_damaged_messages_are_refused_in_one_line():
    given, whole = adapter(), encode(adapter(), "int4", 0.5)
    damages = {
        "bytes of values": {"values": whole["values"][:-1]},
        "scales for": {"scales": whole["scales"][:-1]},
        "while decompressing": {"mask": whole["mask"][::-1].copy()},
        "not flat uint8": {"values": whole["values"].reshape(-1, 1)},
        "'scales' is float32": {"scales": whole["scales"].astype(np.float32)},
        "a mask of": {"mask": encode({"v": np.ones(2, np.float32)}, "int4", 0.5)["mask"]},
        "expected the arrays mask, scales, unit, values, there are": {"extra": np.zeros(1)},
    }
    for said, change in damages.items():
        with pytest.raises((ValueError, compression.zlib.error), match=said) as caught:
            decode(whole | change, given, "int4", 0.5)
        assert "\n" not in str(caught.value)


def test_unknown_formats_and_shares_are_named():
    with pytest.raises(ValueError, match="federation.compression.up=int2: allowed are fp32, fp16, int8, int4"):
        config.load("cpu", "federation.compression.up=int2")
    with pytest.raises(ValueError, match="federation.compression.keep=0.0: allowed is from"):
        config.load("cpu", "federation.compression.keep=0")


@pytest.mark.parametrize(("number_format", "times"), [("fp16", 2.0), ("int8", 3.99), ("int4", 7.9)])
def test_messages_of_the_real_adapter_shrink_as_promised(cfg, number_format, times):
    start = first_adapter(cfg)
    rng = np.random.default_rng(0)
    update = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in start.items()}
    sizes = [
        recorddict_to_proto(RecordDict({"arrays": to_record(arrays)})).ByteSize()
        for arrays in (update, encode(update, number_format))
    ]
    assert sizes[0] / sizes[1] >= times


def _compressed(app=None):
    """A tiny ClientApp behind the mod."""
    client = tiny.client()
    return lambda message, context: compression.mod(message, context, app or client)


@pytest.mark.parametrize(
    "changes",
    [
        ["federation.compression.up=fp16", "federation.compression.down=fp16"],
        ["federation.compression.up=int8"],
        ["federation.compression.up=int4", "federation.compression.down=int8"],
        ["federation.compression.keep=0.5"],
    ],
    ids=lambda changes: " ".join(change.split("compression.")[1] for change in changes),
)
@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "FedMedian"])
def test_a_compressed_federation_comes_close_to_the_plain_one(changes, strategy):
    if "keep" in changes[0] and strategy == "FedMedian":
        with pytest.raises(ValueError, match="keep=0.5 with FedMedian: it compares replies number by number"):
            tiny.federate(tiny.settings(f"federation.strategy={strategy}", *changes))
        return
    plain, compressed = (tiny.settings(f"federation.strategy={strategy}", *more, rounds=6) for more in ([], changes))
    (expected, _), (adapter, tables) = tiny.federate(plain), tiny.federate(compressed, _compressed())
    moved = max(np.abs(value - tiny.START[key]).max() for key, value in expected.items())
    near = 1.0 if "keep" in changes[0] and strategy != "FedAvg" else 0.25  # Adam divides by what was sent
    for key, value in expected.items():
        assert value.shape == adapter[key].shape
        assert np.abs(adapter[key] - value).max() < near * moved
    assert all(row[2] == "used" for row in tables.clients)


def test_faults_behind_the_mod_are_named_and_left_out(caplog):
    cfg = tiny.settings("federation.compression.up=int8", rounds=2)

    def not_finite(adapter, numbers):
        return {key: value * np.nan for key, value in adapter.items()}, numbers

    inner = _compressed(tiny.client({(1, 2): not_finite}))

    def damaged(message, context):
        reply = inner(message, context)
        kind, node = message.metadata.message_type, context.node_config["partition-id"]
        if kind == "train" and node == 1 and message.content["config"]["server-round"] == 2:
            arrays = {key: Array(array.numpy()[:1]) for key, array in reply.content["arrays"].items()}
            reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    _, tables = tiny.federate(cfg, damaged)
    faults = {row[:2]: row[2] for row in tables.clients if row[2] != "used"}
    assert "cannot be compressed" in faults[1, 2] and "its update cannot be decoded" in faults[2, 1]
    assert len(faults) == 2


def test_a_killed_run_goes_on_with_what_the_hospitals_had_not_sent_yet(tmp_path):
    cfg = tiny.settings("federation.compression.up=int4", "federation.compression.keep=0.3", rounds=4)
    expected, tables = tiny.federate(cfg, _compressed(), folder=tmp_path / "whole")

    def killed(message, context):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 3:
            raise KeyboardInterrupt
        return _compressed()(message, context)

    with pytest.raises(KeyboardInterrupt):
        tiny.federate(cfg, killed, folder=tmp_path / "killed")
    adapter, again = tiny.federate(cfg, _compressed(), folder=tmp_path / "killed")
    for key, value in expected.items():
        np.testing.assert_array_equal(adapter[key], value)
    assert [row[:5] for row in again.clients] == [row[:5] for row in tables.clients]


def test_without_feedback_a_client_remembers_nothing():
    for feedback in (True, False):
        cfg = tiny.settings("federation.compression.up=int4", f"federation.compression.error_feedback={feedback}")
        with in_process.InProcessGrid(_compressed(), 4, {}) as grid:
            server_app.federate(grid, cfg, tiny.START)
            assert bool(grid.states) is feedback
