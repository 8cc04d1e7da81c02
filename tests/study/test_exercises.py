"""The checks of exercises: a right solution passes, and each usual slip is told from it."""

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


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Momentum, "right"),
        (FedAvg, "after 2 rounds of two clients the average is another"),
        (Lighter, "after 2 rounds"),
        (lambda **given: FedAvgM(server_learning_rate=0.5, server_momentum=0.5, **given), "after 1 rounds"),
    ],
)
def test_momentum_at_the_server(strategy, says):
    assert says in exercises.server_momentum(lambda: strategy(fraction_evaluate=0.0))


def test_what_is_not_answered_is_said_so():
    assert exercises.lora_of_a_conv1d(None) == exercises.server_momentum(None) == "not answered yet"
