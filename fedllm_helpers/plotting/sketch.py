"""The few shapes that every drawing is made of. One unit is an inch, so that text and boxes fit as they were drawn."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from fedllm_helpers.plotting.figures import STYLE

INK, GREY, HOSPITAL, SERVER, GRID = "#444444", "#e6e6e6", "#dceaf7", "#f2f2f2", "#fff4dc"
DOWN, UP, FACTOR, BAD, WRONG = "#1f4e8c", "#1b8a5a", "#cdeadd", "#b2182b", "#f7dcd8"
Point = tuple[float, float]


def canvas(width: float, height: float, alt: str) -> tuple[Figure, Axes]:
    """An empty figure of so many inches; its label says in words what it shows, and ``plotting.show`` keeps them."""
    with plt.style.context(STYLE):
        figure = plt.figure(figsize=(width, height), layout="none")
        axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.set_label(alt)
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, face: str, head: str = "") -> None:
    """A rounded box with lines of text in its middle, under a bold head if there is one."""
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.08", fc=face, ec=INK, lw=1)
    axes.add_patch(shape)
    lines = text.count("\n") + 1 if text else 0
    if head:
        y = y + 0.085 * lines
        axes.text(x + width / 2, y + height / 2, head, ha="center", va="center", fontsize=9.5, fontweight="bold")
        y = y - 0.085 * (lines + 1) - 0.01
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, linespacing=1.25)


def block(axes: Axes, x: float, y: float, width: float, height: float, text: str, face: str, edge: str = INK) -> None:
    """A matrix: a sharp rectangle with its name."""
    axes.add_patch(Rectangle((x, y), width, height, fc=face, ec=edge, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: Point, end: Point, colour: str, *, both: bool = False, dashed: bool = False) -> None:
    """A straight arrow, or one with two heads."""
    style = {"arrowstyle": "<|-|>" if both else "-|>", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "linestyle": "--" if dashed else "-", "mutation_scale": 11})


def note(
    axes: Axes, x: float, y: float, text: str, colour: str = INK, *, size: float = 9, side: str = "center"
) -> None:
    """A line of text beside what it is about."""
    axes.text(x, y, text, ha=side, va="center", color=colour, fontsize=size, linespacing=1.3)
