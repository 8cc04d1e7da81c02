"""Every figure of the course, drawn from plain tables; ``course.mplstyle`` beside this file holds the look."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

STYLE = "fedllm_helpers.course"
# One colour and one mark per arm in every notebook; the marks keep them apart in greyscale.
ARMS = {
    "untuned": ("#8c8c8c", "o"),
    "one hospital": ("#e08214", "s"),
    "pooled 10 %": ("#74add1", "v"),
    "pooled": ("#1f4e8c", "D"),
    "federated": ("#1b8a5a", "^"),
    "federated + DP": ("#b2479a", "P"),
}


def intervals(table: pd.DataFrame, xlabel: str, title: str, references: Mapping[str, float] | None = None) -> Figure:
    """Points with their intervals, one line per label and one mark per arm.

    Args:
        table: columns ``label``, ``arm`` (of :data:`ARMS`), ``value``, ``low``, ``high``; drawn from top to bottom.
        xlabel: with its unit.
        title: of the figure.
        references: dashed lines, such as chance: name to position.

    Returns:
        The figure; nothing is shown or saved.
    """
    labels = list(dict.fromkeys(table["label"]))
    arms = list(dict.fromkeys(table["arm"]))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.32 * max(len(labels), 3) + 0.1 * len(arms)))
        for place, arm in enumerate(arms):
            rows = table[table["arm"] == arm]
            shift = 0.16 * (place - (len(arms) - 1) / 2) if len(labels) > 1 and len(rows) > 1 else 0
            y = [labels.index(label) + shift for label in rows["label"]]
            spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            colour, mark = ARMS[arm]
            axes.errorbar(rows["value"], y, xerr=spread, fmt=mark, color=colour, label=arm)
        for name, position in (references or {}).items():
            axes.axvline(position, color="black", linestyle="--", linewidth=1)
            axes.text(position, len(labels) - 0.45, f" {name}", va="bottom", fontsize=9)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.65)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel, title=title)
        if len(arms) > 1 and arms != labels:
            figure.legend(loc="outside lower center", ncols=len(arms))
    return figure


def losses(histories: Mapping[str, pd.DataFrame], title: str, window: int = 5) -> Figure:
    """Training loss by step: each step thin, a running mean bold.

    Args:
        histories: arm to a table with ``step`` and ``loss`` in nats per answer token.
        title: of the figure.
        window: steps of the running mean.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots()
        for arm, history in histories.items():
            colour, mark = ARMS[arm]
            axes.plot(history["step"], history["loss"], color=colour, linewidth=0.7, alpha=0.5)
            mean = history["loss"].rolling(window, min_periods=1).mean()
            axes.plot(history["step"], mean, color=colour, marker=mark, markevery=10, label=arm)
        axes.set(xlabel="step", ylabel="loss (nats per answer token)", title=title)
        figure.legend(title=f"mean of {window} steps", loc="outside right upper")
    return figure


def pairs(table: pd.DataFrame, first: str, second: str, xlabel: str, title: str) -> Figure:
    """Two values per row, joined by a line, on a logarithmic axis.

    Args:
        table: column ``label`` and the two columns ``first`` and ``second``, all above 0.
        first, second: names of the columns; they stand in the legend.
        xlabel, title: of the figure.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.3 * len(table)))
        y = range(len(table))
        axes.hlines(y, table[first], table[second], color="#bbbbbb", linewidth=2)
        axes.plot(table[first], y, "o", color="#1f4e8c", label=first)
        axes.plot(table[second], y, "s", color="#e08214", markerfacecolor="white", label=second)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(y, table["label"])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel, title=title)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def byte_bars(sizes: Mapping[str, int], title: str) -> Figure:
    """Bytes on a logarithmic axis, each bar with its number (1 MB = 10⁶ bytes).

    Args:
        sizes: name to bytes.
        title: of the figure.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.0 + 0.36 * len(sizes)))
        values = [size / 1e6 for size in sizes.values()]
        bars = axes.barh(list(sizes), values, color="#74add1", edgecolor="#1f4e8c")
        axes.bar_label(bars, [f"{value:,.1f} MB" for value in values], padding=4)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="megabytes (logarithmic)", title=title)
    return figure


def heat_maps(
    tables: Mapping[str, pd.DataFrame], label: str, title: str, *, digits: int = 0, columns: int = 2
) -> Figure:
    """Tables as coloured cells with their numbers, on one scale of colours.

    Args:
        tables: panel title to a table; rows and columns carry the names that are written beside them.
        label: of the colours, with the unit.
        title: of the figure.
        digits: after the point.
        columns: panels side by side.
    """
    low = min(table.min().min() for table in tables.values())
    high = max(table.max().max() for table in tables.values())
    rows, columns = -(-len(tables) // columns), min(columns, len(tables))
    tallest, widest = max(len(t) for t in tables.values()), max(len(t.columns) for t in tables.values())
    with plt.style.context(STYLE):
        size = (1.8 + 0.62 * widest * columns, 1.6 + rows * (0.9 + 0.3 * tallest))
        figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True)
        for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
            image = axes.imshow(table, cmap=plt.get_cmap("cividis", 32), vmin=low, vmax=high, aspect="auto")
            for (y, x), value in np.ndenumerate(table.to_numpy()):
                colour = "white" if value < (low + high) / 2 else "black"
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=8)
            axes.set_xticks(range(len(table.columns)), table.columns, rotation=40, ha="right")
            axes.set_yticks(range(len(table)), table.index)
            axes.set_title(name)
            axes.grid(visible=False)
        figure.colorbar(image, ax=panels, label=label, shrink=0.7)
        figure.suptitle(title)
    return figure


def by_round(tables: Mapping[str, pd.DataFrame], ylabel: str, title: str, references: Mapping[str, float]) -> Figure:
    """A measure after each round, beside the arms that have no rounds.

    Args:
        tables: arm to a table with ``round`` and ``nll``.
        ylabel: with its unit.
        title: of the figure.
        references: arm to its value, drawn as a dashed line.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots()
        for arm, table in tables.items():
            colour, mark = ARMS[arm]
            axes.plot(table["round"], table["nll"], color=colour, marker=mark, label=arm)
        for (arm, value), dashes in zip(references.items(), itertools.cycle(("--", ":", "-.")), strict=False):
            axes.axhline(value, color=ARMS[arm][0], linestyle=dashes, linewidth=1.4, label=arm)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="round", ylabel=ylabel, title=title)
        figure.legend(loc="outside right upper")
    return figure


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


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, face: str, head: str, lines: Sequence[str]
) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.05,rounding_size=0.3", fc=face, ec="#555555"))
    axes.text(x + width / 2, y + height - 0.75, head, ha="center", va="center", fontweight="bold", fontsize=9)
    for number, line in enumerate(lines):
        axes.text(x + width / 2, y + height - 1.75 - number, line, ha="center", va="center", fontsize=8.5)
