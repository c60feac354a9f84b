"""Figure 2, straight lines in the logarithm of Tr Π, and how well other predictors do."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np

from pkjax.experiments.figures.styles import (
    PURPLE,
    SKY,
    UNUSED,
    below,
    count,
    finish,
    first_in_row,
    grid,
    left_out,
    legend,
    note,
    r2_text,
)
from pkjax.experiments.findings import fits, predictor_scores
from pkjax.experiments.run_tables import PREDICTORS, QUANTITIES, finished, floats, groups
from pkjax.plots.panels import BLACK, BLUE, GREEN, ORANGE, SMALL, VERMILLION, literal
from pkjax.tables import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["figure2", "predictors"]


def figure2(table: "DataFrame", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw ‖ω_t‖ and ‖f_t‖ against Tr Π at initialisation, with a line in ln Tr Π per model and data set.

    The legend shows each line's R², slope (per factor e of the trace) and number of runs. Fewer than three traces have
    no line, and "–".

    Args:
        table: columns data, model, trace_pi, weight_change, output_norm.
        axes: two, for ‖ω_t‖ and ‖f_t‖; None makes a figure.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: the table has no finished runs or lacks a column, or there is not one axes per panel.
        ImportError: Matplotlib or pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "trace_pi": [1., 10., 100.],
        ...                      "weight_change": [1., 2., 3.], "output_norm": [2., 2., 5.]})
        >>> figure2(runs).axes[0].get_legend().get_texts()[0].get_text()
        'fc-100: R² 1.00, slope 0.434 (n = 3)'
    """
    chosen = finished(table, "data", "model", "trace_pi", *QUANTITIES)
    runs = chosen.runs
    models, lines = list(groups(runs)), fits(runs).set_index(["data", "model", "quantity"])
    colours = islice(cycle((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)), len(models))
    looks = list(zip(colours, islice(cycle("osv^DPX*p"), len(models)), strict=True))
    figure, places = grid(2, 3.7, 2.9 + 0.15 * len(models), axes)
    omitted = 0
    for ax, (quantity, symbol) in zip(places, QUANTITIES.items(), strict=True):
        for (data, model, label, group), (colour, marker) in zip(models, looks, strict=True):
            x, y, fit = floats(group, "trace_pi"), floats(group, quantity), lines.loc[(data, model, quantity)]
            kept = np.isfinite(x) & np.isfinite(y) & (np.nan_to_num(x) > 0)
            omitted += int(fit["left_out"])
            ax.plot(x[kept], y[kept], color=colour, marker=marker, linestyle="none", markersize=3.5, alpha=0.6,
                    markeredgewidth=0, label=f"{literal(label)}: {r2_text(fit['r2'])}, slope "
                                             f"{format_number(fit['slope'], 3)} (n = {int(fit['runs'])})")
            if np.isfinite(fit["slope"]):
                ends = np.array([x[kept].min(), x[kept].max()])
                ax.plot(ends, fit["intercept"] + fit["slope"] * np.log(ends), color="white", linewidth=3, zorder=4)
                ax.plot(ends, fit["intercept"] + fit["slope"] * np.log(ends), color=colour, linewidth=1.6, zorder=5,
                        label=f"_{label}")
        ax.set_xscale("log")
        ax.legend(fontsize=SMALL - 1, frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.0), borderaxespad=0,
                  handletextpad=0.1, bbox_transform=below(ax))
        finish(ax, f"{symbol}, lines in ln Tr Π", "Tr Π at initialisation", f"{symbol} at the end")
    note(figure, *left_out(chosen), *count(omitted, *UNUSED))
    return figure


def predictors(table: "DataFrame", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw how well Tr Π, the gated path trace, Σ ν_i π_i and Tr Θ predict ‖ω_t‖ and ‖f_t‖, per model and data set.

    A bar is the R² of a line in the predictor's logarithm; above it stands the number of runs in the fit.

    Args:
        table: columns data, model, trace_pi, gated_trace, bound, trace_ntk, weight_change, output_norm.
        axes: two, for ‖ω_t‖ and ‖f_t‖; None makes a figure.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: the table has no finished runs or lacks a column, or there is not one axes per panel.
        ImportError: Matplotlib or pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2 for Tr Π, theorem 1 for Σ ν_i π_i.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "weight_change": [1., 2., 3.], "output_norm": 1.0,
        ...                      **{name: [1., 10., 100.] for name in PREDICTORS}})
        >>> [float(bar.get_height()) for bar in predictors(runs).axes[0].patches]
        [1.0, 1.0, 1.0, 1.0]
    """
    chosen = finished(table, "data", "model", *PREDICTORS, *QUANTITIES)
    runs = chosen.runs
    models, scores = list(groups(runs)), predictor_scores(runs)
    figure, places = grid(2, max(3.7, 0.6 + 0.85 * len(models)), 2.6, axes, across=2 if len(models) <= 4 else 1,
                          sharey=True)
    looks = zip((BLUE, SKY, ORANGE, VERMILLION), ("", "///", "...", "xx"), strict=True)
    for shift, (predictor, (colour, hatch)) in enumerate(zip(PREDICTORS, looks, strict=True)):
        for ax, quantity in zip(places, QUANTITIES, strict=True):
            rows = scores[(scores["quantity"] == quantity) & (scores["predictor"] == predictor)]
            place = np.arange(len(models)) + 0.2 * (shift - 1.5)
            ax.bar(place, rows["r2"].fillna(0), 0.18, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
                   label=PREDICTORS[predictor])
            for x, r2, fitted in zip(place, rows["r2"], rows["runs"], strict=True):
                ax.text(x, np.nan_to_num(r2) + 0.015, f"{fitted}" if np.isfinite(r2) else f"– ({fitted})",
                        fontsize=SMALL - 1, rotation=90, ha="center", va="bottom")
    for ax, symbol in zip(places, QUANTITIES.values(), strict=True):
        ax.set_xticks(np.arange(len(models)), [literal(label).replace(", ", "\n") for _, _, label, _ in models])
        ax.set_ylim(0, 1.15)
        finish(ax, f"{symbol} against the predictor's logarithm", "", first_in_row(ax, "R²"))
        ax.grid(False, axis="x")
    legend(figure, places)
    note(figure, "above a bar: its number of runs", *left_out(chosen))
    return figure
