"""Figures of how adapters are combined."""

import re

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedllm_helpers.plotting.figures import STYLE

LOOKS = (("#1f4e8c", "o", "-"), ("#e08214", "s", "--"), ("#1b8a5a", "^", ":"), ("#b2479a", "D", "-."))


def errors_by_layer(table: pd.DataFrame, title: str) -> Figure:
    """Relative error of a combination, along the blocks of a model: a panel per partition, a line per projection.

    Args:
        table: columns ``partition``, ``round``, ``layer`` (a name with ``.layers.N.`` in it) and ``error``.
        title: of the figure.
    """
    block = table["layer"].map(lambda name: int(re.search(r"\.(?:layers|h)\.(\d+)\.", name)[1]))
    table = table.assign(block=block, projection=table["layer"].str.split(".").str[-1])
    partitions = list(dict.fromkeys(table["partition"]))
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, len(partitions), figsize=(8.4, 3.4), sharey=True, squeeze=False)
        for axes, partition in zip(panels[0], partitions, strict=True):
            groups = table[table["partition"] == partition].groupby(["projection", "round"], sort=True)
            for ((projection, number), part), (colour, mark, line) in zip(groups, LOOKS, strict=False):
                label = f"{projection}, round {number}" if axes is panels[0][0] else None
                look = {"color": colour, "marker": mark, "linestyle": line, "markersize": 4}
                axes.plot(part["block"], part["error"], label=label, **look)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(xlabel="block of the model", title=partition, ylim=(0, None))
        panels[0][0].set_ylabel("relative error of the update")
        figure.suptitle(title)
        figure.legend(loc="outside right upper")
    return figure
