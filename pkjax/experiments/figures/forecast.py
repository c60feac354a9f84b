"""Figure 1: the outcome of training against the forecast by Tr Π after the first epoch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pkjax.experiments.figures.styles import (
    UNUSED,
    count,
    finish,
    grid,
    left_out,
    line_style,
    note,
    r2_text,
    styles_of,
)
from pkjax.experiments.findings import curves, rms
from pkjax.experiments.regression import risen
from pkjax.experiments.run_tables import QUANTITIES, finished, floats, groups
from pkjax.plots.panels import BLACK, SMALL, literal
from pkjax.tables import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["figure1"]


def figure1(table: "DataFrame", t: float | int | Literal["fit"] = "fit",
            axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw ‖ω_t‖ and ‖f_t‖ at the end of training against Tr Π after the first epoch, with the fitted curve.

        ‖ω_t‖ ≈ a(1 − e^{−ηTr(Π)t}),   ‖f_t‖ ≈ a(1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t}

    One row of panels per model and data set. a and b are fitted to a panel's points by least squares; η is the runs'
    learning rate (one curve for each). The legend shows how far each pruner's points lie from the curve: the root mean
    square of their residuals.

    Args:
        table: columns data, model, pruner, learning_rate, steps, trace_pi_1, weight_change, output_norm.
        t: steps. At the steps of a real run the exponential has vanished at every realistic trace, and the curve is
            flat. "fit" (the default) fits one effective t to each panel too, which the title shows.
        axes: two for each model and data set, for ‖ω_t‖ and ‖f_t‖ in turn; None makes a figure.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: the table has no finished runs or lacks a column, a pruner is unknown, t is neither "fit"
            nor positive, or there is not one axes per panel.
        ImportError: Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 1.

    Examples:
        >>> import pandas as pd
        >>> trace = [0.1, 1.0, 10.0, 100.0]
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "snip", "learning_rate": 0.1,
        ...                      "steps": 10, "trace_pi_1": trace, "weight_change": [0.1, 0.6, 1.0, 1.0],
        ...                      "output_norm": trace})
        >>> figure1(runs).axes[0].get_xlabel()
        'Tr Π after epoch 1'
    """
    chosen = finished(table, "data", "model", "pruner", "learning_rate", "steps", "trace_pi_1", *QUANTITIES)
    runs = chosen.runs
    styles = styles_of(runs["pruner"])
    models = list(groups(runs))
    figure, places = grid(2 * len(models), 3.75, 2.6, axes, across=2)
    omitted = 0
    for row, (_, _, title, group) in enumerate(models):
        trace, eta, pruner = floats(group, "trace_pi_1"), floats(group, "learning_rate"), group["pruner"].to_numpy()
        for ax, (quantity, curve) in zip(places[2 * row:], curves(group, t).items(), strict=False):
            kept = np.isfinite(curve.residuals) if curve.drawn else np.isfinite(trace) & (trace > 0)
            omitted += curve.left_out
            y = floats(group, quantity)
            for name, style in ((name, style) for name, style in styles.items() if name in pruner):
                here = kept & (pruner == name)
                label = f"{style.label} {format_number(rms(curve.residuals[here]), 3)}"
                ax.plot(trace[here], y[here], **line_style(style) | {"linestyle": "none", "markersize": 4,
                                                                     "label": label})
            if curve.drawn:
                x = np.geomspace(trace[kept].min(), trace[kept].max(), 300)
                for rate in np.unique(eta[kept]):
                    ax.plot(x, risen(rate * x, curve.a, curve.b, curve.t), color=BLACK, linewidth=1.2, zorder=5,
                            label="_curve")
            ax.set_xscale("log")
            ax.legend(fontsize=SMALL - 1, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02),
                      handletextpad=0.1, borderaxespad=0.1, title="RMS residual", title_fontsize=SMALL - 1,
                      alignment="left")
            start = f", b = {format_number(curve.b, 3)}" if quantity == "output_norm" else ""
            fitted = " (given)" if t != "fit" else " (fitted, at its bound)" if curve.at_bound else " (fitted)"
            finish(ax, f"{literal(title)}\na = {format_number(curve.a, 3)}{start}, t = {format_number(curve.t, 3)}"
                       f"{fitted if curve.drawn else ''}, {r2_text(curve.r2)}",
                   "Tr Π after epoch 1", f"{QUANTITIES[quantity]} at the end")
    steps = floats(runs, "steps")
    took = f"{_span(steps)} steps" if np.isfinite(steps).any() else "an unknown number of steps"
    note(figure, f"line: fitted curve; the runs took {took}", *left_out(chosen), *count(omitted, *UNUSED))
    return figure


def _span(values: np.ndarray) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
