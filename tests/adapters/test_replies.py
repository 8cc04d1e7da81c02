"""Replies of strangers: each is left out with one line, and the others' round goes on."""

import io
import logging
from types import SimpleNamespace

import lora_rounds
import numpy as np
import pytest
import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies

from fedllm_helpers import config, training
from fedllm_helpers.adapters import screening
from fedllm_helpers.adapters.records import message_bytes, to_record
from fedllm_helpers.adapters.screening import printable
from fedllm_helpers.config.schema import BY_PRODUCT
from fedllm_helpers.federation import nodes, tables
from fedllm_helpers.federation.chain import compose
from fedllm_helpers.grids import in_process

HONEST = {key: value + 0.5 for key, value in tiny.START.items()}
NUMBERS = {"num-examples": 20, "examples": 8, "tokens": 80, "loss-before": 3.0, "loss-after": 2.0, "seconds": 0.1}
NAN, INF = float("nan"), float("inf")


def raw(data, stype="numpy.ndarray"):
    """An array whose description is right, whatever its bytes are."""
    return Array(dtype="float32", shape=(3, 2), stype=stype, data=data)


def npy(array, **changes):
    """The bytes of a .npy file, its header changed."""
    file = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | changes
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def archive():
    file = io.BytesIO()
    np.savez(file, a=np.ones((3, 2), np.float32))
    return file.getvalue()


def number(name, value):
    """Puts one in place of another; past Flower's own checks, as a stranger may."""
    return lambda content: content["metrics"].__dict__["_data"].update({name: value})


def array(value):
    """Puts an array, or an Array, in the place of one."""
    return lambda content: content["arrays"].update({"a.B": value if isinstance(value, Array) else Array(value)})


def record(**records):
    """Adds records, or takes them out where None."""

    def change(content):
        for name, value in records.items():
            content.pop(name, None)
            content.update({} if value is None else {name: value})

    return change


B, TINY = np.ones((3, 2), np.float32), Array(np.ones(1, np.float32))
WIRE = {  # what crosses Flower's wire as it is
    **{f"{name} {value}": number(name, value) for name in ("examples", "tokens", "seconds", "train-seconds")
       for value in (INF, NAN, -1.0, 1e300, [1.0, 2.0])},
    **{f"{name} {value}": number(name, value) for name in ("loss-before", "loss-after")
       for value in (INF, NAN, -1.0, 1e300, [3.0])},
    **{f"cards {value}": number("num-examples", value)
       for value in (1e308, 10**12, 10**7, 0, -3, 2.5, INF, NAN, [3], [])},
    "no cards": lambda content: content["metrics"].pop("num-examples"),
    "5,000 numbers": lambda content: content["metrics"].update({f"n{k}": k for k in range(5000)}),
    "no numbers": record(metrics=None),
    "numbers twice": record(more=MetricRecord(NUMBERS)),
    "numbers as settings": record(metrics=ConfigRecord({"num-examples": 20, "loss-before": 3.0})),
    "no adapter": record(arrays=None),
    "an adapter twice": record(more=ArrayRecord({"a.B": TINY})),
    "nothing": record(arrays=None, metrics=None),
    **{f"values {value}": array(B * np.float32(value)) for value in (1e19, 3e38, -3e38, NAN, INF)},
    **{f"a {kind} array": array(B.astype(kind)) for kind in (">f4", "float64", "float16", "int32", "complex64", "?")},
    "another shape": array(B[:1]),
    "turned": array(B.T.copy()),
    "no dimension": array(np.array(1.0, np.float32)),
    "a dimension more": array(B[None]),
    "no values": array(B[:0]),
    "a key less": lambda content: content["arrays"].pop("a.B"),
    "a key more": lambda content: content["arrays"].update({"c": TINY}),
    "a key of escapes": lambda content: content["arrays"].update({"\x1b[31m\r\n" * 400: TINY}),
    "a key of 11 MB": lambda content: content["arrays"].update({"k" * 11_000_000: TINY}),
    "20,000 arrays": lambda content: content["arrays"].update({f"k{k}": TINY for k in range(20_000)}),
    "bytes of another shape": array(raw(npy(np.ones((2, 3), np.float32)))),
    "a header of another shape": array(raw(npy(B, shape=(30_000_000_000, 2)))),
    "a header of a negative shape": array(raw(npy(B, shape=(-3, -2)))),
    "objects": array(raw(npy(B, descr="|O"))),
    "bytes short": array(raw(npy(B)[:-1])),
    "bytes over": array(raw(npy(B) + b"x")),
    "an archive": array(raw(archive())),
    "no bytes": array(raw(b"")),
    "noise": array(raw(bytes(range(256)))),
    "brackets": array(raw(b"\x93NUMPY\x01\x00\x76\x00{'descr': " + b"[" * 108)),
    "code": array(raw(b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').abort()".ljust(118))),
    "a payload of NaN": array(np.full((3, 2), 0x7F812345, np.uint32).view(np.float32)),
    "a header of 10**90 rows": array(raw(npy(B, shape=(10**90, 2)))),
    "a header of no rows, endless": array(raw(npy(B[:0], shape=(0, 10**30)))),
    "a type within a type": array(raw(npy(B, descr=("<f4", (2,)), shape=(3,)))),
    "fields": array(np.zeros((3, 2), [("a", "<f4")])),
    "dates": array(B.astype("M8[s]")),
    "cards 2**62": number("num-examples", 2**62),
    "a key of no letters": lambda content: content["arrays"].update({"": TINY}),
    "packed anew": record(packed=ArrayRecord({"all": TINY})),
    "another serialisation": array(raw(npy(B), stype="pickle")),
}  # fmt: skip
MILLION = dict.fromkeys(map(str, range(10**6)), TINY)
DIRECT = {  # what no record of Flower's takes, and a test of the screening can
    **{f"cards {str(value)[:12]}": number("num-examples", value) for value in (True, "20", None, 10**400, object())},
    **{f"examples {value!r}": number("examples", value) for value in (False, "many", {}, np.float32(3))},
    "a million arrays": lambda content: content["arrays"].__dict__["_data"].update(MILLION),
    "a key of 101 MB": lambda content: content["arrays"].__dict__["_data"].update({"k" * 101_000_000: TINY}),
}  # fmt: skip
FAILURES = [
    "\n" * 50,
    "",
    "x" * 10**7,
    "Traceback\n  line\nValueError: \x1b[2J\x1b[31mgone\x07",
    "a\rb\x0bc\u2028d\u202ee",
]


def content_of(adapter=None, numbers=None):
    return RecordDict({"arrays": to_record(adapter or HONEST), "metrics": MetricRecord(numbers or NUMBERS)})


@pytest.fixture
def request_():
    """A request of a run, to which a reply can be made."""
    with in_process.InProcessGrid(None, 1, {}):
        message = Message(RecordDict(), 2, "train")
        message.metadata.__dict__["_message_id"] = "1"
        yield message


def looked_at(message, cfg=None):
    strategies = compose(cfg or tiny.settings())
    alone = SimpleNamespace(get_node_ids=lambda: [2])
    strategies.top.configure_train(1, to_record(tiny.START), ConfigRecord({"lr": 1.0}), alone)
    strategies.screened.aggregate_train(1, [message])
    return strategies.screened.seen[2]


def is_one_line(text):
    return 0 < len(text) <= screening.WORDS and text.isprintable()


@pytest.mark.parametrize("spoil", [*WIRE.values(), *DIRECT.values()], ids=[*WIRE, *DIRECT])
def test_a_reply_that_is_not_what_was_asked_for_is_one_line(request_, spoil):
    message = Message(content_of(), reply_to=request_)
    spoil(message.content)
    reply = looked_at(message)
    assert reply.status != "used" and is_one_line(reply.status) and reply.arrays == {} and reply.sender == 2
    assert all(type(value) is float and (np.isnan(value) or 0 <= value <= 1e15) for value in reply.numbers.values())


@pytest.mark.parametrize("said", FAILURES)
def test_what_a_failure_says_is_cut_to_one_line(request_, said):
    reply = looked_at(Message(Error(2, said), reply_to=request_))
    assert reply.status.startswith("it failed: ") and is_one_line(reply.status)
    assert len(reply.trace) <= screening.LINES * (screening.WORDS + 1)
    assert all(line.isprintable() for line in reply.trace.split("\n"))


def test_a_message_with_neither_content_nor_error_is_left_out(request_):
    message = Message(content_of(), reply_to=request_)
    message.__dict__["_content"] = None
    assert message_bytes(message) == 0 and is_one_line(looked_at(message).status)


def fortran(content):
    content["arrays"] = ArrayRecord({key: Array(np.asfortranarray(value)) for key, value in HONEST.items()})


FINE = {
    "as asked": record(),
    "columns first": fortran,
    "another order": lambda content: content.update({"arrays": to_record(dict(reversed(HONEST.items())))}),
    "numbers of its own": number("favourite-colour", [3, 4]),
    "settings of its own": record(mine=ConfigRecord({"note": "hello"})),
    "cards with a point": number("num-examples", 20.0),
    "the most cards": number("num-examples", 10**6),
    "examples untold": lambda content: content["metrics"].pop("examples"),
    "denormal values": array(B * np.finfo(np.float32).smallest_subnormal),
    "zeros below zero": array(-B * 0),
    "a described shape that lies": array(Array(dtype="float64", shape=(9,), stype="numpy.ndarray", data=npy(B))),
    "settings of 10 MB": record(mine=ConfigRecord({"note": "x" * 10**7})),
    "loss after training untold": lambda content: content["metrics"].pop("loss-after"),
    "large values": array(np.full((3, 2), -9e11, np.float32)),
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_what_can_be_used_is_used_in_the_order_asked_for(request_, change):
    message = Message(content_of(), reply_to=request_)
    change(message.content)
    reply = looked_at(message)
    assert reply.status == "used" and list(reply.arrays) == list(tiny.START)
    assert np.array_equal(reply.arrays["b.A"], HONEST["b.A"]) and reply.arrays["b.A"].flags.c_contiguous
    assert reply.numbers["num-examples"] in (20, 10**6)


def test_the_most_cards_are_a_setting(request_):
    message = Message(content_of(numbers=NUMBERS | {"num-examples": 300}), reply_to=request_)
    small = tiny.settings("federation.max_cards=299")
    assert "num-examples is 300, not a number, whole and from 1 to 299" in looked_at(message, small).status
    assert looked_at(message).status == "used"


def test_texts_are_printable_and_short_and_say_that_they_were_cut():
    assert printable("a\n\tb\x00c\x1b[0m \u202ed") == "a b c [0m d"
    assert printable("é ü 漢字") == "é ü 漢字" and printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 199 + "…" and len(printable("\n" * 10**6 + "x")) <= 200


# whole rounds


def spoiled(app, kinds):
    """A hospital 1 that sends another wrong reply in each round."""

    def hostile(message, context):
        reply = app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            spoil = kinds[message.content["config"]["server-round"] - 1]
            spoil(reply.content) if callable(spoil) else reply.__dict__.update(_content=None, _error=Error(2, spoil))
        return reply

    return hostile


def away(numbers):
    def gone(adapter, given):
        raise OSError("gone")

    return {(k, 1): gone for k in numbers}


KINDS = [*WIRE.values(), *FAILURES]
ROUNDS = f"federation.num_rounds={len(KINDS)}"


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "Krum", "QFedAvg"])
def test_the_others_rounds_come_to_what_they_would_alone(strategy, caplog):
    cfg = config.load(tiny.settings(f"federation.strategy={strategy}", hospitals=6), ROUNDS)
    with caplog.at_level(logging.WARNING):
        adapter, told = tiny.federate(cfg, spoiled(tiny.client(), KINDS))
    lines = [line for line in caplog.messages if "hospital 1 is left out" in line]
    alone, _ = tiny.federate(cfg, tiny.client(away(range(1, len(KINDS) + 1))))
    assert all(np.array_equal(adapter[key], alone[key]) for key in alone)
    assert [row["used"] for row in told.history] == [5] * len(KINDS)
    assert len(lines) == len(KINDS) and all(line.isprintable() and len(line) < 260 for line in lines)
    statuses = [row[2] for row in told.clients if row[1] == 1]
    assert len(statuses) == len(KINDS) and all(map(is_one_line, statuses))
    figures = told.clients_frame()[list(tables.NUMBERS.values())]
    assert np.nanmax(figures.to_numpy(float)) < 1e4 and np.nanmin(figures.to_numpy(float)) >= 0


@pytest.mark.parametrize("strategy", ["FedAvg", "QFedAvg"])
def test_a_hospital_may_keep_its_losses_unless_the_strategy_weights_by_them(strategy):
    quiet = spoiled(tiny.client(), [lambda content: content["metrics"].pop("loss-before")])
    _, told = tiny.federate(tiny.settings(f"federation.strategy={strategy}", hospitals=3, rounds=1), quiet)
    (status,) = [row[2] for row in told.clients if row[1] == 1]
    assert (status == "used") == (strategy == "FedAvg") and ("loss-before" in status) == (strategy == "QFedAvg")


@pytest.mark.parametrize("rule", ["FedIT", *BY_PRODUCT])
def test_the_rules_of_products_go_on_with_the_others(rule):
    key = "m.q.lora_B.weight"
    kinds = [number("num-examples", value) for value in (1e308, 10**12, 2.5)] + [number("loss-before", [3.0])]
    kinds += [
        lambda content, value=value: content["arrays"].update({key: Array(np.full((11, 4), value, np.float32))})
        for value in (1e19, 3e38, NAN)
    ]
    cfg = lora_rounds.plan(rule, rounds=len(kinds))
    adapter, told, base = lora_rounds.federate(cfg, spoiled(lora_rounds.client(), kinds))
    alone, _, other = lora_rounds.federate(cfg, lora_rounds.client({(k, 1) for k in range(1, len(kinds) + 1)}))
    assert [row["used"] for row in told.history] == [2] * len(kinds)
    assert all(np.array_equal(adapter[key], alone[key]) for key in alone)
    assert all(np.array_equal(base.whole()[key], other.whole()[key]) for key in other.whole())


def masked_array(value):
    return record(arrays=ArrayRecord({"masked": Array(value)}))


MASKED = ["federation.secure_aggregation.threshold=3", "federation.secure_aggregation.value_range=4"]
SIZE = sum(value.size for value in tiny.START.values())


def test_masked_rounds_go_on_with_the_others():
    kinds = [masked_array(np.zeros(SIZE, kind)) for kind in ("float32", "int32", ">u4", "uint64")]
    kinds += [masked_array(np.zeros(size, np.uint32)) for size in (0, SIZE - 1, SIZE + 1)]
    kinds += [WIRE[name] for name in ("nothing", "no adapter", "no numbers", "cards 0", "tokens inf", "seconds nan")]
    kinds += [array(raw(b"")), *FAILURES]
    cfg = config.load(tiny.settings(*MASKED), f"federation.num_rounds={len(kinds)}")
    adapter, told = tiny.federate(cfg, spoiled(tiny.masked(tiny.client()), kinds))
    plain = config.load(tiny.settings(), f"federation.num_rounds={len(kinds)}")
    alone, _ = tiny.federate(plain, tiny.client(away(range(1, len(kinds) + 1))))
    assert [row["used"] for row in told.history] == [3] * len(kinds)
    for key in alone:
        np.testing.assert_allclose(adapter[key], alone[key], atol=1e-5 * len(kinds))


@pytest.mark.parametrize(
    "spoil",
    [
        number("num-examples", 10**7),
        number("num-examples", 999_999),  # allowed by itself, and 4 times as much as the sum has room for
        number("num-examples", 1e308),
        number("num-examples", 2.5),
        record(metrics=None),
        record(secure=None),
        record(secure=ConfigRecord({name: bytes(32) for name in ("mask_key", "cipher_key", "commitment")})),
        record(secure=ConfigRecord({"mask_key": "text", "cipher_key": b"", "commitment": 3})),
        record(secure=ConfigRecord({"k" * 10**6: b"x"})),
    ],
    ids=["many cards", "no room", "huge", "half", "no metrics", "no keys", "zero keys", "no bytes", "long name"],
)
def test_wrong_keys_and_weights_leave_the_masked_sum_to_the_others(spoil, caplog):
    """Three of four are enough; 32 zeros are a key with which nobody can agree on anything."""
    whole = tiny.masked(tiny.client())

    def app(message, context):
        reply = whole(message, context)
        if message.metadata.message_type == "query.keys" and context.node_config["partition-id"] == 1:
            spoil(reply.content)
        return reply

    changes = [MASKED[0], "federation.secure_aggregation.value_range=16"]
    hidden, told = tiny.federate(tiny.settings(*changes, rounds=2), app)
    plain, _ = tiny.federate(tiny.settings(rounds=2), tiny.client(away((1, 2))))
    for key in plain:
        np.testing.assert_allclose(hidden[key], plain[key], atol=1e-4)
    assert [row["used"] for row in told.history] == [3, 3]
    said = [line for line in caplog.messages if "hospital 1 is left out of the keys" in line]
    assert len(said) == 2 and all(line.isprintable() and len(line) < 260 for line in said)


def test_scores_of_strangers_are_left_out(caplog):
    wrong = [number("nll", value) for value in (INF, NAN, -1.0, 1e300, [2.0])]
    wrong += [number("num-examples", value) for value in (-1, 1e308, 10**12, NAN, [1])]
    wrong += [record(metrics=None), record(more=MetricRecord({})), lambda content: content["metrics"].pop("nll")]
    honest = tiny.client()

    def app(message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 1:
            wrong[message.content["config"]["server-round"] - 1](reply.content)
        return reply

    cfg = tiny.settings("federation.fraction_evaluate=1.0", rounds=len(wrong))
    _, told = tiny.federate(cfg, app)
    assert told.history_frame()["client_nll"].tolist() == pytest.approx([(0 * 1 + 2 * 3 + 3 * 4) / 8] * len(wrong))
    assert sum("hospital 1 is left out" in line for line in caplog.messages) == len(wrong)


class Doubled(in_process.InProcessGrid):
    """Answers twice, to what nobody asked, and under another's number."""

    def send_and_receive(self, messages, *, timeout=None):
        for reply in super().send_and_receive(messages, timeout=timeout):
            yield reply
            yield reply
            for changes in ({"_reply_to_message_id": "12345"}, {"_reply_to_message_id": ""}, {"_src_node_id": 77}):
                other = Message(content_of(), reply_to=Message(RecordDict(), 2, "train"))
                other.metadata.__dict__.update(changes)
                yield other


def test_a_second_reply_and_one_that_nobody_asked_for_change_nothing(caplog):
    adapter, told = tiny.federate(tiny.settings("federation.fraction_evaluate=1.0", rounds=2), grid=Doubled)
    alone, _ = tiny.federate(tiny.settings(rounds=2))
    assert all(np.array_equal(adapter[key], alone[key]) for key in alone)
    assert len(told.clients) == 8 and "a reply that nobody asked for is left out" in caplog.text


# who is who

INTRODUCTIONS = {
    "no metrics": record(metrics=None),
    "two records": record(more=MetricRecord({"partition-id": 0})),
    "no number": lambda content: content["metrics"].pop("partition-id"),
    "no count": lambda content: content["metrics"].pop("num-partitions"),
    "negative": number("partition-id", -1),
    "half": number("partition-id", 1.5),
    "a list": number("partition-id", [1]),
    "nan": number("partition-id", NAN),
    "beyond": number("partition-id", 4),
    "a billion": number("num-partitions", 10**9),
    "none": number("num-partitions", 0),
    "many numbers": lambda content: content["metrics"].update({f"n{k}": k for k in range(1000)}),
    "settings": record(metrics=ConfigRecord({"partition-id": 1, "num-partitions": 4})),
}


@pytest.mark.parametrize("spoil", INTRODUCTIONS.values(), ids=INTRODUCTIONS)
def test_an_introduction_that_makes_no_sense_leaves_the_others_to_train(spoil, caplog):
    honest = tiny.client()

    def app(message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "query" and context.node_config["partition-id"] == 1:
            spoil(reply.content)
        return reply

    cfg = tiny.settings(rounds=1)
    with in_process.InProcessGrid(app, 4, {}) as grid:
        cfg, answers = nodes.join(grid, cfg)
        adapter, told = tiny.server_app.federate(grid, cfg, dict(tiny.START), answers=answers)
    alone, _ = tiny.federate(tiny.settings(rounds=1), tiny.client(away([1])))
    assert all(np.array_equal(adapter[key], alone[key]) for key in alone)
    assert [row[2] for row in told.clients] == ["used"] * 3 + ["not connected"]
    assert told.history[0]["asked"] == 4 and told.history[0]["used"] == 3
    assert "round 1: not connected: hospitals 1" in caplog.messages
    assert sum("does not take part" in line for line in caplog.messages) == 1


class Coming(in_process.InProcessGrid):
    """Nodes that come and go; a node says that it is the hospital of its number modulo 10."""

    there = (2, 3)

    def get_node_ids(self):
        return list(self.there)

    def _deliver(self, message):
        numbers = {"partition-id": message.metadata.dst_node_id % 10 - 2, "num-partitions": 2}
        self.app = lambda request, context: Message(RecordDict({"m": MetricRecord(numbers)}), reply_to=request)
        return super()._deliver(message)


def test_no_node_takes_the_place_of_another_that_is_there_or_was_a_minute_ago(caplog, monkeypatch):
    cfg, seats, now = tiny.settings("federation.min_share=0", hospitals=2), {}, [1000.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now[0])
    with Coming(None, 2, {}) as grid:
        for at, there, expected in [
            (0, (2, 3), {2: 0, 3: 1}),
            (1, (2, 3, 12), {2: 0, 3: 1}),  # a second hospital 0
            (9, (3, 12), {3: 1}),  # and the first is gone only now
            (68, (3, 12), {3: 1}),
            (69, (2, 3, 12), {2: 0, 3: 1}),  # it was back in time
            (80, (3, 12), {3: 1}),
            (140, (3, 12), {12: 0, 3: 1}),  # a minute without it
            (150, (2, 3, 12), {12: 0, 3: 1}),  # now the first one is the stranger
        ]:
            now[0], grid.there = 1000.0 + at, there
            assert nodes.hospitals(grid, cfg, seats) == expected, at
    assert "node 12 does not take part: it says that it is hospital 0, which is node 2" in caplog.text
    assert "node 12 takes the place of node 2 as hospital 0" in caplog.text
    assert "node 2 does not take part" in caplog.text
    with Coming(None, 2, {}) as grid:
        grid.there = (2, 12)
        with pytest.raises(RuntimeError, match="nodes 2 and 12 are both hospital 0"):
            nodes.hospitals(grid, cfg, {})


def test_hospitals_that_are_not_connected_are_drawn_told_and_replaced():
    cfg = tiny.settings("federation.fraction_train=0.5", hospitals=10)
    for step in training.rounds(tiny.settings("federation.fraction_train=0.5", hospitals=10, rounds=20)):
        everyone, nobody = nodes.sample(cfg, step, range(10))
        asked, missing = nodes.sample(cfg, step, {0, 2, 4, 6, 7, 8, 9})
        assert not nobody and len(everyone) == len(asked) == 5
        assert missing == sorted(set(everyone) & {1, 3, 5}) and set(everyone) - set(missing) <= set(asked)
        assert nodes.sample(cfg, step, {3})[0] == [3]
    drawn = [nodes.sample(cfg, step, range(10), *purpose)[0] for purpose in ((), (1,))]
    assert drawn[0] != drawn[1]


def test_those_who_score_are_drawn_by_themselves():
    seen, kinds = [], {"train": [], "evaluate": []}
    honest = tiny.client(seen=seen)

    def app(message, context):
        kind = message.metadata.message_type
        if kind in kinds:
            kinds[kind].append((message.content["config"]["server-round"], context.node_config["partition-id"]))
        return honest(message, context)

    changes = ["federation.fraction_train=0.5", "federation.fraction_evaluate=0.5"]
    tiny.federate(tiny.settings(*changes, hospitals=6, rounds=8), app)
    same = [
        {h for n, h in kinds["train"] if n == k} == {h for n, h in kinds["evaluate"] if n == k} for k in range(1, 9)
    ]
    assert len(kinds["train"]) == len(kinds["evaluate"]) == 24 and sum(same) < 4  # one in 20 by chance


# strategies that make nothing of what came


@pytest.mark.parametrize(
    ("strategy", "hospitals", "needed"),
    [
        ("Bulyan num_malicious_nodes=1", 7, 7),
        ("Bulyan", 3, 3),
        ("Krum num_malicious_nodes=1", 5, 5),
        ("MultiKrum num_nodes_to_select=4", 4, 4),
        ("FedTrimmedAvg", 5, 5),
        ("FedTrimmedAvg beta=0.3", 4, 4),
    ],
)
def test_too_few_replies_for_a_strategy_are_not_called_used(strategy, hospitals, needed, caplog):
    name, *arguments = strategy.split()
    changes = [f"federation.strategy={name}", *(f"federation.strategy_arguments.{one}" for one in arguments)]
    adapter, told = tiny.federate(tiny.settings(*changes, hospitals=hospitals), tiny.client(away([2])))
    assert [row["used"] for row in told.history] == [hospitals, 0, hospitals]
    said = f"not combined: {name} needs {needed} replies, {hospitals - 1} came"
    assert {row[2] for row in told.clients if row[0] == 2 and row[1] != 1} == {said} and said in caplog.text
    row = told.history[1]
    assert np.isnan(row["loss_before"]) and np.isnan(row["loss_after"]) and row["examples"] == row["tokens"] == 0
    assert "loss" not in tables.report(row, 3)
    with pytest.raises(RuntimeError, match=f"round 3: {said}"):
        tiny.federate(tiny.settings(*changes, hospitals=hospitals), tiny.client(away([2, 3])))


@pytest.mark.parametrize("what", ["raises", "nothing", "infinite"])
def test_a_strategy_that_makes_nothing_loses_a_round_and_not_the_run(what, monkeypatch):
    honest, spoil = strategies.FedAvgM.aggregate_train, [2]

    def aggregate(self, number, replies):
        made = honest(self, number, replies)
        if number not in spoil:
            return made
        if what == "raises":
            raise ZeroDivisionError("by\nzero")
        whole = {key: Array(array.numpy() * np.float32(INF)) for key, array in made[0].items()}
        return (None, None) if what == "nothing" else (ArrayRecord(whole), None)

    monkeypatch.setattr(strategies.FedAvgM, "aggregate_train", aggregate)
    cfg = tiny.settings("federation.strategy=FedAvgM", "federation.strategy_arguments.server_momentum=0.5")
    adapter, told = tiny.federate(cfg)
    assert [row["used"] for row in told.history] == [4, 0, 4] and np.isfinite(adapter["a.B"]).all()
    assert all(row[2].startswith("not combined: FedAvgM") and row[2].isprintable() for row in told.clients[4:8])
    spoil.clear()
    gone = {(2, k): fault for k in range(4) for fault in away([2]).values()}
    without, _ = tiny.federate(cfg, tiny.client(gone))
    assert all(np.array_equal(adapter[key], without[key]) for key in without), "it remembers nothing of that round"
    spoil += [1, 2]
    with pytest.raises(RuntimeError, match="round 2: not combined: FedAvgM"):
        tiny.federate(cfg)
