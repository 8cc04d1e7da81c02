"""Each technique in somebody else's Flower app, by one import and one line on either side: in process and on Ray."""

import logging
import re
from importlib.util import find_spec

import numpy as np
import pytest
import somebody
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedllm_helpers.adapters.records import from_record, message_bytes, to_record
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.communication import compression
from fedllm_helpers.federation import in_process
from fedllm_helpers.privacy import masked_clients, masked_rounds

NODES = 3
RAY = [pytest.mark.processes, pytest.mark.skipif(find_spec("ray") is None, reason="the extra `sim` is not installed")]
PLACES = ["in process", pytest.param("ray", marks=RAY)]


class Weighed(Wrapper):
    """The bytes of what goes down and up, as the server sees them."""

    def __init__(self, strategy):
        super().__init__(strategy)
        self.down, self.up = [], []

    def configure_train(self, *given):
        messages = list(super().configure_train(*given))
        self.down += [message_bytes(message) for message in messages]
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.up += [message_bytes(reply) for reply in replies]
        return super().aggregate_train(server_round, replies)


def plain():
    return FedAvg(fraction_evaluate=0.0)


def run(strategy, mods=(), place="in process", family="llama", rounds=2, client=None):
    """The adapter to which their federation comes, by key."""
    results = []
    server, client = somebody.server(strategy, family, rounds, results), client or somebody.client(family, mods)
    if place == "ray":
        from flwr.simulation import run_simulation

        started = {"init_args": {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False}}
        run_simulation(server, client, NODES, backend_config=started)
    else:
        in_process.run_apps(server, client, NODES)
    return from_record(results[0].arrays)


def by_hand(family, start, weights=(10, 20, 30)):
    """One round in float64: the mean of what the three train, and their updates."""
    trained = [somebody.training(family, _torch(start), node)[0] for node in range(NODES)]
    trained = [{key: value.numpy().astype(np.float64) for key, value in one.items()} for one in trained]
    mean = {key: np.average([one[key] for one in trained], axis=0, weights=weights) for key in start}
    return mean, [{key: one[key] - start[key] for key in start} for one in trained]


def _torch(arrays):
    return to_record(arrays).to_torch_state_dict()


def start_of(family):
    return {k: v.numpy() for k, v in somebody.get_peft_model_state_dict(somebody.build(family)).items()}


def far(one, other):
    return max(float(np.abs(one[key] - other[key]).max()) for key in one)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_their_app_alone_is_the_weighted_mean(family, place):
    mean, _ = by_hand(family, start_of(family))
    assert far(run(plain(), place=place, family=family, rounds=1), mean) < 1e-6


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compression_in_their_app(family, place):
    mean, updates = by_hand(family, start_of(family))
    for formats, times, off in (
        ({"up": "fp32", "down": "fp16"}, 0.9, 1e-3),
        ({"up": "int8"}, 2.5, 1 / 127),
        ({"up": "int4", "down": "int8"}, 3.5, 1 / 7),
        ({"up": "int8", "keep": 0.25}, 3.9, 1.0),
    ):
        weighed, open_ = Weighed(compression.Compressed(plain(), **formats)), Weighed(plain())
        adapter = run(weighed, [compression.mod], place, family, rounds=1)
        reference = run(open_, place=place, family=family, rounds=1)
        assert sum(open_.up) > times * sum(weighed.up)
        assert (sum(weighed.down) < 0.8 * sum(open_.down)) == ("down" in formats)
        largest = max(float(np.abs(value).max()) for update in updates for value in update.values())
        assert 0 < far(adapter, mean) <= off * largest and far(reference, mean) < 1e-6


def test_error_feedback_makes_up_for_what_was_left_out():
    """Ten rounds of a tenth of the values: with feedback nearer to the plain federation than without."""
    wanted = run(plain(), rounds=10)
    gaps = []
    for feedback in (True, False):
        strategy = compression.Compressed(plain(), up="int4", keep=0.1, error_feedback=feedback)
        gaps.append(far(run(strategy, [compression.mod], rounds=10), wanted))
    assert gaps[0] < 0.8 * gaps[1]


def test_compression_on_one_side_only_is_one_line():
    with pytest.raises(ValueError, match=r"node \d+ sends no compressed update: .* needs compression.mod") as caught:
        run(compression.Compressed(plain(), up="int8"))
    assert "\n" not in str(caught.value)
    mean, _ = by_hand("llama", start_of("llama"))
    assert far(run(plain(), [compression.mod], rounds=1), mean) < 1e-6, "a mod without orders lets everything through"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"up": "int3"}, "up='int3': allowed are fp32, fp16, int8, int4"),
        ({"down": None}, "down=None: allowed are"),
        ({"keep": 0}, "keep=0: allowed are shares above 0, to 1"),
        ({"keep": 1.5}, "keep=1.5"),
    ],
)
def test_formats_that_there_are_not_are_one_line(given, says):
    with pytest.raises(ValueError, match=says):
        compression.Compressed(plain(), **given)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: compression.Compressed(masked_rounds.Masked(plain(), threshold=2), up="int8"),
        lambda: masked_rounds.Masked(compression.Compressed(plain(), up="int8"), threshold=2),
        lambda: compression.Compressed(Weighed(compression.Compressed(plain(), up="int8")), down="fp16"),
    ],
)
def test_two_forms_of_replies_at_once_are_one_line(wrong):
    with pytest.raises(ValueError, match="one of them has to leave the replies alone, as Compressed") as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_what_wraps_no_strategy_is_one_line():
    with pytest.raises(TypeError, match=r"Compressed wraps a strategy such as FedAvg\(\), given is 'FedAvg'"):
        compression.Compressed("FedAvg")


def spoiled(change, only=1):
    """Their app, whose node ``only`` sends something else in place of its arrays, behind the mod."""
    inner = somebody.client("llama")

    def app(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_config["partition-id"] == only:
            reply.content["arrays"] = ArrayRecord(
                {k: Array(v) for k, v in change(from_record(reply.content["arrays"])).items()}
            )
        return reply

    return lambda message, context: compression.mod(message, context, app)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda arrays: {key: value.astype(np.int64) for key, value in arrays.items()}, "is int64"),
        (lambda arrays: {**arrays, "more": np.ones(3, np.float32)}, "'more' did not"),
        (lambda arrays: {key: value[:1] for key, value in arrays.items()}, "came down with shape"),
        (lambda arrays: {}, "for .* places|rows|mask|bytes of values"),
        (lambda arrays: {key: value * np.nan for key, value in arrays.items()}, "not finite"),
    ],
)
def test_a_faulty_client_is_left_out_and_the_others_go_on(change, says, caplog):
    caplog.set_level(logging.INFO)
    strategy = compression.Compressed(plain(), up="int8")
    adapter = run(strategy, client=spoiled(change), rounds=1)
    _, updates = by_hand("llama", start_of("llama"))
    start = start_of("llama")
    mean = {key: np.average([updates[0][key], updates[2][key]], axis=0, weights=(10, 30)) + start[key] for key in start}
    assert far(adapter, mean) < 0.02
    assert any(re.search(says, record.getMessage()) for record in caplog.records)


def test_orders_that_a_mod_does_not_know_are_one_line(caplog):
    class Newer(compression.Compressed):
        def configure_train(self, *given):
            messages = super().configure_train(*given)
            for message in messages:
                message.content[compression.ORDERS]["rotate"] = True
            return messages

    caplog.set_level(logging.INFO)
    run(Newer(plain(), up="int8"), [compression.mod], rounds=1)
    assert "compression: the server orders 'rotate', which this client's mod does not know" in caplog.text


def test_mixed_number_formats_come_back_as_they_are():
    """Half of the arrays in float16, as some apps hold them."""

    def halves(message: Message, context: Context) -> Message:
        arrays = {key: array.numpy() for key, array in message.content["arrays"].items()}
        moved = {key: (value + 1).astype(value.dtype) for key, value in arrays.items()}
        content = {"arrays": ArrayRecord({key: Array(value) for key, value in moved.items()})}
        return Message(RecordDict({**content, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    start = {"a": np.zeros((2, 3), np.float16), "b": np.zeros(4, np.float32)}
    strategy, grid = compression.Compressed(plain(), up="int8"), in_process.InProcessGrid
    with grid(lambda m, c: compression.mod(m, c, halves), NODES, {}) as nodes:
        result = strategy.start(nodes, ArrayRecord({k: Array(v) for k, v in start.items()}), num_rounds=2)
    assert all(np.allclose(array.numpy(), 2, atol=0.02) for array in result.arrays.values())


def masking(family="llama", mods=(), gone=None):
    """Their app with masks: one mod, and one call for the queries. Node ``gone`` never comes back from training."""
    app = somebody.client(family, [masked_clients.mod, *mods])
    masked_clients.register(app, lambda context: 10 * (int(context.node_config["partition-id"]) + 1))

    def leaving(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == gone:
            raise OSError("the power is gone")
        return app(message, context)

    return app if gone is None else leaving


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_in_their_app(family, place):
    mean, _ = by_hand(family, start_of(family))
    adapter = run(
        masked_rounds.Masked(plain(), threshold=2), place=place, client=masking(family), family=family, rounds=1
    )
    assert far(adapter, mean) < 1e-5, "fixed point, and nothing else"


def test_masks_with_one_client_gone_open_the_sum_of_the_others():
    start = start_of("llama")
    _, updates = by_hand("llama", start)
    wanted = {
        key: start[key] + np.average([updates[0][key], updates[2][key]], axis=0, weights=(10, 30)) for key in start
    }
    adapter = run(masked_rounds.Masked(plain(), threshold=2), client=masking(gone=1), rounds=1)
    assert far(adapter, wanted) < 1e-5


def test_what_crosses_behind_masks_is_noise():
    seen = []

    class Curious(Wrapper):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.extend(reply.content["arrays"][masked_clients.MASKED].numpy() for reply in replies)
            return super().aggregate_train(server_round, replies)

    run(Curious(masked_rounds.Masked(plain(), threshold=2)), client=masking(), rounds=1)
    values = np.concatenate(seen) / 2.0**32
    assert len(seen) == 3 and abs(values.mean() - 0.5) < 5 / np.sqrt(12 * len(values))


def test_masks_over_adapters_that_came_down_in_few_bits():
    strategy = compression.Compressed(masked_rounds.Masked(plain(), threshold=2), up=None, down="fp16")
    app = masking()
    adapter = run(strategy, client=lambda m, c: compression.mod(m, c, app), rounds=1)
    mean, _ = by_hand("llama", start_of("llama"))
    assert 0 < far(adapter, mean) < 1e-3


@pytest.mark.parametrize(
    ("strategy", "client", "says"),
    [
        (
            lambda: masked_rounds.Masked(plain(), threshold=2),
            somebody.client,
            "needs masked_clients.mod among its mods",
        ),
        (lambda: masked_rounds.Masked(plain(), threshold=4), masking, "threshold=4: 3 clients are asked in a round"),
        (lambda: masked_rounds.Masked(plain(), threshold=1), masking, "threshold=1: allowed are whole numbers from 2"),
        (
            lambda: masked_rounds.Masked(plain(), 2, value_range=0),
            masking,
            "value_range=0: allowed are numbers above 0",
        ),
    ],
)
def test_masks_that_cannot_be_are_one_line(strategy, client, says):
    with pytest.raises(ValueError, match=says) as caught:
        run(strategy(), client=client(), rounds=1)
    assert "\n" not in str(caught.value)
