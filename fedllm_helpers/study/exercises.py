"""Checks of the exercises that are written in code: they say what is not right yet, and never how it is done."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedAvgM, Strategy
from transformers.pytorch_utils import Conv1D

from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.grids.in_process import run_apps

OPEN, RIGHT = "not answered yet", "right"
# made-up questions: the options, and the one that shares most words of four letters or more with the question
OVERLAPS = (
    ("What is Crimson elbow?", ["An elbow that is CRIMSON.", "A knee.", "What is it?", "Crimson hair."], 0),
    (
        "What is Late walking?",
        ["Talking.", "It is what it is.", "Walking that begins late, later than that.", "Late."],
        2,
    ),
    (
        "What is Abnormal ear lobe?",
        ["An ear.", "What is.", "Of an ear: is it an ear?", "An abnormal lobe (of ears)."],
        3,
    ),
    ("What is a Grey lens?", ["Crystalline opacities of unknown origin in many.", "Grey lens.", "Eyes.", "A lens."], 1),
    ("What is Ring finger?", ["Bringing up a fingering.", "The finger.", "Hands.", "Toes."], 1),
    ("What is Deep pain?", ["Pain, pain, pain.", "Deep pain in a joint.", "Aches.", "None."], 1),
    ("What is Red eye of a dog?", ["A red eye of a dog.", "Whatever.", "What else.", "A dog."], 2),
)


def word_overlap(rule: Callable[[str, list[str]], int] | None) -> str:
    """The baseline that reads words and knows no medicine. Exercise of notebook 01.

    Args:
        rule: from a question and its options to the place of the option that shares most words with the question;
            words have four letters or more, in whatever case.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if rule is None:
        return OPEN
    for question, options, wanted in OVERLAPS:
        found = rule(question, list(options))
        if found != wanted:
            return f"not yet: for {question!r} and {options} it gives {found!r}"
    return RIGHT


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


def quorum(strategy: Callable[[], Strategy] | None) -> str:
    """FedAvg that keeps the old adapter where fewer than half of the clients replied. Exercise of notebook 03.

    Args:
        strategy: makes one; three clients are asked, of whom two fail in the second round and one in the third.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if strategy is None:
        return OPEN
    clients, failing = 3, {2: (0, 1), 3: (2,)}
    wanted = [_after(FedAvg(fraction_evaluate=0.0), 1, clients)]
    wanted.append(wanted[0])  # the second round counts for nothing
    places, weights = _places(clients)[:2], np.array([1, 2])
    wanted.append(np.average((wanted[0] + places) / 2, axis=0, weights=weights).astype(np.float32))
    for rounds, right in enumerate(wanted, 1):
        found = _after(strategy(), rounds, clients, failing)
        if found is None:
            return f"not yet: after {rounds} rounds there are no arrays"
        if not np.allclose(found, right, atol=1e-5):
            lost = len(failing.get(rounds, ()))
            return f"not yet: after round {rounds}, in which {lost} of {clients} clients failed, the adapter is another"
    return RIGHT


def ffa_lora(strategy: Callable[[], Strategy] | None) -> str:
    """FFA-LoRA at the server: A stays as it was, only B is sent and averaged. Exercise of notebook 04.

    Args:
        strategy: makes one; two clients train what they are sent.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if strategy is None:
        return OPEN
    sent: list[list[str]] = []
    start = {"layer.lora_A.weight": np.float32([[1, 2]]), "layer.lora_B.weight": np.zeros((3, 1), np.float32)}
    arrays = _run(strategy(), 2, 2, start, lambda key, node: np.float32(1 + 2 * node), sent=sent)
    if {"layer.lora_A.weight"} & {key for keys in sent for key in keys}:
        return "not yet: A is sent"
    if set(arrays) != set(start):
        return f"not yet: the adapter that comes out has {', '.join(sorted(arrays)) or 'nothing'}"
    if not np.array_equal(arrays["layer.lora_A.weight"], start["layer.lora_A.weight"]):
        return "not yet: A has changed"
    right = np.allclose(arrays["layer.lora_B.weight"], (0.75 * 7 / 3), atol=1e-5)
    return RIGHT if right else "not yet: B is not the mean of two rounds, weighted by the examples"


def beats_the_median(attack: Callable[[np.ndarray], np.ndarray] | None) -> str:
    """Two of six hospitals move a median although each of their numbers looks honest. Exercise of notebook 04.

    Args:
        attack: from the four honest moves, shape (4, numbers), to two poisoned ones, shape (2, numbers).

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if attack is None:
        return OPEN
    rng = np.random.default_rng(0)
    way = rng.normal(size=2000)
    honest = 0.5 * way + rng.normal(size=(4, 2000))
    poisoned = np.asarray(attack(honest.copy()))
    if poisoned.shape != (2, 2000):
        return f"not yet: two moves have the shape (2, 2000), yours {poisoned.shape}"
    low, high = honest.min(axis=0), honest.max(axis=0)
    if not ((poisoned >= low - 1e-9) & (poisoned <= high + 1e-9)).all():
        return "not yet: some of your numbers lie outside of what the honest ones span, and would be seen"
    before, after = (float(np.median(moves, axis=0) @ way / (way @ way)) for moves in (honest, [*honest, *poisoned]))
    if after < 0.5 * before:
        return RIGHT
    return f"not yet: of what the median learned without you, {after / before:.0%} are left; get below half"


def _places(clients: int) -> np.ndarray:
    """Where each client wants to go, shape (clients, 3)."""
    return np.float32([1.0, -2.0, 3.0]) * (1 + 2 * np.arange(clients, dtype=np.float32)[:, None])


def _after(
    strategy: Strategy, rounds: int, clients: int = 2, failing: dict[int, Sequence[int]] | None = None
) -> np.ndarray | None:
    """Where clients, who go half of the way to a place of their own, come to in so many rounds."""
    start, places = {"w": np.zeros(3, np.float32)}, _places(clients)
    return _run(strategy, rounds, clients, start, lambda key, node: places[node], failing).get("w")


def _run(
    strategy: Strategy,
    rounds: int,
    clients: int,
    start: Adapter,
    place: Callable[[str, int], np.ndarray],
    failing: dict[int, Sequence[int]] | None = None,
    sent: list[list[str]] | None = None,
) -> Adapter:
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """Half of the way to where this client wants to go; or none, in a round in which it fails."""
        node = int(context.node_config["partition-id"])
        if node in (failing or {}).get(int(message.content["config"]["server-round"]), ()):
            raise RuntimeError("this hospital is not there")
        here = from_record(message.content["arrays"])
        if sent is not None:
            sent.append(list(here))
        moved = {key: ((value + place(key, node)) / 2).astype(np.float32) for key, value in here.items()}
        numbers = MetricRecord({"num-examples": 1 + node})
        return Message(RecordDict({"arrays": to_record(moved), "metrics": numbers}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        """All rounds."""
        result = strategy.start(grid, to_record(start), num_rounds=rounds, train_config=ConfigRecord())
        context.state["arrays"] = result.arrays or ArrayRecord()

    return from_record(run_apps(server, client, clients).state["arrays"])
