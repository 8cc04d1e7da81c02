"""Each technique in somebody else's Flower app, by one import and one line on either side: in process and on Ray."""

import logging
import re

import numpy as np
import pytest
import somebody
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedllm_helpers.adapters.records import from_record, message_bytes, to_record
from fedllm_helpers.adapters.screened import Screened
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.communication import compression
from fedllm_helpers.communication.metered import Metered
from fedllm_helpers.grids import in_process
from fedllm_helpers.privacy import accounting, audit_log, masked_clients
from fedllm_helpers.privacy.masked import Masked
from fedllm_helpers.privacy.noised import Noised

NODES = 3


def plain():
    return FedAvg(fraction_evaluate=0.0)


def run(strategy, mods=(), place="in process", family="llama", rounds=2, client=None):
    """The adapter to which their federation comes, by key."""
    results = []
    server, client = somebody.server(strategy, family, rounds, results), client or somebody.client(family, mods)
    if place == "ray":
        from flwr.simulation import run_simulation

        settings = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False}
        actor = {"num_cpus": 1, "num_gpus": 0.0}  # Flower asks for two otherwise: none would start
        run_simulation(server, client, NODES, backend_config={"init_args": settings, "client_resources": actor})
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_their_app_alone_is_the_weighted_mean(family):
    mean, _ = by_hand(family, start_of(family))
    assert far(run(plain(), family=family, rounds=1), mean) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compression_in_their_app(family):
    mean, updates = by_hand(family, start_of(family))
    for formats, times, off in (
        ({"up": "fp32", "down": "fp16"}, 0.9, 1e-3),
        ({"up": "int8"}, 2.5, 1 / 127),
        ({"up": "int4", "down": "int8"}, 3.5, 1 / 7),
        ({"up": "int8", "keep": 0.25}, 3.9, 1.0),
    ):
        weighed, open_ = Metered(compression.Compressed(plain(), **formats)), Metered(plain())
        adapter = run(weighed, [compression.mod], family=family, rounds=1)
        reference = run(open_, family=family, rounds=1)
        few, all_ = (each.ledger().groupby("direction")["bytes"].sum() for each in (weighed, open_))
        assert all_["up"] > times * few["up"]
        assert (few["down"] < 0.8 * all_["down"]) == ("down" in formats)
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
        lambda: compression.Compressed(Masked(plain(), threshold=2), up="int8"),
        lambda: Masked(compression.Compressed(plain(), up="int8"), threshold=2),
        lambda: compression.Compressed(Metered(compression.Compressed(plain(), up="int8")), down="fp16"),
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_in_their_app(family):
    mean, _ = by_hand(family, start_of(family))
    adapter = run(Masked(plain(), threshold=2), client=masking(family), family=family, rounds=1)
    assert far(adapter, mean) < 1e-5, "fixed point, and nothing else"


def test_masks_with_one_client_gone_open_the_sum_of_the_others():
    start = start_of("llama")
    _, updates = by_hand("llama", start)
    wanted = {
        key: start[key] + np.average([updates[0][key], updates[2][key]], axis=0, weights=(10, 30)) for key in start
    }
    adapter = run(Masked(plain(), threshold=2), client=masking(gone=1), rounds=1)
    assert far(adapter, wanted) < 1e-5


def test_what_crosses_behind_masks_is_noise():
    seen = []

    class Curious(Wrapper):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.extend(reply.content["arrays"][masked_clients.MASKED].numpy() for reply in replies)
            return super().aggregate_train(server_round, replies)

    run(Curious(Masked(plain(), threshold=2)), client=masking(), rounds=1)
    values = np.concatenate(seen) / 2.0**32
    assert len(seen) == 3 and abs(values.mean() - 0.5) < 5 / np.sqrt(12 * len(values))


def test_masks_over_adapters_that_came_down_in_few_bits():
    strategy = compression.Compressed(Masked(plain(), threshold=2), up=None, down="fp16")
    app = masking()
    adapter = run(strategy, client=lambda m, c: compression.mod(m, c, app), rounds=1)
    mean, _ = by_hand("llama", start_of("llama"))
    assert 0 < far(adapter, mean) < 1e-3


@pytest.mark.parametrize(
    ("strategy", "client", "says"),
    [
        (
            lambda: Masked(plain(), threshold=2),
            somebody.client,
            "needs masked_clients.mod among its mods",
        ),
        (lambda: Masked(plain(), threshold=4), masking, "threshold=4: 3 clients are asked in a round"),
        (lambda: Masked(plain(), threshold=1), masking, "threshold=1: allowed are whole numbers from 2"),
        (
            lambda: Masked(plain(), 2, value_range=0),
            masking,
            "value_range=0: allowed are numbers above 0",
        ),
    ],
)
def test_masks_that_cannot_be_are_one_line(strategy, client, says):
    with pytest.raises(ValueError, match=says) as caught:
        run(strategy(), client=client(), rounds=1)
    assert "\n" not in str(caught.value)


class Sizes(Wrapper):
    """Bytes of messages and replies, counted by the test."""

    seen: list

    def configure_train(self, *given):
        messages = list(super().configure_train(*given))
        self.seen = [("down", message.metadata.dst_node_id, message_bytes(message)) for message in messages]
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.seen += [("up", reply.metadata.src_node_id, message_bytes(reply)) for reply in replies]
        return super().aggregate_train(server_round, replies)


def test_the_ledger_in_their_app():
    sizes = Sizes(Metered(compression.Compressed(plain(), up="int4")))
    metered = sizes.strategy
    run(sizes, [compression.mod], rounds=2)
    table = metered.ledger()
    assert len(table) == 2 * 2 * NODES and set(table["kind"]) == {"train"}
    last = table[table["round"] == 2]
    assert sorted(last[["direction", "node", "bytes"]].itertuples(index=False, name=None)) == sorted(sizes.seen)


def test_the_audit_log_in_their_app(tmp_path):
    strategy = audit_log.Audited(compression.Compressed(plain(), up="int4"))
    strategy.begin(tmp_path / "server", run="1", settings="")

    def logged(message: Message, context: Context, call_next) -> Message:
        context.node_config["audit"] = str(tmp_path / f"client-{context.node_config['partition-id']}")
        return audit_log.mod(message, context, call_next)

    run(strategy, [logged, compression.mod], rounds=2)
    server = audit_log.check(tmp_path / "server")
    clients = [entry for node in range(NODES) for entry in audit_log.check(tmp_path / f"client-{node}")]
    for mine, theirs in (("sent", "received"), ("received", "sent")):
        assert sorted(entry[mine] for entry in server if mine in entry) == sorted(entry[theirs] for entry in clients)
    assert len({entry["sent"] for entry in clients}) == 2 * NODES


def test_screening_in_their_app_lets_honest_replies_through():
    mean, _ = by_hand("llama", start_of("llama"))
    assert far(run(Screened(plain(), numbers={"loss": (0, 1e6)}), rounds=1), mean) < 1e-6


def sent(change, only=1):
    """Their app, whose node ``only`` sends another reply."""
    app = somebody.client("llama")

    def altered(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if context.node_config["partition-id"] == only:
            change(reply.content)
        return reply

    return altered


def arrays_as(change):
    return lambda content: content.__setitem__("arrays", to_record(change(from_record(content["arrays"]))))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (arrays_as(lambda arrays: {key: value * np.inf for key, value in arrays.items()}), "not finite"),
        (arrays_as(lambda arrays: {key: value + np.float32(1e19) for key, value in arrays.items()}), "a value of 1e"),
        (arrays_as(lambda arrays: {key: value.astype(np.float64) for key, value in arrays.items()}), "is float64"),
        (arrays_as(lambda arrays: {key: value[:1] for key, value in arrays.items()}), "has shape"),
        (arrays_as(lambda arrays: dict(list(arrays.items())[1:])), "keys are missing or unknown"),
        (arrays_as(lambda arrays: {}), "keys are missing or unknown"),
        (lambda content: content["metrics"].update({"num-examples": 1e308}), "its num-examples is 1e"),
        (lambda content: content["metrics"].update({"num-examples": -3}), "its num-examples is -3"),
        (lambda content: content["metrics"].update({"loss": float("nan")}), "its loss is nan"),
        (lambda content: content["metrics"].__delitem__("loss"), "its loss is None"),
        (lambda content: content.__delitem__("metrics"), "does not hold one adapter and one set of numbers"),
        (lambda content: content.__delitem__("arrays"), "does not hold one adapter and one set of numbers"),
    ],
)
def test_screening_leaves_out_what_bends_a_round(change, says, caplog):
    _, updates = by_hand("llama", start_of("llama"))
    start = start_of("llama")
    wanted = {
        key: start[key] + np.average([updates[0][key], updates[2][key]], axis=0, weights=(10, 30)) for key in start
    }
    adapter = run(Screened(plain(), numbers={"loss": (0, 1e6)}), client=sent(change), rounds=1)
    assert far(adapter, wanted) < 1e-6
    assert any("is left out" in r.getMessage() and says in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("turn", [lambda one, other: other(one(plain())), lambda one, other: one(other(plain()))])
def test_screening_stands_within_compression_or_around_it(turn):
    mean, _ = by_hand("llama", start_of("llama"))
    strategy = turn(Screened, lambda inner: compression.Compressed(inner, up="int8"))
    assert far(run(strategy, [compression.mod], rounds=1), mean) < 0.02


def norm_of(update):
    return float(np.sqrt(sum(np.square(value).sum() for value in update.values())))


def clipped_mean(updates, weights, norm):
    short = [{k: v * min(1, norm / norm_of(one)) for k, v in one.items()} for one in updates]
    return {key: np.average([one[key] for one in short], axis=0, weights=weights) for key in short[0]}


@pytest.mark.parametrize(("uniform", "weights"), [(True, (1, 1, 1)), (False, (10, 20, 30))])
def test_noise_in_their_app_is_what_it_says(uniform, weights):
    """Measured: what the adapter has beyond the clipped mean, against normal noise of the promised width."""
    start = start_of("llama")
    _, updates = by_hand("llama", start)
    norm = 0.5 * min(map(norm_of, updates))
    mean = clipped_mean(updates, weights, norm)
    noised = Noised(plain(), 0.7, norm, uniform=uniform, seed=3)
    adapter = run(noised, rounds=1)
    rest = np.concatenate([(adapter[key] - start[key] - mean[key]).ravel() for key in start])
    wide = 0.7 * norm * max(weights) / sum(weights)
    assert (
        rest.std() == pytest.approx(wide, rel=4 / np.sqrt(2 * len(rest)))
        and abs(rest.mean()) < 4 * wide / len(rest) ** 0.5
    )
    assert noised.rounds == 1 and noised.epsilon(1e-5) == accounting.epsilon(0.7, 1.0, 1, 1e-5) > 1


def test_noise_goes_before_a_server_optimiser():
    """FedAvgM with a momentum: its second step carries the noise of the first one on."""
    from flwr.serverapp.strategy import FedAvgM

    inner = FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.9)
    noised = Noised(inner, 1.0, 0.01, seed=1)
    one = run(noised, rounds=2)
    other = run(
        Noised(FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.0), 1.0, 0.01, seed=1),
        rounds=2,
    )
    assert noised.rounds == 2 and far(one, other) > 1e-4


def test_noise_on_masked_updates():
    start = start_of("llama")
    _, updates = by_hand("llama", start)
    norm = 0.5 * min(map(norm_of, updates))
    mean, noised = clipped_mean(updates, (1, 1, 1), norm), Noised(plain(), 1e-6, norm, seed=2)
    masked = Masked(noised, 2, clipping_norm=norm, uniform=True)
    adapter = run(masked, client=masking(), rounds=1)
    assert far(adapter, {key: start[key] + mean[key] for key in start}) < 1e-5
    with pytest.raises(ValueError, match="behind masks only clients can clip, and the noise within is for 0.5"):
        Masked(Noised(plain(), 1.0, 0.5), 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((0, 1.0), "noise_multiplier=0: allowed are numbers above 0"),
        ((float("nan"), 1.0), "noise_multiplier=nan"),
        ((1.0, -1), "clipping_norm=-1: allowed are numbers above 0"),
        (("1", 1.0), "noise_multiplier='1'"),
    ],
)
def test_noise_that_is_none_is_one_line(given, says):
    with pytest.raises(ValueError, match=says):
        Noised(plain(), *given)


def test_a_client_cannot_talk_its_way_past_clipping_and_noise():
    """It claims to be a mean already, of which nobody has a share: it is clipped, and the noise stays as wide."""
    start = start_of("llama")
    _, updates = by_hand("llama", start)
    norm = 0.5 * min(map(norm_of, updates))
    mean = clipped_mean(updates, (1, 1, 1), norm)
    cheat = sent(lambda content: content["metrics"].update({"largest-share": 1e-12}))
    adapter = run(Noised(plain(), 0.7, norm, seed=3), client=cheat, rounds=1)
    honest = run(Noised(plain(), 0.7, norm, seed=3), rounds=1)
    assert far(adapter, honest) == 0 and far(honest, {key: start[key] + mean[key] for key in start}) > 0


def compressed():
    """Compression with its memory and the ledger, in two rounds."""
    return Metered(compression.Compressed(Screened(plain()), up="int4", down="fp16")), somebody.client(
        mods=[compression.mod]
    )


def masked():
    """Masks over clipped updates, and noise on their sum."""
    return Masked(Noised(plain(), 0.5, 0.1, seed=4), 2, clipping_norm=0.1, uniform=True), masking()


@pytest.mark.processes
@pytest.mark.usefixtures("on_ray")
@pytest.mark.parametrize("chain", [compressed, masked])
def test_pieces_do_on_ray_what_they_do_in_process(chain):
    adapters = [
        run(strategy, place=place, client=client) for place in ("in process", "ray") for strategy, client in [chain()]
    ]
    assert far(*adapters) < 1e-6 < far(adapters[0], start_of("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.__delitem__("metrics"),
        lambda content: content["metrics"].update({"num-examples": float("nan")}),
        arrays_as(lambda arrays: {key: value[:1] for key, value in arrays.items()}),
        arrays_as(lambda arrays: {**arrays, "more": np.ones(3, np.float32)}),
    ],
)
def test_noise_leaves_out_a_faulty_reply_by_itself(change, caplog):
    start = start_of("llama")
    _, updates = by_hand("llama", start)
    wanted = {key: start[key] + (updates[0][key] + updates[2][key]) / 2 for key in start}
    adapter = run(Noised(plain(), 1e-9, 10.0), client=sent(change), rounds=1)
    assert far(adapter, wanted) < 1e-5 and "node 3 is left out" in caplog.text


@pytest.mark.parametrize("chain", [lambda: Masked(plain(), 2), lambda: Screened(plain())])
def test_a_second_reply_of_a_node_counts_once(chain):
    class Doubled(Wrapper):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            return super().aggregate_train(server_round, [*replies, replies[0]])

    app = masking() if isinstance(chain(), Masked) else None
    mean, _ = by_hand("llama", start_of("llama"))
    assert far(run(Doubled(chain()), client=app, rounds=1), mean) < 1e-5
