"""Arrays packed for the way between machines come out as they went in."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm_helpers.adapters import packing
from fedllm_helpers.grids import in_process

RECORDS = {
    "arrays": {"b.A": np.arange(6, dtype=np.float32).reshape(2, 3), "a.B": np.zeros((3, 0), np.float16)},
    "state": {"seed": np.array(7, np.int64), "bits": np.array([[True], [False]])},
    "none": {},
}


@pytest.fixture(autouse=True)
def a_run():
    """Messages belong to a run."""
    with in_process.InProcessGrid(None, 1, {}):
        yield


def message(records, node=5):
    arrays = {name: ArrayRecord({key: Array(value) for key, value in one.items()}) for name, one in records.items()}
    numbers = {"metrics": MetricRecord({"n": 3}), "config": ConfigRecord({"lr": 0.1})}
    return Message(RecordDict({**arrays, **numbers}), node, "train")


def test_what_is_unpacked_is_what_was_packed():
    (sent,) = packing.packed([message(RECORDS)])
    assert list(sent.content.array_records) == [packing.PACKED] and len(sent.content[packing.PACKED]) == 1
    (got,) = packing.unpacked([sent])
    assert list(got.content.array_records) == list(RECORDS)
    for name, record in RECORDS.items():
        assert list(got.content[name]) == list(record), "the order of keys is kept"
        for key, value in record.items():
            there = got.content[name][key].numpy()
            assert np.array_equal(there, value) and there.dtype == value.dtype and there.shape == value.shape
    assert got.content["metrics"]["n"] == 3 and got.content["config"]["lr"] == 0.1


def test_messages_with_the_same_records_share_one_array():
    first = message(RECORDS)
    second = Message(RecordDict(dict(first.content)), 6, "train")
    third = message(RECORDS)
    one, two, three = packing.packed([first, second, third])
    assert one.content[packing.PACKED] is two.content[packing.PACKED] is not three.content[packing.PACKED]


def test_a_message_without_arrays_is_left_alone():
    (sent,) = packing.packed([message({})])
    assert not sent.content.array_records and next(packing.unpacked([sent])) is sent


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 40, b"text"], ids=["empty", "noise", "text"])
def test_garbage_stays_garbage_and_stops_nobody(garbage):
    wrong = message({})
    wrong.content[packing.PACKED] = ArrayRecord({"all": Array(np.frombuffer(garbage, np.uint8))})
    good = packing.packed([message(RECORDS)])[0]
    first, second = packing.unpacked([wrong, good])
    assert "arrays" not in first.content and "arrays" in second.content


def test_a_client_answers_packed_to_packed_and_open_to_open():
    def echo(request, context):
        assert "arrays" in request.content
        return Message(RecordDict({"arrays": request.content["arrays"]}), reply_to=request)

    (request,) = packing.packed([message(RECORDS)])
    for whole in (request, message(RECORDS)):
        closed = packing.PACKED in whole.content
        whole.metadata.__dict__["_message_id"] = "1"
        reply = packing.client_mod(whole, None, echo)
        assert (packing.PACKED in reply.content) == closed


class Slow(in_process.InProcessGrid):
    """Flower's grid over a network: it takes some messages, and has the replies when it has them."""

    lazy, moment, untaken = False, 0.0, 0

    def push_messages(self, messages):
        numbers = list(super().push_messages(messages))
        return [*numbers[self.untaken :], *[None] * self.untaken]

    def pull_messages(self, message_ids):
        ready = [number for number in message_ids if 10 * int(number) <= self.moment]
        return list(super().pull_messages(ready))


@pytest.mark.parametrize("untaken, timeout, expected", [(0, 100.0, [1, 2, 3]), (1, 100.0, [2, 3]), (0, 25.0, [1, 2])])
def test_replies_come_when_they_are_there_and_nobody_waits_for_what_was_not_sent(
    untaken, timeout, expected, monkeypatch, caplog
):
    def answered(request, context):
        return Message(RecordDict({"n": MetricRecord({"node": context.node_id})}), reply_to=request)

    with Slow(answered, 3, {}) as grid:
        grid.untaken, waits = untaken, []

        def later(seconds):
            waits.append(seconds)
            grid.moment += seconds

        monkeypatch.setattr(packing.time, "sleep", later)
        monkeypatch.setattr(packing.time, "monotonic", lambda: grid.moment)
        asked = [message({"arrays": {}}, node) for node in grid.get_node_ids()]
        came = [(node, round(grid.moment)) for node, _ in packing.send(grid, asked, timeout)]
    assert [node - 1 for node, _ in came] == expected
    assert all(10 * k <= when <= 10 * k + 1.5 for k, (_, when) in zip(expected, came, strict=True))
    assert waits[0] == packing.SOON and max(waits) < packing.LATE and grid.moment <= timeout
    assert caplog.messages == ["1 of 3 messages could not be sent"] * untaken
