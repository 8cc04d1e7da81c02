"""Checks of the exercises that are written in code: they say what is not right yet, and never how it is done."""

from collections.abc import Callable

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvgM, Strategy
from transformers.pytorch_utils import Conv1D

from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.federation.in_process import run_apps

OPEN, RIGHT = "not answered yet", "right"


def lora_of_a_conv1d(layer: Callable[[Conv1D, int, float], torch.nn.Module] | None) -> str:
    """A LoRA layer around GPT-2's ``Conv1D``, which holds its weight as (inputs, outputs). Exercise of notebook 02.

    Args:
        layer: makes a module with the parameters ``A``, (rank, inputs), and ``B``, (outputs, rank).

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if layer is None:
        return OPEN
    torch.manual_seed(0)
    base, rank, alpha, x = Conv1D(5, 7), 3, 6.0, torch.randn(2, 4, 7)  # 7 inputs, 5 outputs
    module = layer(base, rank, alpha)
    shapes = {name: tuple(getattr(module, name).shape) for name in ("A", "B") if hasattr(module, name)}
    if shapes != {"A": (rank, 7), "B": (5, rank)}:
        return f"not yet: with 7 inputs, 5 outputs and rank 3 your factors have the shapes {shapes}"
    with torch.no_grad():
        if not torch.allclose(module(x), base(x), atol=1e-6):
            return "not yet: before any training it should say what the layer says without it"
        module.A.normal_()
        module.B.normal_()
        wanted = base(x) + alpha / rank * x @ (module.B @ module.A).T
        if not torch.allclose(module(x), wanted, atol=1e-4):
            return "not yet: with factors that are not zero it computes something else"
    moving = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return RIGHT if moving == rank * (7 + 5) else "not yet: something beside A and B would be trained"


def server_momentum(strategy: Callable[[], Strategy] | None) -> str:
    """FedAvg with a momentum of 0.5 at the server, over four rounds of two clients. Exercise of notebook 03.

    Args:
        strategy: makes one; it is asked for the first time with the arrays of the start.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if strategy is None:
        return OPEN
    for rounds in (1, 2, 4):
        wanted = _after(FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.5), rounds)
        found = _after(strategy(), rounds)
        if found is None:
            return f"not yet: after {rounds} rounds there are no arrays"
        if not np.allclose(found, wanted, atol=1e-5):
            return f"not yet: after {rounds} rounds of two clients the average is another"
    return RIGHT


def _after(strategy: Strategy, rounds: int) -> np.ndarray | None:
    """Where two clients, which go half of the way to a place of their own, come to in so many rounds."""
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """Half of the way."""
        node = int(context.node_config["partition-id"])
        here = from_record(message.content["arrays"])["w"]
        there = np.float32([1.0, -2.0, 3.0]) * (1 + 2 * node)
        numbers = MetricRecord({"num-examples": 1 + node})
        return Message(
            RecordDict({"arrays": to_record({"w": (here + there) / 2}), "metrics": numbers}), reply_to=message
        )

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        """All rounds."""
        start = to_record({"w": np.zeros(3, np.float32)})
        result = strategy.start(grid, start, num_rounds=rounds, train_config=ConfigRecord())
        context.state["arrays"] = result.arrays

    arrays = from_record(run_apps(server, client, 2).state["arrays"])
    return arrays.get("w")
