"""Drawings about a federation: who holds what, who sends what to whom, and what crosses a wall."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from fedllm_helpers.plotting import sketch
from fedllm_helpers.plotting.sketch import arrow, box, note


def data_routes() -> Figure:
    """Three ways to bring private records and a model together, and what crosses the hospital's wall in each."""
    routes = (
        ("Closed model behind an API", "the vendor's model", "records in prompts", sketch.BAD),
        ("Training at a third party", "a cloud's GPU", "whole training records", sketch.BAD),
        ("Federated fine-tuning", "a server that averages", "adapter, there and back", sketch.UP),
    )
    said = "; ".join(f"{title}: {cargo} go to {outside}" for title, outside, cargo, _ in routes)
    figure, axes = sketch.canvas(9, 2.9, f"Three routes. {said}. Only in the last the records stay.")
    for place, (title, outside, cargo, colour) in enumerate(routes):
        left, stays = 0.15 + 3.0 * place, colour == sketch.UP
        axes.text(left, 2.7, title, fontweight="bold", fontsize=10.5, va="center")
        box(axes, left + 0.45, 1.8, 1.9, 0.65, "" if stays else "records seen here", sketch.SERVER, outside)
        for x in (0.0, 0.98, 1.96) if stays else (0.98,):
            text = "records\ntraining" if stays else "records"
            box(axes, left + x, 0.1, 0.85, 0.75, text, sketch.HOSPITAL, "hospital")
            arrow(axes, (left + x + 0.42, 0.9), (left + 1.4 + (x - 0.98) * 0.4, 1.75), colour, both=stays)
        axes.text(left + 1.4, 1.32, cargo, ha="center", va="center", color=colour, fontsize=9, backgroundcolor="white")
    return figure


def federation(hospitals: int = 6) -> Figure:
    """Opens notebook 03: hospitals keep their cards behind walls; adapters go round, and a server averages them."""
    alt = f"{hospitals} hospitals, each with cards behind a wall. Adapters go up to one server, which averages them, "
    figure, axes = sketch.canvas(9, 2.7, alt + "and the average goes down to all. No card crosses a wall.")
    box(axes, 3.2, 1.95, 2.6, 0.6, "averages adapters", sketch.SERVER, "server")
    step = 9 / hospitals
    for place in range(hospitals):
        x = step * place + step / 2
        half = min(0.6, step / 2 - 0.06)
        box(axes, x - half, 0.15, 2 * half, 0.75, "cards stay\nadapter trains", sketch.HOSPITAL, f"hospital {place}")
        axes.plot([x - half - 0.05, x + half + 0.05], [1.03, 1.03], color=sketch.INK, lw=3)
        top = 4.5 + (x - 4.5) * 0.28
        arrow(axes, (top - 0.06, 1.9), (x - 0.12, 1.1), sketch.DOWN)
        arrow(axes, (x + 0.12, 1.1), (top + 0.06, 1.9), sketch.UP)
    note(axes, 0.2, 2.4, "up: each hospital's adapter", sketch.UP, side="left")
    note(axes, 6.4, 2.4, "down: the average, to all", sketch.DOWN, side="left")
    return figure


def one_round() -> Figure:
    """The four steps of a round of federated averaging."""
    steps = (
        ("1  send", "the same adapter\nto every hospital", sketch.DOWN),
        ("2  train", "a few steps on\none's own cards", sketch.INK),
        ("3  return", "the adapter, and how\nmany cards it stands for", sketch.UP),
        ("4  average", "weighted by the cards:\nthe next adapter", sketch.INK),
    )
    said = "; ".join(f"{head}: {' '.join(text.split())}" for head, text, _ in steps)
    figure, axes = sketch.canvas(9, 1.5, f"A round in four steps. {said}. Then it begins again.")
    for place, (head, text, colour) in enumerate(steps):
        x = 0.2 + 2.25 * place
        box(axes, x, 0.5, 1.75, 0.85, text, sketch.HOSPITAL if place in (1, 2) else sketch.SERVER, head)
        if place < 3:
            arrow(axes, (x + 1.8, 0.92), (x + 2.2, 0.92), steps[place + 1][2] if place == 1 else colour)
    axes.plot([7.8, 7.8, 1.1], [0.45, 0.2, 0.2], color=sketch.DOWN, lw=1.8)
    arrow(axes, (1.1, 0.2), (1.1, 0.46), sketch.DOWN)
    note(axes, 4.5, 0.32, "and round again, with the average", sketch.DOWN)
    return figure


def wall(arrays: int, numbers: int, names: tuple[str, ...]) -> Figure:
    """What of a hospital goes into a reply, and what stays.

    Args:
        arrays, numbers: of the adapter that is sent: how many arrays, and how many numbers they hold.
        names: of the few numbers that go with it.
    """
    alt = (
        f"Behind the wall stay questions, answers and records. Through it go {arrays} arrays with {numbers:,} numbers, "
    )
    figure, axes = sketch.canvas(9, 1.9, f"{alt}and {', '.join(names)}.")
    box(axes, 0.2, 0.3, 2.6, 1.3, "questions, answers\nrecords, names", sketch.HOSPITAL, "stays in the hospital")
    axes.plot([3.2, 3.2], [0.1, 1.8], color=sketch.INK, lw=4)
    note(axes, 3.3, 1.8, "the wall", side="left", size=8)
    box(axes, 4.6, 1.0, 2.2, 0.65, f"{arrays} arrays, {numbers:,} numbers", sketch.FACTOR, "the adapter")
    box(
        axes,
        4.6,
        0.2,
        2.2,
        0.65,
        ", ".join(names[:2]) + ("\n" + ", ".join(names[2:]) if names[2:] else ""),
        sketch.GRID,
    )
    for y in (1.32, 0.52):
        arrow(axes, (2.9, y), (4.5, y), sketch.UP)
    arrow(axes, (6.9, 0.95), (7.5, 0.95), sketch.UP)
    box(axes, 7.6, 0.55, 1.2, 0.8, "reads both", sketch.SERVER, "server")
    return figure


def flower_apps(hospitals: int = 3) -> Figure:
    """One round of a Flower app: the ServerApp, the Grid that carries messages, and a ClientApp at each hospital."""
    alt = (
        f"A ServerApp above, the Grid in the middle, {hospitals} ClientApps below, one in each hospital. Messages with "
    )
    figure, axes = sketch.canvas(9, 3.3, alt + "an adapter and orders go down through the Grid, replies come up.")
    box(axes, 2.9, 2.45, 3.2, 0.7, "FedAvg: ask, wait, average", sketch.SERVER, "ServerApp")
    box(axes, 0.4, 1.5, 8.2, 0.45, "", sketch.GRID, "Grid: who is there, and their messages")
    step = 8.2 / hospitals
    for place in range(hospitals):
        x = 0.4 + step * (place + 0.5)
        box(
            axes,
            x - 1.1,
            0.15,
            2.2,
            0.85,
            f"hospital {place}: own cards\ntrain, send back",
            sketch.HOSPITAL,
            "ClientApp",
        )
        arrow(axes, (x - 0.2, 1.47), (x - 0.2, 1.03), sketch.DOWN)
        arrow(axes, (x + 0.2, 1.03), (x + 0.2, 1.47), sketch.UP)
    arrow(axes, (4.3, 2.42), (4.3, 1.98), sketch.DOWN)
    arrow(axes, (4.7, 1.98), (4.7, 2.42), sketch.UP)
    note(axes, 6.3, 2.95, "down: adapter, orders", sketch.DOWN, side="left")
    note(axes, 6.3, 2.65, "up: adapter, a few numbers", sketch.UP, side="left")
    return figure


def moves(steps: Mapping[str, np.ndarray]) -> Figure:
    """How far each client moved from the start, and their average, as arrows in a plane.

    To the right is the direction of the average, and there the lengths are true. Up and down only keeps the arrows
    apart: they point to more sides than a plane has.

    Args:
        steps: name of a client to its move, a flat array; all of one length.
    """
    whole = np.stack(list(steps.values())).astype(float)
    mean, size = whole.mean(axis=0), np.linalg.norm(whole, axis=1).mean()
    along, share = whole @ mean / max(np.linalg.norm(mean), 1e-12) / size, np.linalg.norm(mean) / size
    alt = (
        f"Arrows from one start: {', '.join(steps)}. They point to different sides; their average points between them "
    )
    figure, axes = sketch.canvas(9, 2.5, f"{alt}and is {share:.0%} as long as one of them is on average.")
    left, right = min(0.0, along.min()), max(1.0, along.max())
    unit = 6.0 / (right - left)
    start, places = (1.0 - left * unit, 1.3), np.linspace(2.25, 0.35, len(steps) + 1 + len(steps) % 2)
    heights = [place for place in places if abs(place - 1.3) > 1e-6][: len(steps)]  # the average lies in the middle
    for name, x, y in zip(steps, along * unit, heights, strict=True):
        arrow(axes, start, (start[0] + x, y), "#e08214")
        note(axes, start[0] + x + (0.08 if x >= 0 else -0.08), y, name, "#e08214", side="left" if x >= 0 else "right")
    arrow(axes, start, (start[0] + share * unit, 1.3), sketch.UP)
    note(axes, start[0] + share * unit + 0.08, 1.3, f"average: {share:.0%}", sketch.UP, side="left")
    axes.plot(*start, "o", color=sketch.INK, markersize=6)
    note(axes, 0.9, 1.3, "the start", side="right") if left == 0 else note(axes, start[0], 1.12, "the start")
    axes.plot([start[0] + unit] * 2, [0.3, 2.3], color=sketch.INK, lw=1, linestyle="--")
    note(axes, start[0] + unit + 0.1, 0.38, "the whole length\nof a hospital's move", side="left", size=8)
    return figure
