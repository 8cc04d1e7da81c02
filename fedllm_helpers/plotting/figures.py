"""Every figure of the course, drawn from plain tables; ``course.mplstyle`` beside this file holds the look."""

import itertools
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

STYLE = "fedllm_helpers.plotting.course"
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
            axes.axvline(position, color="black", linestyle="--", linewidth=1, gid=name)
            side = "right" if position > np.mean(axes.get_xlim()) else "left"
            axes.text(position, len(labels) - 0.45, f" {name} ", va="bottom", ha=side, fontsize=9)
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
        plain_ticks(axes)
        axes.set_yticks(y, table["label"])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel, title=title)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def byte_sizes(sizes: Mapping[str, int], title: str) -> Figure:
    """Bytes as points on a logarithmic axis, each with its number (1 MB = 10⁶ bytes).

    Args:
        sizes: name to bytes.
        title: of the figure.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.0 + 0.36 * len(sizes)))
        values = [size / 1e6 for size in sizes.values()]
        axes.plot(values, range(len(values)), "D", color="#1f4e8c", label="megabytes")
        for place, size in enumerate(sizes.values()):
            axes.annotate(_size(size), (size / 1e6, place), (9, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 30)
        axes.set_yticks(range(len(values)), sizes)
        axes.set_ylim(len(values) - 0.5, -0.5)
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


def frontier(table: pd.DataFrame, xlabel: str, ylabel: str, title: str, tolerance: float) -> Figure:
    """What is lost against what is sent: a point with its interval per setting, on a logarithmic axis of bytes.

    Args:
        table: columns ``label``, ``megabytes``, ``value``, ``low``, ``high``.
        xlabel, ylabel, title: of the figure, with units.
        tolerance: the band around 0 that is drawn in grey; settings whose interval reaches above it are hollow.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 4.2))
        axes.axhspan(-tolerance, tolerance, color="#e6e6e6", zorder=0, label=f"±{tolerance}")
        axes.axhline(0, color="black", linewidth=1)
        marks = itertools.cycle("o^sDvP*Xhd<>")
        for number, (row, mark) in enumerate(zip(table.to_dict("records"), marks, strict=False)):
            spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            colour, face = ARMS["federated"][0], "white" if row["high"] > tolerance else ARMS["federated"][0]
            beside = 1.06 ** sum(abs(table["megabytes"].iloc[:number] / row["megabytes"] - 1) < 0.05)  # like bytes
            where, look = row["megabytes"] * beside, {"fmt": mark, "color": colour, "markerfacecolor": face}
            axes.errorbar(where, row["value"], yerr=spread, label=row["label"], **look)
        axes.set_xscale("log")
        plain_ticks(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        figure.legend(loc="outside right upper")
    return figure


def curves(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """One line per value of a column, on logarithmic axes.

    Args:
        table: columns ``x``, ``y`` and ``by``; all of ``x`` and ``y`` above 0.
        x, y, by: names of columns.
        xlabel, ylabel, title: of the figure, with units.
        references: dashed horizontal lines: name to position.
    """
    looks = itertools.cycle(zip(("#1f4e8c", "#e08214", "#1b8a5a", "#b2479a", "#8c8c8c"), "Ds^Po", strict=True))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots()
        for (name, part), (colour, mark) in zip(table.groupby(by, sort=False), looks, strict=False):
            axes.plot(part[x], part[y], color=colour, marker=mark, label=str(name))
        for name, position in (references or {}).items():
            axes.axhline(position, color="black", linestyle="--", linewidth=1, gid=name)
            axes.annotate(name, (0.01, position), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
        axes.grid(which="minor", visible=False)
        figure.legend(loc="outside right upper", title=by)
    return figure


def _size(value: float) -> str:
    unit, name = next((pair for pair in ((1e12, "TB"), (1e9, "GB")) if value >= pair[0]), (1e6, "MB"))
    return f"{value / unit:,.1f} {name}"


def plain_ticks(axes: Axes) -> None:
    """Plain numbers at 1, 2 and 5 of each power of ten, along a logarithmic x axis."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
