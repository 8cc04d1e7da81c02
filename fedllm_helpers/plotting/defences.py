"""Drawings of attacks and defences: who sees what, masks when a hospital goes away, one card clipped under noise."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from fedllm_helpers.plotting import sketch
from fedllm_helpers.plotting.sketch import arrow, box, note


def who_sees_what(hospitals: int = 4) -> Figure:
    """Opens notebook 05a: what leaves the hospitals, and who looks at it."""
    alt = f"{hospitals} hospitals keep their cards behind a wall. Each sends its update to the server, which sees "
    alt += "every single one. The average goes to the other hospitals every round, and the last adapter to the public."
    figure, axes = sketch.canvas(9, 2.9, alt)
    step = 2.3 / hospitals
    for place in range(hospitals):
        y = 2.42 - step * (place + 0.5)
        box(axes, 0.2, y - 0.42 * step, 1.7, 0.84 * step, f"hospital {place}: cards", sketch.HOSPITAL)
        arrow(axes, (2.2, y), (4.05, 1.27 + (1.27 - y) * -0.3), sketch.UP)
    axes.plot([2.08, 2.08], [0.12, 2.45], color=sketch.INK, lw=3)
    note(axes, 1.05, 2.65, "no card crosses the wall", size=8.5)
    box(axes, 4.15, 0.87, 1.5, 0.8, "averages", sketch.SERVER, "the server")
    box(axes, 7.3, 1.62, 1.5, 0.7, "all hospitals", sketch.HOSPITAL, "the others")
    box(axes, 7.3, 0.22, 1.5, 0.7, "if it is published", sketch.GRID, "the public")
    arrow(axes, (5.75, 1.42), (7.2, 1.97), sketch.DOWN)
    arrow(axes, (5.75, 1.12), (7.2, 0.57), sketch.DOWN)
    note(axes, 4.9, 2.55, "sees every update, one by one,\nevery round", sketch.UP)
    note(axes, 7.1, 2.62, "see the average, every round", sketch.DOWN, side="left")
    note(axes, 6.35, 0.08, "sees the last adapter, once", sketch.DOWN, side="left")
    note(axes, 4.9, 0.42, "words, specialty,\nsecrets, members?", sketch.BAD)
    note(axes, 6.95, 1.27, "secrets, members?", sketch.BAD, side="left")
    return figure


def dropped_mask() -> Figure:
    """Three hospitals mask in pairs; one goes away before it sends, and the shares of its key take the rest off."""
    alt = "Hospitals 0, 1 and 2 agree on a mask for each pair. Hospital 2 goes away before it sends. The sum of the "
    alt += "other two still holds the masks that they share with it. Their two shares of its key open the key, the "
    alt += "server computes both masks and takes them off, and the sum of the two updates is left."
    figure, axes = sketch.canvas(9, 3.0, alt)
    sent = (r"$x_0 + m_{01} + m_{02}$", r"$x_1 - m_{01} + m_{12}$", r"$x_2 - m_{02} - m_{12}$")
    for place, what in enumerate(sent):
        x, gone = 0.2 + 2.0 * place, place == 2
        box(axes, x, 1.85, 1.75, 0.8, what, sketch.GREY if gone else sketch.HOSPITAL, f"hospital {place}")
        if not gone:
            arrow(axes, (x + 0.87, 1.8), (2.1 + 0.5 * place, 1.2), sketch.UP)
            note(axes, x + 0.87, 2.8, "holds a share of 2's key", sketch.DOWN, size=8)
    axes.plot([4.15, 6.0], [1.8, 2.7], color=sketch.BAD, lw=2)
    note(axes, 5.1, 1.62, "goes away, and sends nothing", sketch.BAD, size=8.5)
    box(axes, 1.1, 0.35, 2.6, 0.8, r"$x_0 + x_1$  $+\ m_{02} + m_{12}$", sketch.SERVER, "the server's sum")
    note(axes, 2.4, 0.16, r"$m_{01}$ has cancelled; two masks are left over", size=8.5)
    arrow(axes, (3.8, 0.75), (4.5, 0.75), sketch.DOWN)
    box(axes, 4.6, 0.3, 2.0, 0.95, "open the key of hospital 2:\nmake both masks again,\ntake them off", sketch.GRID)
    note(axes, 6.3, 2.35, "any 2 of 3 shares open the key,\n1 share tells nothing", sketch.DOWN, side="left", size=8.5)
    arrow(axes, (6.7, 0.75), (7.35, 0.75), sketch.DOWN)
    box(axes, 7.45, 0.4, 1.35, 0.7, r"$x_0 + x_1$", sketch.FACTOR, "the sum")
    arrow(axes, (7.0, 2.05), (5.9, 1.3), sketch.DOWN, dashed=True)
    return figure


def one_card(noise_multiplier: float = 1.0) -> Figure:
    """Clipping and noise on one card: gradients cut to one length, and sums with and without a card under noise.

    Args:
        noise_multiplier: of the noise that is drawn, in clipping norms.
    """
    alt = "Left: gradients of four cards as arrows from one point, in a circle of radius C; one reaches beyond it and "
    alt += "is cut at the circle. Right: the sum with that card and the sum without it, each in a cloud of noise of "
    alt += f"{noise_multiplier:g} C. The clouds overlap where one noisy sum does not tell whether the card was there."
    figure, axes = sketch.canvas(9, 3.1, alt)
    unit, start = 0.8, np.array([1.9, 1.35])
    axes.add_patch(Circle(start, unit, fc="none", ec=sketch.INK, ls="--", lw=1))
    cards = np.array([[0.3, 0.75], [-0.35, 0.6], [0.5, -0.45]])
    for x, y in start + unit * cards:
        arrow(axes, tuple(start), (x, y), sketch.UP)
    long = np.array([1.9, 1.15])
    cut = long / np.linalg.norm(long)
    arrow(axes, tuple(start + unit * cut), tuple(start + unit * long), sketch.BAD, dashed=True)
    arrow(axes, tuple(start), tuple(start + unit * cut), sketch.BAD)
    note(axes, 0.2, 2.9, "each card's gradient is cut to length C", side="left")
    axes.plot([start[0] - unit, start[0]], [start[1]] * 2, color=sketch.INK, lw=1, ls="--")
    note(axes, start[0] - unit / 2, start[1] + 0.13, "C", size=10)
    note(axes, 3.5, 2.05, "one long card:\nthe rest is cut off", sketch.BAD, side="left", size=8.5)
    begin = np.array([6.2, 0.75])
    _cloud(axes, begin + unit * cards.sum(0), unit * noise_multiplier, sketch.DOWN, 0)
    _cloud(axes, begin + unit * (cards.sum(0) + cut), unit * noise_multiplier, sketch.BAD, 1)
    note(axes, 4.7, 2.9, "their sum, and where noise may put it", side="left")
    note(axes, 4.7, 0.25, "without the long card", sketch.DOWN, side="left", size=8.5)
    note(axes, 8.9, 0.25, "with it: moved by C at most", sketch.BAD, side="right", size=8.5)
    return figure


def _cloud(axes: Axes, middle: np.ndarray, spread: float, colour: str, seed: int) -> None:
    """A sum, and where noise may put it: points within what is drawn."""
    dots = middle + spread * np.random.default_rng(seed).normal(size=(140, 2))
    inside = (dots > [4.7, 0.5]).all(axis=1) & (dots < [8.9, 2.75]).all(axis=1)
    axes.plot(*dots[inside].T, ".", color=colour, markersize=3, alpha=0.5)
    axes.plot(*middle, "o", color=colour, markersize=8, markeredgecolor="white")
