"""Drawings that show an idea, not data."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from fedllm_helpers.plotting.figures import STYLE


def data_routes() -> Figure:
    """Three ways to bring private records and a model together, and what crosses the hospital's wall in each."""
    routes = (
        ("Closed model behind an API", "records in prompts", "#b2182b", "the vendor's model"),
        ("Training at a third party", "whole training records", "#b2182b", "a cloud's GPU"),
        ("Federated fine-tuning", "adapter, there and back", "#1b8a5a", "a server that averages"),
    )
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9.0, 3.0))
        for axes, (title, cargo, colour, outside) in zip(panels, routes, strict=True):
            axes.set(xlim=(0, 10), ylim=(0, 10), title=title)
            axes.axis("off")
            federated = outside == "a server that averages"
            for x in (0.4, 3.7, 7.0) if federated else (3.7,):
                _box(
                    axes,
                    x,
                    0.3,
                    2.7,
                    3.4,
                    "#dceaf7",
                    "hospital",
                    ("records", "training") if federated else ("records",),
                )
                style = "<|-|>" if federated else "-|>"
                arrow = {"arrowstyle": style, "color": colour, "lw": 2.2, "shrinkA": 2, "shrinkB": 2}
                axes.annotate("", (5.05 + (x - 3.7) * 0.35, 7.0), (x + 1.35, 3.8), arrowprops=arrow)
            _box(axes, 2.0, 7.1, 6.1, 2.4, "#f2f2f2", outside, () if federated else ("records seen here",))
            axes.text(5.05, 5.4, cargo, ha="center", color=colour, fontsize=10, backgroundcolor="white")
    return figure


def tokens(pieces: Sequence[str], learned: Sequence[bool], title: str, width: int = 76) -> Figure:
    """A text as its tokens, in boxes: grey ones are given to the model, green ones it learns to say.

    Args:
        pieces: the tokens as text; a blank is drawn as ``·``.
        learned: for each, whether the loss counts it.
        title: of the figure.
        width: characters in a line.
    """
    rows: list[list[tuple[str, bool]]] = [[]]
    for piece, counts in zip(pieces, learned, strict=True):
        text = repr(piece)[1:-1].replace(" ", "·")
        if sum(len(one) + 1 for one, _ in rows[-1]) + len(text) + 1 > width:
            rows.append([])
        rows[-1].append((text, counts))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(9.0, 0.9 + 0.36 * len(rows)))
        axes.set(xlim=(0, width), ylim=(len(rows) + 0.9, -0.2), title=title)
        axes.axis("off")
        for line, row in enumerate(rows):
            place = 0.0
            for text, counts in row:
                _token(axes, place, line, text, counts)
                place += len(text) + 1
        for place, text, counts in ((0.0, "given", False), (9.0, "learned", True)):
            _token(axes, place, len(rows) + 0.1, text, counts)
    return figure


def _token(axes: Axes, x: float, y: float, text: str, learned: bool) -> None:
    face, edge = ("#cdeadd", "#1b8a5a") if learned else ("#eeeeee", "#9a9a9a")
    shape = FancyBboxPatch(
        (x + 0.1, y + 0.05), len(text) + 0.5, 0.7, "round,pad=0.0,rounding_size=0.12", fc=face, ec=edge
    )
    shape.set_gid("learned" if learned else "given")
    axes.add_patch(shape)
    axes.text(x + 0.35 + len(text) / 2, y + 0.42, text, ha="center", va="center", family="monospace", fontsize=8)


def lora_update(outputs: int, inputs: int, rank: int) -> Figure:
    """A LoRA layer: the frozen square W, and beside it the two thin factors whose product is added to it."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 2.9))
        axes.set(xlim=(0, 13), ylim=(0, 5.4), aspect="equal")
        axes.axis("off")
        blocks = (
            (0.5, 0.8, 4.0, 4.0, "#e6e6e6", f"W\n{outputs} × {inputs}\nfrozen"),
            (6.7, 0.8, 0.7, 4.0, "#cdeadd", "B"),
            (8.6, 4.1, 4.0, 0.7, "#cdeadd", "A"),
        )
        for x, y, width, height, face, text in blocks:
            axes.add_patch(Rectangle((x, y), width, height, fc=face, ec="#555555"))
            axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)
        axes.text(5.6, 2.8, "+ α/r ·", ha="center", va="center", fontsize=12)
        axes.text(8.0, 4.45, "·", ha="center", va="center", fontsize=14)
        axes.text(7.05, 0.35, f"{outputs} × {rank}", ha="center", va="center", fontsize=9)
        axes.text(10.6, 3.7, f"{rank} × {inputs}", ha="center", va="center", fontsize=9)
        share = rank * (outputs + inputs) / (outputs * inputs)
        trained = f"trained: {rank * (outputs + inputs):,} numbers\n{share:.0%} of the {outputs * inputs:,} of W"
        axes.text(8.7, 2.0, trained, ha="left", va="center", color="#1b8a5a", fontsize=10)
    return figure


def flower_apps(hospitals: int = 3) -> Figure:
    """One round of a Flower app: the ServerApp, the Grid that carries messages, and a ClientApp at each hospital."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(9.0, 4.0))
        axes.set(xlim=(0, 18), ylim=(0, 10.2))
        axes.axis("off")
        _box(axes, 5.5, 7.7, 7.0, 2.3, "#f2f2f2", "ServerApp", ("FedAvg: ask, wait, average",))
        _box(axes, 1.0, 5.2, 16.0, 1.3, "#fff4dc", "Grid: who is there, and their messages", ())
        step = 16.0 / hospitals
        for place in range(hospitals):
            x = 1.0 + step * place + (step - 4.4) / 2
            _box(axes, x, 0.3, 4.4, 3.5, "#dceaf7", "ClientApp", (f"hospital {place}: own cards", "train, send back"))
            for shift, colour, ends in ((-0.5, "#1f4e8c", "<|-"), (0.5, "#1b8a5a", "-|>")):
                arrow = {"arrowstyle": ends, "color": colour, "lw": 2.0, "shrinkA": 1, "shrinkB": 1}
                axes.annotate("", (x + 2.2 + shift, 5.1), (x + 2.2 + shift, 3.9), arrowprops=arrow)
        for shift, colour, ends in ((-0.5, "#1f4e8c", "<|-"), (0.5, "#1b8a5a", "-|>")):
            arrow = {"arrowstyle": ends, "color": colour, "lw": 2.0, "shrinkA": 1, "shrinkB": 1}
            axes.annotate("", (9.0 + shift, 7.6), (9.0 + shift, 6.6), arrowprops=arrow)
        axes.text(13.0, 9.2, "down: adapter, orders", color="#1f4e8c", fontsize=9.5)
        axes.text(13.0, 8.3, "up: adapter, a few numbers", color="#1b8a5a", fontsize=9.5)
    return figure


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, face: str, head: str, lines: Sequence[str]
) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.05,rounding_size=0.3", fc=face, ec="#555555"))
    axes.text(x + width / 2, y + height - 0.75, head, ha="center", va="center", fontweight="bold", fontsize=9)
    for number, line in enumerate(lines):
        axes.text(x + width / 2, y + height - 1.75 - number, line, ha="center", va="center", fontsize=8.5)
