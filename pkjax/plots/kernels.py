"""Pictures of the kernels in a report: spectra with their bound, and overlaps of eigenvectors."""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from pkjax.analysis.report import Report
from pkjax.plots.panels import BLACK, BLUE, GREEN, ORANGE, SMALL, VERMILLION, axes_of, blank, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["overlaps", "spectra"]


def spectra(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw λ of Θ, ν of A and π of Π, largest first, with the bound ν_i π_i, on double logarithmic axes.

    With frozen gates there are the λ of Θ_frozen too, which are those that the bound is for. Eigenvalues that are zero
    to rounding (below 1e-12 of the largest of their spectrum) are left out. π ends with the eigenvalues that the report
    holds, and so does the bound.

    Args:
        report: the result of `pk.analyze`.
        ax: the axes to draw on; None makes a figure of 4.6 × 3.4 inches.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: `ax` is not the axes of one panel.
        ImportError: Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), theorem 1 for the bound.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> report = pk.analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))
        >>> [line.get_ydata().round(6).tolist() for line in spectra(report).axes[0].lines]     # the bound, λ, ν and π
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    ax = axes_of(ax, 4.6, 3.4)
    count = min(len(report.nu), len(report.pi))
    of_frozen = [] if report.frozen is None else [
        ("$\\lambda_i$ of $\\Theta_\\mathrm{frozen}$, with gates held", report.frozen.lam, GREEN, (0, (5, 1)))]
    curves = [("bound $\\nu_i\\pi_i$", np.asarray(report.nu)[:count] * np.asarray(report.pi)[:count], BLACK, ":"),
              ("$\\lambda_i$ of Θ, the tangent kernel", report.lam, VERMILLION, "-"), *of_frozen,
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
        ax.plot(index[shown], values[shown], linestyle=style, color=colour, label=label, linewidth=1.6, marker=marker,
                markersize=3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    longest = max(len(values) for _, values, _, _ in curves)
    if longest <= 10:
        ax.set_xticks(range(1, longest + 1), map(str, range(1, longest + 1)))
        ax.set_xticks([], minor=True)
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    if of_frozen:      # five entries cover curves wherever they lie
        ax.legend(fontsize=SMALL - 1, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    else:
        ax.legend(fontsize=SMALL - 1, frameon=False)
    return finish(ax, "Eigenvalues", "index $i$", "eigenvalue")


def overlaps(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw which pairs of eigenvectors carry the tangent kernel, with frozen gates Θ_frozen: ν_i π_j O_ij² / Tr Θ.

    The indices of both spectra fall into bins that widen geometrically. A cell shows the sum over its bin, so that all
    cells together make the share of Tr Θ that the report's path eigenvectors carry; the title shows that share.

    Args:
        report: the result of `pk.analyze`.
        ax: the axes to draw on; None makes a figure of 4.6 × 3.4 inches.

    Returns:
        the figure of the axes, with a colour bar.

    Raises:
        ValueError: `ax` is not the axes of one panel.
        ImportError: Matplotlib is missing.

    Source: U′ = WᵀU in Gebhart, Saxena and Schrater (2021), equation 13.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> report = pk.analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.diag(jnp.array([2.0, 1.0])))
        >>> overlaps(report).axes[0].get_title(loc="left")
        'Share of Tr Θ, in all 100 %'
    """
    from matplotlib.colors import LogNorm

    ax = axes_of(ax, 4.6, 3.4)
    kernel = "Θ" if report.frozen is None else "$\\Theta_\\mathrm{frozen}$"
    if not np.any(report.overlaps) or report.trace_on_paths <= 0:
        return blank(ax, f"Share of Tr {kernel}", "no pair of eigenvectors carries anything")
    O = np.asarray(report.overlaps, np.float64)
    weights = np.asarray(report.nu)[:, None] * np.asarray(report.pi)[None, :O.shape[1]] * O**2 / report.trace_on_paths
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
    title = f"Share of Tr {kernel}, in all {100 * weights.sum():.3g} %"
    return finish(ax, title, "path eigenvector $j$", "data eigenvector $i$")


def _edges(n: int, most: int = 40) -> np.ndarray:
    """Bounds of at most `most` bins over the indices 1 … n, narrow at the beginning."""
    return np.unique(np.round(np.geomspace(1, n + 1, min(most, n) + 1)).astype(int))
