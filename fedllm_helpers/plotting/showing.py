"""Show a figure in a notebook together with what it shows in words."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure


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
    beside = [_names(one.get_yticklabels()) for one in (axes, *axes.get_shared_y_axes().get_siblings(axes))]
    rows, columns = next(filter(None, beside), {}), _names(axes.get_xticklabels())
    for image in axes.images:
        cells = np.asarray(image.get_array())
        yield from (f"{rows[y]}, {columns[x]}: {value:.3g}" for (y, x), value in np.ndenumerate(cells) if y in rows)
    drawn = []
    for group in axes.containers:
        if isinstance(group, ErrorbarContainer):
            line, _, bars = group
            drawn.append(line)
            ends = [segment[:, 0] for bar in bars for segment in bar.get_segments()]
            for x, y, (low, high) in zip(*line.get_data(), ends, strict=True):
                yield f"{rows.get(round(float(y)), line.get_label())}: {x:.3g} from {low:.3g} to {high:.3g}"
        elif isinstance(group, BarContainer) and len(group) <= 12:
            yield from (f"{rows.get(place, place)}: {value:.3g}" for place, value in enumerate(group.datavalues))
    for line in axes.lines:
        if line not in drawn and not line.get_label().startswith("_"):
            points = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
            shown = points if len(points) <= 12 else [points[0], points[-1]]
            told = [f"{rows[round(y)]} {x:.3g}" if round(y) in rows else f"({x:.3g}, {y:.3g})" for x, y in shown]
            yield f"{line.get_label()}: {', '.join(told)}"


def _names(labels: list) -> dict[int, str]:
    """Ticks with words, by their place."""
    texts = [label.get_text() for label in labels]
    return dict(enumerate(texts)) if any(any(char.isalpha() for char in text) for text in texts) else {}
