"""The mean against numpy and Flower, every strategy against Flower's own loop, and replies that cannot be used."""

import io
import logging
import re

import numpy as np
import pytest
import tiny
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error
from flwr.serverapp import strategy as strategies

from fedllm_helpers import aggregation, config, training
from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.communication import compression
from fedllm_helpers.config import rounds
from fedllm_helpers.config.schema import STRATEGIES
from fedllm_helpers.federation import chain, nodes, server_app
from fedllm_helpers.grids import in_process
from fedllm_helpers.training import memory

NEEDED = {
    "MultiKrum": {"num_nodes_to_select": 3},
    "QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "loss-before"},
    "FedAvgM": {"server_momentum": 0.5},
    "FedProx": {"proximal_mu": 0.1},
}


def random_adapter(seed):
    rng = np.random.default_rng(seed)
    shapes = {"z.lora_A": (4, 7), "a.lora_B": (5, 4), "one": (1,), "flat": (3, 1)}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize("weights", [[3], [1, 2], [200, 1, 77.5], [1e-3, 1e6, 5, 0]])
def test_weighted_mean_against_numpy(weights):
    adapters = [random_adapter(seed) for seed in range(len(weights))]
    mean = aggregation.weighted_mean(zip(adapters, weights, strict=True))
    assert list(mean) == list(adapters[0])
    for key, value in mean.items():
        wanted = np.average([a[key].astype(np.float64) for a in adapters], axis=0, weights=weights)
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_weighted_mean_refuses_what_does_not_fit():
    one = random_adapter(0)
    with pytest.raises(ValueError, match="nothing to average"):
        aggregation.weighted_mean([])
    with pytest.raises(ValueError, match="weights that sum to 0"):
        aggregation.weighted_mean([(one, 0)])
    with pytest.raises(ValueError, match="'one' has shape .2,., not .1,."):
        aggregation.weighted_mean([(one, 1), ({**one, "one": np.zeros(2, np.float32)}, 1)])
    with pytest.raises(ValueError, match="1 keys are missing or unknown, the first is 'flat'"):
        aggregation.weighted_mean([(one, 1), ({k: v for k, v in one.items() if k != "flat"}, 1)])


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_gives_what_flowers_own_loop_gives(name):
    arguments = NEEDED.get(name, {})
    given = [f"federation.strategy_arguments.{key}={value}" for key, value in arguments.items() if "_key" not in key]
    cfg = tiny.settings(f"federation.strategy={name}", *given, hospitals=5)
    ours, _ = tiny.federate(cfg)
    with in_process.InProcessGrid(tiny.client(), 5, {}) as grid, memory.loaded_set_aside():
        theirs = getattr(strategies, name)(**arguments, fraction_evaluate=0.0)
        result = theirs.start(grid, to_record(tiny.START), num_rounds=3, train_config=ConfigRecord({"lr": 1.0}))
    for key, value in from_record(result.arrays).items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours["b.A"], tiny.START["b.A"])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("beta1=0.5", "federation.strategy_arguments.beta1=0.5: .* FedAdam takes eta, tau, beta_1, beta_2"),
        ("eta=much", "federation.strategy_arguments.eta=much: allowed are numbers"),
        ("fraction_train=0.5", "federation.strategy_arguments.fraction_train=0.5: .* the server app's"),
        ("weighted_by_key=tokens", "federation.strategy_arguments.weighted_by_key=tokens: .* the server app's"),
    ],
)
def test_a_wrong_argument_of_a_strategy_is_one_line(argument, expected):
    with pytest.raises(ValueError, match=expected):
        tiny.settings("federation.strategy=FedAdam", f"federation.strategy_arguments.{argument}")


def test_a_minimum_that_no_round_can_reach_is_refused():
    with pytest.raises(ValueError, match="federation.min_replies=3: a round asks 2 hospitals"):
        tiny.federate(tiny.settings("federation.fraction_train=0.5", "federation.min_replies=3"))


def test_every_round_has_its_rate_and_asks_the_sampled_hospitals_in_order():
    cfg, seen = tiny.settings("federation.fraction_train=0.5", hospitals=6, rounds=4), []
    tiny.federate(cfg, tiny.client(seen=seen))
    for step in training.rounds(cfg):
        asked = [hospital for number, hospital, _ in seen if number == step.number]
        assert len(asked) == 3 and asked == sorted(asked)
        assert {rate for number, _, rate in seen if number == step.number} == {step.learning_rate}
    drawn = [tuple(h for n, h, _ in seen if n == number) for number in (1, 2, 3, 4)]
    assert len(set(drawn)) > 1, "another draw in every round"
    again = []
    tiny.federate(cfg, tiny.client(seen=again))
    assert again == seen
    other = []
    tiny.federate(config.load(cfg, "seed=7"), tiny.client(seen=other))
    assert [h for _, h, _ in other] != [h for _, h, _ in seen]


class WithAnOfflineNode(tiny.Shuffled):
    """Hospital 1 is gone after the first round: Flower's server answers in its place, under its own number."""

    def pull_messages(self, message_ids):
        replies, gone = super().pull_messages(message_ids), in_process.FIRST_CLIENT_NODE + 1
        for reply in replies:
            if reply.metadata.src_node_id == gone and reply.metadata.message_type == "train":
                reply.metadata.__dict__["_src_node_id"] = in_process.SERVER_NODE
                reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(5)
        return replies


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian"])
def test_the_order_of_nodes_and_replies_changes_no_bit(name):
    cfg = tiny.settings(f"federation.strategy={name}", "federation.fraction_train=0.8", hospitals=7)
    ours, theirs = tiny.federate(cfg)[0], tiny.federate(cfg, grid=tiny.Shuffled)[0]
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_a_node_that_goes_offline_is_named_and_left_out(caplog):
    adapter, tables = tiny.federate(tiny.settings(rounds=1), grid=WithAnOfflineNode)
    assert "hospital 1 is left out: it failed: an error without a reason (code 5)" in caplog.text
    wanted = aggregation.weighted_mean([(tiny.update(tiny.START, h, 1), 10 * (h + 1)) for h in (0, 2, 3)])
    assert all(np.array_equal(adapter[key], wanted[key]) for key in wanted)
    assert tables.history_frame()["asked"].tolist() == [4]


@pytest.mark.parametrize("name", ["FedAvgM", "Krum", "QFedAvg", "FedTrimmedAvg"])
def test_clients_may_order_and_name_things_as_they_like(name):
    def backwards(adapter, numbers):
        return dict(reversed(adapter.items())), {**numbers, "favourite-colour": 3}

    extra = ["federation.strategy_arguments.server_momentum=0.5"] if name == "FedAvgM" else []
    cfg = tiny.settings(f"federation.strategy={name}", *extra, hospitals=5)
    faults = {(number, hospital): backwards for number in (1, 2, 3) for hospital in (0, 2)}
    ours, odd = tiny.federate(cfg)[0], tiny.federate(cfg, tiny.client(faults))[0]
    assert list(ours) == list(odd) and all(np.array_equal(ours[key], odd[key]) for key in ours)


def test_fedprox_sends_its_mu_to_the_hospitals():
    seen = []
    arguments = ["federation.strategy=FedProx", "federation.strategy_arguments.proximal_mu=0.25"]
    tiny.federate(tiny.settings(*arguments, rounds=1), tiny.client(orders=seen))
    assert [order["proximal-mu"] for order in seen] == [0.25] * 4


def _with(key, value):
    return lambda adapter, numbers: ({**adapter, key: value}, numbers)


def _raise(adapter, numbers):
    raise OSError("the disk of this hospital is full")


FAULTS = {
    "not finite": _with("a.B", np.full((3, 2), np.nan, np.float32)),
    "has shape .1, 2., not .3, 2.": _with("a.B", np.zeros((1, 2), np.float32)),
    "is float64, not float32": _with("a.B", np.zeros((3, 2))),
    "1 keys are missing or unknown, the first is 'c'": _with("c", np.zeros(1, np.float32)),
    "num-examples is 0": lambda adapter, numbers: (adapter, {**numbers, "num-examples": 0}),
    "num-examples is nan": lambda adapter, numbers: (adapter, {**numbers, "num-examples": float("nan")}),
    "loss-before is nan, not a finite number": lambda adapter, numbers: (
        adapter,
        {**numbers, "loss-before": float("nan")},
    ),
    "num-examples is .3., not a number": lambda adapter, numbers: (adapter, {**numbers, "num-examples": [3]}),
    "num-examples is None": lambda adapter, numbers: (adapter, {"seconds": 1.0}),
    "it failed: OSError: the disk of this hospital is full": _raise,
    "it failed: TypeError: .*BFloat16": lambda adapter, numbers: (
        ArrayRecord({"a.B": torch.zeros(3, 2, dtype=torch.bfloat16)}),
        numbers,
    ),
}


@pytest.mark.parametrize("name", ["FedMedian", "Krum", "QFedAvg"])
def test_no_strategy_sees_a_reply_that_cannot_be_used(name):
    for fault in FAULTS.values():
        cfg = tiny.settings(f"federation.strategy={name}", rounds=1, hospitals=5)
        adapter, tables = tiny.federate(cfg, tiny.client({(1, 2): fault}))
        assert all(np.isfinite(value).all() for value in adapter.values())
        assert tables.history_frame()["used"].tolist() == [4]


@pytest.mark.parametrize("expected", FAULTS)
def test_a_reply_that_cannot_be_used_is_named_and_left_out(expected, caplog):
    cfg = tiny.settings(rounds=1)
    with caplog.at_level(logging.WARNING):
        adapter, tables = tiny.federate(cfg, tiny.client({(1, 2): FAULTS[expected]}))
    assert any(m.startswith("round 1: hospital 2 is left out: ") for m in caplog.messages)
    frame = tables.clients_frame().set_index("client")
    assert frame.loc[2, "status"] in caplog.text and frame["status"].drop(2).eq("used").all()
    assert tables.history_frame()["used"].tolist() == [3]
    assert re.search(expected, frame.loc[2, "status"])
    others = [(tiny.update(tiny.START, h, 1), 10 * (h + 1)) for h in (0, 1, 3)]
    wanted = aggregation.weighted_mean(others)
    assert all(np.array_equal(adapter[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("up", ["fp32", "int4"])
@pytest.mark.parametrize("what", ["archive", "header", "vast", "nothing"])
def test_bytes_that_are_no_array_are_left_out(what, up):
    """What numpy's reader makes of a stranger's bytes must not end a run."""
    archive, whole = io.BytesIO(), io.BytesIO()
    np.savez(archive, a=np.ones(3))
    np.save(whole, np.ones(3, np.float32))
    vast = whole.getvalue().replace(b"(3,), }" + b" " * 14, b"(100000000000000,), }")
    strange = {"archive": archive.getvalue(), "header": b"\x93NUMPY\x01\x00\x76\x00{'descr': [[[" + b" " * 200}
    strange |= {"vast": vast, "nothing": b""}
    assert vast != whole.getvalue()

    def app(message, context):
        reply = tiny.client()(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            arrays = {
                key: Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=strange[what])
                for key in reply.content["arrays"]
            }
            reply.content["arrays"] = ArrayRecord(arrays)
        elif message.metadata.message_type == "train" and up == "int4":
            arrays = {key: value.numpy() - tiny.START[key] for key, value in reply.content["arrays"].items()}
            reply.content["arrays"] = to_record(compression.encode(arrays, up))
        return reply

    _, tables = tiny.federate(tiny.settings(f"federation.compression.up={up}", rounds=1), app)
    status = {row[1]: row[2] for row in tables.clients}
    said = "cannot be read" if up == "fp32" else "5 keys are missing or unknown"  # where an encoded update is expected
    assert said in status.pop(1) and set(status.values()) == {"used"}


def test_a_round_without_any_usable_reply_ends_with_the_first_traceback():
    faults = {(1, hospital): _raise for hospital in range(4)}
    with pytest.raises(RuntimeError, match="(?s)round 1: none of 4 hospitals .*Traceback.*in _raise.*disk of this"):
        tiny.federate(tiny.settings(), tiny.client(faults))


def test_one_such_round_is_survived_and_two_running_are_not(caplog):
    faults = {(2, hospital): _raise for hospital in range(4)}
    _, tables = tiny.federate(tiny.settings(), tiny.client(faults))
    assert tables.history_frame()["used"].tolist() == [4, 0, 4] and "the adapter stays as it was" in caplog.text
    faults |= {(3, hospital): _raise for hospital in range(4)}
    with pytest.raises(RuntimeError, match="round 3: none of 4 hospitals"):
        tiny.federate(tiny.settings(), tiny.client(faults))


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian"])
def test_fewer_replies_than_the_minimum_leave_the_adapter_as_it_was(name, caplog):
    cfg = tiny.settings("federation.min_replies=3", f"federation.strategy={name}")
    faults = {(2, hospital): _raise for hospital in (0, 1)}
    adapter, tables = tiny.federate(cfg, tiny.client(faults))
    assert "round 2: not combined: 2 usable replies, 3 are needed (federation.min_replies=3)" in caplog.text
    assert "the first of the others, hospital 0: it failed: OSError" in caplog.text
    assert tables.history_frame()["used"].tolist() == [4, 0, 4]

    strategy, current = chain.named_strategy(cfg), tiny.START  # the same two rounds, the second left out by hand
    for number in (1, 3):
        with in_process.InProcessGrid(tiny.client(), 4, {}) as grid:
            messages = list(strategy.configure_train(number, to_record(current), ConfigRecord(), grid))
            messages.sort(key=lambda message: message.metadata.dst_node_id)
            current = from_record(strategy.aggregate_train(number, list(grid.send_and_receive(messages)))[0])
    for key, value in current.items():
        np.testing.assert_allclose(adapter[key], value, rtol=1e-5, atol=1e-6)


def test_a_lone_survivor_does_not_become_everyones_adapter(caplog):
    faults = {(2, hospital): _raise for hospital in (0, 1)}
    _, tables = tiny.federate(tiny.settings(), tiny.client(faults))  # two of four are no more than half
    assert tables.history_frame()["used"].tolist() == [4, 0, 4]
    assert "2 usable replies, 3 are needed (federation.min_share=0.5)" in caplog.text
    status = tables.clients_frame().query("round == 2")["status"]
    assert status.str.startswith("not combined: 2 usable replies").tolist() == [False, False, True, True]
    _, tables = tiny.federate(tiny.settings("federation.min_share=0"), tiny.client(faults))
    assert tables.history_frame()["used"].tolist() == [4, 2, 4]
    faults |= {(3, hospital): _raise for hospital in (0, 1)}
    with pytest.raises(RuntimeError, match="round 3: not combined: 2 usable replies, 3 are needed"):
        tiny.federate(tiny.settings(), tiny.client(faults))


@pytest.mark.parametrize(
    ("share", "asked", "least"), [(0, 6, 1), (0.5, 6, 4), (0.5, 5, 3), (0.29, 100, 30), (0.5, 1, 1)]
)
def test_more_than_a_share_are_needed(share, asked, least):
    assert rounds.needed(tiny.settings(f"federation.min_share={share}", hospitals=asked)) == least


def test_a_round_waits_for_more_than_half_of_the_hospitals(caplog):
    class Leaving(tiny.Shuffled):
        """Of four hospitals, two lose their connection after the first round, and one of them comes back."""

        looks = 0

        def get_node_ids(self):
            nodes = sorted(super().get_node_ids())
            Leaving.looks += bool(seen)
            return nodes if not seen else nodes[:2] if Leaving.looks < 8 else nodes[:3]

    seen = []
    cfg = tiny.settings("federation.timeout=20", rounds=2)
    _, tables = tiny.federate(cfg, tiny.client(seen=seen), grid=Leaving)
    assert Leaving.looks >= 8 and tables.history_frame()["used"].tolist() == [4, 3]
    Leaving.looks, cfg = -100, config.load(cfg, "federation.timeout=1")
    seen.clear()
    with pytest.raises(TimeoutError, match="2 of 3 hospitals are connected after federation.timeout="):
        tiny.federate(cfg, tiny.client(seen=seen), grid=Leaving)


def test_hospitals_score_the_average_on_their_own_cards():
    cfg, seen = tiny.settings("federation.fraction_evaluate=1.0", rounds=1), []
    _, tables = tiny.federate(cfg, tiny.client(seen=seen))
    wanted = sum((h + 1) * h for h in range(4)) / sum(h + 1 for h in range(4))
    assert tables.history_frame()["client_nll"].tolist() == pytest.approx([wanted])


def test_the_names_of_flower_that_are_not_public_are_still_there():
    """The grid in this process touches these; a failure here means: look at what the new Flower calls them."""
    from flwr.common.constant import ErrorCode
    from flwr.common.serde import message_from_proto, message_to_proto, recorddict_to_proto  # noqa: F401
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    assert {"_task_id", "_run_id", "_node_id"} <= vars(TaskIdentity).keys()
    assert Run.create_empty(run_id=1).run_id == 1
    assert in_process.CLIENT_RAISED in (ErrorCode.UNKNOWN, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


@pytest.mark.parametrize("times", [1, 9])
def test_a_node_that_could_not_say_who_it_is_is_asked_again_and_no_run_starts_without_it(times, caplog):
    honest, failed = tiny.client(), []

    def app(message, context):
        kind = message.metadata.message_type
        if kind == "query" and context.node_config["partition-id"] == 1 and len(failed) < times:
            failed.append(True)
            raise FileNotFoundError("no cards yet")
        return honest(message, context)

    cfg = tiny.settings(rounds=2)
    with in_process.InProcessGrid(app, 4, {}) as grid:
        cfg, answers = nodes.join(grid, cfg)
        if times > 1:
            with pytest.raises(
                TimeoutError, match="3 of 4 hospitals say which they are; .*FileNotFoundError: no cards"
            ):
                server_app.federate(grid, cfg, dict(tiny.START), answers=answers)
            return
        _, tables = server_app.federate(grid, cfg, dict(tiny.START), answers=answers)
    asked = tables.clients_frame().groupby("round")["client"].agg(list)
    assert asked[1] == asked[2] == [0, 1, 2, 3]
    assert "no cards yet" in caplog.text and len(failed) == 1


def test_nodes_must_agree_on_how_many_hospitals_there_are():
    honest = tiny.client()

    def app(message, context):
        reply = honest(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["metrics"]["num-partitions"] = 5
        return reply

    with in_process.InProcessGrid(app, 4, {}) as grid:
        with pytest.raises(RuntimeError, match=r"disagree on how many hospitals there are: num-partitions=\[4, 5\]"):
            nodes.join(grid, tiny.settings())
        one_by_one = nodes.hospitals(grid, tiny.settings(), {})
    assert sorted(one_by_one.values()) == [0, 1, 3], "one that comes later with another number is left out"
