"""Each rule in somebody else's Flower app: the mod, and the line that reads its orders; against float64."""

import numpy as np
import pytest
import somebody
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from test_pieces import NODES, far, run, start_of

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.adapters.screened import Screened
from fedllm_helpers.aggregation import edits, rules
from fedllm_helpers.communication.compression import Compressed
from fedllm_helpers.communication.metered import Metered
from fedllm_helpers.federation.chain import RULES
from fedllm_helpers.federation.resumed import Resumed
from fedllm_helpers.privacy.masked import Masked
from fedllm_helpers.privacy.noised import Noised

SHARES = np.array([10, 20, 30]) / 60
SCALE = 8 / 4  # of their LoRA
OF_FACTORS = [name for name in RULES if name != "LoRA-XS"]  # whose adapter has cores: see test_cores_pieces


def plain():
    return FedAvg(fraction_evaluate=0.0)


def asks(message):
    return {"moves": rules.trained(message), "edit": edits.edit_of(message)}


def client(family, mods=(rules.mod,)):
    return somebody.client(family, list(mods), asks)


def made(name, strategy=None, **options):
    scale = {"scale": SCALE} if RULES[name].single else {}
    return RULES[name](strategy or plain(), seed=3, **scale, **options)


def product(adapter):
    return {layer: SCALE * b.astype(float) @ a.astype(float) for layer, (a, b) in factors.pairs(adapter).items()}


def by_hand(name, family, rounds):
    """ΔW by layer: each rule's definition, on what their training gives, in full float64 matrices."""
    adapter, edit, own = start_of(family), {}, [{}, {}, {}]
    for number in range(1, rounds + 1):
        if name == "FLoRA" or (name == "FFA-LoRA" and number == 1):
            drawn = rules.fresh(3, number, rules.shapes_of(adapter))
            adapter = drawn if name == "FLoRA" else {**adapter, **rules.chosen(drawn, "A")}
        moves = {"FFA-LoRA": (".lora_B.",), "RoLoRA": (".lora_B." if number % 2 else ".lora_A.",)}.get(name)
        given = [to_record({**adapter, **own[node]}).to_torch_state_dict() for node in range(NODES)]
        trained = [somebody.training(family, given[node], node, moves=moves, edit=edit)[0] for node in range(NODES)]
        trained = [{key: value.numpy() for key, value in one.items()} for one in trained]
        mean = {k: np.average([t[k].astype(float) for t in trained], axis=0, weights=SHARES) for k in adapter}
        parts = [product(one) for one in trained]
        exact = {layer: np.average([part[layer] for part in parts], axis=0, weights=SHARES) for layer in parts[0]}
        if name == "FedSA-LoRA":
            own = [rules.chosen(one, "B") for one in trained]
            mean |= rules.chosen(adapter, "B")
        if name == "FlexLoRA":
            return {layer: best(value, 4) for layer, value in exact.items()}
        missed = {layer: exact[layer] - product(mean)[layer] for layer in exact}
        grown = {"FLoRA": exact, "FedEx-LoRA": missed}.get(name, {})
        edit = {layer: edit.get(layer, 0) + value for layer, value in grown.items()}
        adapter = {key: value.astype(np.float32) for key, value in mean.items()}
    learned = product(adapter) if name != "FLoRA" else {}
    return adapter if name == "FedSA-LoRA" else {k: learned.get(k, 0) + edit.get(k, 0) for k in exact}


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OF_FACTORS)
def test_every_rule_is_what_its_definition_says(name, family):
    rounds, rule = 1 if name == "FlexLoRA" else 2, made(name)
    adapter = run(rule, client=client(family), family=family, rounds=rounds)
    wanted = by_hand(name, family, rounds)
    if name == "FedSA-LoRA":
        assert far(adapter, wanted) < 1e-5 and not any(v.any() for v in rules.chosen(adapter, "B").values())
        return
    edit = factors.product(rule.base.whole()) if rule.base.edits else {}
    learned = {layer: value + edit.get(layer, 0) for layer, value in product(adapter).items()}
    size = max(np.abs(value).max() for value in wanted.values())
    assert max(np.abs(learned[layer] - value).max() for layer, value in wanted.items()) < 1e-5 * size


@pytest.mark.processes
@pytest.mark.usefixtures("on_ray")
@pytest.mark.parametrize("name", ["FedEx-LoRA", "FedSA-LoRA"])
def test_rules_whose_clients_remember_do_on_ray_what_they_do_in_process(name):
    adapters = [run(made(name), place=place, client=client("llama")) for place in ("in process", "ray")]
    assert far(*adapters) < 1e-6 < far(adapters[0], start_of("llama"))


@pytest.mark.parametrize("name", OF_FACTORS)
def test_bytes_are_those_that_the_rule_counts(name):
    metered = Metered(made(name))
    run(metered, client=client("llama"), rounds=2)
    count = metered.strategy.values(start_of("llama"), NODES)
    for _, row in metered.ledger().iterrows():
        values = 4 * sum(count(row["round"], 0, row["direction"]))
        assert values < row["bytes"] < values + 400 * 8 * 4, "and names, shapes and orders"


def test_a_rule_goes_with_compression_masks_noise_and_screening():
    wanted = run(made("FFA-LoRA"), client=client("llama"))
    from fedllm_helpers.communication import compression
    from fedllm_helpers.privacy import masked_clients

    small = Compressed(Screened(made("FFA-LoRA")), up="int8", down="fp16")
    assert far(run(small, client=client("llama", (compression.mod, rules.mod))), wanted) < 0.02
    app = client("llama", (masked_clients.mod, rules.mod))
    masked_clients.register(app, lambda context: 10 * (int(context.node_config["partition-id"]) + 1))
    assert far(run(Masked(made("FFA-LoRA"), 2), client=app), wanted) < 1e-5
    noised = run(Noised(made("FFA-LoRA"), 1e-9, 1e3, uniform=False, seed=1), client=client("llama"))
    assert far(noised, wanted) < 1e-3
    median = run(Screened(made("RoLoRA", FedMedian(fraction_evaluate=0.0))), client=client("llama"))
    assert far(median, start_of("llama")) > 1e-3


@pytest.mark.parametrize("name", [name for name in OF_FACTORS if name not in ("FedIT", "FlexLoRA")])
def test_a_rule_without_its_mod_is_one_line(name):
    with pytest.raises(ValueError, match=rf"node \d+ does not follow {name}: .* needs rules.mod") as caught:
        run(made(name), client=somebody.client("llama"), rounds=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["FFA-LoRA", "RoLoRA"])
def test_an_app_that_trains_what_rests_is_told(name, caplog):
    caplog.set_level("INFO")
    run(made(name), client=somebody.client("llama", [rules.mod]), rounds=1)
    assert f"{name}: 'base_model" in caplog.text and "rests in this round, and it was trained" in caplog.text


@pytest.mark.parametrize("name", [name for name in OF_FACTORS if name != "FedIT"])
def test_arrays_that_are_no_lora_factors_are_one_line(name):
    with pytest.raises(ValueError, match="'dense.weight' has no partner: a LoRA layer has the keys"):
        somebody_start = to_record({"dense.weight": np.ones((3, 2), np.float32)})
        made(name).configure_train(1, somebody_start, {}, None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: made("FFA-LoRA", made("RoLoRA")), "FFA-LoRA and RoLoRA: one rule combines the factors"),
        (lambda: Noised(made("FLoRA"), 1.0, 1.0), "Noised gives a mean of replies, and FLoRA within it needs each"),
        (lambda: Masked(made("FlexLoRA"), 2), "Masked gives a mean of replies, and FlexLoRA within it needs each"),
        (lambda: made("FLoRA", Noised(plain(), 1.0, 1.0)), "FLoRA: noise on the average needs a mean of what is sent"),
        (lambda: made("FFA-LoRA", Masked(plain(), 2)), "FFALoRA reads adapters, and Masked .* has to stand around it"),
        (lambda: made("FedIT", ranks=lambda node: 2), "ranks: FedIT needs equal ranks"),
        (lambda: Masked(FedMedian(), 2), "Masked gives a mean of replies, and FedMedian compares them"),
    ],
)
def test_what_does_not_go_together_is_one_line(make, says):
    with pytest.raises(ValueError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_start_that_a_rule_would_bend_is_refused():
    start = {key: value + 0.1 for key, value in start_of("llama").items()}
    for name, says in (("FFA-LoRA", "draws its own A"), ("FedSA-LoRA", "starts every client's B at zero")):
        with pytest.raises(ValueError, match=says):
            made(name).configure_train(1, to_record(start), {}, None)


@pytest.mark.parametrize("ranks", [(1, 2, 4), (2, 4, 4)])
@pytest.mark.parametrize("name", ["FLoRA", "FlexLoRA"])
def test_mixed_ranks(name, ranks):
    """A client's own ranks alone cross the network, and the mean is of what they trained."""
    metered = Metered(made(name, ranks=lambda node: ranks[node - 2]))
    run(metered, client=client("llama"), rounds=1)
    up = metered.ledger().query("direction == 'up'").sort_values("node")["bytes"].tolist()
    assert up == sorted(up) and up[0] < up[-1]
    if name == "FLoRA":
        assert factors.rank(metered.strategy.base.whole()) == sum(ranks)


@pytest.mark.parametrize("name", [None, "FedEx-LoRA", "FedSA-LoRA"])
def test_rounds_that_outlive_their_process(name, tmp_path):
    def strategy(folder):
        inner = FedAdam(fraction_evaluate=0.0) if name is None else made(name)
        return Resumed(inner, folder, {"rule": name})

    app = somebody.client("llama") if name is None else client("llama")
    whole = run(strategy(tmp_path / "whole"), client=app, rounds=3)
    run(strategy(tmp_path / "parts"), client=app, rounds=1)
    again = run(strategy(tmp_path / "parts"), client=app, rounds=3)
    assert far(whole, again) < 1e-5, "Flower's strategies ask in an order of chance, and a sum has another last bit"
    once = run(strategy(tmp_path / "once"), client=app, rounds=1)
    assert far(whole, once) > 1e-3
    with pytest.raises(ValueError, match="holds a run with other settings: rule"):
        run(Resumed(plain(), tmp_path / "whole", {"rule": "another"}), client=somebody.client("llama"))
