"""Show a figure in a notebook together with what it shows in words."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryFormatter
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FuncFormatter


def show(figure: Figure) -> None:
    """Display a figure with its alternative text, which the notebook and the pages made from it keep, and close it."""
    display(figure, metadata={"image/png": {"alt": describe(figure)}})
    plt.close(figure)


def describe(figure: Figure) -> str:
    """What a figure shows, in words: of a drawing its label, of data the titles, the axes and the numbers drawn.

    Lines of more than a dozen points are told by their first and last point.
    """
    if figure.get_label():
        return figure.get_label()
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        said = [text for text in (axes.get_title(loc) for loc in ("left", "center")) if text]
        said += [f"{way}: {text}" for way, text in (("x", axes.get_xlabel()), ("y", axes.get_ylabel())) if text]
        parts += [", ".join(said), *_marks(axes)]
    return ". ".join(part for part in parts if part) + "."


def _marks(axes: Axes) -> Iterator[str]:
    """What is drawn: points with intervals, bars, cells and lines, by the names of the ticks where these have names."""
    rows, columns = _names(axes.yaxis), _names(axes.xaxis)
    for image in axes.images:
        cells = np.asarray(image.get_array())
        yield from (f"{rows[y]}, {columns[x]}: {_said(value)}" for (y, x), value in np.ndenumerate(cells) if y in rows)
    legends = [one for one in (axes.get_legend(), *axes.get_figure().legends) if one]
    shown = {text.get_text() for one in legends for text in one.get_texts()}
    for group in axes.containers:
        yield from _points(group, rows, shown) if isinstance(group, ErrorbarContainer) else _bars(group, rows)
    drawn = [group[0] for group in axes.containers if isinstance(group, ErrorbarContainer)]
    for line in axes.lines:
        points = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        if line.get_gid():  # a reference across the panel
            (x, y), (last, _) = points[0], points[-1]
            yield f"dashed at {_said(x if x == last else y)}: {line.get_gid()}"
        elif line not in drawn and not line.get_label().startswith("_"):
            shown = points if len(points) <= 12 else [points[0], points[-1]]
            told = [
                f"{rows[round(y)]} {_said(x)}" if round(y) in rows else f"({_said(x)}, {_said(y)})" for x, y in shown
            ]
            yield f"{line.get_label()}: {', '.join(told)}"


def _points(group: ErrorbarContainer, rows: dict[int, str], shown: set[str]) -> Iterator[str]:
    """Each with its interval; one up and down is told by its height, beside its place. Of a legend, what it shows."""
    line, _, bars = group
    way, arm = int(group.has_yerr), group.get_label()
    ends = [segment[:, way] for bar in bars for segment in bar.get_segments()]
    for x, y, (low, high) in zip(*line.get_data(), ends, strict=True):
        row = "" if way else rows.get(round(float(y)), "")
        names = ", ".join(dict.fromkeys(name for name in (row, arm if arm in shown or not row else "") if name))
        yield f"{names}: {f'at {_said(x)}, ' if way else ''}{_said((x, y)[way])} from {_said(low)} to {_said(high)}"


def _bars(group: BarContainer, rows: dict[int, str]) -> Iterator[str]:
    part = "" if group.get_label().startswith("_") else f", {group.get_label()}"
    if len(group) <= 12:
        for place, value in enumerate(group.datavalues):
            yield f"{rows.get(place, place)}{part}: {_said(value)}"


def _names(axis: Axis) -> dict[int, str]:
    """The ticks of an axis that were given names, by their place; an inner panel hides those that it shares."""
    names, places = axis.get_major_formatter(), axis.get_ticklocs()
    if not isinstance(names, (FixedFormatter, FuncFormatter, StrCategoryFormatter)):
        return {}
    return {round(float(place)): name for place, name in zip(places, names.format_ticks(places), strict=True)}


def _said(value: float) -> str:
    """A number with three digits, or all that stand before its point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
