"""What a server could try to see one update behind masks, and what each hospital says to it: nothing is sent."""

import json

import numpy as np
import pytest
import tiny
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm_helpers import config
from fedllm_helpers.adapters.records import to_record
from fedllm_helpers.federation import checkpoints, client_app, resumed, server_app
from fedllm_helpers.grids import in_process
from fedllm_helpers.privacy import masked_clients
from fedllm_helpers.privacy import secure_aggregation as secure

MASKS = ["federation.secure_aggregation.threshold=3", "federation.secure_aggregation.value_range=4"]


class Hospitals:
    """Some hospitals, and the messages of a server that may say to each what it wants."""

    def __init__(self, grid):
        self.grid, self.all, self.public, self.made = grid, range(grid.num_clients), {}, {}

    def ask(self, kind, hospital, secret=None, number=1):
        """The content of a hospital's answer; ValueError with what it says instead."""
        orders = {"arrays": to_record(tiny.START), "config": ConfigRecord({"server-round": number})}
        content = RecordDict(orders if kind.startswith("train") else {})
        if secret is not None:
            content["secure"] = ConfigRecord(secret)
        request = Message(content, in_process.FIRST_CLIENT_NODE + hospital, kind)
        (reply,) = self.grid.send_and_receive([request])
        if reply.has_error():
            raise ValueError(reply.error.reason)
        return reply.content

    def keys(self, number=1, attempt=0):
        for k in self.all:
            said = self.ask("query.keys", k, {"round": number, "attempt": attempt, "hospital": k})["secure"]
            self.public[k] = secure.Public(**said)

    def orders(self, public=None, threshold=2, number=1, **more):
        public = public or self.public
        lists = {"mask_keys": "mask_key", "cipher_keys": "cipher_key", "commitments": "commitment"}
        keys = {name: [getattr(public[k], one) for k in sorted(public)] for name, one in lists.items()}
        rest = {"round": number, "attempt": 0, "threshold": threshold, "value-range": 4.0, "clipping-norm": 0.0}
        rest |= {"noise-multiplier": 0.0, "noise-seed": -1}
        return {**rest, "hospitals": sorted(public), "weights": [10 * (k + 1) for k in sorted(public)], **keys, **more}

    def shares(self):
        for k in self.all:
            said = self.ask("query.shares", k, self.orders())["secure"]
            self.made[k] = dict(zip(said["hospitals"], said["shares"], strict=True))

    def opening(self, hospital, **more):
        held = {maker: made[hospital] for maker, made in self.made.items()}
        given = {"survivors": sorted(self.public), "makers": list(held), "shares": list(held.values())}
        return {**self.orders(), **given, **more}


@pytest.fixture
def grid(request):
    with in_process.InProcessGrid(tiny.masked(tiny.client()), getattr(request, "param", 3), {}) as made:
        yield made


@pytest.fixture
def some(grid):
    """Hospitals that have made keys of round 1."""
    made = Hospitals(grid)
    made.keys()
    return made


@pytest.fixture
def hospitals(some):
    """And shares."""
    some.shares()
    return some


def test_an_honest_round_is_answered_and_every_step_of_it_once(hospitals):
    masked = hospitals.ask("train", 0, hospitals.orders())["arrays"]["masked"].numpy()
    assert masked.dtype == np.uint32 and len(masked) == 16
    with pytest.raises(ValueError, match="a mask is used once"):
        hospitals.ask("train", 0, hospitals.orders())
    with pytest.raises(ValueError, match="are made once"):
        hospitals.ask("query.shares", 0, hospitals.orders())
    opened = hospitals.ask("query.reveal", 0, hospitals.opening(0))["secure"]
    assert opened["hospitals"] == [0, 1, 2]
    with pytest.raises(ValueError, match="revealed already"):
        hospitals.ask("query.reveal", 0, hospitals.opening(0))


@pytest.mark.parametrize("revealed", [False, True])
def test_after_keys_nothing_is_trained_without_masks(hospitals, revealed):
    if revealed:
        hospitals.ask("train", 0, hospitals.orders()), hospitals.ask("query.reveal", 0, hospitals.opening(0))
    for number in (1, 2):
        with pytest.raises(ValueError, match="this run has masks, and this order to train has none: nothing is sent"):
            hospitals.ask("train", 0, None, number)


@pytest.mark.parametrize("grid", [1], indirect=True)
def test_a_sum_of_one_is_no_sum(some):
    with pytest.raises(ValueError, match="a threshold of 1 for 1 hospitals: allowed is more than half, from 2"):
        some.ask("query.shares", 0, some.orders(threshold=1))
    with pytest.raises(ValueError, match="from 2 up to all"):
        some.ask("query.shares", 0, some.orders(threshold=2))


def test_keys_of_which_no_shares_were_made_mask_nothing(some):
    with pytest.raises(ValueError, match="no shares were made of these keys"):
        some.ask("train", 0, some.orders())


def test_a_hospital_whose_keys_are_others_in_the_list_takes_no_part(some):
    false = {**some.public, 0: secure.make_keys()[1]}
    with pytest.raises(ValueError, match="not in the list, or with other keys than its own"):
        some.ask("query.shares", 0, some.orders(false))
    with pytest.raises(ValueError, match="not in the list"):
        some.ask("query.shares", 0, some.orders({1: some.public[1], 2: some.public[2]}))
    with pytest.raises(ValueError, match="two hospitals have the same keys"):
        some.ask("query.shares", 0, some.orders({**some.public, 2: some.public[1]}))


def false_keys(some):
    """The others' keys are the server's own: it would know every mask of the update."""
    return some.orders({0: some.public[0], 1: secure.make_keys()[1], 2: secure.make_keys()[1]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (false_keys, "are not those for which shares were made"),
        (lambda some: some.orders(threshold=3), "are not those for which"),
        (lambda some: some.orders(weights=[10, 20, 1]), "are not those for which"),
        (lambda some: some.orders({0: some.public[0]}), "1 hospitals, 2 are needed"),
        (lambda some: some.orders(number=2), "round 2 is asked for, the secrets are of round 1"),
        (lambda some: some.orders(attempt=1), "is asked for, the secrets are of"),
        (lambda some: some.orders(**{"clipping-norm": 9.0}), "are not those for which"),
    ],
)
def test_orders_to_train_are_those_for_which_shares_were_made(hospitals, change, said):
    with pytest.raises(ValueError, match=said):
        hospitals.ask("train", 0, change(hospitals))
    few = {0: hospitals.public[0], 2: hospitals.public[2]}  # one went away between shares and training
    assert "masked" in hospitals.ask("train", 0, hospitals.orders(few))["arrays"]


def test_nothing_is_opened_for_others_than_those_of_the_masked_update(hospitals):
    with pytest.raises(ValueError, match="not those of the masked update"):
        hospitals.ask("query.reveal", 0, hospitals.opening(0))  # it has sent none
    hospitals.ask("train", 0, hospitals.orders())
    for more in ({"threshold": 3}, {"hospitals": [0, 1, 3]}, {"weights": [1, 20, 30]}):
        with pytest.raises(ValueError, match="not those of the masked update|not in the list"):
            hospitals.ask("query.reveal", 0, hospitals.opening(0, **more))
    with pytest.raises(ValueError, match="1 masked updates arrived, 2 are needed"):
        hospitals.ask("query.reveal", 0, hospitals.opening(0, survivors=[0]))


def test_an_update_leaves_under_one_set_of_keys(hospitals):
    hospitals.ask("train", 0, hospitals.orders())
    for number, attempt in ((1, 0), (0, 5)):
        with pytest.raises(ValueError, match="a masked update of it, or of a later one, has left"):
            hospitals.ask("query.keys", 0, {"round": number, "attempt": attempt, "hospital": 0})
    for number, attempt in ((1, 1), (2, 0)):
        assert hospitals.ask("query.keys", 0, {"round": number, "attempt": attempt, "hospital": 0})["secure"]


def run(cfg, folder, seen, gone=None, **options):
    """A tiny masked federation that keeps its rounds in a folder, as far as it gets."""
    faults = {(number, gone): tiny_gone for number in range(9)} if gone is not None else {}
    app = tiny.masked(tiny.client(faults, orders=seen))
    with in_process.InProcessGrid(app, cfg.federation.num_clients, {}) as grid:
        start = {key: value.copy() for key, value in tiny.START.items()}
        return server_app.federate(grid, cfg, start, server_app.Options(folder=folder, **options))


def tiny_gone(adapter, numbers):
    raise RuntimeError("away")


def stop(*arguments):
    raise KeyboardInterrupt


def test_a_sum_that_was_opened_is_not_asked_for_again(tmp_path):
    """Killed while it scores the model: another sum, without hospital 1, would give away what that one sent."""
    cfg, seen, calls = tiny.settings(*MASKS, "federation.evaluate_every=1"), [], iter([3.0, 2.5])
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path, seen, evaluate=lambda adapter: next(calls, None) or stop())
    assert [orders["server-round"] for orders in seen] == [1] * 4 + [2] * 4
    seen.clear()
    adapter, tables = run(cfg, tmp_path, seen, gone=1, evaluate=lambda adapter: float(adapter["a.B"].mean()))
    assert {orders["server-round"] for orders in seen} == {3}
    assert [row["round"] for row in tables.history] == [0, 1, 2, 3] and tables.history[2]["nll"] > 0
    assert all(row["seconds"] > 0 for row in tables.history[1:])


def test_a_sum_that_may_have_been_opened_is_asked_for_of_other_updates(tmp_path, monkeypatch, caplog):
    """Killed after hospitals revealed their shares, before the round was on disk."""
    cfg, seen, kept = tiny.settings(*MASKS, rounds=2), [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *given: kept(*given) if given[2].number < 2 else stop())
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path, seen)
    assert json.loads((tmp_path / resumed.ATTEMPTS).read_text()) == {"1": 1, "2": 1}
    assert not any(masked_clients.ATTEMPT in orders for orders in seen)
    monkeypatch.undo(), seen.clear()
    run(cfg, tmp_path, seen)
    assert [(orders["server-round"], orders[masked_clients.ATTEMPT]) for orders in seen] == [(2, 1)] * 4
    assert "round 2 was asked for before; it is asked for anew, attempt 1" in caplog.text
    (tmp_path / resumed.ATTEMPTS).write_text("[")
    with pytest.raises(ValueError, match="attempts.json is damaged"):
        run(cfg, tmp_path, seen)


def test_another_attempt_trains_on_other_cards_with_other_noise():
    cfg = config.load("cpu", "dataset.max_cards_per_specialty=40")
    cards = client_app.own_cards(cfg, 0)[0]
    first, again, other = (client_app.cards_of_round(cards, cfg, 2, 0, *more)["card_id"] for more in ((), (), (1,)))
    assert first == again != other and len(first) == len(other)
    private = config.load(cfg, "federation.privacy.noise_seed=3", "federation.privacy.record.noise_multiplier=1")
    one, two = (client_app.noise.noise_seed(private, 1, 2, 0, *more).generate_state(2) for more in ((), (1,)))
    assert (one != two).any()


@pytest.mark.parametrize(
    ("public", "said"),
    [([0, 0, 0], "a hospital is in the list twice"), ([0, 0, 1], "a hospital is in the list twice")],
)
def test_nobody_is_in_a_list_twice(hospitals, public, said):
    """A hospital that masks against itself alone would be opened with the others' shares."""
    given = hospitals.orders()
    for name in ("mask_keys", "cipher_keys", "commitments", "weights"):
        given[name] = [given[name][k] for k in public]
    with pytest.raises(ValueError, match=said):
        hospitals.ask("train", 0, {**given, "hospitals": public})


def test_whoever_was_told_something_else_masks_for_another_sum(hospitals):
    """The server tells hospital 2 that it is alone with hospital 1: its masks cancel in no sum."""
    few = {k: hospitals.public[k] for k in (1, 2)}
    masked = {k: hospitals.ask("train", k, hospitals.orders())["arrays"]["masked"].numpy() for k in (0, 1)}
    masked[2] = hospitals.ask("train", 2, hospitals.orders(few))["arrays"]["masked"].numpy()
    opened = {}
    for k in (0, 1):
        said = hospitals.ask("query.reveal", k, hospitals.opening(k))["secure"]
        opened[k] = dict(zip(said["hospitals"], said["opened"], strict=True))
    total, places = masked[0] + masked[1] + masked[2], {0: 1, 1: 2, 2: 3}
    label = masked_clients.label(hospitals.orders())
    found = secure.unmask(total, hospitals.public, places, {0, 1, 2}, opened, label, 2)
    code = secure.fixed_point([10, 20, 30], 4.0)
    mean = secure.decode(found, 60, code, tiny.START)
    assert max(np.abs(value).max() for value in mean.values()) > 1  # noise: no update of tiny is so large
    assert label != masked_clients.label(hospitals.orders(few))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round": 1, "attempt": 0, "config": 2}, "the order to train is of round 2, attempt 0"),
        ({"clipping-norm": -50.0}, "no number from 0"),
        ({"noise-multiplier": float("nan")}, "no number from 0"),
    ],
)
def test_masks_are_for_the_round_that_is_trained_with_numbers_that_can_be(hospitals, change, said):
    number = change.pop("config", 1)
    with pytest.raises(ValueError, match=said):
        hospitals.ask("train", 0, {**hospitals.orders(), **change}, number)


def test_a_weight_is_what_the_hospital_said(some):
    with pytest.raises(ValueError, match="the weight of this hospital is not what it said"):
        some.ask("query.shares", 0, some.orders(weights=[10**6, 1, 1]))


def test_nothing_leaves_beside_a_masked_update(hospitals):
    inner = tiny.client()

    def more(message, context):
        reply = inner(message, context)
        reply.content["more"] = to_record(tiny.START)
        return reply

    hospitals.grid.app = tiny.masked(more)
    with pytest.raises(ValueError, match="has arrays beside the update, which nothing would mask"):
        hospitals.ask("train", 0, hospitals.orders())


@pytest.mark.parametrize("kind", ["train.default", "train.other"])
def test_an_order_to_train_is_one_by_any_name(hospitals, kind):
    with pytest.raises(ValueError, match="this run has masks, and this order to train has none"):
        hospitals.ask(kind, 0)
