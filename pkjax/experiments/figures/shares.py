"""How much of Tr Θ the top eigenvectors of the path kernel carry."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

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
    scale,
    styles_of,
)
from pkjax.experiments.run_tables import finished, groups
from pkjax.plots.panels import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["captured"]


def captured(table: "DataFrame", by: Literal["pruner", "compression"] = "pruner",
             axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw the share of Tr Θ that the top path eigenvectors carry against their number, one panel per model.

    A line is the mean over runs and ends where the shortest list of its runs ends. The bar beside its end spans the
    smallest to the largest of the runs there.

    Args:
        table: columns data, model, pruner, compression, captured: cells with the shares of the top 1, 2, …
            eigenvectors (cumulative), or None.
        by: what a line stands for.
        axes: one for each model and data set; None makes a figure.

    Returns:
        the figure of the axes: percent of Tr Θ.

    Raises:
        ValueError: the table has no finished runs or lacks a column, a pruner or `by` is unknown, no run
            has shares, or there is not one axes per panel.
        ImportError: Matplotlib is missing.

    Source: Tr Θ = Σ_ij ν_i π_j O_ij², where O = WᵀU of Gebhart, Saxena and Schrater (2021), equation 13.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "snip", "compression": [1.0, 1.0],
        ...                      "captured": [[0.1, 0.2], [0.3, 0.4]]})
        >>> captured(runs).axes[0].lines[0].get_ydata().round(3).tolist()
        [0.2, 0.3]
    """
    if by not in ("pruner", "compression"):
        raise ValueError(f"a line stands for a 'pruner' or a 'compression', not for {by!r}")
    chosen = finished(table, "data", "model", "pruner", "compression", "captured")
    runs = chosen.runs
    has = np.array([np.ndim(cell) == 1 and len(cell) > 0 and bool(np.all(np.isfinite(np.asarray(cell, np.float64))))
                    for cell in runs["captured"]])
    if not has.any():
        raise ValueError("no run of the table has the shares that path eigenvectors carry")
    shown = runs[has]
    styles = styles_of(shown["pruner"]) if by == "pruner" else scale(shown[by])
    panels = list(groups(shown))
    figure, places = by_data(panels, axes, sharey=True)
    for ax, (data, model, _, group) in zip(places, panels, strict=True):
        for place, (value, style) in enumerate(styles.items()):
            cells = [np.asarray(cell, np.float64) for cell in group["captured"][group[by] == value]]
            if cells:
                shares = np.stack([cell[:min(map(len, cells))] for cell in cells])
                index = np.arange(1, shares.shape[1] + 1)
                marked = np.unique(np.round(np.geomspace(1, len(index), 6)).astype(int)) - 1
                ax.plot(index, shares.mean(0), markevery=marked.tolist(), **line_style(style))
                ax.vlines(index[-1] * 1.08**(place + 1), shares[:, -1].min(), shares[:, -1].max(), color=style.colour,
                          linewidth=1.6)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter(percent())
        finish(ax, literal(f"{model}, {data}"), "path eigenvectors", first_in_row(ax, "share of Tr Θ"))
    legend(figure, places)
    note(figure, "mean over runs; bars beside the ends: the least to the largest", *left_out(chosen),
          *count(int(np.sum(~has)), "run without shares", "runs without shares"))
    return figure
