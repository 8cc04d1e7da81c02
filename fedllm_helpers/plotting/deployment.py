"""Figures of notebook 06."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedllm_helpers.plotting.figures import STYLE


def stacked(table: pd.DataFrame, xlabel: str, title: str) -> Figure:
    """One bar per row, made of the columns one after the other, each with its value where there is room for it.

    Args:
        table: values of 0 or more; rows and columns in the order in which they are drawn.
        xlabel: with the unit.
        title: of the figure.
    """
    shades, widest = np.linspace(0.25, 0.9, len(table.columns)), table.sum(axis=1).max()
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.55 * len(table)))
        left = np.zeros(len(table))
        for shade, name in zip(shades, table.columns, strict=True):
            axes.barh(table.index, table[name], left=left, color=plt.cm.viridis(shade), edgecolor="white", label=name)
            for row, (start, value) in enumerate(zip(left, table[name], strict=True)):
                if value > 0.05 * widest:
                    colour = "white" if shade < 0.6 else "black"
                    axes.text(start + value / 2, row, f"{value:.1f}", ha="center", va="center", color=colour)
            left += table[name].to_numpy()
        axes.invert_yaxis()
        axes.set(xlabel=xlabel, title=title)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55), ncols=len(table.columns), frameon=False)
    return figure
