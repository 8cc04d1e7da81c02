"""The checks of the exercises on privacy: a right solution passes, and each usual slip is told from it."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedllm_helpers.study import privacy_exercises


def shadows(slip=""):
    """The solution of notebook 05a; ``slip`` names what is wrong with it."""

    def score(attacked, shadows, inside):
        outside = np.nanmean(shadows if slip == "all" else np.where(inside, np.nan, shadows), axis=0)
        found = -attacked + outside if slip == "sign" else attacked - outside
        return attacked if slip == "loss" else found[:-1] if slip == "shape" else found

    return score


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("", "right"),
        ("all", "trained on that very card"),
        ("sign", "get above 0.95"),
        ("loss", "get above 0.95"),
        ("shape", r"yours have (399,)"),
    ],
)
def test_membership_by_shadow_models(slip, says):
    assert says in privacy_exercises.shadow_models(shadows(slip))


def patients(slip=""):
    """The solution of notebook 05b; ``slip`` names what is wrong with it."""

    def cut(gradients, limit):
        return gradients * np.minimum(1, limit / np.linalg.norm(gradients, axis=1, keepdims=True))

    def total(gradients, owners, limit):
        if slip == "cards":
            return cut(gradients, limit).sum(axis=0)
        means = [gradients[owners == one].mean(axis=0) for one in np.unique(owners)]
        sums = [gradients[owners == one].sum(axis=0) for one in np.unique(owners)]
        if slip == "late":
            return np.sum(sums, axis=0)
        return {"sums": cut(np.array(sums), limit).sum(axis=0), "shape": cut(np.array(means), limit)}.get(
            slip, cut(np.array(means), limit).sum(axis=0)
        )

    return total


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("", "right"),
        ("cards", "cards moves the sum by"),
        ("late", "cards moves the sum by"),
        ("sums", "it is another sum"),
        ("shape", "yours has the shape (9, 7)"),
    ],
)
def test_a_sum_that_one_patient_moves_by_no_more_than_the_clip(slip, says):
    assert says in privacy_exercises.clipped_by_patient(patients(slip))


def two_at_most(slip=""):
    """The solution of notebook 06; ``slip`` names what is wrong with it."""
    everywhere = {}

    def mod(message, context, call_next):
        if message.metadata.message_type != "train" and slip != "all kinds":
            return call_next(message, context)
        place = {"global": "all", "by node": message.metadata.dst_node_id}.get(slip)
        kept = context.state.config_records.get("answered", ConfigRecord({"times": 0}))
        times = kept["times"] if place is None else everywhere.get(place, 0)
        if slip == "late":
            call_next(message, context)
        if times >= (3 if slip == "three" else 2):
            raise RuntimeError("this hospital has answered twice, and does so no more")
        everywhere[place] = times + 1
        context.state["answered"] = ConfigRecord({"times": times + 1})
        return call_next(message, context)

    return mod


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("", "right"),
        ("global", "order 4 of run 1, a train for hospital 0, is refused"),
        ("by node", "order 1 of run 2, a train for hospital 0, is refused"),
        ("all kinds", "order 4 of run 1, a train for hospital 0, is refused"),
        ("three", "order 5 of run 1, a train for hospital 0, is the third, and is trained"),
        ("late", "order 5 of run 1, a train for hospital 0, is the third, and is trained"),
    ],
)
def test_a_hospital_that_answers_twice(slip, says):
    assert says in privacy_exercises.two_rounds_at_most(two_at_most(slip))


def test_what_is_not_answered_is_said_so():
    checks = (
        privacy_exercises.shadow_models,
        privacy_exercises.clipped_by_patient,
        privacy_exercises.two_rounds_at_most,
    )
    assert {check(None) for check in checks} == {"not answered yet"}
