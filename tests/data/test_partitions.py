"""Who holds which cards."""

import numpy as np
import pytest

from fedllm_helpers import data
from fedllm_helpers.config.schema import PARTITIONS
from fedllm_helpers.data import partitions


@pytest.fixture(scope="module")
def hpo():
    return data.choose(data.load_flashcards("hpo"), ["eye", "ear", "nervous system", "integument"], 50)


@pytest.mark.parametrize("scheme", PARTITIONS)
@pytest.mark.parametrize("hospitals", [1, 3, 4, 9])
def test_every_card_goes_to_exactly_one_hospital(hpo, scheme, hospitals):
    parts = partitions.partition(hpo, hospitals, scheme, seed=1)
    assert len(parts) == hospitals and all(len(part) for part in parts)
    assert sorted(i for part in parts for i in part["card_id"]) == sorted(hpo["card_id"])
    again = partitions.partition(hpo, hospitals, scheme, seed=1)
    assert [part["card_id"] for part in parts] == [part["card_id"] for part in again]
    if hospitals > 1:
        other = partitions.partition(hpo, hospitals, scheme, seed=2)
        assert [part["card_id"] for part in parts] != [part["card_id"] for part in other]


def test_iid_is_even(hpo):
    parts = partitions.partition(hpo.select(range(103)), 10)
    assert sorted(len(part) for part in parts) == [10] * 7 + [11] * 3


@pytest.mark.parametrize(
    ("hospitals", "specialties_each"), [(4, [1, 1, 1, 1]), (2, [2, 2]), (3, [2, 1, 1]), (6, [1] * 6)]
)
def test_by_specialty_a_hospital_has_some_whole_or_shared_specialties(hpo, hospitals, specialties_each):
    table = partitions.holdings(partitions.partition(hpo, hospitals, "specialty"))
    assert (table > 0).sum(axis=1).tolist() == specialties_each
    if hospitals <= 4:
        assert ((table > 0).sum(axis=0) == 1).all(), "no specialty is divided while there are enough of them"


def test_small_alpha_is_more_uneven_than_large(hpo):
    def largest_share(alpha):
        table = partitions.holdings(partitions.partition(hpo, 4, "dirichlet", alpha=alpha, seed=3))
        return (table / table.sum()).max().mean()

    assert largest_share(0.1) > 0.7 > 0.4 > largest_share(100.0)


def test_quantity_grows_with_the_number(hpo):
    sizes = [len(part) for part in partitions.partition(hpo, 4, "quantity")]
    assert sizes == [20, 40, 60, 80]


def test_a_rare_specialty_cannot_be_shared(hpo):
    rare = hpo.select([i for i, name in enumerate(hpo["specialty"]) if name != "ear"] + [hpo["specialty"].index("ear")])
    with pytest.raises(ValueError, match="specialty cannot give each of 8 hospitals a card of 151"):
        partitions.partition(rare, 8, "specialty")


def test_held_out_cards_follow_the_training_cards(hpo):
    train, test = data.split(hpo, 0.2, 0)
    parts = partitions.partition(train, 4, "specialty")
    like = partitions.partition_like(test, parts)
    assert [set(part["specialty"]) for part in like] == [set(part["specialty"]) for part in parts]
    assert sorted(i for part in like for i in part["card_id"]) == sorted(test["card_id"])
    shares = partitions.holdings(partitions.partition_like(test, partitions.partition(train, 3, "quantity")))
    assert (np.diff(shares.sum(axis=1)) > 0).all()


def test_what_cannot_be_divided_is_one_line(hpo):
    for scheme, hospitals, expected in [
        ("iid", 201, "num_clients=201: there are only 200 cards"),
        ("dirichlet", 190, "dirichlet cannot give each of 190 hospitals"),
        ("quantity", 60, "quantity cannot give each of 60 hospitals"),
        ("specialty", 4 * 60, "num_clients=240: there are only"),
        ("by name", 2, "allowed are iid, specialty, dirichlet, quantity"),
    ]:
        with pytest.raises(ValueError, match=expected) as error:
            partitions.partition(hpo, hospitals, scheme)
        assert "\n" not in str(error.value)
