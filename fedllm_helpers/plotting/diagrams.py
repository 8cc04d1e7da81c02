"""Drawings that show an idea, not data."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fedllm_helpers.plotting.figures import STYLE


def data_routes() -> Figure:
    """Three ways to bring private records and a model together, and what crosses the hospital's wall in each."""
    routes = (
        ("Closed model behind an API", "records in prompts", "#b2182b", "the vendor's model"),
        ("Training at a third party", "whole training records", "#b2182b", "a cloud's GPU"),
        ("Federated fine-tuning", "adapter, there and back", "#1b8a5a", "a server that averages"),
    )
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9.0, 3.0))
        for axes, (title, cargo, colour, outside) in zip(panels, routes, strict=True):
            axes.set(xlim=(0, 10), ylim=(0, 10), title=title)
            axes.axis("off")
            federated = outside == "a server that averages"
            for x in (0.4, 3.7, 7.0) if federated else (3.7,):
                _box(
                    axes,
                    x,
                    0.3,
                    2.7,
                    3.4,
                    "#dceaf7",
                    "hospital",
                    ("records", "training") if federated else ("records",),
                )
                style = "<|-|>" if federated else "-|>"
                arrow = {"arrowstyle": style, "color": colour, "lw": 2.2, "shrinkA": 2, "shrinkB": 2}
                axes.annotate("", (5.05 + (x - 3.7) * 0.35, 7.0), (x + 1.35, 3.8), arrowprops=arrow)
            _box(axes, 2.0, 7.1, 6.1, 2.4, "#f2f2f2", outside, () if federated else ("records seen here",))
            axes.text(5.05, 5.4, cargo, ha="center", color=colour, fontsize=10, backgroundcolor="white")
    return figure


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, face: str, head: str, lines: Sequence[str]
) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.05,rounding_size=0.3", fc=face, ec="#555555"))
    axes.text(x + width / 2, y + height - 0.75, head, ha="center", va="center", fontweight="bold", fontsize=9)
    for number, line in enumerate(lines):
        axes.text(x + width / 2, y + height - 1.75 - number, line, ha="center", va="center", fontsize=8.5)
