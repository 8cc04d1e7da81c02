"""A hospital's own policy and its ledger: read or refused in one line, kept whatever a server orders, over all runs."""

import json
import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiny

from fedllm_helpers import config
from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.federation import client_app, server_app, simulation
from fedllm_helpers.grids import in_process
from fedllm_helpers.privacy import accounting, policy, promises
from fedllm_helpers.privacy.ledger import BEGUN, NOISE, ROUND, Ledger
from fedllm_helpers.site import standing
from fedllm_helpers.training import guarantees

MASKS = ["federation.secure_aggregation.threshold=3", "federation.secure_aggregation.value_range=4"]
PLAN = accounting.plan(60, 12, 8, delta=1e-3, noise_multiplier=1.0)  # two rounds of four steps


@pytest.fixture
def file(tmp_path):
    """Writes a policy, begins its ledger, and returns its path."""

    def write(text=""):
        path = tmp_path / "policy.yaml"
        path.write_text(text, encoding="utf-8")
        if not path.with_suffix(".ledger").exists():
            Ledger(path.with_suffix(".ledger")).begin()
        return path

    return write


def ruled(app, path, hospital=0):
    """A ClientApp in which one hospital has a policy."""

    def whole(message, context):
        if context.node_config["partition-id"] == hospital:
            context.node_config["policy"] = str(path)
        return policy.mod(message, context, app)

    return whole


def node(path, run=7):
    """The context of a node with a policy."""
    return client_app.Context(run, 1, {"partition-id": 0, "policy": str(path)}, tiny.RecordDict(), {})


def test_an_empty_policy_sets_no_limit_and_its_ledger_lies_beside_it(file):
    found = policy.load(file())
    assert found.ledger.endswith("policy.ledger") and found.largest_epsilon is None and found.rules is None
    own = policy.load(file("ledger: ~/mine.jsonl\nlargest_epsilon: 3\nrules: [FedIT]\n"))
    assert (Path(own.ledger), own.largest_epsilon, own.rules) == (Path.home() / "mine.jsonl", 3.0, ["FedIT"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("largest_epsilom: 3", "largest_epsilom.*known are ledger, largest_epsilon"),
        ("largest_epsilon: much", "'much'"),
        ("largest_epsilon: -1", "largest_epsilon=-1.0: allowed are numbers above 0"),
        ("largest_epsilon: .nan", "largest_epsilon=nan: allowed are numbers above 0"),
        ("delta: 1", "delta=1.0: allowed are numbers above 0 and below 0.1"),
        ("most_rounds: 2.5", "2.5"),
        ("least_hospitals: 1", "least_hospitals=1: allowed are whole numbers from 2"),
        ("scores: sometimes", "sometimes"),
        ("rules: FedIT", "rules"),
        ("- a list", "policy.yaml"),
        ("a: [", "policy.yaml"),
    ],
)
def test_a_wrong_policy_is_one_line(file, text, said):
    with pytest.raises(ValueError, match=said) as caught:
        policy.load(file(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["largest_epsilon: much", None])
def test_a_policy_that_cannot_be_read_lets_nothing_leave_and_says_why_at_home(file, text, caplog):
    path = file(text or "")
    if text is None:
        path.unlink()
    with pytest.raises(TimeoutError, match="this hospital's policy cannot be read, and so nothing leaves") as caught:
        tiny.federate(tiny.settings(hospitals=1, rounds=1), ruled(tiny.client(), path))
    assert str(path) not in str(caught.value) and str(path) in caplog.text


def statuses(tables, hospital=0):
    return [row[2] for row in tables.clients if row[1] == hospital]


def test_rounds_are_counted_over_runs_and_so_are_those_that_are_sent_again(file):
    path, cfg = file("most_rounds: 5"), tiny.settings(rounds=3)
    _, first = tiny.federate(cfg, ruled(tiny.client(), path))
    _, second = tiny.federate(cfg, ruled(tiny.client(), path))
    assert statuses(first) == ["used"] * 3 and statuses(second)[:2] == ["used"] * 2
    assert "most_rounds=5, all answered" in statuses(second)[2]
    assert statuses(second, 1) == ["used"] * 3
    assert [one["number"] for one in Ledger(path.with_suffix(".ledger")).entries(ROUND)] == [1, 2, 3, 1, 2]


def test_a_round_in_which_training_failed_is_not_counted(file):
    def away(adapter, numbers):
        raise RuntimeError("away")

    path = file("most_rounds: 5")
    tiny.federate(tiny.settings(rounds=3), ruled(tiny.client({(2, 0): away}), path))
    assert [one["number"] for one in Ledger(path.with_suffix(".ledger")).entries(ROUND)] == [1, 3]


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("least_hospitals: 3", [], "least_hospitals=3, and this order has no masks"),
        ("least_hospitals: 4", MASKS, "least_hospitals=4, and 3 would open the sum"),
        ("rules: [FFA-LoRA]", [], "rules=FFA-LoRA, and the order is FedIT"),
        ("most_rounds: 0", [], "most_rounds=0, all answered"),
    ],
)
def test_what_is_ordered_against_a_policy_is_refused_and_others_go_on(file, text, settings, said, caplog):
    app = ruled(tiny.masked(tiny.client()), file(text))
    _, tables = tiny.federate(tiny.settings(*settings, rounds=1), app)
    assert tables.history[0]["used"] == 3 and (said in caplog.text or said in str(statuses(tables)))
    _, tables = tiny.federate(tiny.settings(*settings, rounds=1), ruled(tiny.masked(tiny.client()), file()))
    assert tables.history[0]["used"] == 4


def test_clipping_norms_behind_masks_are_within_the_policy(file, caplog):
    noise = "federation.privacy.client={noise_multiplier: 0.5, clipping_norm: 2}"
    cfg = tiny.settings(*MASKS, noise, rounds=1)
    _, tables = tiny.federate(cfg, ruled(tiny.masked(tiny.client()), file("largest_clipping_norm: 1")))
    assert statuses(tables) == ["no reply"] and "largest_clipping_norm=1.0, and the order says 2.0" in caplog.text
    _, tables = tiny.federate(cfg, ruled(tiny.masked(tiny.client()), file("largest_clipping_norm: 2")))
    assert statuses(tables) == ["used"]


def test_a_seed_of_noise_in_an_order_is_refused(file, caplog):
    noisy = "federation.privacy.client={noise_multiplier: 0.5, clipping_norm: 2}"
    cfg = tiny.settings(*MASKS, noisy, "federation.privacy.noise_seed=1", rounds=1)
    _, tables = tiny.federate(cfg, ruled(tiny.masked(tiny.client()), file()))
    assert statuses(tables) == ["no reply"] and "the order names the seed of the noise" in caplog.text
    _, tables = tiny.federate(cfg, ruled(tiny.masked(tiny.client()), file("known_noise: true")))
    assert statuses(tables) == ["used"]


def test_the_same_update_leaves_behind_masks_once_whatever_process_asks(file):
    path, cfg = file(), tiny.settings(*MASKS, rounds=1)
    _, first = tiny.federate(cfg, ruled(tiny.masked(tiny.client()), path))
    _, again = tiny.federate(cfg, ruled(tiny.masked(tiny.client()), path))
    assert statuses(first) == ["used"] and "this very update left behind masks before" in statuses(again)[0]
    with in_process.InProcessGrid(ruled(tiny.masked(tiny.client()), path), 4, {}) as grid:  # of other updates
        chain = server_app.compose(cfg)
        chain.masked.attempts = {1: 1}
        _, other = server_app.federate(grid, cfg, dict(tiny.START), chain=chain)
    assert statuses(other) == ["used"]


def test_losses_stay_where_the_policy_says_so(file):
    _, tables = tiny.federate(tiny.settings(rounds=1), ruled(tiny.client(), file("losses: false")))
    frame = tables.clients_frame()
    assert statuses(tables) == ["used"] and frame["loss_before"].isna().tolist() == [True, False, False, False]


def test_scores_stay_where_the_policy_says_so(file):
    cfg = tiny.settings("federation.fraction_evaluate=1", rounds=1)
    nll = [
        tiny.federate(cfg, ruled(tiny.client(), file(text)))[1].history[-1]["client_nll"]
        for text in ("", "scores: false")
    ]
    assert nll == pytest.approx([(0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10, (1 * 2 + 2 * 3 + 3 * 4) / 9])


def scoring(plan, **more):
    """The tiny ClientApp, that says its scores have the noise of a plan."""
    inner = tiny.client()

    def app(message, context):
        reply = inner(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content[promises.PROMISE] = promises.promise(plan, 1, **more)[promises.PROMISE]
        return reply

    return app


SCORED = accounting.plan(30, 30, 3, delta=1e-3, target=4.0)  # the scores of three rounds


@pytest.mark.parametrize(
    ("text", "seeded", "leave"),
    [
        ("largest_epsilon: 9\ndelta: 1.0e-3", False, 3),
        ("largest_epsilon: 3\ndelta: 1.0e-3", False, 1),
        ("", False, 3),
        ("scores: false", False, 0),
        ("scores: false\nlargest_epsilon: 9", False, 0),
        ("scores: true\nleast_hospitals: 2", False, 3),
        ("least_noise_multiplier: 1", False, 0),
        ("least_hospitals: 2\nlargest_epsilon: 9", False, 0),
        ("largest_epsilon: 9", True, 0),
        ("largest_epsilon: 9\nknown_noise: true\ndelta: 1.0e-3", True, 3),
    ],
)
def test_scores_with_noise_leave_while_there_is_epsilon_and_are_booked(file, text, seeded, leave):
    seen, path = [], file(text)

    def watched(message, context):
        reply = ruled(scoring(SCORED, seeded=seeded), path)(message, context)
        if context.node_config["partition-id"] == 0 and message.metadata.message_type == "evaluate":
            seen.append(reply.content)
        return reply

    cfg = tiny.settings("federation.fraction_evaluate=1", "federation.min_share=0", rounds=3)
    _, tables = tiny.federate(cfg, watched)
    assert [hospital for _, hospital, *_ in tables.scores_frame().itertuples(index=False)].count(0) == leave
    ledger = Ledger(path.with_suffix(".ledger"))
    assert len(ledger.entries(NOISE)) == leave and not any(promises.PROMISE in content for content in seen)
    assert ledger.epsilon(1e-3) == pytest.approx(accounting.epsilon(SCORED.noise_multiplier, 1.0, leave, 1e-3))
    assert leave < 3 or ledger.epsilon(1e-3) == pytest.approx(4.0, rel=2e-3)


def test_a_score_without_noise_stays_where_noise_is_asked_for_and_none_is_computed_in_vain(file, caplog):
    cfg, path, asked = tiny.settings("federation.fraction_evaluate=1", rounds=1), file("largest_epsilon: 9"), []

    def app(message, context):
        asked.append((message.metadata.message_type, context.node_config["partition-id"]))
        return private(PLAN)(message, context)

    scores = tiny.federate(cfg, ruled(app, path))[1].scores_frame()
    assert 0 not in scores["client"].tolist() and ("evaluate", 0) in asked
    asked.clear(), path.write_text("largest_epsilon: 0.1\n")
    tiny.federate(cfg, ruled(app, path))
    assert ("evaluate", 0) not in asked, "all is spent"


def test_a_damaged_ledger_lets_no_score_leave_and_its_path_stays(file, caplog):
    path = file("largest_epsilon: 9")
    path.with_suffix(".ledger").write_text("not json\n")
    context, message = node(path), type("Message", (), {"content": tiny.RecordDict()})
    message.metadata = type("Meta", (), {"message_type": "evaluate"})
    with pytest.raises(policy.Refused, match="ledger cannot be read, and so nothing leaves") as refused:
        policy.mod(message, context, lambda *given: pytest.fail("it was scored"))
    assert str(path.parent) not in str(refused.value) and "damaged" in caplog.text


def test_where_privacy_is_promised_no_score_leaves_whatever_a_server_asks():
    context, message = node("unused"), type("Message", (), {"content": tiny.RecordDict()})
    message.metadata = type("Meta", (), {"message_type": "evaluate"})
    for setting in ("federation.privacy.record.epsilon=8", "federation.secure_aggregation.threshold=4"):
        context.run_config = {"config": config.OmegaConf.to_yaml(config.load("cpu", setting))}
        with pytest.raises(ValueError, match="privacy was promised, and scores of cards leave without any"):
            client_app.PROMISED(message, context, lambda *given: pytest.fail("it was scored"))
    context.run_config = {"config": config.OmegaConf.to_yaml(config.load("cpu"))}
    assert client_app.PROMISED(message, context, lambda *given: "scored") == "scored"


def private(plan, steps=4, **more):
    """The tiny ClientApp, that says it was trained by a plan."""
    inner = tiny.client()

    def app(message, context):
        reply = inner(message, context)
        if message.metadata.message_type == "train" and plan:
            reply.content[promises.PROMISE] = promises.promise(plan, steps, **more)[promises.PROMISE]
        return reply

    return app


def test_epsilon_is_booked_over_runs_and_none_leaves_beyond_it(file):
    path, after = (
        file("largest_epsilon: 8\ndelta: 1.0e-3"),
        [accounting.composed([(1.0, 0.2, 4 * n)], 1e-3) for n in range(99)],
    )
    fits = int(np.searchsorted(after, 8, side="right")) - 1
    assert fits > 3
    done, cfg = [], tiny.settings(rounds=fits - 1)
    for _ in range(2):  # the second run has room for one more round
        done += statuses(tiny.federate(cfg, ruled(private(PLAN), path))[1])
    ledger = Ledger(path.with_suffix(".ledger"))
    assert done[:fits] == ["used"] * fits and "used" not in done[fits:]
    assert "largest_epsilon=8.0 over all runs, and with this round it would be" in done[fits]
    assert ledger.epsilon(1e-3) == pytest.approx(after[fits]) and len(ledger.entries(NOISE)) == fits
    assert len(ledger.entries(ROUND)) == fits


def test_where_all_is_spent_nothing_is_trained(file):
    path, trained = file("largest_epsilon: 2"), []
    Ledger(path.with_suffix(".ledger")).add(dict(kind=NOISE, run=3, noise_multiplier=0.5, sample_rate=0.5, steps=20))

    def app(message, context):
        trained.append((message.metadata.message_type, context.node_config["partition-id"]))
        return private(PLAN)(message, context)

    _, tables = tiny.federate(tiny.settings(rounds=1), ruled(app, path))
    assert "largest_epsilon=2.0 over all runs, all spent" in statuses(tables)[0] and ("train", 0) not in trained


@pytest.mark.parametrize(
    ("text", "plan", "seeded", "said"),
    [
        ("largest_epsilon: 8", None, False, "largest_epsilon=8.0, and this was no DP-SGD"),
        ("least_noise_multiplier: 0.5", None, False, "least_noise_multiplier=0.5, and this was no DP-SGD"),
        ("least_noise_multiplier: 1.5", PLAN, False, "least_noise_multiplier=1.5, and this was 1"),
        ("largest_clipping_norm: 0.5", PLAN, False, "largest_clipping_norm=0.5, and this was 1"),
        ("", PLAN, True, "known_noise=false, and the settings name the seed of the noise"),
        ("most_rounds: 3", None, False, "used"),
        ("known_noise: true", PLAN, True, "used"),
        ("least_noise_multiplier: 1.0", PLAN, False, "used"),
        (None, PLAN, True, "used"),
    ],
)
def test_noise_is_as_the_policy_wants_it_and_the_promise_stays_here(file, text, plan, seeded, said):
    seen, app = [], private(plan, seeded=seeded)

    def whole(message, context):
        reply = app(message, context) if text is None else ruled(app, file(text))(message, context)
        reply = policy.mod(message, context, app) if text is None else reply
        seen.append(reply.content)
        return reply

    _, tables = tiny.federate(tiny.settings(rounds=1), whole)
    assert said in statuses(tables)[0]
    assert not any(promises.PROMISE in content for content in seen)


def test_a_ledger_without_a_folder_lets_nothing_leave_and_its_path_stays(file, tmp_path, caplog):
    path = file(f"ledger: {tmp_path}/unmounted/mine.ledger")
    (tmp_path / "unmounted").write_text("no folder")
    with pytest.raises(RuntimeError, match="ledger cannot be written, and so nothing leaves") as caught:
        tiny.federate(tiny.settings(hospitals=1, rounds=1), ruled(tiny.client(), path))
    said = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "unmounted" not in said and "unmounted" in caplog.text


def test_a_damaged_ledger_lets_nothing_leave(file, caplog):
    path = file("largest_epsilon: 8")
    ledger = path.with_suffix(".ledger")
    for text in ("not json\n", '{"kind": "noise", "run": 1, "time": ""}\n', "[]\n"):
        ledger.write_text(text)
        with pytest.raises(RuntimeError, match="ledger cannot be read, and so nothing leaves"):
            tiny.federate(tiny.settings(hospitals=1, rounds=1), ruled(private(PLAN), path))
        assert ledger.read_text() == text and "damaged" in caplog.text


def test_a_federation_with_dp_sgd_spends_what_it_promises_and_then_no_more(file):
    """The real app and model: two rounds fit into the policy, and of the next run none."""
    small = "federation.num_clients=2 federation.num_rounds=2 federation.training_arguments={max_steps: 1, "
    small += "per_device_train_batch_size: 2} dataset.specialties=[eye,ear] dataset.max_cards_per_specialty=4"
    quiet = ["federation.evaluate_every=0", "train.seq_length=64", "federation.privacy.record.noise_multiplier=2"]
    quiet += ["federation.min_share=0"]  # goes on with the other alone
    cfg = config.load("cpu", "train.evaluate_split=0.25", *quiet, *_words(small))
    plan = guarantees.record_privacy(cfg, 3)
    whole = accounting.composed([(2.0, plan.sample_rate, 2)], 1e-5)
    path = file(f"largest_epsilon: {whole * 1.001}")

    def app(message, context):
        if context.node_config["partition-id"] == 0:
            context.node_config["policy"] = str(path)
        return client_app.app(message, context)

    first = simulation.run(cfg, progress=False, client=app)
    assert first.clients["status"].tolist() == ["used"] * 4
    second = simulation.run(cfg, progress=False, client=app)
    mine = second.clients[second.clients["client"] == 0]["status"]
    assert mine.str.contains("over all runs, and with this round it would be").all()


def _words(text):
    """Settings apart, those in braces whole."""
    before, rest = text.split("={max", 1)
    inside, after = rest.split("} ", 1)
    *first, last = before.split()
    return [*first, f"{last}={{max{inside}}}", *after.split()]


def test_an_error_says_nothing_of_the_cards_where_privacy_is_promised(caplog):
    def fails(message, context):
        raise KeyError("the patient of room 7")

    for setting, said in (("seed=0", "room 7"), ("federation.privacy.record.epsilon=8", "KeyError in train")):
        context = node("unused")
        context.run_config = {"config": config.OmegaConf.to_yaml(config.load("cpu", setting))}
        message = type("Message", (), {"metadata": type("Meta", (), {"message_type": "train"})})
        with caplog.at_level(logging.ERROR), pytest.raises((KeyError, RuntimeError), match=said) as caught:
            client_app.CLOSED(message, context, fails)
        assert ("room 7" in str(caught.value)) == (said == "room 7")
    assert "room 7" in caplog.text


def test_settings_with_masks_send_nothing_without_the_orders_of_masks():
    context = node("unused")
    context.run_config = {
        "config": config.OmegaConf.to_yaml(config.load("cpu", "federation.secure_aggregation.threshold=4"))
    }
    message = type("Message", (), {"metadata": type("Meta", (), {"message_type": "train"})})
    message.content = tiny.RecordDict({"arrays": to_record(tiny.START)})
    with pytest.raises(ValueError, match="masks were promised, and this order to train has none"):
        client_app.PROMISED(message, context, lambda *given: pytest.fail("it trained"))


def begun(folder):
    ledger = Ledger(folder / "mine.ledger")
    ledger.begin()
    return ledger


def test_the_ledger_is_a_line_for_each_answer(tmp_path):
    ledger = begun(tmp_path)
    assert ledger.entries(ROUND) == [] and ledger.epsilon(1e-5) == 0
    spent = {"kind": NOISE, "run": 3, "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 2}
    ledger.add({"kind": ROUND, "run": 3, "number": 1}, spent)
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [one["kind"] for one in lines] == [BEGUN, ROUND, NOISE] and lines[0]["time"].endswith("+00:00")
    assert ledger.epsilon(1e-5) == pytest.approx(accounting.composed([(1.0, 0.1, 2)], 1e-5))
    more = ledger.epsilon(1e-5, [(1.0, 0.1, 2), (2.0, 1.0, 1)])
    assert more == pytest.approx(accounting.composed([(1.0, 0.1, 4), (2.0, 1.0, 1)], 1e-5))
    assert more > ledger.epsilon(1e-5)


def test_the_command_says_what_is_allowed_spent_and_left(file, monkeypatch, capsys):
    path = file("largest_epsilon: 8\nmost_rounds: 5\nleast_hospitals: 3\nrules: [FedIT, LoRA-XS]\n")
    tiny.federate(tiny.settings(*MASKS, rounds=2), ruled(tiny.masked(private(PLAN)), path))
    monkeypatch.setattr("sys.argv", ["policy", str(path)])
    standing.main()
    said, spent = capsys.readouterr().out, accounting.composed([(1.0, 0.2, 8)], 1e-5)
    assert [line.split()[-3:] for line in said.splitlines()[1:3]] == [
        ["8", f"{spent:.4g}", f"{8 - spent:.4g}"],
        ["5", "2", "3"],
    ]
    assert "least_hospitals: 3" in said and "rules: FedIT, LoRA-XS" in said and "last answer: round 2" in said


def test_a_new_policy_has_every_key_and_no_limit(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new.yaml"
    monkeypatch.setattr("sys.argv", ["policy", "--new", str(path)])
    standing.main()
    assert "then `python -m fedllm_helpers.policy --begin POLICY` begins one" in capsys.readouterr().out
    found, blank = policy.load(path), policy.Policy()
    assert vars(found) == {**vars(blank), "ledger": str(tmp_path / "new.ledger"), "scores": True}
    assert all(one.metadata["meaning"] in path.read_text() for one in fields(policy.Policy))
    with pytest.raises(SystemExit):
        standing.main()
    assert "is there already, and stays as it is" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["policy", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit):
        standing.main()
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["train", "train.default", "evaluate", "evaluate.default"])
def test_an_order_is_held_against_policy_and_promises_by_any_name(file, kind):
    context, message = node(file("most_rounds: 0\nscores: false")), type("Message", (), {"content": tiny.RecordDict()})
    message.metadata = type("Meta", (), {"message_type": kind})
    with pytest.raises(policy.Refused, match="most_rounds=0|scores=false"):
        policy.mod(message, context, lambda *given: pytest.fail("it was done"))
    context.run_config = {
        "config": config.OmegaConf.to_yaml(config.load("cpu", "federation.secure_aggregation.threshold=4"))
    }
    with pytest.raises(ValueError, match="nothing is sent"):
        client_app.PROMISED(message, context, lambda *given: pytest.fail("it was done"))


def test_masks_are_those_that_the_settings_promise():
    settings = [
        "federation.secure_aggregation.threshold=4",
        "federation.privacy.client={noise_multiplier: 1, delta: 0.1}",
    ]
    cfg, context = config.load("cpu", *settings), node("unused")
    context.run_config = {"config": config.OmegaConf.to_yaml(cfg)}
    right = {"threshold": 4, "value-range": 1.0, "clipping-norm": 1.0, "noise-multiplier": 1.0, "noise-seed": -1}
    how = vars(server_app.compose(cfg).masked.how)
    assert all(how[name.replace("-", "_")] == value for name, value in right.items() if name != "noise-seed")
    for name, value in (("threshold", 2), ("clipping-norm", 0.0), ("noise-multiplier", 0.0), ("noise-seed", 3)):
        message = type("Message", (), {"metadata": type("Meta", (), {"message_type": "train"})})
        message.content = tiny.RecordDict({"secure": tiny.ConfigRecord({**right, name: value})})
        with pytest.raises(ValueError, match=f"masks were promised with {name}="):
            client_app.PROMISED(message, context, lambda *given: pytest.fail("it trained"))
    message.content = tiny.RecordDict({"secure": tiny.ConfigRecord(right)})
    assert client_app.PROMISED(message, context, lambda *given: "done") == "done"


def test_without_losses_nothing_but_what_is_needed_leaves(file):
    inner = tiny.client()

    def chatty(message, context):
        reply = inner(message, context)
        if message.metadata.message_type == "train":
            reply.content["metrics"]["train_loss"] = 2.5
            reply.content["more"] = tiny.MetricRecord({"eval_nll": 2.0})
        return reply

    seen = []

    def whole(message, context):
        reply = ruled(chatty, file("losses: false"))(message, context)
        seen.append(reply.content)
        return reply

    _, tables = tiny.federate(tiny.settings(hospitals=1, rounds=1), whole)
    assert statuses(tables) == ["used"]
    assert list(seen[-1]) == ["arrays", "metrics"] and set(seen[-1]["metrics"]) <= set(policy.TOLD)


def test_a_line_that_was_cut_off_is_of_an_answer_that_never_left(tmp_path, caplog):
    ledger = begun(tmp_path)
    ledger.add({"kind": ROUND, "run": 1})
    whole = ledger.path.read_bytes()
    line = whole.splitlines()[1]
    ledger.path.write_bytes(whole + line[: len(line) // 2])
    assert len(ledger.entries(ROUND)) == 1 and "its last line was cut off" in caplog.text
    ledger.add({"kind": ROUND, "run": 2})
    assert [one["run"] for one in ledger.entries(ROUND)] == [1, 2]
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])  # whole but for its end
    ledger.add({"kind": ROUND, "run": 3})
    assert [one["run"] for one in ledger.entries(ROUND)] == [1, 2, 3]
    ledger.path.write_bytes(whole + line[: len(line) // 2] + b"\n" + line)
    with pytest.raises(ValueError, match="is damaged"):
        ledger.entries()


@pytest.mark.parametrize(
    ("left", "said"),
    [(None, "is missing: put it back"), (9, "first line is not"), (1, "first line is not")],
)
def test_a_ledger_that_is_gone_is_not_taken_for_a_new_one(file, left, said, caplog):
    path = file("most_rounds: 5")
    ledger = Ledger(path.with_suffix(".ledger"))
    tiny.federate(tiny.settings(rounds=2), ruled(tiny.client(), path))
    if left is None:
        ledger.path.unlink()
    else:  # emptied, or without its beginning
        ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[left:]))
    before = ledger.path.read_bytes() if ledger.path.exists() else None
    _, tables = tiny.federate(tiny.settings(rounds=1), ruled(tiny.client(), path))
    assert "this hospital's ledger cannot be read, and so nothing leaves" in statuses(tables)[0]
    assert said in caplog.text and statuses(tables, 1) == ["used"]
    assert (ledger.path.read_bytes() if ledger.path.exists() else None) == before
    with pytest.raises(ValueError, match=said):
        standing.standing(path)


def test_a_ledger_is_begun_once_by_command(file, tmp_path, monkeypatch, capsys):
    path = file("most_rounds: 5\nledger: mine.ledger")
    monkeypatch.setattr("sys.argv", ["policy", "--begin", str(path)])
    standing.main()
    assert "rounds answered                       5          0          5" in capsys.readouterr().out
    Ledger(tmp_path / "mine.ledger").add({"kind": ROUND, "run": 1, "number": 1})
    with pytest.raises(SystemExit):
        standing.main()
    assert "mine.ledger is there already, and stays as it is" in capsys.readouterr().err
    assert len(Ledger(tmp_path / "mine.ledger").entries(ROUND)) == 1


@pytest.mark.parametrize(
    "change", [{"steps": -3}, {"sample_rate": 2.0}, {"noise_multiplier": float("nan")}, {"steps": "4"}]
)
def test_a_mechanism_that_cannot_be_is_damage(tmp_path, change):
    ledger = begun(tmp_path)
    ledger.add({"kind": NOISE, "run": 1, "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 2} | change)
    with pytest.raises(ValueError, match="is damaged"):
        ledger.epsilon(1e-5)


def test_a_ledger_is_found_from_any_folder_and_scores_follow_the_limits(file, tmp_path):
    path = file("ledger: mine.ledger\nlargest_epsilon: 8")
    assert policy.load(path).ledger == str(tmp_path / "mine.ledger") and policy.load(path).scores is None
    assert policy.load(file("")).scores is True and policy.load(file("least_hospitals: 3\nscores: true")).scores is True
