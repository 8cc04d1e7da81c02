"""Masks, shares and sums: right with drop-outs, closed below the threshold, and a view that is noise."""

import numpy as np
import pytest
import tiny
from flwr.serverapp.strategy import FedAvg
from scipy.stats import chisquare, kstest

from fedllm_helpers.federation import server_app
from fedllm_helpers.privacy import masked_clients, noise
from fedllm_helpers.privacy import secure_aggregation as secure
from fedllm_helpers.privacy.masked import Masked
from fedllm_helpers.privacy.noised import Noised


def make(hospitals, threshold, size=7, number=3, weights=None, seed=0):
    """Everything that the hospitals of a round make: updates, weights, keys, shares by receiver, masked values."""
    rng, ids = np.random.default_rng(seed), [2 * k + 1 for k in range(hospitals)]
    updates = {k: {"x.A": rng.normal(0, 0.3, (size, 3)).astype(np.float32), "a.B": rng.normal(0, 1, 4)} for k in ids}
    weights = dict(zip(ids, weights or rng.integers(1, 300, hospitals).tolist(), strict=True))
    keys = {k: secure.make_keys() for k in ids}
    own, public = {k: key[0] for k, key in keys.items()}, {k: key[1] for k, key in keys.items()}
    made = {k: secure.make_shares(k, own[k], public, threshold, number) for k in ids}
    held = {k: {maker: made[maker][k] for maker in ids} for k in ids}
    code = secure.fixed_point(weights.values(), 1.0)
    masked = {k: secure.mask(secure.encode(updates[k], weights[k], code), k, own[k], public, number) for k in ids}
    return updates, weights, own, public, held, code, masked


def open_sum(round_, survivors, threshold, number=3):
    """The server's part: sum, ask, unmask."""
    _, _, own, public, held, _, masked = round_
    total = np.sum([masked[k] for k in survivors], axis=0, dtype=np.uint32)
    opened = {k: secure.reveal(k, own[k], public, held[k], set(survivors), number, threshold) for k in survivors}
    places = {k: place for place, k in enumerate(sorted(public), 1)}
    return secure.unmask(total, public, places, set(survivors), opened, number, threshold)


@pytest.mark.parametrize(
    "hospitals, threshold, gone", [(3, 2, 0), (3, 2, 1), (6, 4, 0), (6, 4, 1), (6, 4, 2), (9, 5, 4)]
)
def test_the_sum_is_right_to_the_quantisation_step_whoever_drops_out(hospitals, threshold, gone):
    round_ = make(hospitals, threshold)
    updates, weights, *_, code, _ = round_
    survivors = sorted(updates)[gone:]
    total = sum(weights[k] for k in survivors)
    mean = secure.decode(open_sum(round_, survivors, threshold), total, code, updates[survivors[0]])
    for key in ("x.A", "a.B"):
        cut = {k: np.clip(updates[k][key].astype(np.float64), -1, 1) for k in survivors}
        right = sum(weights[k] * cut[k] for k in survivors) / total
        assert np.abs(mean[key] - right).max() <= code.error(len(survivors), total) + 1e-7  # and float32's own
        assert mean[key].dtype == np.float32 and mean[key].shape == right.shape


def test_a_sum_without_unmasking_is_nothing():
    updates, weights, *_, code, masked = make(3, 2, size=500)
    total = np.sum(list(masked.values()), axis=0, dtype=np.uint32)  # the pairwise masks cancel, each one's own do not
    wrong = secure.decode(total, sum(weights.values()), code, updates[1])["x.A"]
    right = sum(weights[k] * np.clip(updates[k]["x.A"], -1, 1) for k in updates) / sum(weights.values())
    assert abs(np.corrcoef(wrong.ravel(), right.ravel())[0, 1]) < 0.15


def test_the_view_of_one_hospital_is_uniform_whatever_its_update():
    zeros = {"x": np.zeros(200_000, np.float32)}
    keys = {k: secure.make_keys() for k in range(3)}
    public = {k: key[1] for k, key in keys.items()}
    masked = secure.mask(secure.encode(zeros, 1, secure.fixed_point([1, 1, 1], 1.0)), 0, keys[0][0], public, 1)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(masked >> shift & 255, minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    again = secure.mask(np.zeros(200_000, np.uint32), 0, keys[0][0], public, 2)
    assert abs(np.corrcoef(masked.astype(float), again.astype(float))[0, 1]) < 0.02  # another round, other masks


def test_below_the_threshold_nothing_opens():
    round_ = make(6, 4)
    _, _, own, public, held, _, masked = round_
    few = {1, 3, 5}
    with pytest.raises(ValueError, match="3 masked updates arrived, 4 are needed"):
        secure.reveal(1, own[1], public, held[1], few, 3, 4)
    everyone = set(public)
    opened = {k: secure.reveal(k, own[k], public, held[k], everyone, 3, 4) for k in few}
    places = {k: place for place, k in enumerate(sorted(public), 1)}
    with pytest.raises(ValueError, match="3 hospitals revealed their shares, 4 are needed"):
        secure.unmask(masked[1], public, places, everyone, opened, 3, 4)
    for threshold in (0, 3, 7):
        with pytest.raises(ValueError, match="allowed is more than half"):
            secure.make_shares(1, own[1], public, threshold, 3)


def test_a_share_that_was_changed_replayed_or_swapped_is_refused():
    _, _, own, public, held, _, masked = make(4, 3)
    everyone = set(public)
    changed = {**held[1], 3: held[1][3][:-1] + bytes([held[1][3][-1] ^ 1])}
    for shares in (changed, {**held[1], 3: held[3][3]}, {**held[1], 3: b""}):
        with pytest.raises(ValueError, match="share of hospital 3 was changed, or is of another round"):
            secure.reveal(1, own[1], public, shares, everyone, 3, 3)
    with pytest.raises(ValueError, match="of another round"):
        secure.reveal(1, own[1], public, held[1], everyone, 4, 3)
    opened = {k: dict(secure.reveal(k, own[k], public, held[k], everyone, 3, 3)) for k in sorted(everyone)}
    opened[1][5] = bytes(16)  # a hospital that lies about what it holds
    places = {k: place for place, k in enumerate(sorted(public), 1)}
    with pytest.raises(ValueError, match="shares of hospital 5's seed do not open it"):
        secure.unmask(masked[1], public, places, everyone, opened, 3, 3)


def test_a_hospital_opens_one_seed_of_another_and_never_both():
    _, _, own, public, held, *_ = make(5, 3)
    opened = secure.reveal(1, own[1], public, held[1], {1, 3, 5, 7}, 3, 3)  # 9 went away
    both = secure.reveal(1, own[1], public, held[1], {1, 3, 5, 7, 9}, 3, 3)
    assert {len(share) for share in opened.values()} == {16} and opened[9] != both[9] and opened[3] == both[3]


def test_fixed_point_cannot_overflow_and_says_what_cannot_be_encoded():
    weights = [1, 200, 1999]
    code = secure.fixed_point(weights, 0.7)
    highest = sum(int(secure.encode({"x": np.full(1, 9.0)}, w, code)[0]) for w in weights)
    assert 2**29 < highest < 2**31
    lowest = np.sum([secure.encode({"x": np.full(1, -9.0)}, w, code) for w in weights], axis=0, dtype=np.uint32)
    assert secure.decode(lowest, sum(weights), code, {"x": np.zeros(1)})["x"][0] == pytest.approx(-0.7, abs=1e-6)
    for wrong in ([], [0, 3], [-1, 2], [1.5, 2]):
        with pytest.raises(ValueError, match="whole numbers from 1"):
            secure.fixed_point(wrong, 1.0)
    with pytest.raises(ValueError, match="smaller value_range"):
        secure.fixed_point([10**6], 1e4)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            secure.encode({"x": np.array([0.0, value])}, 1, code)
    assert len(secure.encode({}, 1, code)) == 0


def gone(adapter, numbers):
    raise RuntimeError("the power went out")


@pytest.mark.parametrize("faults", [{}, {(1, 2): gone}, {(2, 0): gone, (3, 3): gone}])
@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam"])
def test_a_masked_federation_ends_where_the_open_one_does(faults, strategy):
    settings = [f"federation.strategy={strategy}", "federation.secure_aggregation.value_range=4"]
    plain, tables = tiny.federate(tiny.settings(settings[0]), tiny.client(faults))
    hidden, more = tiny.federate(
        tiny.settings(*settings, "federation.secure_aggregation.threshold=3"), tiny.masked(tiny.client(faults))
    )
    for key, value in plain.items():
        np.testing.assert_allclose(hidden[key], value, atol=3e-5)
    assert [row["used"] for row in more.history] == [row["used"] for row in tables.history]
    assert more.history[0]["bytes_up"] > sum(row[4] for row in more.clients if row[0] == 1)  # keys and shares count


def test_a_hospital_that_goes_between_keys_and_shares_is_left_out():
    inner, asked = tiny.masked(tiny.client()), []

    def app(message, context):
        if message.metadata.message_type == "query.shares" and context.node_config["partition-id"] == 1:
            asked.append(1)
            raise RuntimeError("gone")
        return inner(message, context)

    hidden, tables = tiny.federate(
        tiny.settings(
            "federation.secure_aggregation.threshold=3", "federation.secure_aggregation.value_range=4", rounds=1
        ),
        app,
    )
    plain, _ = tiny.federate(tiny.settings(rounds=1), tiny.client({(1, 1): gone}))
    np.testing.assert_allclose(hidden["a.B"], plain["a.B"], atol=3e-5)
    assert asked and tables.history[0]["used"] == 3


def test_too_few_hospitals_leave_the_adapter_and_two_such_rounds_end_the_run():
    few = {(1, 0): gone, (1, 1): gone}
    cfg = tiny.settings("federation.secure_aggregation.threshold=3", "federation.secure_aggregation.value_range=4")
    with pytest.raises(RuntimeError, match="2 masked updates arrived, 3 are needed.* hospital 0: .*power went out"):
        tiny.federate(cfg, tiny.masked(tiny.client(few)))
    later = {(2, 0): gone, (2, 1): gone}
    _, tables = tiny.federate(cfg, tiny.masked(tiny.client(later)))
    assert [row["used"] for row in tables.history] == [4, 0, 4]
    assert {row[2] for row in tables.clients if row[0] == 2} > {"not opened"}


def test_secrets_are_gone_after_they_were_used_once():
    cfg = tiny.settings("federation.secure_aggregation.threshold=3", rounds=1)
    with tiny.in_process.InProcessGrid(tiny.masked(tiny.client()), 4, {}) as grid:
        tiny.server_app.federate(grid, cfg, {key: value.copy() for key, value in tiny.START.items()})
        assert grid.states and all(masked_clients.KEPT not in state for state in grid.states.values())


@pytest.mark.parametrize(
    "override, said",
    [
        ("federation.secure_aggregation.threshold=2", "more than half of them"),
        ("federation.secure_aggregation.threshold=5", "more than half of them"),
        ("federation.strategy=FedMedian", "compares replies"),
        ("federation.strategy=QFedAvg", "stay at home"),
        ("federation.compression.up=int8", "a format of their own"),
        ("federation.compression.keep=0.1", "the largest values"),
    ],
)
def test_settings_that_masks_cannot_go_with(override, said):
    with pytest.raises(ValueError, match=said):
        tiny.federate(tiny.settings("federation.secure_aggregation.threshold=3", override))


def test_a_round_needs_its_minimum_of_replies_masked_or_not(caplog):
    cfg = tiny.settings("federation.secure_aggregation.threshold=3", "federation.min_replies=4", rounds=2)
    adapter, tables = tiny.federate(cfg, tiny.masked(tiny.client({(2, 1): gone})))
    before, _ = tiny.federate(
        tiny.settings("federation.secure_aggregation.threshold=3", rounds=1), tiny.masked(tiny.client())
    )
    assert [row["used"] for row in tables.history] == [4, 0]
    for key, value in before.items():
        np.testing.assert_allclose(adapter[key], value, atol=1e-5)


def without(name):
    """Takes a record out of an answer."""
    return lambda content: content.pop(name)


def change(record, **values):
    """Puts other values into a record of an answer."""
    return lambda content: content[record].update(values)


@pytest.mark.parametrize(
    "stage, spoil",
    [
        ("query.keys", without("secure")),
        ("query.keys", change("metrics", **{"num-examples": float("nan")})),
        ("query.keys", change("metrics", **{"num-examples": 0})),
        ("query.keys", change("secure", mask_key=b"abc")),
        ("query.keys", change("secure", another=1)),
        ("query.shares", change("secure", shares=[b"x"])),
        ("query.shares", change("secure", shares=["no bytes"] * 4)),
        ("query.reveal", change("secure", hospitals=[0])),
        ("query.reveal", change("secure", opened=["no bytes"] * 4)),
        ("train", without("arrays")),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_left_out(stage, spoil, caplog):
    """One of four hospitals answers wrongly; three are enough, and the others go on."""
    whole = tiny.masked(tiny.client())

    def app(message, context):
        kind, hospital = message.metadata.message_type, context.node_config["partition-id"]
        reply = whole(message, context)
        if kind == stage and hospital == 1:
            spoil(reply.content)
        return reply

    settings = ["federation.secure_aggregation.threshold=3", "federation.secure_aggregation.value_range=4"]
    hidden, tables = tiny.federate(tiny.settings(*settings, rounds=1), app)
    faults = {} if stage == "query.reveal" else {(1, 1): gone}
    plain, _ = tiny.federate(tiny.settings(rounds=1), tiny.client(faults))
    np.testing.assert_allclose(hidden["a.B"], plain["a.B"], atol=3e-5)
    assert "hospital 1" in caplog.text and tables.history[0]["used"] == (4 if stage == "query.reveal" else 3)


def test_secrets_of_a_round_stay_out_of_the_servers_checkpoint():
    cfg = tiny.settings("federation.secure_aggregation.threshold=3", rounds=1)
    with tiny.in_process.InProcessGrid(tiny.masked(tiny.client({(1, 1): gone})), 4, {}) as grid:
        tiny.server_app.federate(grid, cfg, {key: value.copy() for key, value in tiny.START.items()})
        assert any(masked_clients.KEPT in state for state in grid.states.values())  # of the one who went away
        assert not grid.remembered()


def test_shares_of_noise_add_up_to_whole_numbers_of_the_promised_spread():
    rng = np.random.default_rng(0)
    parts = [noise.whole_share(5e4, 3, 40_000, rng) for _ in range(4)]
    assert all(part.dtype == np.int64 for part in parts)
    assert np.std(sum(parts[:3])) == pytest.approx(5e4, rel=0.02)  # any three of four are enough
    assert np.std(sum(parts)) == pytest.approx(5e4 * np.sqrt(4 / 3), rel=0.02)
    assert kstest(sum(parts[:3]) / 5e4, "norm").pvalue > 1e-3 and abs(np.corrcoef(*parts[:2])[0, 1]) < 0.03


NOISY = [
    "federation.secure_aggregation.threshold=3",
    "federation.secure_aggregation.value_range=4",
    "federation.privacy.client={noise_multiplier: 0.5, clipping_norm: 2}",
]


@pytest.mark.parametrize("weights", ["uniform", "cards"])
def test_no_sum_is_opened_without_its_noise(weights):
    """Against the mean of clipped updates, over many rounds: noise of z · C · max pₖ · √(n / t) per value."""
    apart, shares = [], [1 / 4] * 4 if weights == "uniform" else [0.1, 0.2, 0.3, 0.4]
    for seed in range(30):
        how = [f"federation.privacy.noise_seed={seed}", f"federation.privacy.client.weights={weights}"]
        cfg = tiny.settings(*NOISY, *how, rounds=1)
        found, _ = tiny.federate(cfg, tiny.masked(tiny.client()))
        made = [tiny.update(tiny.START, hospital, 1) for hospital in range(4)]
        cut = [noise.clip({key: one[key] - tiny.START[key] for key in one}, 2.0) for one in made]
        mean = {key: tiny.START[key] + np.average([one[key] for one in cut], 0, shares) for key in found}
        apart += [(found[key] - mean[key]).ravel() for key in found]
    apart = np.concatenate(apart)
    assert apart.std() == pytest.approx(0.5 * 2 * np.sqrt(4 / 3) * max(shares), rel=0.12) and abs(apart.mean()) < 0.06


def test_noise_repeats_with_its_seed_and_not_without():
    def run(*more):
        return tiny.federate(tiny.settings(*NOISY, *more, rounds=1), tiny.masked(tiny.client()))[0]["a.B"]

    one, two, other = (run(f"federation.privacy.noise_seed={seed}") for seed in (1, 1, 2))
    assert (one == two).all() and (one != other).all() and (run() != run()).all()
    assert server_app.compose(tiny.settings(*NOISY)).masked.how.noise_multiplier == 0.5
    assert not any(isinstance(inner, Noised) for inner in server_app.compose(tiny.settings(*NOISY)).top.within())


def test_noise_behind_masks_needs_a_clip_and_comes_once():
    with pytest.raises(ValueError, match="clipping_norm=0.0: noise protects only what is clipped"):
        Masked(FedAvg(), 3, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="Noised within would add its own, too"):
        Masked(Noised(FedAvg(), 1.0, 0.5), 3, clipping_norm=0.5, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="take a smaller value_range"):
        secure.fixed_point([1, 1, 1], 1.0, 1e6)
    assert secure.fixed_point([1, 1, 1], 1.0, 1.0).bits < secure.fixed_point([1, 1, 1], 1.0).bits
