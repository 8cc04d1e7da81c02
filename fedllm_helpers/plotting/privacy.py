"""Figures of attacks and defences."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedllm_helpers.plotting.figures import ARMS, STYLE


def roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """ROC curves on logarithmic axes, where the small false positive rates that matter can be seen.

    Args:
        curves: label to its false and true positive rates, each of shape (points,).
        title: of the figure.
    """
    looks = zip(("#1f4e8c", "#1b8a5a", "#b2479a", "#e08214", "#8c8c8c"), ("-", "--", "-.", ":", "-"), strict=True)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 4.2))
        for (label, (false, true)), (colour, dashes) in zip(curves.items(), looks, strict=False):
            axes.plot(false, true, dashes, color=colour, label=label, drawstyle="steps-post")
        line = np.geomspace(2e-3, 1, 50)
        axes.plot(line, line, color="black", linewidth=1, label="chance")
        axes.set(xscale="log", yscale="log", xlim=(2e-3, 1), ylim=(2e-3, 1.05), title=title)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        figure.legend(loc="outside right upper")
    return figure


def bill(table: pd.DataFrame, references: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """What each arm gives and gives away: one panel per measure, one line per arm, with intervals.

    Args:
        table: columns ``label``, ``arm`` (of :data:`fedllm_helpers.plotting.ARMS`), ``measure`` (with its unit),
            ``value``, ``low``, ``high``.
        references: measure to its dashed lines: name to position.
        title: of the figure.
    """
    labels, measures = list(dict.fromkeys(table["label"])), list(dict.fromkeys(table["measure"]))
    with plt.style.context(STYLE):
        size = (2.2 + 2.6 * len(measures), 1.5 + 0.34 * len(labels))
        figure, panels = plt.subplots(1, len(measures), figsize=size, sharey=True, squeeze=False)
        for axes, measure in zip(panels[0], measures, strict=True):
            for row in table[table["measure"] == measure].to_dict("records"):
                colour, mark = ARMS[row["arm"]]
                spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                axes.errorbar(row["value"], labels.index(row["label"]), xerr=spread, fmt=mark, color=colour)
            for name, position in references.get(measure, {}).items():
                axes.axvline(position, color="black", linestyle="--", linewidth=1, gid=name)
                axes.text(position, -0.62, f" {name}", fontsize=8.5, va="bottom")
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.4, -0.65)
            axes.grid(axis="y", visible=False)
            axes.set(xlabel=measure)
        figure.suptitle(title)
    return figure


def views(plain: np.ndarray, masked: np.ndarray, title: str) -> Figure:
    """Histograms of one hospital's update as the server sees it: open, and masked.

    Args:
        plain: values of the update.
        masked: unsigned integers of 32 bits.
        title: of the figure.
    """
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9))
        left.hist(plain, bins=80, color=ARMS["federated"][0])
        right.hist(masked / 2**32, bins=80, color=ARMS["federated + DP"][0])
        left.set(xlabel="value of the update", ylabel="values", title="open")
        right.set(xlabel="masked value / 2³²", title="masked", ylim=(0, None))
        figure.suptitle(title)
    return figure


def words(columns: Mapping[str, Sequence[tuple[str, bool]]], title: str, shown: int = 14) -> Figure:
    """Words that an attack names, best first, a column for each update: those that are right in bold, with a mark.

    Args:
        columns: name of an update to its words and whether each is right.
        title: of the figure.
        shown: words of a column at most.
    """
    right, wrong = ARMS["federated"][0], "#6f6f6f"
    some = {name: list(named)[:shown] for name, named in columns.items()}
    told = {name: ", ".join(f"{word} ✓" if true else word for word, true in named) for name, named in some.items()}
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(2.05 * len(columns) + 0.4, 0.24 * shown + 1.0))
        axes.set(xlim=(-0.1, len(columns)), ylim=(shown - 0.4, -1.6), title=title)
        axes.axis("off")
        for place, (name, named) in enumerate(some.items()):
            axes.text(place, -1.1, name, fontsize=9, weight="bold", va="center")
            for row, (word, true) in enumerate(named):
                mark, look = ("✓", {"color": right, "weight": "bold"}) if true else ("·", {"color": wrong})
                axes.text(place, row, f"{mark} {word}".replace("$", r"\$"), fontsize=9, va="center", **look)
    figure.set_label(f"{title}. {'. '.join(f'{name}: {text}' for name, text in told.items())}.")
    return figure
