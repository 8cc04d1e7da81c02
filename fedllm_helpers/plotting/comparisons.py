"""Figures that compare arms on the same cards."""

import itertools
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from fedllm_helpers.plotting.figures import ARMS, STYLE, plain_ticks


def budgets(tables: Mapping[str, pd.DataFrame], xlabel: str, title: str) -> Figure:
    """The same arms under different budgets, a panel for each, as differences to one of them with their intervals.

    Args:
        tables: name of a budget to columns ``label``, ``arm`` (of :data:`fedllm_helpers.plotting.figures.ARMS`),
            ``value``, ``low``, ``high``, with the same labels in each.
        xlabel: with its unit.
        title: of the figure.
    """
    labels = list(next(iter(tables.values()))["label"])
    with plt.style.context(STYLE):
        size = (4.5 * len(tables), 1.3 + 0.36 * len(labels))
        figure, panels = plt.subplots(1, len(tables), figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, (name, table) in zip(panels[0], tables.items(), strict=True):
            axes.axvline(0, color="black", linewidth=1)
            for row in table.to_dict("records"):
                (colour, mark), place = ARMS[row["arm"]], labels.index(row["label"])
                spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                axes.errorbar(row["value"], place, xerr=spread, fmt=mark, color=colour)
                axes.annotate(
                    f"{row['value']:+.2f}", (row["high"], place), (6, 0), textcoords="offset points", va="center"
                )
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.margins(x=0.2)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y", visible=False)
            axes.set(title=name, xlabel=xlabel)
        figure.suptitle(title)
    return figure


def differences(table: pd.DataFrame, own: Mapping[str, str], label: str, title: str) -> Figure:
    """A table of differences as cells from blue (below 0) over white to red (above 0); some cells are boxed.

    Args:
        table: with the names that are written beside rows and columns.
        own: row to the column that is boxed in it.
        label: of the colours, with the unit.
        title: of the figure.
    """
    most = float(np.abs(table.to_numpy()).max())
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(2.6 + 0.78 * len(table.columns), 1.7 + 0.32 * len(table)))
        image = axes.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        for (y, x), value in np.ndenumerate(table.to_numpy()):
            colour = "white" if abs(value) > 0.7 * most else "black"
            axes.text(x, y, f"{value:+.2f}", ha="center", va="center", color=colour, fontsize=8.5)
        for row, column in own.items():
            x, y = table.columns.get_loc(column), table.index.get_loc(row)
            axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, ec="black", lw=2))
        axes.set_xticks(range(len(table.columns)), table.columns, rotation=35, ha="right")
        axes.set_yticks(range(len(table)), table.index)
        axes.set_title(title)
        axes.grid(visible=False)
        figure.colorbar(image, label=label, shrink=0.8)
    return figure


def cost_to_target(table: pd.DataFrame, target: float, title: str) -> Figure:
    """How far each arm has come after so many bytes, round by round, and a line at what one wants to reach.

    Args:
        table: columns ``arm``, ``megabytes`` (one hospital's, up to and with a round, above 0) and ``nll``, in the
            order of the rounds; each arm is named above its first point.
        target: NLL of the dashed line.
        title: of the figure.
    """
    looks = itertools.cycle(zip(("#1f4e8c", "#e08214", "#1b8a5a", "#b2479a", "#555555"), "Ds^Po", strict=True))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 4.0))
        axes.axhline(target, color="black", linestyle="--", linewidth=1, gid="the target")
        for (arm, part), (colour, mark) in zip(table.groupby("arm", sort=False), looks, strict=False):
            axes.plot(part["megabytes"], part["nll"], color=colour, marker=mark, markersize=4, label=arm)
            start = (part["megabytes"].iloc[0], part["nll"].iloc[0])
            axes.annotate(arm, start, (0, 7), textcoords="offset points", ha="center", color=colour, fontsize=9)
        axes.set(xscale="log", xlabel="megabytes up, per hospital, up to a round (logarithmic)")
        axes.set(ylabel="held-out NLL (nats per token)", title=title)
        plain_ticks(axes)
        axes.margins(x=0.12, y=0.15)
        axes.grid(which="minor", visible=False)
    return figure


def lines(series: Mapping[str, pd.Series], ylabel: str, title: str) -> Figure:
    """A line by round for each name, in a legend beside.

    Args:
        series: values by round.
        ylabel, title: of the figure, with the unit.
    """
    looks = itertools.cycle(zip(("#1f4e8c", "#e08214", "#1b8a5a", "#b2479a", "#555555"), "Ds^Po", strict=True))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 3.6))
        for (name, values), (colour, mark) in zip(series.items(), looks, strict=False):
            axes.plot(values.index, values, color=colour, marker=mark, markersize=5, label=name)
        axes.set(xlabel="round", ylabel=ylabel, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if series:
            figure.legend(loc="outside lower center", ncols=2)
    return figure


def families(table: pd.DataFrame, xlabel: str, ylabel: str, title: str) -> Figure:
    """Quality against size for kinds of adapters that each come in several sizes: a line for each, with intervals.

    Args:
        table: columns ``family``, ``label`` (written beside each mark), ``kilobytes`` (above 0), ``value``, ``low`` and
            ``high``, in the order of the sizes.
        xlabel, ylabel, title: of the figure, with units.
    """
    colours = ("#1f4e8c", "#e08214", "#1b8a5a", "#b2479a", "#555555", "#74add1")
    looks = itertools.cycle(zip(colours, "Ds^Pov", strict=True))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 4.4))
        axes.axhline(0, color="black", linewidth=1)
        for place, (family, part) in enumerate(table.groupby("family", sort=False)):
            colour, mark = next(looks)
            spread = [part["value"] - part["low"], part["high"] - part["value"]]
            look = {"fmt": f"{mark}-", "color": colour, "markersize": 5, "linewidth": 1}
            axes.errorbar(part["kilobytes"], part["value"], yerr=spread, label=family, **look)
            for row in part.itertuples():
                beside = {"textcoords": "offset points", "color": colour, "fontsize": 9}
                where = {"xytext": (5, 4)} if place % 2 == 0 else {"xytext": (-5, -4), "ha": "right", "va": "top"}
                axes.annotate(row.label, (row.kilobytes, row.value), **where, **beside)
        axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
        plain_ticks(axes)
        axes.margins(x=0.08)
        axes.grid(which="minor", visible=False)
        figure.legend(loc="outside right upper")
    return figure
