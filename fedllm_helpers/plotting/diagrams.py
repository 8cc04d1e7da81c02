"""Drawings about a model: what it has read, how it is scored, what LoRA trains, what four bits keep."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fedllm_helpers.plotting import sketch
from fedllm_helpers.plotting.sketch import arrow, block, box, note


def two_questions() -> Figure:
    """Opens notebook 01: the public web that a model has read, and the hospitals' records that it has not."""
    alt = "A model between two shelves. It has read the public web: what did it learn by heart? It has not read what "
    figure, axes = sketch.canvas(9, 2.3, alt + "hospitals keep: what does it not know?")
    box(axes, 0.2, 0.55, 2.3, 1.2, "books, forums, code:\nread, some of it often", sketch.SERVER, "the public web")
    box(axes, 3.75, 0.55, 1.5, 1.2, "135 million\nnumbers", sketch.FACTOR, "the model")
    for place, name in enumerate(("heart clinic", "eye clinic", "nerve clinic")):
        box(axes, 6.7, 1.6 - 0.62 * place, 2.0, 0.5, f"{name}: own records", sketch.HOSPITAL)
    arrow(axes, (2.6, 1.15), (3.65, 1.15), sketch.DOWN)
    arrow(axes, (6.62, 1.15), (6.42, 1.15), sketch.BAD)
    axes.plot([6.35, 6.35], [0.25, 2.08], color=sketch.INK, lw=3)
    note(axes, 3.1, 1.95, "What did it learn by heart? (1.5)", sketch.DOWN)
    note(axes, 5.0, 0.25, "What does it not know? (1.2 to 1.4)", sketch.BAD)
    note(axes, 6.35, 2.2, "a wall", size=8)
    return figure


def next_token(prompt: Sequence[str], answer: Sequence[str], chances: Sequence[float]) -> Figure:
    """How an answer is scored: the logits at each place give a chance to the token at the next place.

    Args:
        prompt: the last tokens of the prompt, as text.
        answer: the first tokens of the answer, as text.
        chances: what the model gives to each of those, from 0 to 1.
    """
    pieces = [repr(one)[1:-1].replace(" ", "·") for one in (*prompt, *answer)]
    alt = (
        f"Tokens in a row: {' '.join(pieces)}. An arrow leads from each place, from the last of the prompt on, to the "
    )
    said = ", ".join(f"{one} {chance:.2g}" for one, chance in zip(pieces[len(prompt) :], chances, strict=True))
    figure, axes = sketch.canvas(9, 1.9, f"{alt}next token, with the chance that the model gave it: {said}.")
    ends = np.concatenate([[0], np.cumsum([0.3 + 0.083 * len(piece) for piece in pieces])])
    middles = 0.2 + (ends[:-1] + ends[1:]) / 2 * 8.6 / ends[-1]
    for place, (piece, middle) in enumerate(zip(pieces, middles, strict=True)):
        width = (ends[place + 1] - ends[place]) * 8.6 / ends[-1] - 0.08
        box(axes, middle - width / 2, 0.55, width, 0.36, "", sketch.GREY if place < len(prompt) else sketch.FACTOR)
        axes.text(middle, 0.73, piece, ha="center", va="center", family="monospace", fontsize=8.5)
    for place, chance in enumerate(chances, len(prompt)):
        bow = {"arrowstyle": "-|>", "color": sketch.UP, "connectionstyle": "arc3,rad=-0.45", "lw": 1.4}
        axes.annotate("", (middles[place], 0.93), (middles[place - 1], 0.93), arrowprops=bow)
        note(axes, (middles[place - 1] + middles[place]) / 2, 1.42, f"p = {chance:.2g}", sketch.UP)
    note(axes, middles[0] - 0.2, 0.3, "prompt: given", side="left")
    note(axes, middles[len(prompt)] - 0.2, 0.3, "answer: its NLL is the sum of −ln p", sketch.UP, side="left")
    note(axes, 0.2, 1.75, "the logits at a place are about the token at the next place", side="left")
    return figure


def tokens(pieces: Sequence[str], learned: Sequence[bool], title: str, width: int = 76) -> Figure:
    """A text as its tokens, in boxes: grey ones are given to the model, green ones it learns to say.

    Args:
        pieces: the tokens as text; a blank is drawn as ``·``.
        learned: for each, whether the loss counts it.
        title: of the figure.
        width: characters in a line.
    """
    rows: list[list[tuple[str, bool]]] = [[]]
    for piece, counts in zip(pieces, learned, strict=True):
        text = repr(piece)[1:-1].replace(" ", "·")
        text = text if len(text) < width - 1 else f"{text[: width - 3]}…"
        if sum(len(one) + 1 for one, _ in rows[-1]) + len(text) + 1 > width:
            rows.append([])
        rows[-1].append((text, counts))
    parts = {what: "".join(p for p, c in zip(pieces, learned, strict=True) if c == what) for what in (False, True)}
    alt = f"{title}. Given, in grey: {parts[False]!r}. Learned, in green: {parts[True]!r}."
    figure, axes = sketch.canvas(9.0, 0.9 + 0.36 * len(rows), alt)
    axes.set(xlim=(-0.5, width + 0.5), ylim=(len(rows) + 1.2, -0.9))
    axes.text(0, -0.45, title, fontweight="bold", fontsize=11, va="center")
    for line, row in enumerate(rows):
        place = 0.0
        for text, counts in row:
            _token(axes, place, line, text, counts)
            place += len(text) + 1
    for place, text, counts in ((0.0, "given", False), (9.0, "learned", True)):
        _token(axes, place, len(rows) + 0.2, text, counts)
    return figure


def _token(axes: Axes, x: float, y: float, text: str, learned: bool) -> None:
    face, edge = (sketch.FACTOR, sketch.UP) if learned else ("#eeeeee", "#9a9a9a")
    shape = FancyBboxPatch(
        (x + 0.1, y + 0.05), len(text) + 0.5, 0.7, "round,pad=0.0,rounding_size=0.12", fc=face, ec=edge
    )
    shape.set_gid("learned" if learned else "given")
    axes.add_patch(shape)
    axes.text(x + 0.35 + len(text) / 2, y + 0.42, text, ha="center", va="center", family="monospace", fontsize=8)


def pooled_training(hospitals: int = 6) -> Figure:
    """Opens notebook 02: every hospital's cards in one place, a model that trains there, and cards held out to ask."""
    alt = f"The cards of {hospitals} organ systems go into one pool. A public model, frozen, with a small adapter is "
    figure, axes = sketch.canvas(9, 2.5, alt + "trained on the pool and asked about cards that were held out.")
    for place in range(hospitals):
        y = 2.05 - 0.36 * place
        box(axes, 0.2, y, 1.5, 0.3, f"organ system {place + 1}", sketch.HOSPITAL)
        arrow(axes, (1.75, y + 0.15), (2.75, 1.45), sketch.BAD)
    box(axes, 2.8, 0.85, 1.4, 1.2, "all cards\nin one place", sketch.HOSPITAL, "the pool")
    arrow(axes, (4.3, 1.45), (5.1, 1.45), sketch.UP)
    box(axes, 5.2, 0.85, 1.2, 1.2, "frozen", sketch.GREY, "the model")
    box(axes, 6.5, 0.85, 0.75, 1.2, "trained", sketch.FACTOR, "adapter")
    arrow(axes, (8.0, 1.45), (7.35, 1.45), sketch.DOWN, both=True)
    box(axes, 8.05, 0.95, 0.8, 1.0, "held-out\ncards", sketch.SERVER)
    note(axes, 4.7, 1.65, "train", sketch.UP)
    note(axes, 7.68, 1.65, "ask", sketch.DOWN)
    note(axes, 2.25, 0.25, "private records would have to move", sketch.BAD, side="left")
    note(axes, 6.9, 0.6, "only this is trained", sketch.UP)
    return figure


def lora_update(outputs: int, inputs: int, rank: int) -> Figure:
    """A LoRA layer: the frozen square W, and beside it the two thin factors whose product is added to it."""
    count, whole = rank * (outputs + inputs), outputs * inputs
    alt = (
        f"A frozen matrix W, {outputs} by {inputs}, plus α/r times B, {outputs} by {rank}, times A, {rank} by {inputs}"
    )
    figure, axes = sketch.canvas(7, 2.7, f"{alt}. Only B and A are trained: {count:,} numbers against {whole:,}.")
    block(axes, 0.2, 0.45, 2.1, 2.1, f"W\n{outputs} × {inputs}\nfrozen", sketch.GREY)
    note(axes, 2.85, 1.5, "+  α/r ·", size=12)
    block(axes, 3.4, 0.45, 0.3, 2.1, "B", sketch.FACTOR)
    note(axes, 3.95, 2.4, "·", size=14)
    block(axes, 4.2, 2.25, 2.1, 0.3, "A", sketch.FACTOR)
    note(axes, 3.55, 0.22, f"{outputs} × {rank}")
    note(axes, 5.25, 2.02, f"{rank} × {inputs}")
    share = f"trained: {count:,} numbers\n{count / whole:.0%} of the {whole:,} of W"
    note(axes, 4.2, 1.1, share, sketch.UP, size=10, side="left")
    return figure


def levels(weights: Sequence[float], shown: int = 24) -> Figure:
    """What four bits keep: the weights of a block above, and the nearest of 16 even levels, to which each goes, below.

    Args:
        weights: of one block, of any scale.
        shown: how many of them are drawn.
    """
    values = np.asarray(weights, dtype=float) / np.abs(weights).max()
    codes, shown = np.round((values + 1) * 7.5), min(shown, len(values))
    alt = f"{shown} weights on a line, in units of the largest, each joined to the nearest of 16 even levels; "
    figure, axes = sketch.canvas(9, 1.9, f"{alt}{len(np.unique(codes))} of the 16 are used by the whole block.")
    places = 4.5 + values * 4.0
    for place, code in list(zip(places, codes, strict=True))[:shown]:
        axes.plot([place, 0.5 + code * 8 / 15], [1.25, 0.62], color=sketch.UP, lw=0.9)
    axes.plot(places[:shown], np.full(shown, 1.25), "o", color=sketch.UP, markersize=4)
    for code in range(16):
        axes.plot([0.5 + code * 8 / 15] * 2, [0.5, 0.62], color=sketch.INK, lw=1.6)
        note(axes, 0.5 + code * 8 / 15, 0.36, f"{code:04b}", size=7.5)
    note(axes, 0.5, 1.6, f"{shown} weights of a block, in units of its largest", sketch.UP, side="left")
    note(
        axes,
        0.5,
        0.12,
        "16 levels: 4 bits name one of them, and one scale per block says how large a unit is",
        side="left",
    )
    return figure
