"""The checks of exercises: a right solution passes, and each usual slip is told from it."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedAvgM

from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.study import exercises


class Layer(torch.nn.Module):
    """The solution of notebook 02; ``slip`` names what is wrong with it."""

    def __init__(self, base, rank, alpha, slip=""):
        super().__init__()
        self.base, self.scale, self.slip = base, alpha if slip == "scale" else alpha / rank, slip
        inputs, outputs = base.weight.shape[::-1] if slip == "shapes" else base.weight.shape
        for parameter in base.parameters():
            parameter.requires_grad_(slip == "all move")
        self.A = torch.nn.Parameter(torch.randn(rank, inputs))
        self.B = torch.nn.Parameter((torch.ones if slip == "start" else torch.zeros)(outputs, rank))

    def forward(self, x):
        return self.base(x) + self.scale * x @ self.A.T @ self.B.T


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("", "right"),
        ("shapes", "your factors have the shapes"),
        ("start", "before any training"),
        ("scale", "with factors that are not zero"),
        ("all move", "something beside A and B"),
    ],
)
def test_a_lora_layer_around_a_conv1d(slip, says):
    assert says in exercises.lora_of_a_conv1d(lambda *given: Layer(*given, slip=slip))


class Momentum(FedAvg):
    """The solution of notebook 03."""

    factor, velocity = 0.5, None

    def configure_train(self, server_round, arrays, config, grid):
        self.before = from_record(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        step = {key: value - self.before[key] for key, value in from_record(arrays).items()}
        old = self.velocity or {key: 0 * value for key, value in step.items()}
        self.velocity = {key: self.factor * old[key] + value for key, value in step.items()}
        return to_record({key: self.before[key] + value for key, value in self.velocity.items()}), metrics


class Lighter(Momentum):
    factor = 0.4


class Silent(FedAvg):
    """Forgets to give its average back."""

    def aggregate_train(self, server_round, replies):
        super().aggregate_train(server_round, replies)
        return None, None


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Momentum, "right"),
        (FedAvg, "after 2 rounds of two clients the average is another"),
        (Lighter, "after 2 rounds"),
        (lambda **given: Silent(**given), "after 1 rounds there are no arrays"),
        (lambda **given: FedAvgM(server_learning_rate=0.5, server_momentum=0.5, **given), "after 1 rounds"),
    ],
)
def test_momentum_at_the_server(strategy, says):
    assert says in exercises.server_momentum(lambda: strategy(fraction_evaluate=0.0))


def overlap(question, options, find=r"\w{4,}", lower=True):
    """The solution of notebook 01."""
    texts = [text.lower() if lower else text for text in (question, *options)]
    asked, *offered = (set(re.findall(find, text)) for text in texts)
    shared = [len(asked & words) for words in offered]
    return shared.index(max(shared))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (overlap, "right"),
        (partial(overlap, find=r"\w+"), "What is Late walking?"),
        (partial(overlap, lower=False), "not yet"),
        (partial(overlap, find=r"\S{4,}"), "What is Crimson elbow?"),
        (lambda question, options: options[0], "gives 'An elbow"),
    ],
)
def test_the_rule_that_counts_shared_words(rule, says):
    assert says in exercises.word_overlap(rule)


@pytest.mark.parametrize(
    "rule",
    [
        lambda question, options: max(range(len(options)), key=lambda place: len(options[place])),
        partial(overlap, find=r"\w{5,}"),
    ],
    ids=["the longest option", "words of five letters or more"],
)
def test_another_rule_is_not_taken_for_the_one_that_counts_shared_words(rule):
    assert "not yet" in exercises.word_overlap(rule)


class Quorum(FedAvg):
    """The solution of notebook 03."""

    least = 0.5

    def configure_train(self, server_round, arrays, config, grid):
        self.before = arrays
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.asked = len(messages)
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        there = sum(not reply.has_error() for reply in replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        return (arrays if there >= self.asked * self.least else self.before), metrics


class Everybody(Quorum):
    least = 1.0


class NoAnswer(Quorum):
    """Another right one: without an answer Flower itself goes on with the old adapter."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        there = sum(not reply.has_error() for reply in replies)
        return FedAvg.aggregate_train(self, server_round, replies) if 2 * there >= self.asked else (None, None)


class Beginning(Quorum):
    """Goes back to the adapter of the first round, not of the one before."""

    first = None

    def configure_train(self, server_round, arrays, config, grid):
        self.first = self.first or arrays
        messages = super().configure_train(server_round, arrays, config, grid)
        self.before = self.first
        return messages


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Quorum, "right"),
        (FedAvg, "after round 2, in which 2 of 3 clients failed"),
        (Everybody, "after round 3, in which 1 of 3 clients failed"),
        (NoAnswer, "right"),
        (Beginning, "after round 2, in which 2 of 3 clients failed"),
        (Silent, "after 1 rounds there are no arrays"),
    ],
)
def test_a_round_needs_half_of_its_clients(strategy, says):
    assert says in exercises.quorum(lambda: strategy(fraction_evaluate=0.0))


class FFA(FedAvg):
    """The solution of notebook 04; ``slip`` names what is wrong with it."""

    slip = ""

    def configure_train(self, server_round, arrays, config, grid):
        adapter = from_record(arrays)
        self.resting = {key: value for key, value in adapter.items() if "lora_A" in key}
        moving = {key: value for key, value in adapter.items() if "lora_B" in key}
        return super().configure_train(server_round, to_record(moving), config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.slip == "lost":
            return arrays, metrics
        if self.slip == "unweighted":
            sent = [from_record(reply.content["arrays"]) for reply in replies]
            arrays = to_record({key: np.mean([one[key] for one in sent], axis=0) for key in sent[0]})
        grown = {key: value * (2 if self.slip == "moved" else 1) for key, value in self.resting.items()}
        return to_record(grown | from_record(arrays)), metrics


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("", "right"),
        ("lost", "has layer.lora_B"),
        ("moved", "A has changed"),
        ("unweighted", "B is not the mean of two rounds, weighted by the examples"),
    ],
)
def test_ffa_lora_at_the_server(slip, says):
    assert says in exercises.ffa_lora(lambda: type("Slip", (FFA,), {"slip": slip})(fraction_evaluate=0.0))
    assert exercises.ffa_lora(lambda: FedAvg(fraction_evaluate=0.0)) == "not yet: A is sent"


def worst(honest):
    """The solution of notebook 04."""
    ends = np.where(honest.mean(axis=0) > 0, honest.min(axis=0), honest.max(axis=0))
    return np.stack([ends, ends])


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (worst, "right"),
        (lambda honest: -10 * honest[:2], "would be seen"),
        (lambda honest: honest[:2], "100% are left"),
        (lambda honest: worst(honest)[0], "the shape (2, 2000), yours (2000,)"),
        (lambda honest: None, "the shape (2, 2000), yours ()"),
        (lambda honest: np.stack([honest.min(axis=0) - 0.001] * 2), "would be seen"),
        (lambda honest: np.stack([honest.max(axis=0) + 0.001] * 2), "would be seen"),
        (lambda honest: np.nan * honest[:2], "would be seen"),
        (lambda honest: np.stack([honest.min(axis=0), honest.max(axis=0)]), "are left; get below half"),
    ],
)
def test_two_of_six_beat_the_median_without_standing_out(attack, says):
    assert says in exercises.beats_the_median(attack)


def test_what_is_not_answered_is_said_so():
    checks = [exercises.word_overlap, exercises.lora_of_a_conv1d, exercises.server_momentum, exercises.quorum]
    checks += [exercises.ffa_lora, exercises.beats_the_median]
    assert {check(None) for check in checks} == {"not answered yet"}
