"""The paper's figures from the runs of a sweep, and two more: what predicts training, and what Θ is carried by.

Every function takes a table with one row per run, returns a Matplotlib figure and leaves pyplot's state alone. Given
``axes``, a sequence of as many as there are panels, it draws on these; the legend that panels share and the note go to
their figure, or to the subfigure that holds them.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pkjax.experiments.findings import (
    PREDICTORS,
    QUANTITIES,
    curves,
    finished,
    fits,
    floats,
    groups,
    predictor_scores,
    rms,
)
from pkjax.experiments.regression import risen
from pkjax.experiments.styles import (
    PURPLE,
    SKY,
    STYLES,
    below,
    by_data,
    count,
    finish,
    grid,
    known,
    legend,
    line_style,
    note,
    number,
    percent,
    r2_text,
    scale,
)
from pkjax.plots.panels import BLACK, BLUE, GREEN, ORANGE, SMALL, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["captured", "figure1", "figure2", "figure3", "predictors"]

FAILED = ("failed run", "failed runs")
UNUSED = ("point without a positive trace and a value", "points without a positive trace and a value")


def figure1(table: "DataFrame", t: float | int | Literal["fit"] = "fit",
            axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw ‖ω_t‖ and ‖f_t‖ at the end of training against Tr Π after the first epoch, with the fitted curve.

        ‖ω_t‖ ≈ a(1 − e^{−ηTr(Π)t}),   ‖f_t‖ ≈ a(1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t}

    One row of panels per model and data set. a and b are fitted over a panel's points by least squares, η is the
    runs' learning rate (one curve for each). The legend says how far each pruner's points lie from the curve: the
    root mean square of their residuals.

    Args:
      table: columns data, model, pruner, learning_rate, steps, trace_pi_1, weight_change, output_norm.
      t: steps; with the steps of a real run the exponential has vanished at every realistic trace and the curve is
        flat. "fit" (the default) fits one effective t to each panel too, which the title says.
      axes: two for each model and data set, those of ‖ω_t‖ and ‖f_t‖ in turn; None makes a figure.

    Returns: the figure of the axes.

    Raises: ValueError as ``finished``, for an unknown pruner, where t is neither "fit" nor positive, and for another
        number of axes; ImportError where Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 1.

    >>> import pandas as pd
    >>> trace = [0.1, 1.0, 10.0, 100.0]
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "snip", "learning_rate": 0.1, "steps": 10,
    ...                      "trace_pi_1": trace, "weight_change": [0.1, 0.6, 1.0, 1.0], "output_norm": trace})
    >>> figure1(runs).axes[0].get_xlabel()
    'Tr Π after epoch 1'
    """
    runs, failed = finished(table, "data", "model", "pruner", "learning_rate", "steps", "trace_pi_1", *QUANTITIES)
    names = known(runs["pruner"])
    models = list(groups(runs))
    figure, places = grid(2 * len(models), 3.75, 2.6, axes, across=2)
    omitted = 0
    for row, (_, _, title, some) in enumerate(models):
        trace, eta, pruner = floats(some, "trace_pi_1"), floats(some, "learning_rate"), some["pruner"].to_numpy()
        for ax, (quantity, curve) in zip(places[2 * row:], curves(some, t).items(), strict=False):
            kept = np.isfinite(curve.residuals) if curve.drawn else np.isfinite(trace) & (trace > 0)
            omitted += curve.left_out
            y = floats(some, quantity)
            for name in (n for n in names if n in pruner):
                style, here = STYLES[name], kept & (pruner == name)
                label = f"{style.label} {number(rms(curve.residuals[here]))}"
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
            start = f", b = {number(curve.b)}" if quantity == "output_norm" else ""
            fitted = " (given)" if t != "fit" else " (fitted, at its bound)" if curve.at_bound else " (fitted)"
            finish(ax, f"{title}\na = {number(curve.a)}{start}, t = {number(curve.t)}"
                       f"{fitted if curve.drawn else ''}, {r2_text(curve.r2)}",
                   "Tr Π after epoch 1", f"{QUANTITIES[quantity]} at the end")
    steps = floats(runs, "steps")
    took = f"{_span(steps)} steps" if np.isfinite(steps).any() else "an unknown number of steps"
    note(figure, f"line: fitted curve; the runs took {took}", *count(failed, *FAILED),
          *count(omitted, *UNUSED))
    return figure


def _span(values: np.ndarray) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def figure2(table: "DataFrame", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw ‖ω_t‖ and ‖f_t‖ against Tr Π at initialisation, with a line in ln Tr Π per model and data set.

    The legend has each line's R², slope (per factor e of the trace) and number of runs; fewer than three traces
    have no line, and "–".

    Args:
      table: columns data, model, trace_pi, weight_change, output_norm.
      axes: two, those of ‖ω_t‖ and ‖f_t‖; None makes a figure.

    Returns: the figure of the axes.

    Raises: ValueError as ``finished`` and for another number of axes, ImportError where Matplotlib or pandas is
        missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2.

    >>> import pandas as pd
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "trace_pi": [1., 10., 100.],
    ...                      "weight_change": [1., 2., 3.], "output_norm": [2., 2., 5.]})
    >>> figure2(runs).axes[0].get_legend().get_texts()[0].get_text()
    'fc-100: R² 1.00, slope 0.434 (n = 3)'
    """
    runs, failed = finished(table, "data", "model", "trace_pi", *QUANTITIES)
    models, found = list(groups(runs)), fits(runs).set_index(["data", "model", "quantity"])
    colours = islice(cycle((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)), len(models))
    looks = list(zip(colours, islice(cycle("osv^DPX*p"), len(models)), strict=True))
    figure, places = grid(2, 3.7, 2.9 + 0.15 * len(models), axes)
    omitted = 0
    for ax, (quantity, symbol) in zip(places, QUANTITIES.items(), strict=True):
        for (data, model, label, some), (colour, marker) in zip(models, looks, strict=True):
            x, y, fit = floats(some, "trace_pi"), floats(some, quantity), found.loc[(data, model, quantity)]
            kept = np.isfinite(x) & np.isfinite(y) & (np.nan_to_num(x) > 0)
            omitted += int(fit["left_out"])
            ax.plot(x[kept], y[kept], color=colour, marker=marker, linestyle="none", markersize=3.5, alpha=0.6,
                    markeredgewidth=0, label=f"{label}: {r2_text(fit['r2'])}, slope {number(fit['slope'])} "
                                             f"(n = {int(fit['runs'])})")
            if np.isfinite(fit["slope"]):
                ends = np.array([x[kept].min(), x[kept].max()])
                ax.plot(ends, fit["intercept"] + fit["slope"] * np.log(ends), color="white", linewidth=3, zorder=4)
                ax.plot(ends, fit["intercept"] + fit["slope"] * np.log(ends), color=colour, linewidth=1.6, zorder=5,
                        label=f"_{label}")
        ax.set_xscale("log")
        ax.legend(fontsize=SMALL - 1, frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.0), borderaxespad=0,
                  handletextpad=0.1, bbox_transform=below(ax))
        finish(ax, f"{symbol}, lines in ln Tr Π", "Tr Π at initialisation", f"{symbol} at the end")
    note(figure, *count(failed, *FAILED),
          *count(omitted, *UNUSED))
    return figure


def figure3(table: "DataFrame", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw top-1 accuracy on test data against compression, one panel per data set and model.

    A line is the mean over seeds, its band goes from the worst seed to the best; the dashed line is the mean of the
    dense runs (pruner "none").

    Args:
      table: columns data, model, pruner, compression, test_accuracy (a fraction).
      axes: one for each model and data set; None makes a figure.

    Returns: the figure of the axes. Units: percent against ρ.

    Raises: ValueError as ``finished``, for an unknown pruner and for another number of axes, ImportError where
        Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 3.

    >>> import pandas as pd
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "synflow", "compression": [1., 1., 2.],
    ...                      "test_accuracy": [0.9, 0.8, 0.7]})
    >>> figure3(runs).axes[0].lines[0].get_ydata().round(3).tolist()
    [0.85, 0.7]
    """
    runs, failed = finished(table, "data", "model", "pruner", "compression", "test_accuracy")
    valued = np.isfinite(floats(runs, "test_accuracy"))
    names, panels = known(runs["pruner"]), list(groups(runs))
    figure, places = by_data(panels, axes, sharey="row")
    for ax, (data, model, _, some) in zip(places, panels, strict=True):
        some = some[np.isfinite(floats(some, "test_accuracy"))]
        for name in names:
            here, style = some[some["pruner"] == name], STYLES[name]
            if name == "none" and len(here):
                ax.axhline(here["test_accuracy"].mean(), color=style.colour, linestyle=style.dashes, linewidth=1.2,
                           label=style.label)
            elif len(here):
                seeds = here.groupby("compression")["test_accuracy"].agg(["mean", "min", "max"])
                ax.fill_between(seeds.index, seeds["min"], seeds["max"], color=style.colour, alpha=0.15, linewidth=0)
                ax.plot(seeds.index, seeds["mean"], **line_style(style))
        ax.yaxis.set_major_formatter(percent())
        finish(ax, f"{model}, {data}", "compression ρ ($10^{-ρ}$ kept)", _first(ax, "top-1 accuracy"))
    legend(figure, places)
    repeated = runs[valued].duplicated(["data", "model", "pruner", "compression"]).any()
    note(figure, "mean over seeds, band from the worst to the best" if repeated else "one seed",
         *count(failed, *FAILED), *count(int(np.sum(~valued)), "run without an accuracy", "runs without an accuracy"))
    return figure


def _first(ax: Any, label: str) -> str:
    """Only the first panel of a row has the label that its neighbours share."""
    place = ax.get_subplotspec()
    return label if place is None or place.is_first_col() else ""


def predictors(table: "DataFrame", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw how well Tr Π, the gated path trace, Σ ν_i π_i and Tr Θ predict ‖ω_t‖ and ‖f_t‖, per model and data set.

    A bar is R² of a line in the predictor's logarithm, with the number of runs that it is fitted to above it.

    Args:
      table: columns data, model, trace_pi, gated_trace, bound, trace_ntk, weight_change, output_norm.
      axes: two, those of ‖ω_t‖ and ‖f_t‖; None makes a figure.

    Returns: the figure of the axes.

    Raises: ValueError as ``finished`` and for another number of axes, ImportError where Matplotlib or pandas is
        missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2 for Tr Π, theorem 1 for Σ ν_i π_i.

    >>> import pandas as pd
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "weight_change": [1., 2., 3.], "output_norm": 1.0,
    ...                      **{name: [1., 10., 100.] for name in PREDICTORS}})
    >>> [float(bar.get_height()) for bar in predictors(runs).axes[0].patches]
    [1.0, 1.0, 1.0, 1.0]
    """
    runs, failed = finished(table, "data", "model", *PREDICTORS, *QUANTITIES)
    models, scores = list(groups(runs)), predictor_scores(runs)
    figure, places = grid(2, max(3.7, 0.6 + 0.85 * len(models)), 2.6, axes, across=2 if len(models) <= 4 else 1,
                          sharey=True)
    looks = zip((BLUE, SKY, ORANGE, VERMILLION), ("", "///", "...", "xx"), strict=True)
    for shift, (predictor, (colour, hatch)) in enumerate(zip(PREDICTORS, looks, strict=True)):
        for ax, quantity in zip(places, QUANTITIES, strict=True):
            some = scores[(scores["quantity"] == quantity) & (scores["predictor"] == predictor)]
            place = np.arange(len(models)) + 0.2 * (shift - 1.5)
            ax.bar(place, some["r2"].fillna(0), 0.18, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
                   label=PREDICTORS[predictor])
            for x, r2, fitted in zip(place, some["r2"], some["runs"], strict=True):
                ax.text(x, np.nan_to_num(r2) + 0.015, f"{fitted}" if np.isfinite(r2) else f"– ({fitted})",
                        fontsize=SMALL - 1, rotation=90, ha="center", va="bottom")
    for ax, symbol in zip(places, QUANTITIES.values(), strict=True):
        ax.set_xticks(np.arange(len(models)), [label.replace(", ", "\n") for _, _, label, _ in models])
        ax.set_ylim(0, 1.15)
        finish(ax, f"{symbol} against the predictor's logarithm", "", _first(ax, "R²"))
        ax.grid(False, axis="x")
    legend(figure, places)
    note(figure, "above a bar: its number of runs", *count(failed, *FAILED))
    return figure


def captured(table: "DataFrame", by: Literal["pruner", "compression"] = "pruner",
             axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw the share of Tr Θ that the top path eigenvectors carry against their number, one panel per model.

    A line is the mean over runs and ends where the shortest list of its runs ends. The bar beside its end goes from
    the least of the runs to the largest there.

    Args:
      table: columns data, model, pruner, compression, captured: cells with the shares of the top 1, 2, ... eigenvectors
        (cumulative), or None.
      by: what a line stands for.
      axes: one for each model and data set; None makes a figure.

    Returns: the figure of the axes. Units: percent of Tr Θ.

    Raises: ValueError as ``finished``, for an unknown pruner or ``by``, where no run has shares, and for another number
        of axes; ImportError where Matplotlib is missing.

    Source: Tr Θ = Σ_ij ν_i π_j O_ij², where O = WᵀU of Gebhart, Saxena and Schrater (2021), equation 13.

    >>> import pandas as pd
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "snip", "compression": [1.0, 1.0],
    ...                      "captured": [[0.1, 0.2], [0.3, 0.4]]})
    >>> captured(runs).axes[0].lines[0].get_ydata().round(3).tolist()
    [0.2, 0.3]
    """
    if by not in ("pruner", "compression"):
        raise ValueError(f"a line stands for a 'pruner' or a 'compression', not for {by!r}")
    runs, failed = finished(table, "data", "model", "pruner", "compression", "captured")
    has = np.array([np.ndim(cell) == 1 and len(cell) > 0 and bool(np.all(np.isfinite(np.asarray(cell, np.float64))))
                    for cell in runs["captured"]])
    if not has.any():
        raise ValueError("no run of the table has the shares that path eigenvectors carry")
    shown = runs[has]
    styles = {name: STYLES[name] for name in known(shown["pruner"])} if by == "pruner" else scale(shown[by])
    panels = list(groups(shown))
    figure, places = by_data(panels, axes, sharey=True)
    for ax, (data, model, _, some) in zip(places, panels, strict=True):
        for place, (value, style) in enumerate(styles.items()):
            cells = [np.asarray(cell, np.float64) for cell in some["captured"][some[by] == value]]
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
        finish(ax, f"{model}, {data}", "path eigenvectors", _first(ax, "share of Tr Θ"))
    legend(figure, places)
    note(figure, "mean over runs; bars beside the ends: the least to the largest", *count(failed, *FAILED),
          *count(int(np.sum(~has)), "run without shares", "runs without shares"))
    return figure
