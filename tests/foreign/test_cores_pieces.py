"""LoRA-XS in somebody else's Flower app: exact in float64, and with every other technique around it."""

import numpy as np
import pytest
import somebody
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from fedllm_helpers import models
from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.adapters.screened import Screened
from fedllm_helpers.aggregation import LoRAXS, rules
from fedllm_helpers.aggregation.loraxs import factors_of
from fedllm_helpers.communication import compression
from fedllm_helpers.communication.compression import Compressed
from fedllm_helpers.communication.metered import Metered
from fedllm_helpers.federation.resumed import Resumed
from fedllm_helpers.grids import in_process
from fedllm_helpers.models import cores
from fedllm_helpers.privacy import masked_clients
from fedllm_helpers.privacy.masked import Masked
from fedllm_helpers.privacy.noised import Noised

NODES, SCALE = 3, 8 / 4


def build(family):
    """Their model, with cores."""
    model = somebody.build(family)
    cores.put_in(model)
    return model


def training(family, arrays, node):
    model = build(family)
    models.set_adapter(model, arrays)
    ids = torch.randint(0, 97, (8, 12), generator=torch.Generator().manual_seed(node))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return models.get_adapter(model), updates(model)


def updates(model):
    """ΔW by layer, in float64."""
    plain = {key: value.double().numpy() for key, value in somebody.get_peft_model_state_dict(model).items()}
    layers = {key.split(".lora_")[0] for key in plain}
    return {k: SCALE * plain[f"{k}.lora_B.weight"] @ plain[f"{k}.lora_A.weight"] for k in layers}


def client(family="llama", mods=(rules.mod,)):
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message, context):
        torch.set_num_threads(1)
        node = int(context.node_config["partition-id"])
        trained, _ = training(family, from_record(message.content["arrays"]), node)
        metrics = MetricRecord({"num-examples": 10 * (node + 1)})
        return Message(RecordDict({"arrays": to_record(trained), "metrics": metrics}), reply_to=message)

    return app


def run(strategy, app=None, family="llama", rounds=2):
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        start = to_record(models.get_adapter(build(family)))
        results.append(strategy.start(grid, start, num_rounds=rounds))

    in_process.run_apps(server, app or client(family), NODES)
    return from_record(results[0].arrays)


def plain():
    return FedAvg(fraction_evaluate=0.0)


def far(one, other):
    return max(float(np.abs(one[key] - other[key]).max()) for key in one)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_mean_of_cores_is_the_mean_of_updates(family):
    """To 1e-6 of the mean itself, formed of full matrices in float64; each factor's mean would miss it."""
    adapter, mean = models.get_adapter(build(family)), {}
    for _ in range(2):
        parts = [training(family, adapter, node) for node in range(NODES)]
        shares = np.array([10, 20, 30]) / 60
        mean = {k: np.average([one[k] for _, one in parts], axis=0, weights=shares) for k in parts[0][1]}
        adapter = {
            k: np.average([one[k].astype(float) for one, _ in parts], axis=0, weights=shares).astype(np.float32)
            for k in adapter
        }
    model = build(family)
    models.set_adapter(model, run(LoRAXS(plain()), family=family))
    found = updates(model)
    assert all(np.linalg.norm(found[k] - value) < 1e-6 * np.linalg.norm(value) for k, value in mean.items())
    assert min(np.linalg.norm(value) for value in mean.values()) > 1e-6


def test_it_goes_with_compression_masks_noise_screening_and_other_strategies(tmp_path):
    wanted = run(LoRAXS(plain()))
    size = max(float(np.abs(value).max()) for value in wanted.values())
    assert far(run(Screened(LoRAXS(plain()))), wanted) < 1e-6
    small = Compressed(Screened(LoRAXS(plain())), up="int8", down="fp16")
    assert far(run(small, client(mods=(compression.mod, rules.mod))), wanted) < 0.02 * size
    app = client(mods=(masked_clients.mod, rules.mod))
    masked_clients.register(app, lambda context: 10 * (int(context.node_config["partition-id"]) + 1))
    assert far(run(Masked(LoRAXS(plain()), 2), app), wanted) < 1e-5
    assert far(run(Noised(LoRAXS(plain()), 1e-9, 1e3, uniform=False, seed=1)), wanted) < 1e-3
    for other in (FedMedian(fraction_evaluate=0.0), FedAdam(fraction_evaluate=0.0)):
        assert far(run(LoRAXS(other)), wanted) > 1e-4
    run(Resumed(LoRAXS(plain()), tmp_path, {}), rounds=1)
    assert far(run(Resumed(LoRAXS(plain()), tmp_path, {})), wanted) < 1e-5


def test_bytes_are_those_of_the_cores():
    metered = Metered(LoRAXS(plain()))
    run(metered, rounds=1)
    values = 4 * 4 * 4 * 4  # layers, r × r numbers, bytes of each
    rows = metered.ledger()
    assert len(rows) == 2 * NODES and rows["bytes"].between(values, values + 1000).all()
    assert rows.query("direction == 'up'")["bytes"].lt(values + 400).all(), "all cores are one array"


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"m.lora_A.weight": (4, 9)}, r"LoRA-XS averages r × r cores, and 'm.lora_A.weight' has shape \(4, 9\)"),
        ({"m.lora_B.core.weight": (4, 3)}, r"and 'm.lora_B.core.weight' has shape \(4, 3\)"),
        ({"m.lora_B.core.weight": (4,)}, r"has shape \(4,\): models.cores.put_in makes them"),
    ],
)
def test_what_is_no_core_is_one_line(arrays, says):
    start = to_record({key: np.zeros(shape, np.float32) for key, shape in arrays.items()})
    with pytest.raises(ValueError, match=says) as caught:
        LoRAXS(plain()).configure_train(1, start, {}, None)
    assert "\n" not in str(caught.value)


def test_one_side_alone_is_one_line(caplog):
    """Without the mod, or with an app of plain LoRA: nothing is averaged."""
    for app, says in (
        (client(mods=()), "keys differ, the first is '4 columns, stacked: rules.mod takes them apart'"),
        (
            somebody.client("llama", [rules.mod]),
            "LoRA-XS: the app sends other arrays than came down, such as 'base_model",
        ),
    ):
        assert run(LoRAXS(plain()), app, rounds=1) == {} and says in caplog.text
        caplog.clear()


@pytest.mark.parametrize("changed", [(7, 4), (16, 3), (16,), ()])
def test_stacks_of_other_shapes_are_one_line(changed):
    stacks = rules.stacked({f"{n}": np.ones((4, 4), np.float32) for n in range(4)})
    shapes = {f"{n}": (4, 4) for n in range(4)}
    assert {k: v.shape for k, v in rules.unstacked(stacks, shapes).items()} == shapes
    other = {next(iter(stacks)): np.ones(changed, np.float32)} if changed else {}
    with pytest.raises(ValueError, match="are not those of 4 cores") as caught:
        rules.unstacked(other, shapes)
    assert "\n" not in str(caught.value)


def test_cores_of_several_ranks_are_stacks_of_their_own():
    given = {"a": np.ones((4, 4)), "b": np.full((2, 2), 2.0), "c": np.full((4, 4), 3.0)}
    stacks = rules.stacked(given)
    assert sorted(value.shape for value in stacks.values()) == [(2, 2), (8, 4)]
    back = rules.unstacked(stacks, rules.shapes_of(given))
    assert all(np.array_equal(back[key], value) for key, value in given.items())


def test_a_client_with_another_base_model_says_so(caplog):
    caplog.set_level("INFO")

    def app(message, context):
        model = build("llama")
        if int(context.node_config["partition-id"]) == 2:
            layer = model.get_base_model().model.layers[0].self_attn.q_proj
            layer.lora_A["default"].weight[0] *= -1  # as another library might have it
        cores.check(model, factors_of(message))
        return client(mods=())(message, context)

    def checked(message, context):
        return rules.mod(message, context, app)

    wanted = run(LoRAXS(plain()), rounds=1)
    found = run(LoRAXS(plain(), factors=cores.sketch(build("llama"))), checked, rounds=1)
    assert "another base model" in caplog.text and far(found, wanted) > 1e-6, "two of three"
    assert far(run(LoRAXS(plain()), checked, rounds=1), wanted) < 1e-6, "nobody looks where nothing is said"


def test_reply_with_cores_of_another_rank_is_left_out(caplog):
    caplog.set_level("INFO")
    app = client()

    def other(message, context):
        reply = app(message, context)
        if int(context.node_config["partition-id"]) == 1:
            arrays = {key: value[:9, :3] for key, value in from_record(reply.content["arrays"]).items()}
            reply.content["arrays"] = to_record(arrays)
        return reply

    run(Screened(LoRAXS(plain())), other, rounds=1)
    assert "node" in caplog.text and "(9, 3)" in caplog.text, caplog.text
