"""Pictures of results: spectra with their bound, overlaps, layers, trainings, trajectories."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.analysis.report import Report
from pkjax.plots.panels import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SMALL,
    VERMILLION,
    axes_of,
    axes_of_all,
    blank,
    finish,
    new_figure,
    size,
)
from pkjax.pruning.connectivity import Connectivity
from pkjax.pruning.result import PruneResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pkjax.experiments.descent import Trajectories

__all__ = ["layers", "overlaps", "report", "spectra", "training", "trajectories"]

MAX_BARS = 30
BAR = 0.14
"""Inches that a layer's bar and name need at least."""


def spectra(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw λ of Θ, ν of A and π of Π, largest first, with the bound ν_i π_i on double logarithmic axes.

    Eigenvalues that are zero to rounding (below 1e-12 of their spectrum's largest) are left out. π ends after
    the eigenvalues that the report holds, and so does the bound.

    Args:
        report: what ``pk.analyze`` returns.
        ax: the axes to draw on; None makes a figure of 4.6 × 3.4 inches.

    Returns: the figure of the axes.

    Raises: ValueError where ``ax`` is no Matplotlib axes, ImportError where Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), theorem 1 for the bound.

    >>> import jax.numpy as jnp, pkjax as pk
    >>> report = pk.analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))
    >>> [line.get_ydata().round(6).tolist() for line in spectra(report).axes[0].lines]     # the bound, λ, ν and π
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    ax = axes_of(ax, 4.6, 3.4)
    count = min(len(report.nu), len(report.pi))
    curves = [("bound $\\nu_i\\pi_i$", np.asarray(report.nu)[:count] * np.asarray(report.pi)[:count], BLACK, ":"),
              ("$\\lambda_i$ of Θ, the tangent kernel", report.lam, VERMILLION, "-"),
              ("$\\nu_i$ of A, the data factor", report.nu, ORANGE, "--"),
              ("$\\pi_i$ of Π, the path kernel", report.pi, BLUE, "-.")]
    if not any(np.max(values, initial=0.0) > 0 for _, values, _, _ in curves):
        return blank(ax, "Eigenvalues", "all eigenvalues are zero")
    for label, values, colour, style in curves:
        values = np.asarray(values, np.float64)
        index = np.arange(1, len(values) + 1)
        shown = values > 1e-12 * max(values.max(initial=0.0), np.finfo(np.float64).tiny)
        label = label if shown.any() else f"{label}: all zero"
        marker = "o" if shown.sum() <= 12 else None      # a short list as a line alone is hard to see
        ax.plot(index[shown], values[shown], style, color=colour, label=label, linewidth=1.6, marker=marker,
                markersize=3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    longest = max(len(values) for _, values, _, _ in curves)
    if longest <= 10:
        ax.set_xticks(range(1, longest + 1), map(str, range(1, longest + 1)))
        ax.set_xticks([], minor=True)
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    ax.legend(fontsize=SMALL - 1, frameon=False)
    return finish(ax, "Eigenvalues", "index $i$", "eigenvalue")


def _edges(n: int, most: int = 40) -> np.ndarray:
    """Bounds of at most ``most`` bins over the indices 1 … n, narrow at the beginning."""
    return np.unique(np.round(np.geomspace(1, n + 1, min(most, n) + 1)).astype(int))


def overlaps(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw which pairs of eigenvectors carry the tangent kernel: ν_i π_j O_ij² / Tr Θ.

    The indices of both spectra fall into bins that widen geometrically; a cell shows its sum, so that all
    cells together are the share of Tr Θ that the report's path eigenvectors carry, which the title says.

    Args:
        report: what ``pk.analyze`` returns.
        ax: the axes to draw on; None makes a figure of 4.6 × 3.4 inches.

    Returns: the figure of the axes, with a colour bar.

    Raises: ValueError where ``ax`` is no Matplotlib axes, ImportError where Matplotlib is missing.

    Source: U′ = WᵀU in Gebhart, Saxena and Schrater (2021), equation 13.

    >>> import jax.numpy as jnp, pkjax as pk
    >>> report = pk.analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.diag(jnp.array([2.0, 1.0])))
    >>> overlaps(report).axes[0].get_title(loc="left")
    'Share of Tr Θ, in all 100 %'
    """
    from matplotlib.colors import LogNorm

    ax = axes_of(ax, 4.6, 3.4)
    if not np.any(report.overlaps) or report.trace_ntk <= 0:
        return blank(ax, "Share of Tr Θ", "no pair of eigenvectors carries anything")
    O = np.asarray(report.overlaps, np.float64)
    weights = np.asarray(report.nu)[:, None] * np.asarray(report.pi)[None, :O.shape[1]] * O**2 / report.trace_ntk
    rows, columns = _edges(O.shape[0]), _edges(O.shape[1])
    cells = np.add.reduceat(np.add.reduceat(weights, rows[:-1] - 1, axis=0), columns[:-1] - 1, axis=1)
    top = float(cells.max())
    norm = LogNorm(vmin=top * 1e-4, vmax=top, clip=True)
    mesh = ax.pcolormesh(columns, rows, np.maximum(cells, top * 1e-4), norm=norm, cmap="cividis", rasterized=True)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.invert_yaxis()
    for axis, edges in ((ax.xaxis, columns), (ax.yaxis, rows)):
        if edges[-1] <= 11:     # a scale of powers of ten says too little
            axis.set_ticks(np.sqrt(edges[:-1] * edges[1:]), [
                f"{low}" if high == low + 1 else f"{low}–{high - 1}" for low, high in itertools.pairwise(edges)])
            axis.set_ticks([], minor=True)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL - 1)
    title = f"Share of Tr Θ, in all {100 * weights.sum():.3g} %"
    return finish(ax, title, "path eigenvector $j$", "data eigenvector $i$")


def layers(report: Report | PruneResult | Connectivity, ax: "Axes | None" = None) -> "Figure":
    """Draw the share of its weights that every layer keeps; emptied layers are named in vermillion.

    Of more layers than fit, at most 30, those that keep least are drawn, and the title says so. Long names lose
    their ending, where all share it, and then their middle.

    Args:
        report: what ``pk.analyze``, ``pk.prune`` or ``pk.connectivity`` returns.
        ax: the axes to draw on; None makes a figure as high as the layers need.

    Returns: the figure of the axes.

    Raises: ValueError where ``ax`` is no Matplotlib axes, ImportError where Matplotlib is missing.

    Source: definition; the paper counts kernels' weights alone (Gebhart, Saxena and Schrater 2021, appendix A.4.2).

    >>> import jax.numpy as jnp, pkjax as pk
    >>> result = pk.prune(pk.magnitude, {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}, density=0.5)
    >>> [text.get_text() for text in layers(result).axes[0].texts]
    ['2 of 4']
    """
    shown = list(report.layers)
    ax = axes_of(ax, 4.6, 0.9 + 0.22 * min(max(len(shown), 3), MAX_BARS))
    width, height = size(ax)
    most = min(MAX_BARS, max(1, int((height - 0.5) / BAR)))
    if len(shown) > most:
        least = sorted(range(len(shown)), key=lambda i: shown[i].kept / max(shown[i].total, 1))[:most]
        shown = [shown[i] for i in sorted(least)]
    place = np.arange(len(shown))
    shares = np.array([layer.kept / max(layer.total, 1) for layer in shown])
    ax.barh(place, shares, color=GREEN, height=0.7)
    for i, (layer, share) in enumerate(zip(shown, shares, strict=True)):
        inside = share > 0.6
        text = "empty" if layer.emptied else f"{layer.kept:,} of {layer.total:,}"
        ax.text(share - 0.01 if inside else share + 0.01, i, text, va="center", fontsize=SMALL - 2,
                ha="right" if inside else "left",
                color="white" if inside else VERMILLION if layer.emptied else BLACK)
    ax.set_yticks(place, _shortened([layer.name for layer in shown], int(6.5 * width)))
    ax.set_ylim(max(len(shown), 3) - 0.5, -0.5)
    ax.set_xlim(0, 1.02)
    title = f"Least kept, {most} of {len(report.layers)} layers" if len(report.layers) > most else "Weights kept"
    return finish(ax, title, "share of the layer's weights", "")


def _shortened(names: list[str], most: int) -> list[str]:
    """Bring names to ``most`` characters: without the last part that all share, then without their middle."""
    if max(map(len, names), default=0) > most and len({name.rpartition("/")[2] for name in names}) == 1:
        names = [name.rpartition("/")[0] or name for name in names]
    most = max(most, 4)
    short = names
    for tail in (most // 2, most // 4, 1, most - 2):     # the first that leaves different names different
        short = [name if len(name) <= most else f"{name[:most - tail - 1]}…{name[-tail:]}" for name in names]
        if len(set(short)) == len(set(names)):
            break
    return short


def training(history: Sequence[Mapping[str, Any]], ax: "Axes | None" = None, title: str = "") -> "Figure":
    """Draw accuracy on training and test images epoch by epoch, as ``pk.training.fit`` records it.

    Args:
        history: rows with epoch, train_accuracy and test_accuracy (fractions), as in ``Fit.history``; that of epoch 0,
            before training, is left out.
        ax: the axes to draw on; None makes a figure of 4.6 × 3.4 inches.
        title: what to write above; "Training" by default.

    Returns: the figure of the axes. Units: percent.

    Raises: ValueError where ``ax`` is no Matplotlib axes, ImportError where Matplotlib is missing.

    Source: definition: the share of images whose largest output is the label's.

    >>> rows = [{"epoch": 0}, {"epoch": 1, "train_accuracy": 0.5, "test_accuracy": 0.25}]
    >>> [float(line.get_ydata()[0]) for line in training(rows).axes[0].lines]
    [50.0, 25.0]
    """
    ax = axes_of(ax, 4.6, 3.4)
    from matplotlib.ticker import MaxNLocator

    if len(history) < 2:
        return blank(ax, title or "Training", "no epoch yet")
    for name, label, colour, style in (("train_accuracy", "training images", BLUE, "--"),
                                       ("test_accuracy", "test images", VERMILLION, "-")):
        rows = [(row["epoch"], 100 * row[name]) for row in history[1:]]     # before training there is only chance
        ax.plot(*zip(*rows, strict=True), style, color=colour, label=label, linewidth=1.6,
                marker="o" if len(rows) <= 12 else None, markersize=3)
    ax.grid(True, linewidth=0.4, alpha=0.5)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    ax.legend(fontsize=SMALL - 1, frameon=False, loc="best")
    return finish(ax, title or "Training", "epoch", "accuracy in %")


def trajectories(found: "Trajectories", title: str = "", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw ‖ω_t‖, ‖f_t‖ and the loss of a training, of its linearisation, and as Tr Π forecasts them.

    Args:
        found: what ``pk.experiments.trajectories`` returns.
        title: what to write above the panels.
        axes: the three axes to draw on; None makes a figure of 10 × 3.2 inches.

    Returns: the figure of the axes.

    Raises: ValueError where ``axes`` are not three Matplotlib axes, ImportError where Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), equations 7, 8 and 18, and figure 1 for the forecast.

    >>> import jax.numpy as jnp, pkjax as pk
    >>> found = pk.experiments.trajectories(lambda w, x: x @ w, jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)),
    ...                                     steps=4, points=3)
    >>> [panel.get_title(loc="left") for panel in trajectories(found).axes][-1]
    'loss $L$'
    """
    names = {"weight_change": "$\\|\\omega_t\\|$", "output_norm": "$\\|f_t\\|$", "loss": "loss $L$"}
    places = new_figure(10.0, 3.2).subplots(1, 3) if axes is None else axes
    places = axes_of_all(places, 3, "trajectories are drawn on 3 panels")
    kinds = (("network", found.measured, VERMILLION, "-"), ("linearised", found.linearized, BLUE, "--"),
             ("forecast by Tr Π", found.forecast, BLACK, ":"))
    for ax, (name, symbol) in zip(places, names.items(), strict=True):
        for label, values, colour, style in kinds:
            if name in values and np.isfinite(values[name]).any():
                ax.plot(found.steps, values[name], style, color=colour, label=label, linewidth=1.6)
        ax.set_xscale("log")
        ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
        ax.legend(fontsize=SMALL - 1, frameon=False)
        finish(ax, symbol, "step of gradient descent", "")
    return _titled(places[0].figure, title)


def _titled(figure: Any, title: str) -> "Figure":
    if title:
        figure.suptitle(title, fontsize=SMALL + 3, x=0.01, ha="left")
    return figure


def report(report: Report, title: str = "", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw the whole report: spectra, overlaps and layers side by side.

    Args:
        report: what ``pk.analyze`` returns.
        title: what to write above the panels.
        axes: the three axes to draw on; None makes a figure of 13 × 3.8 inches, higher where there are many layers.

    Returns: the figure of the axes.

    Raises: ValueError where ``axes`` are not three Matplotlib axes, ImportError where Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), theorem 1 and equation 13.

    >>> import jax.numpy as jnp, pkjax as pk
    >>> figure = report(pk.analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2)))
    >>> len(figure.axes)                                           # three panels and a colour bar
    4
    """
    height = max(3.8, 1.0 + BAR * min(len(report.layers), MAX_BARS))
    places = new_figure(13.0, height).subplots(1, 3) if axes is None else axes
    places = axes_of_all(places, 3, "a report is drawn on 3 panels")
    for ax, draw in zip(places, (spectra, overlaps, layers), strict=True):
        draw(report, ax)
    return _titled(places[0].figure, title)
