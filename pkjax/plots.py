"""Pictures: a report's spectra with their bound, its overlaps and layers, and a training's accuracies.

Every function returns a Matplotlib figure, draws on ``ax`` where one is given, and leaves pyplot's state alone. Colours
are Okabe and Ito's (2008), which colour-blind readers tell apart; curves differ in their line style too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.analysis import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pkjax.experiments.descent import Trajectories

__all__ = ["layers", "overlaps", "report", "spectra", "training", "trajectories"]

BLUE, ORANGE, GREEN, VERMILLION, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
SMALL = 8
MAX_BARS = 30


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need Matplotlib: pip install 'pkjax[plots]'") from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _axes(ax: "Axes | None", width: float, height: float) -> Any:
    return _figure(width, height).add_subplot() if ax is None else ax


def _finish(ax: Any, title: str, x: str, y: str) -> "Figure":
    ax.set_title(title, fontsize=SMALL + 1, loc="left")
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.tick_params(labelsize=SMALL - 1)
    return ax.figure


def spectra(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw λ of Θ, ν of A and π of Π, largest first, with the bound ν_i π_i on double logarithmic axes.

    Eigenvalues that are zero to rounding (below 1e-12 of their spectrum's largest) are left out. π ends after
    the eigenvalues that the report holds, and so does the bound.

    Source: figure 4 of Gebhart et al. (2021) draws such spectra.
    """
    ax = _axes(ax, 4.6, 3.4)
    count = min(len(report.nu), len(report.pi))
    curves = [("bound $\\nu_i\\pi_i$", np.asarray(report.nu)[:count] * np.asarray(report.pi)[:count], BLACK, ":"),
              ("$\\lambda_i$ of Θ, the tangent kernel", report.lam, VERMILLION, "-"),
              ("$\\nu_i$ of A, the data factor", report.nu, ORANGE, "--"),
              ("$\\pi_i$ of Π, the path kernel", report.pi, BLUE, "-.")]
    for label, values, colour, style in curves:
        values = np.asarray(values, np.float64)
        index = np.arange(1, len(values) + 1)
        shown = values > 1e-12 * max(values.max(initial=0.0), np.finfo(np.float64).tiny)
        marker = "o" if shown.sum() <= 12 else None      # a short list as a line alone is hard to see
        ax.plot(index[shown], values[shown], style, color=colour, label=label, linewidth=1.6, marker=marker,
                markersize=3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    ax.legend(fontsize=SMALL - 1, frameon=False)
    return _finish(ax, "Eigenvalues", "index $i$", "eigenvalue")


def _edges(n: int, most: int = 40) -> np.ndarray:
    """Bounds of at most ``most`` bins over the indices 1 … n, narrow at the beginning."""
    return np.unique(np.round(np.geomspace(1, n + 1, min(most, n) + 1)).astype(int))


def overlaps(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw which pairs of eigenvectors carry the tangent kernel: ν_i π_j O_ij² / Tr Θ.

    The indices of both spectra fall into bins that widen geometrically; a cell shows its sum, so that all
    cells together are the share of Tr Θ that the report's path eigenvectors carry.

    Source: U′ = WᵀU in equation 13 of Gebhart et al. (2021).
    """
    from matplotlib.colors import LogNorm

    ax = _axes(ax, 4.6, 3.4)
    title = "Share of Tr Θ by pairs of eigenvectors"
    if not np.any(report.overlaps) or report.trace_ntk <= 0:
        ax.text(0.5, 0.5, "no pair of eigenvectors carries anything", ha="center", va="center", transform=ax.transAxes,
                fontsize=SMALL)
        ax.set_xticks([])
        ax.set_yticks([])
        return _finish(ax, title, "", "")
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
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL - 1)
    return _finish(ax, f"{title} (in all {weights.sum():.3g})", "path eigenvector $j$", "data eigenvector $i$")


def layers(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw the share of its weights that every layer keeps; emptied layers are named in vermillion.

    Of more than 30 layers, the 30 that keep least are drawn.
    """
    shown = list(report.layers)
    if len(shown) > MAX_BARS:
        least = sorted(range(len(shown)), key=lambda i: shown[i].kept / max(shown[i].total, 1))[:MAX_BARS]
        shown = [shown[i] for i in sorted(least)]
    ax = _axes(ax, 4.6, 0.9 + 0.22 * max(len(shown), 3))
    place = np.arange(len(shown))
    shares = np.array([layer.kept / max(layer.total, 1) for layer in shown])
    ax.barh(place, shares, color=GREEN, height=0.7)
    for i, (layer, share) in enumerate(zip(shown, shares, strict=True)):
        inside = share > 0.6
        text = "empty" if layer.emptied else f"{layer.kept:,} of {layer.total:,}"
        ax.text(share - 0.01 if inside else share + 0.01, i, text, va="center", fontsize=SMALL - 2,
                ha="right" if inside else "left",
                color="white" if inside else VERMILLION if layer.emptied else BLACK)
    ax.set_yticks(place, [layer.name for layer in shown])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.02)
    title = "Weights kept" + (f" (the {MAX_BARS} layers that keep least)" if len(report.layers) > MAX_BARS else "")
    return _finish(ax, title, "share of the layer's weights", "")


def training(history: Sequence[Mapping[str, Any]], ax: "Axes | None" = None, title: str = "") -> "Figure":
    """Draw accuracy on training and test images epoch by epoch, as ``pk.training.fit`` records it.

    Units: percent.
    """
    ax = _axes(ax, 4.6, 3.4)
    for name, label, colour, style in (("train_accuracy", "training images", BLUE, "--"),
                                       ("test_accuracy", "test images", VERMILLION, "-")):
        rows = [(row["epoch"], 100 * row[name]) for row in history[1:]]     # before training there is only chance
        ax.plot(*zip(*rows, strict=True), style, color=colour, label=label, linewidth=1.6,
                marker="o" if len(rows) <= 12 else None, markersize=3)
    ax.grid(True, linewidth=0.4, alpha=0.5)
    ax.legend(fontsize=SMALL - 1, frameon=False, loc="lower right")
    return _finish(ax, title or "Training", "epoch", "accuracy in %")


def trajectories(found: "Trajectories", title: str = "") -> "Figure":
    """Draw ‖ω_t‖, ‖f_t‖ and the loss of a training, of its linearisation, and as Tr Π forecasts them.

    Source: equations 7, 8 and 18 and figure 1 of Gebhart et al. (2021).
    """
    names = {"weight_change": "$\\|\\omega_t\\|$", "output_norm": "$\\|f_t\\|$", "loss": "loss $L$"}
    figure = _figure(10.0, 3.2)
    kinds = (("network", found.measured, VERMILLION, "-"), ("linearised", found.linearized, BLUE, "--"),
             ("forecast by Tr Π", found.forecast, BLACK, ":"))
    for ax, (name, symbol) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for label, values, colour, style in kinds:
            if name in values and np.isfinite(values[name]).any():
                ax.plot(found.steps, values[name], style, color=colour, label=label, linewidth=1.6)
        ax.set_xscale("log")
        ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
        ax.legend(fontsize=SMALL - 1, frameon=False)
        _finish(ax, symbol, "step of gradient descent", "")
    if title:
        figure.suptitle(title, fontsize=SMALL + 3, x=0.01, ha="left")
    return figure


def report(report: Report, title: str = "") -> "Figure":
    """Draw the whole report: spectra, overlaps and layers side by side.

    Shapes: one figure of 13 × 3.8 inches, higher where there are many layers.
    """
    count = min(len(report.layers), MAX_BARS)
    figure = _figure(13.0, max(3.8, 0.9 + 0.16 * count))
    for axes, draw in zip(figure.subplots(1, 3), (spectra, overlaps, layers), strict=True):
        draw(report, axes)
    if title:
        figure.suptitle(title, fontsize=SMALL + 3, x=0.01, ha="left")
    return figure
