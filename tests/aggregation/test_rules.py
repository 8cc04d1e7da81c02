"""The rules: on layers of PEFT against float64, and in federations against a loop written out here."""

import logging
from types import SimpleNamespace

import lora_rounds
import numpy as np
import pytest
import tiny
import torch
from flwr.app import Message, MetricRecord, RecordDict
from lora_rounds import LORA, RANK, SHAPES, client, federate, first, plan, step
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from fedllm_helpers import aggregation, communication, config, models
from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.aggregation import edits, rules
from fedllm_helpers.communication import compression, estimates
from fedllm_helpers.config.schema import BY_PRODUCT, EDITING, MIXED, RULES
from fedllm_helpers.federation import chain, server_app
from fedllm_helpers.grids import in_process
from fedllm_helpers.models import editing
from fedllm_helpers.privacy import masked_clients  # fmt: skip


def learned(cfg, adapter, base):
    """All that was learned, ΔW by layer."""
    return factors.product(server_app.learned(cfg, adapter, SimpleNamespace(base=base)))


# what a federation of three hospitals must come to, written out in full float64 matrices


def drawn(number):
    """PEFT's start, A uniform in ±1/√inputs and B zero, as the package's documentation says that it is drawn."""
    rng, made = np.random.default_rng([0, 4, number]), {}
    for layer in sorted(SHAPES):
        outputs, inputs = SHAPES[layer]
        made[f"{layer}.lora_A.weight"] = rng.uniform(-1, 1, (RANK, inputs)).astype(np.float32) / np.sqrt(inputs)
        made[f"{layer}.lora_B.weight"] = np.zeros((outputs, RANK), np.float32)
    return {key: value.astype(np.float32) for key, value in made.items()}


def masked_to(adapter, size):
    """Zeros in all ranks from ``size`` on."""
    kept = {key: value.copy() for key, value in adapter.items()}
    for key, value in kept.items():
        if "lora_A" in key:
            value[size:] = 0
        else:
            value[:, size:] = 0
    return kept


def by_hand(cfg, rounds):
    """ΔW by layer after so many rounds, by each rule's definition and without the package's algebra."""
    rule, scale, p = cfg.federation.aggregation, 3.0, np.array([10, 20, 30]) / 60
    ranks = cfg.federation.ranks or [RANK] * 3
    adapter, edit = first(), {layer: np.zeros(shape) for layer, shape in SHAPES.items()}
    if rule in ("FFA-LoRA", "FLoRA"):
        adapter = drawn(1)
    for number in range(1, rounds + 1):
        moved = {"FFA-LoRA": (".lora_B.",), "RoLoRA": (".lora_B.",) if number % 2 else (".lora_A.",)}.get(rule)
        sent = []
        for hospital in range(3):
            start = masked_to(adapter, ranks[hospital])
            sent.append(masked_to(step(start, hospital, number, moved), ranks[hospital]))
        mean = {
            key: sum(w * one[key].astype(float) for w, one in zip(p, sent, strict=True)).astype(np.float32)
            for key in adapter
        }
        exact = {
            layer: scale * sum(
                w * one[f"{layer}.lora_B.weight"].astype(float) @ one[f"{layer}.lora_A.weight"].astype(float)
                for w, one in zip(p, sent, strict=True)
            )
            for layer in SHAPES
        }  # fmt: skip
        if rule == "FLoRA":
            edit = {layer: edit[layer] + exact[layer] for layer in SHAPES}
            adapter = drawn(number + 1)
        elif rule == "FedEx-LoRA":
            adapter = mean
            edit = {
                layer: edit[layer] + exact[layer]
                - scale * mean[f"{layer}.lora_B.weight"].astype(float) @ mean[f"{layer}.lora_A.weight"].astype(float)
                for layer in SHAPES
            }  # fmt: skip
        elif rule == "FlexLoRA":
            adapter = {}
            for layer in SHAPES:
                u, s, vt = np.linalg.svd(exact[layer] / scale, full_matrices=False)
                size = min(RANK, len(s))
                adapter[f"{layer}.lora_A.weight"] = (np.sqrt(s[:size, None]) * vt[:size]).astype(np.float32)
                adapter[f"{layer}.lora_B.weight"] = (u[:, :size] * np.sqrt(s[:size])).astype(np.float32)
        else:
            adapter = mean
    return {
        layer: edit[layer]
        + scale * adapter[f"{layer}.lora_B.weight"].astype(float) @ adapter[f"{layer}.lora_A.weight"].astype(float)
        for layer in SHAPES
    }


def apart(first_one, second):
    norm = np.sqrt(sum(np.square(value).sum() for value in second.values()))
    return np.sqrt(sum(np.square(first_one[layer] - second[layer]).sum() for layer in second)) / norm


@pytest.mark.parametrize("rule", ["FedIT", "FFA-LoRA", "RoLoRA", "FLoRA", "FedEx-LoRA"])
def test_three_rounds_come_to_what_the_definition_says(rule):
    cfg = plan(rule)
    adapter, _, base = federate(cfg)
    assert apart(learned(cfg, adapter, base), by_hand(cfg, 3)) < 1e-5


def test_one_round_of_flexlora_is_the_best_approximation():
    """Over more rounds the signs of singular vectors are free, and the next pseudo-random step depends on them."""
    cfg = plan("FlexLoRA", rounds=1)
    adapter, _, base = federate(cfg)
    assert not base.edits and apart(learned(cfg, adapter, base), by_hand(cfg, 1)) < 1e-5
    mixed = config.load(cfg, "federation.ranks=[1,2,4]")
    adapter, _, base = federate(mixed)
    assert apart(learned(mixed, adapter, base), by_hand(mixed, 1)) < 1e-5


def test_flora_with_mixed_ranks_comes_to_what_the_definition_says():
    cfg, seen = plan("FLoRA", "federation.ranks=[1,2,4]", rounds=2), []
    adapter, tables, base = federate(cfg, client(seen=seen))
    assert factors.rank(base.whole()) == 2 * (1 + 2 + 4)
    assert apart(learned(cfg, adapter, base), by_hand(cfg, 2)) < 1e-5
    for _, _, hospital, got, _ in seen:
        size = (1, 2, 4)[hospital]
        assert not got["m.q.lora_A.weight"][size:].any() and got["m.q.lora_A.weight"][:size].any()
    up = tables.clients_frame().groupby("client")["bytes_up"].sum()
    assert up[0] < up[1] < up[2], "only its own ranks are sent"


def test_a_fresh_adapter_is_drawn_anew_each_round_from_the_seed_alone():
    shapes = rules.shapes_of(first())
    one, again, next_one = (rules.fresh(0, draw, shapes) for draw in (2, 2, 3))
    for key, value in one.items():
        assert np.array_equal(value, again[key]) and value.dtype == np.float32
        if factors.A in key:
            bound = value.shape[1] ** -0.5
            assert 0.5 * bound < np.abs(value).max() <= bound and not np.allclose(value, next_one[key])
        else:
            assert not value.any()
    other = rules.fresh(1, 2, shapes)
    assert not np.allclose(other["m.q.lora_A.weight"], one["m.q.lora_A.weight"])


def test_every_hospital_starts_from_the_same_sum_of_all_edits():
    for rule in EDITING:
        cfg, seen = plan(rule, rounds=3), []
        _, _, base = federate(cfg, client(seen=seen))
        first_two = factors.product(factors.together([base.edits[1], base.edits[2]]))
        last = [edit for _, number, _, _, edit in seen if number == 3]
        assert len(last) == 3 and all(apart(edit, first_two) < 1e-6 for edit in last)


def test_fedsa_keeps_b_at_home_and_sends_the_mean_of_a():
    cfg, seen = plan("FedSA-LoRA", rounds=2), []
    with in_process.InProcessGrid(client(seen=seen), 3, {"config": OmegaConf.to_yaml(cfg)}) as grid:
        adapter, _ = server_app.federate(grid, cfg, first())
        own = grid.kept(rules.PERSONAL)
    assert not any(value.any() for key, value in adapter.items() if factors.B in key)
    for hospital, kept in own.items():
        once = step(first(), hospital, 1)
        start = next(got for _, number, h, got, _ in seen if (number, h) == (2, hospital))
        assert all(np.array_equal(start[key], once[key]) for key in kept), "its own B of the round before"
        twice = step(start, hospital, 2)
        assert all(np.array_equal(kept[key], twice[key]) for key in kept)
    mean = aggregation.weighted_mean([(step(first(), h, 1), 10 * (h + 1)) for h in range(3)])
    started = next(got for _, number, _, got, _ in seen if number == 2)
    assert all(np.array_equal(started[key], mean[key]) for key in mean if factors.A in key)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_nodes_and_replies_changes_no_bit(rule):
    cfg = plan(rule, hospitals=5)
    ours, _, base = federate(cfg)
    theirs, _, other = federate(cfg, grid=tiny.Shuffled)
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert all(np.array_equal(value, other.whole()[key]) for key, value in base.whole().items())


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(rule, tmp_path):
    cfg = plan(rule, "federation.fraction_train=0.67", rounds=4)
    whole, tables, base = federate(cfg, folder=tmp_path / "whole")

    calls = iter(range(9))

    def until(adapter):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        federate(cfg, folder=tmp_path / "parts", evaluate=until)
    again, resumed, other = federate(cfg, folder=tmp_path / "parts")
    assert resumed.history_frame()["round"].tolist()[-4:] == [1, 2, 3, 4]
    assert all(np.array_equal(whole[key], again[key]) for key in whole)
    assert all(np.array_equal(value, other.whole()[key]) for key, value in base.whole().items())
    used = ["round", "client", "status", "bytes_up"]
    assert tables.clients_frame()[used].equals(resumed.clients_frame()[used])


def test_a_hospital_that_missed_rounds_gets_the_edits_that_it_lacks():
    cfg, seen = plan("FedEx-LoRA", rounds=4), []
    _, tables, base = federate(cfg, client({(2, 1)}, seen=seen))
    assert tables.history_frame()["used"].tolist() == [3, 2, 3, 3]
    wanted = factors.product(factors.together([base.edits[number] for number in (1, 2, 3)]))
    assert all(apart(edit, wanted) < 1e-6 for _, number, _, _, edit in seen if number == 4)
    down = tables.clients_frame().pivot(index="round", columns="client", values="bytes_down")
    assert down.loc[3, 1] > down.loc[3, 0], "after its failure it gets all of them"


def test_a_node_that_lost_its_state_is_named_and_has_all_edits_a_round_later(caplog):
    class Forgetful(in_process.InProcessGrid):
        """The node of hospital 1 is started anew before round 3, and nobody tells the server."""

        def _deliver(self, message):
            again = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 3
            if again and message.metadata.dst_node_id == in_process.FIRST_CLIENT_NODE + 1:
                self.states.pop(message.metadata.dst_node_id)
            return super()._deliver(message)

    cfg, seen = plan("FLoRA", rounds=4), []
    with caplog.at_level(logging.WARNING):
        _, tables, base = federate(cfg, client(seen=seen), grid=Forgetful)
    assert (
        "hospital 1 is left out: it failed: ValueError: edits up to round 1 are expected here, there are" in caplog.text
    )
    assert tables.history_frame()["used"].tolist() == [3, 3, 2, 3]
    wanted = factors.product(factors.together([base.edits[number] for number in (1, 2, 3)]))
    assert all(apart(edit, wanted) < 1e-6 for _, number, _, _, edit in seen if number == 4)


def test_a_round_that_failed_leaves_compressed_flora_at_the_right_start(caplog):
    """After it hospitals begin anew, and the server must measure their updates from the same start."""
    cfg, app = (
        plan("FLoRA", "federation.compression.error_feedback=false", rounds=3),
        client({(2, k) for k in range(3)}),
    )
    plain, _, base = federate(cfg, app)
    small = config.load(cfg, "federation.compression.up=fp16")
    adapter, tables, other = federate(small, lambda m, c: compression.mod(m, c, app))
    assert tables.history_frame()["used"].tolist() == [3, 0, 3] and "the adapter stays as it was" in caplog.text
    assert apart(learned(small, adapter, other), learned(cfg, plain, base)) < 2e-3


@pytest.mark.parametrize("rule", BY_PRODUCT)
@pytest.mark.parametrize("value", [1e19, 3e37])
def test_a_hospital_whose_product_would_overflow_is_left_out(rule, value):
    """The others' rounds come to what they would without it, edits of the base model included."""
    honest = client()

    def app(message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            arrays = {key: array.numpy() for key, array in reply.content["arrays"].items()}
            reply.content["arrays"] = to_record({key: np.full_like(one, value) for key, one in arrays.items()})
        return reply

    adapter, tables, base = federate(plan(rule), app)
    without, _, other = federate(plan(rule), client({(number, 1) for number in (1, 2, 3)}))
    assert tables.history_frame()["used"].tolist() == [2, 2, 2]
    assert all(np.array_equal(adapter[key], without[key]) for key in without)
    assert all(np.array_equal(base.whole()[key], other.whole()[key]) for key in other.whole())


def test_an_edit_that_would_overflow_is_not_kept():
    huge = {key: np.full_like(value, 3e37) for key, value in first().items()}
    base = edits.Base()
    with pytest.raises(RuntimeError, match="round 1: finite adapters make an edit .* that is not finite"):
        base.add(1, huge)
    assert not base.edits


def test_who_has_the_edits_is_told_by_who_answers_not_by_what_is_answered():
    """Hospital 0 says in its evaluations that it is hospital 1, whose own evaluations fail."""
    honest = client()

    def app(message, context):
        hospital = context.node_config["partition-id"]
        if message.metadata.message_type == "evaluate" and hospital == 1:
            raise OSError("no disk")
        reply = honest(message, context)
        if message.metadata.message_type == "evaluate" and hospital == 0:
            reply.content["metrics"]["partition-id"] = 1
        return reply

    _, tables, _ = federate(plan("FLoRA", "federation.fraction_evaluate=1.0"), app)
    assert tables.history_frame()["used"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("rule", ["FFA-LoRA", "RoLoRA", "FedSA-LoRA"])
def test_masks_change_a_mean_by_their_rounding_alone(rule):
    answers = {"query.shares": masked_clients.shares, "query.reveal": masked_clients.reveal}

    def masked(message, context):
        answer = answers.get(message.metadata.message_type)
        return answer(message, context) if answer else masked_clients.mod(message, context, client())

    cfg, masks = plan(rule, rounds=2), ("threshold=2", "value_range=8")
    open_, _, _ = federate(cfg)
    hidden, tables, _ = federate(config.load(cfg, *(f"federation.secure_aggregation.{one}" for one in masks)), masked)
    assert tables.history_frame()["used"].tolist() == [3, 3]
    for key in open_:
        np.testing.assert_allclose(hidden[key], open_[key], atol=1e-5)


def test_noise_on_the_average_falls_on_what_was_sent_alone():
    how = ["federation.privacy.client.noise_multiplier=1", "federation.privacy.noise_seed=0"]
    adapter, _, _ = federate(plan("FFA-LoRA", *how, rounds=2))
    for key, value in drawn(1).items():
        assert np.allclose(adapter[key], value, rtol=1e-6) == (factors.A in key)


def idle(message, context):
    """A hospital whose training moves nothing: it sends back what it got."""
    hospital = context.node_config["partition-id"]
    numbers = {"partition-id": hospital, "num-examples": 10 * (hospital + 1), "loss-before": 3.0}
    content = RecordDict({"metrics": MetricRecord(numbers | {"num-partitions": 3})})
    if message.metadata.message_type == "train":
        content["arrays"] = message.content["arrays"]
    return Message(content, reply_to=message)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("FLoRA", "FlexLoRA")])
@pytest.mark.parametrize("down", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("more", ["", "up=int4", "up=fp16", "keep=0.5", "clipped", "masked", "FedAdam", "Krum"])
def test_where_nobody_trains_the_servers_adapter_keeps_its_bits_however_it_goes_down(rule, down, more):
    """Not FLoRA, which sends no adapter down, and not FlexLoRA, which makes new factors of any product."""
    how = {
        "clipped": ["federation.privacy.client.noise_multiplier=1e-9", "federation.privacy.client.clipping_norm=1e-9"],
        "masked": ["federation.secure_aggregation.threshold=2"],
    }.get(more, [f"federation.compression.{more}" if "=" in more else f"federation.strategy={more or 'FedAvg'}"])
    refused = {"FedEx-LoRA": ("clipped", "masked", "FedAdam", "Krum"), "RoLoRA": ("FedAdam",)}
    if more in refused.get(rule, ()):
        with pytest.raises(ValueError, match=f"federation.aggregation={rule}: "):
            plan(rule, f"federation.compression.down={down}", *how)
        return
    cfg = plan(rule, f"federation.compression.down={down}", *how, rounds=2)
    start = step(first(cfg), 7, 7)
    if rule == "FFA-LoRA":
        start |= rules.chosen(rules.fresh(0, 1, rules.shapes_of(start)), "A")
    if rule == "FedSA-LoRA":
        start |= rules.chosen(first(), "B")

    def app(message, context):
        kind, inner = message.metadata.message_type, lambda m, c: rules.mod(m, c, idle)
        if more == "masked":
            answers = {"query.shares": masked_clients.shares, "query.reveal": masked_clients.reveal}
            inner = answers.get(kind) or (lambda m, c: masked_clients.mod(m, c, lambda m, c: rules.mod(m, c, idle)))
        return compression.mod(message, context, inner)

    with in_process.InProcessGrid(app, 3, {"config": OmegaConf.to_yaml(cfg)}) as grid:
        adapter, tables = server_app.federate(grid, cfg, {key: value.copy() for key, value in start.items()})
    assert tables.history_frame()["used"].tolist() == [3, 3]
    assert all(np.array_equal(adapter[key], start[key]) for key in start)


@pytest.mark.parametrize("rule", RULES)
def test_compressed_both_ways_every_rule_comes_near_to_the_open_one(rule):
    feedback = "federation.compression.error_feedback=" + ("false" if rule in MIXED else "true")
    down = "fp32" if rule == "FLoRA" else "int8"
    packed = ["federation.compression.up=int8", f"federation.compression.down={down}", feedback]
    cfg = plan(rule, rounds=2 if rule != "FlexLoRA" else 1)
    plain, _, base = federate(cfg)
    small = config.load(cfg, *packed)
    app = client()
    adapter, tables, other = federate(small, lambda m, c: compression.mod(m, c, app))
    assert tables.history_frame()["used"].eq(3).all()
    for key in plain:
        assert np.abs(adapter[key] - plain[key]).max() < 0.2 * max(np.abs(plain[key]).max(), 1e-9)
    if rule not in ("FedSA-LoRA", "LoRA-XS"):  # whose servers have no product
        assert apart(learned(small, adapter, other), learned(cfg, plain, base)) < 0.1


@pytest.mark.parametrize(
    ("rule", "ranks"), [*((rule, None) for rule in RULES), ("FLoRA", [2, 4, 4]), ("FlexLoRA", [1, 2, 4])]
)
def test_the_ledger_counts_what_each_rule_sends(rule, ranks, monkeypatch):
    """On adapters of some thousand values the numbers are nearly all of a message."""
    for layer, shape in {"m.q": (2048, 1024), "m.v": (512, 1024)}.items():
        monkeypatch.setitem(SHAPES, layer, shape)
    more = [f"federation.ranks={ranks}"] if ranks else []
    if rule == "LoRA-XS":
        monkeypatch.setattr(lora_rounds, "RANK", 64)
        more = ["model.lora.peft_lora_r=64"]
    cfg = plan(rule, *more, rounds=2)
    _, tables, _ = federate(cfg)
    counts = estimates.ParameterCounts(0, 1, 1)
    ledger = communication.ledger(tables.clients_frame(), counts, values=chain.values(cfg, first(cfg)))
    some = ledger[ledger["formula"] > 0]
    assert some["overhead"].between(0, 0.1).all()
    assert ledger[ledger["formula"] == 0]["bytes"].lt(1000).all() and len(ledger) == 4


@pytest.mark.parametrize(
    ("rule", "more", "expected"),
    [
        ("FedAvg", "", "federation.aggregation=FedAvg: allowed are FedIT, FFA-LoRA"),
        ("FedIT", "federation.ranks=[1,2,4]", "federation.ranks: FedIT needs equal ranks; .*FLoRA or FlexLoRA"),
        ("FLoRA", "federation.ranks=[1,2]", "federation.ranks: 2 ranks for 3 hospitals"),
        ("FLoRA", "federation.ranks=[1,2,5]", "federation.ranks: 5; allowed are 1 to .*=4"),
        ("FLoRA", "federation.ranks=[0,2,4]", "federation.ranks: 0; allowed are 1 to"),
        ("FLoRA", "model.quantization=4", "FLoRA: it edits the base model, and model.quantization=4"),
        ("FedEx-LoRA", "model.quantization=8", "FedEx-LoRA: it edits the base model"),
        ("FlexLoRA", "federation.strategy=FedAdam", "FlexLoRA: it combines products itself"),
        ("FLoRA", "federation.secure_aggregation.threshold=2", "FLoRA: masks, and noise on the average"),
        ("FlexLoRA", "federation.privacy.client.noise_multiplier=1", "need a mean of what is sent"),
        ("RoLoRA", "federation.strategy=FedAdam", "RoLoRA: FedAdam remembers both factors, and one rests"),
        ("FLoRA", "federation.compression.up=int4", "set federation.compression.error_feedback to false"),
        ("FLoRA", "federation.compression.down=int8", "stacks come down, and they are not compressed"),
        (
            "FedEx-LoRA",
            "model.lora.target_modules=[q_proj,lm_head]",
            "FedEx-LoRA: the last layer may share its weights",
        ),
        ("FLoRA", "federation.ranks=[1,2,4] federation.privacy.record.epsilon=8", "DP-SGD would add noise to ranks"),
    ],
)
def test_what_does_not_go_together_is_one_line(rule, more, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        tiny.settings(*LORA, f"federation.aggregation={rule}", *more.split(), hospitals=3)
    assert "\n" not in str(caught.value)


def test_a_rank_above_a_layers_size_is_said_before_anyone_trains(monkeypatch):
    seen = []
    monkeypatch.setitem(SHAPES, "m.v", (3, 9))
    with pytest.raises(ValueError, match="model.lora.peft_lora_r=4: 'm.v' has no rank above 3"):
        federate(plan("FlexLoRA"), client(seen=seen))
    assert not seen


@pytest.mark.parametrize("rule", ["FLoRA", "FedEx-LoRA", "FlexLoRA"])
def test_one_hospital_alone_gets_back_what_it_sent(rule):
    cfg = plan(rule, hospitals=1, rounds=1)
    adapter, _, base = federate(cfg)
    start = drawn(1) if rule == "FLoRA" else first()
    wanted = {layer: 3.0 * value for layer, value in factors.product(step(start, 0, 1)).items()}
    assert apart(learned(cfg, adapter, base), wanted) < 1e-5
    assert bool(base.edits) == (rule == "FLoRA")


def test_where_only_small_ranks_answer_flexlora_keeps_the_others_alive():
    cfg = plan("FlexLoRA", "federation.ranks=[1,1,4]", rounds=1)
    adapter, _, _ = federate(cfg, client({(1, 2)}))
    rows = np.linalg.norm(adapter["m.q.lora_A.weight"], axis=1)
    assert rows.min() > 0 and not adapter["m.q.lora_B.weight"][:, 2:].any()


# layers of PEFT


class Net(torch.nn.Module):
    """Two layers that are not square, one of them as GPT-2 holds its weights."""

    def __init__(self):
        super().__init__()
        self.line, self.conv = torch.nn.Linear(7, 5), Conv1D(3, 5)

    def forward(self, x):
        return self.conv(self.line(x))


def net(rank, alpha, rslora):
    torch.manual_seed(0)
    how = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["line", "conv"])
    model = get_peft_model(Net(), how)
    return model.eval()


def with_adapter(model, seed):
    rng = np.random.default_rng(seed)
    made = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in models.get_adapter(model).items()}
    models.set_adapter(model, made)
    return made


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 2, False), (3, 12, False), (3, 12, True)])
def test_an_edit_of_linear_and_conv1d_is_the_mean_of_what_peft_computes(rank, alpha, rslora):
    model, x, weights = (
        net(rank, alpha, rslora),
        torch.randn(6, 7, generator=torch.Generator().manual_seed(1)),
        [3, 1, 2],
    )
    lora = OmegaConf.create({"peft_lora_r": rank, "peft_lora_alpha": alpha, "use_rslora": rslora})
    layers = [model.base_model.model.line, model.base_model.model.conv]
    inputs, merged, adapters = [x, torch.randn(6, 5)], [0, 0], []
    plain = [layer.base_layer(given) for layer, given in zip(layers, inputs, strict=True)]
    for share, seed in zip(weights, range(3), strict=True):
        adapters.append(with_adapter(model, seed))
        merged = [m + share / 6 * layer(given) for m, layer, given in zip(merged, layers, inputs, strict=True)]
    before = [layer.base_layer.weight.detach().clone() for layer in layers]
    for whole in (
        rules.scaled(factors.stacked(adapters, weights), editing.scaling(lora)),
        factors.together(
            [rules.scaled(part, editing.scaling(lora)) for part in factors.mean_and_residual(adapters, weights)]
        ),
    ):
        with editing.edited(model, whole):
            for layer, given, wanted, rest in zip(layers, inputs, merged, plain, strict=True):
                moved = layer.base_layer(given)
                assert float(((moved - wanted).norm() / (wanted - rest).norm()).detach()) < 1e-5
        assert all(torch.equal(layer.base_layer.weight, kept) for layer, kept in zip(layers, before, strict=True))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_zeros_in_missing_ranks_train_as_if_the_ranks_were_not_there():
    """Against a PEFT model of a smaller rank and the same scale; with Adam, so that tiny gradients would show."""
    large, small = net(4, 8, False), net(2, 4, False)
    start = with_adapter(small, 3)
    models.set_adapter(large, factors.padded(start, 4))
    x, y = torch.randn(9, 7, generator=torch.Generator().manual_seed(2)), torch.randn(9, 3)
    for model in (large, small):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimiser.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimiser.step()
    trained = models.get_adapter(large)
    assert all(not v[2:].any() if factors.A in k else not v[:, 2:].any() for k, v in trained.items())
    for key, value in factors.cut(trained, 2).items():
        np.testing.assert_allclose(value, models.get_adapter(small)[key], rtol=1e-4, atol=1e-6)
        assert not np.allclose(value, start[key])


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_everything_that_was_learned_opens_as_one_adapter_in_plain_peft(tmp_path):
    model, x = net(3, 12, False), torch.randn(4, 7)
    adapter, lora = (
        with_adapter(model, 0),
        OmegaConf.create({"peft_lora_r": 3, "peft_lora_alpha": 12, "use_rslora": False}),
    )
    edit = rules.scaled(with_adapter(model, 1), 0.5)
    models.set_adapter(model, adapter)
    with editing.edited(model, edit):
        wanted = model(x)
    whole = factors.together([rules.scaled(adapter, editing.scaling(lora)), edit])
    editing.save_update(model, whole, tmp_path / "adapter")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "adapter").eval()
    assert again.peft_config["default"].r == 6 and torch.allclose(again(x), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_an_edit_that_does_not_fit_changes_nothing():
    model = net(2, 2, False)
    before = [p.detach().clone() for p in model.parameters()]
    good = {"base_model.model.line": np.ones((5, 7))}
    for bad, expected in (
        ({"base_model.model.lone": np.ones((5, 7))}, "it has no layer 'base_model.model.lone'"),
        (
            {"base_model.model.conv": np.ones((5, 3))},
            "the edit of 'base_model.model.conv' has shape .5, 3., the weight .5, 3.",
        ),
    ):
        with pytest.raises(ValueError, match=expected), editing.edited(model, {**good, **bad}):
            pass
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_base_in_4_bits_is_not_edited():
    cfg = config.load("cpu", "model.quantization=4")
    model, _ = models.load(cfg)
    layer = next(key for key in factors.pairs(models.get_adapter(model)))
    shape = models.get_adapter(model)[f"{layer}.lora_A.weight"].shape[1]
    edit = {layer: np.ones((shape, shape), np.float32)}
    with pytest.raises(ValueError, match="is held in 4 or 8 bits, and those steps"), editing.edited(model, edit):
        pass
