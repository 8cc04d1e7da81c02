"""Drawings and figures of how adapters are combined."""

import re

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedllm_helpers.plotting import sketch
from fedllm_helpers.plotting.figures import STYLE
from fedllm_helpers.plotting.sketch import arrow, block, box, note

LOOKS = (("#1f4e8c", "o", "-"), ("#e08214", "s", "--"), ("#1b8a5a", "^", ":"), ("#b2479a", "D", "-."))


def errors_by_layer(table: pd.DataFrame, title: str) -> Figure:
    """Relative error of a combination, along the blocks of a model: a panel per partition, a line per projection.

    Args:
        table: columns ``partition``, ``round``, ``layer`` (a name with ``.layers.N.`` in it) and ``error``.
        title: of the figure.
    """
    block = table["layer"].map(lambda name: int(re.search(r"\.(?:layers|h)\.(\d+)\.", name)[1]))
    table = table.assign(block=block, projection=table["layer"].str.split(".").str[-1])
    partitions = list(dict.fromkeys(table["partition"]))
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, len(partitions), figsize=(8.4, 3.4), sharey=True, squeeze=False)
        for axes, partition in zip(panels[0], partitions, strict=True):
            groups = table[table["partition"] == partition].groupby(["projection", "round"], sort=True)
            for ((projection, number), part), (colour, mark, line) in zip(groups, LOOKS, strict=False):
                label = f"{projection}, round {number}"
                look = {"color": colour, "marker": mark, "linestyle": line, "markersize": 4}
                axes.plot(part["block"], part["error"], label=label, **look)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(xlabel="block of the model", title=partition, ylim=(0, None))
        panels[0][0].set_ylabel("relative error of the update")
        figure.suptitle(title)
        figure.legend(handles=panels[0][0].get_lines(), loc="outside right upper")
    return figure


def two_means() -> Figure:
    """Opens notebook 04: two hospitals' products, averaged in two orders, which do not give the same."""
    alt = "Two hospitals send thin factors B and A. Above: multiply, then average. Below: average, then multiply. "
    figure, axes = sketch.canvas(9, 2.6, alt + "The two results differ.")
    for place in (0, 1):
        y = 1.6 - 1.25 * place
        note(axes, 0.15, y + 0.35, f"hospital\n{place + 1}", side="left", size=8.5)
        _product(axes, 0.9, y, f"$B_{place + 1}$", f"$A_{place + 1}$")
    for y, first, second, colour in (
        (1.85, "multiply", "average", sketch.UP),
        (0.55, "average", "multiply", sketch.BAD),
    ):
        arrow(axes, (2.5, 1.3), (3.3, y), colour)
        box(axes, 3.4, y - 0.22, 1.1, 0.44, first, sketch.SERVER)
        arrow(axes, (4.55, y), (5.0, y), colour)
        box(axes, 5.05, y - 0.22, 1.1, 0.44, second, sketch.SERVER)
        arrow(axes, (6.2, y), (6.6, y), colour)
    note(axes, 6.7, 1.85, r"$\frac{1}{2}(B_1A_1 + B_2A_2)$", sketch.UP, side="left", size=13)
    note(axes, 6.7, 0.55, r"$\bar B\,\bar A$", sketch.BAD, side="left", size=13)
    note(axes, 7.6, 1.2, "≠", size=20)
    note(axes, 7.5, 0.55, "what FedAvg does", sketch.BAD, side="left")
    note(axes, 6.7, 2.3, "what one would want", sketch.UP, side="left")
    return figure


def _product(axes: Axes, x: float, y: float, tall: str, wide: str, face: str = sketch.FACTOR) -> None:
    block(axes, x, y, 0.32, 0.8, tall, face)
    block(axes, x + 0.42, y + 0.48, 0.8, 0.32, wide, face)


def cross_terms() -> Figure:
    """The four products that a mean of factors makes of two hospitals: two were trained, two were not."""
    alt = (
        "A square of four products: B1 A1 and B2 A2 on the diagonal were trained; B1 A2 and B2 A1 beside it were not. "
    )
    figure, axes = sketch.canvas(6.5, 2.6, alt + "The mean of factors weighs each with a quarter.")
    for row in (0, 1):
        for column in (0, 1):
            face, edge = (sketch.FACTOR, sketch.UP) if row == column else (sketch.WRONG, sketch.BAD)
            text = f"¼ $B_{row + 1}A_{column + 1}$"
            block(axes, 0.9 + 1.35 * column, 1.25 - 1.05 * row, 1.25, 0.95, text, face, edge)
        note(axes, 1.52 + 1.35 * row, 2.4, f"$A_{row + 1}$")
        note(axes, 0.6, 1.72 - 1.05 * row, f"$B_{row + 1}$")
    note(axes, 3.8, 1.8, "trained together, but with a\nquarter instead of a half", sketch.UP, side="left")
    note(axes, 3.8, 0.7, "cross terms: one hospital's B\nwith the other's A", sketch.BAD, side="left")
    return figure


def core(outputs: int = 576, inputs: int = 192, rank: int = 16) -> Figure:
    """LoRA-XS: two hospitals' cores between the same frozen factors, and their mean; sizes of a layer at its foot."""
    alt = (
        "Each hospital's update is P R A. P, tall, and A, wide, are frozen and the same everywhere: they come from the "
    )
    alt += "singular vectors of the base model's own weight. Only the small square R in between is trained, and only R "
    whole, small = rank * (outputs + inputs), rank * rank
    alt += "crosses the network. The mean of the two updates is P times the mean of R1 and R2 times A. "
    alt += (
        f"For a layer of {outputs} by {inputs} and rank {rank}, LoRA sends {whole:,} numbers, and a core has {small:,}."
    )
    figure, axes = sketch.canvas(9, 2.5, alt)
    for place, (x, name) in enumerate(((0.35, "hospital 1"), (3.15, "hospital 2"), (6.2, "the mean of the two"))):
        middle = ("$R_1$", "$R_2$", r"$\bar R$")[place]
        block(axes, x, 0.85, 0.32, 1.2, "P", sketch.GREY)
        block(axes, x + 0.42, 1.73, 0.32, 0.32, middle, sketch.FACTOR, sketch.UP)
        block(axes, x + 0.84, 1.73, 1.0, 0.32, "A", sketch.GREY)
        note(axes, x + 0.92, 2.3, name)
    note(axes, 2.72, 1.85, "and", size=11)
    note(axes, 5.55, 1.85, "→", size=16)
    note(axes, 0.85, 1.2, "frozen: from W itself,\nthe same everywhere", side="left", size=8.5)
    note(axes, 3.65, 1.2, "only R is trained,\nand only R is sent", sketch.UP, side="left", size=8.5)
    note(axes, 6.7, 1.2, r"$\bar R = \frac{1}{2}(R_1 + R_2)$, exactly", sketch.UP, side="left", size=10)
    size = f"a layer of {outputs:,} × {inputs:,} at rank {rank}: LoRA sends {whole:,} numbers, a core has {small:,}"
    note(axes, 4.5, 0.35, size, size=9)
    return figure


RULES = {  # rule: what goes up and what comes down of (B, A), what rests or stays, and a word
    "FedIT": ("BA", "BA", "", "mean of each"),
    "FFA-LoRA": ("B", "B", "A", "A never learns"),
    "RoLoRA": ("B", "BA", "A", "they take turns"),
    "FLoRA": ("BA", "BABABA", "", "stack, add to W"),
    "FedEx-LoRA": ("BA", "BABABA", "", "mean, and the rest"),
    "FlexLoRA": ("BA", "BA", "", "SVD to rank r"),
    "FedSA-LoRA": ("A", "A", "B", "B stays at home"),
}


def rules() -> Figure:
    """Each rule of notebook 04 as a pictogram: which factors go up, which come down, and which rest or stay."""
    said = "; ".join(f"{name}: up {up}, down {down}, {word}" for name, (up, down, _, word) in RULES.items())
    figure, axes = sketch.canvas(9, 2.7, f"{said}.")
    for place, (name, (up, down, rests, word)) in enumerate(RULES.items()):
        x = 0.42 + 1.26 * place
        axes.text(x + 0.35, 2.5, name, ha="center", fontweight="bold", fontsize=9)
        for y, what, colour in ((1.5, up, sketch.UP), (0.45, down, sketch.DOWN)):
            _factors(axes, x - 0.1, y, what, rests, colour)
        note(axes, x + 0.35, 0.12, word, size=8)
    note(axes, 0.05, 1.85, "up", sketch.UP, size=8.5, side="left")
    note(axes, 0.06, 0.8, "down", sketch.DOWN, size=8.5, side="left")
    return figure


def _factors(axes: Axes, x: float, y: float, what: str, rests: str, colour: str) -> None:
    count = max(1, len(what) // 2)
    for number in reversed(range(count)):
        shift = 0.13 * number
        for name, left, bottom, width, height in (("B", 0.2, 0.0, 0.16, 0.7), ("A", 0.42, 0.54, 0.5, 0.16)):
            if name in what:
                block(
                    axes,
                    x + left + shift,
                    y + bottom - shift / 2,
                    width,
                    height,
                    name if not number else "",
                    sketch.FACTOR,
                    colour,
                )
            elif name == rests:
                block(axes, x + left, y + bottom, width, height, "", "white", "#bbbbbb")
