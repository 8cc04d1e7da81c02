"""Notebook 07's own pictures: two models card by card, and four ways to make a message smaller."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedllm_helpers.plotting import sketch
from fedllm_helpers.plotting.figures import STYLE
from fedllm_helpers.plotting.sketch import note


def card_by_card(values: dict[str, np.ndarray], ylabel: str, title: str) -> Figure:
    """The same cards under two models, joined by lines, with both means; and the differences, with theirs.

    Args:
        values: name of a model to its value per card, (cards,), of two models.
        ylabel, title: of the figure.
    """
    (first, one), (second, other) = values.items()
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.5), width_ratios=[3, 2])
        for a, b in zip(one, other, strict=True):
            left.plot([0, 1], [a, b], "-", color="#1b8a5a" if b < a else "#b2182b", lw=0.9, alpha=0.6)
        left.plot(np.zeros(len(one)), one, "o", color="#777777", ms=4)
        left.plot(np.ones(len(other)), other, "o", color="#777777", ms=4)
        for x, name, some in ((-0.18, first, one), (1.18, second, other)):
            _mean(left, x, some, name)
        left.set_xticks([0, 1], [first, second])
        left.set(xlim=(-0.4, 1.4), ylabel=ylabel, title="each card under both models")
        apart = other - one
        right.plot(np.linspace(-0.25, 0.25, len(apart)), apart, "o", color="#777777", ms=4)
        right.axhline(0, color="#444444", lw=1)
        _mean(right, 0.5, apart, f"{second} minus {first}")
        right.set_xticks([])
        right.set(
            xlim=(-0.5, 0.8), title=f"{second} minus {first}", ylim=np.array([-0.5, 0.5]) * np.ptp(left.get_ylim())
        )
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _mean(axes: Axes, x: float, values: np.ndarray, name: str) -> None:
    """A mean with two standard errors."""
    half = 2 * values.std(ddof=1) / len(values) ** 0.5
    axes.errorbar(x, values.mean(), half, fmt="D", color="#1f4e8c", ms=6, capsize=4, lw=1.6, label=name)


def smaller_messages(seed: int = 0) -> Figure:
    """One update as a grid of squares, and what fewer bits, fewer values, a lower rank and a core leave of it."""
    alt = "Five grids of squares. An update: every square has a shade of its own. Fewer bits: every square is there, "
    alt += "in a few shades. Fewer values: only the darkest squares are left. A lower rank: two thin strips instead of "
    alt += "the grid. A core: a small square between two strips that stay at home."
    figure, axes = sketch.canvas(9, 2.5, alt)
    shades = np.abs(np.random.default_rng(seed).normal(size=(8, 8)))
    shades /= shades.max()
    few, sparse = np.rint(shades * 3) / 3, np.where(shades > np.quantile(shades, 0.85), shades, 0)
    kinds = (("an update", "32 bits a number", shades), ("fewer bits", "every number, rougher", few))
    for place, (name, what, values) in enumerate((*kinds, ("fewer values", "the largest, and where", sparse))):
        _squares(axes, 0.3 + 1.75 * place, 0.65, values)
        note(axes, 0.95 + 1.75 * place, 2.2, name, size=10)
        note(axes, 0.95 + 1.75 * place, 0.4, what, size=8.5)
    for x, name, what in ((5.55, "a lower rank", "two thin factors"), (7.3, "a core", "its strips stay frozen")):
        core = name == "a core"
        _squares(axes, x, 0.65, np.ones((8, 1)) if core else shades[:, :1], sketch.GREY if core else "")
        _squares(axes, x + 0.3, 1.79, np.ones((1, 6)) if core else shades[:1, :6], sketch.GREY if core else "")
        if core:
            _squares(axes, x + 0.62, 1.1, shades[:2, :2])
        note(axes, x + 0.65, 2.2, name, size=10)
        note(axes, x + 0.65, 0.4, what, size=8.5)
    note(axes, 0.3, 0.12, "blue is sent", sketch.DOWN, size=8.5, side="left")
    return figure


def _squares(axes: Axes, x: float, y: float, values: np.ndarray, face: str = "") -> None:
    """Shaded squares, a row of an array above the next; white where nothing is sent, or all of one colour."""
    for (row, column), value in np.ndenumerate(values):
        colour = face or plt.colormaps["Blues"](0.15 + 0.75 * value if value else 0.0)
        place = (x + 0.16 * column, y + 0.16 * (len(values) - 1 - row))
        axes.add_patch(Rectangle(place, 0.15, 0.15, fc=colour, ec="#bbbbbb", lw=0.5))
