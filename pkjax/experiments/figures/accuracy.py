"""Figure 3: accuracy against compression."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pkjax.experiments.figures.styles import (
    by_data,
    count,
    finish,
    first_in_row,
    left_out,
    legend,
    line_style,
    note,
    percent,
    styles_of,
)
from pkjax.experiments.run_tables import finished, floats, groups
from pkjax.plots.panels import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["figure3"]


def figure3(table: "DataFrame", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw top-1 accuracy on test data against compression, one panel per data set and model.

    A line is the mean over seeds, its band runs from the worst seed to the best; the dashed line is the mean of the
    dense runs (pruner "none").

    Args:
        table: columns data, model, pruner, compression, test_accuracy (a fraction).
        axes: one for each model and data set; None makes a figure.

    Returns:
        the figure of the axes: percent against ρ.

    Raises:
        ValueError: the table has no finished runs or lacks a column, a pruner is unknown, or there is not one
            axes per panel.
        ImportError: Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 3.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "synflow", "compression": [1., 1., 2.],
        ...                      "test_accuracy": [0.9, 0.8, 0.7]})
        >>> figure3(runs).axes[0].lines[0].get_ydata().round(3).tolist()
        [0.85, 0.7]
    """
    chosen = finished(table, "data", "model", "pruner", "compression", "test_accuracy")
    runs = chosen.runs
    valued = np.isfinite(floats(runs, "test_accuracy"))
    styles, panels = styles_of(runs["pruner"]), list(groups(runs))
    figure, places = by_data(panels, axes, sharey="row")
    for ax, (data, model, _, group) in zip(places, panels, strict=True):
        accurate = group[np.isfinite(floats(group, "test_accuracy"))]
        for name, style in styles.items():
            here = accurate[accurate["pruner"] == name]
            if name == "none" and len(here):
                ax.axhline(here["test_accuracy"].mean(), color=style.colour, linestyle=style.dashes, linewidth=1.2,
                           label=style.label)
            elif len(here):
                seeds = here.groupby("compression")["test_accuracy"].agg(["mean", "min", "max"])
                ax.fill_between(seeds.index, seeds["min"], seeds["max"], color=style.colour, alpha=0.15, linewidth=0)
                ax.plot(seeds.index, seeds["mean"], **line_style(style))
        ax.yaxis.set_major_formatter(percent())
        finish(ax, literal(f"{model}, {data}"), "compression ρ ($10^{-ρ}$ kept)", first_in_row(ax, "top-1 accuracy"))
    legend(figure, places)
    repeated = runs[valued].duplicated(["data", "model", "pruner", "compression"]).any()
    note(figure, "mean over seeds, band from the worst to the best" if repeated else "one seed",
         *left_out(chosen), *count(int(np.sum(~valued)), "run without an accuracy", "runs without an accuracy"))
    return figure
