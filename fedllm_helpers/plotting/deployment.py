"""Figures of deployed federations, for notebooks 06 and 07, and the drawing of 06."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from fedllm_helpers.plotting import sketch
from fedllm_helpers.plotting.figures import STYLE, plain_ticks
from fedllm_helpers.plotting.sketch import arrow, box, note


def stacked(table: pd.DataFrame, xlabel: str, title: str) -> Figure:
    """One bar per row, made of the columns one after the other, each with its value where there is room for it.

    Args:
        table: values of 0 or more; rows and columns in the order in which they are drawn.
        xlabel: with the unit.
        title: of the figure.
    """
    shades, widest = np.linspace(0.25, 0.9, len(table.columns)), table.sum(axis=1).max()
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.55 * len(table)))
        left = np.zeros(len(table))
        for shade, name in zip(shades, table.columns, strict=True):
            axes.barh(table.index, table[name], left=left, color=plt.cm.viridis(shade), edgecolor="white", label=name)
            for row, (start, value) in enumerate(zip(left, table[name], strict=True)):
                if value > 0.05 * widest:
                    colour = "white" if shade < 0.6 else "black"
                    axes.text(start + value / 2, row, f"{value:.1f}", ha="center", va="center", color=colour)
            left += table[name].to_numpy()
        axes.invert_yaxis()
        axes.set(xlabel=xlabel, title=title)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55), ncols=len(table.columns), frameon=False)
    return figure


def on_lines(table: pd.DataFrame, title: str) -> Figure:
    """What a round takes over lines of some rates: a line with marks for each thing sent, its formula dashed.

    Args:
        table: columns ``sent`` (a name), ``megabits`` (a second, each way), ``seconds`` and ``formula`` (seconds of the
            transfers alone), above 0.
        title: of the figure.
    """
    looks = itertools.cycle(zip(("#1f4e8c", "#e08214", "#1b8a5a", "#b2479a"), "Ds^P", strict=True))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 4.0))
        for (name, part), (colour, mark) in zip(table.groupby("sent", sort=False), looks, strict=False):
            axes.plot(part["megabits"], part["seconds"], color=colour, marker=mark, label=name)
            axes.plot(
                part["megabits"], part["formula"], color=colour, linestyle="--", linewidth=1, label=f"{name}, formula"
            )
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlabel="a hospital's line, each way (Mbit/s)", ylabel="seconds of a round")
        plain_ticks(axes)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(which="minor", visible=False)
        figure.legend(loc="outside right upper")
    return figure


def machines(hospitals: int = 2) -> Figure:
    """Which process runs on which machine, who connects to whom, and which port nobody outside may reach."""
    alt = (
        "The server's machine on the left: a ServerApp, a SuperLink on port 8000 that listens on 127.0.0.1 alone, and "
        f"a gateway on port 9093. On the right {hospitals} hospitals, each with a SuperNode, a ClientApp and its own "
        "cards. Each SuperNode connects out to the gateway, which passes on to the SuperLink. An operator on the "
        "server starts runs with flwr run. An arrow from outside to port 8000 is crossed out: whoever reached it "
        "could start runs."
    )
    figure, axes = sketch.canvas(9, 4.1, alt)
    box(axes, 0.2, 0.2, 4.5, 3.5, "", "white")
    note(axes, 0.4, 3.88, "server", size=10, side="left")
    box(axes, 2.3, 2.75, 2.1, 0.75, "asks and averages", sketch.SERVER, "ServerApp")
    box(axes, 2.3, 1.45, 2.1, 0.85, "port 8000,\n127.0.0.1 alone", sketch.GRID, "SuperLink")
    box(axes, 2.3, 0.4, 2.1, 0.65, "port 9093, open", sketch.SERVER, "gateway")
    box(axes, 0.4, 1.45, 1.3, 0.85, "flwr run", "white", "operator")
    arrow(axes, (1.72, 1.87), (2.27, 1.87), sketch.DOWN)
    arrow(axes, (3.35, 2.72), (3.35, 2.33), sketch.INK, both=True)
    arrow(axes, (3.35, 1.08), (3.35, 1.42), sketch.UP)
    height = 3.5 / hospitals
    for place in range(hospitals):
        y = 3.7 - height * (place + 1)
        box(axes, 5.9, y + 0.1, 2.9, height - 0.2, "", sketch.HOSPITAL)
        note(axes, 6.05, y + height - 0.28, f"hospital {place}", side="left")
        box(axes, 6.05, y + 0.25, 1.05, height - 0.8, "connects out", "white", "SuperNode")
        box(axes, 7.25, y + 0.25, 1.4, height - 0.8, "reads its own cards", "white", "ClientApp")
        arrow(axes, (6.02, y + 0.2 + height / 2 - 0.3), (4.43, 0.62 + 0.2 * (hospitals - place) / hospitals), sketch.UP)
    arrow(axes, (5.8, 3.05), (4.43, 2.05), sketch.BAD, dashed=True)
    note(axes, 5.1, 2.56, "×", sketch.BAD, size=20)
    note(axes, 5.15, 3.32, "nobody from\noutside", sketch.BAD, size=8.5)
    return figure
