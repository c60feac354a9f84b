"""Pictures: a report's spectra with their bound, its overlaps and layers, a network's paths, a training's accuracies.

Every function returns a Matplotlib figure, draws on ``ax`` where one is given, and leaves pyplot's state alone. Colours
are Okabe and Ito's (2008), which colour-blind readers tell apart; curves differ in their line style too.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Shaped

from pkjax.analysis import Report
from pkjax.paths import Path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pkjax.experiments.descent import Trajectories

__all__ = ["layers", "overlaps", "paths", "report", "spectra", "training", "trajectories"]

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


def paths(paths: Sequence[Path], values: Shaped[np.ndarray, " p"], active: Bool[np.ndarray, " p"] | None = None,
          ax: "Axes | None" = None, label: str = "path value $v_p$", limit: float | None = None) -> "Figure":
    """Draw a small fully connected network, and side by side on its edges the paths that run through each.

    A path has one colour from its input to its output: vermillion for values above 0, blue below, paler near 0. Paths
    that are not ``active`` are thin, grey and dotted. What starts at a bias starts at a square.

    Args:
      paths: of a network whose layers are kernels (inputs, outputs) with or without biases, as ``pk.paths.factorize``
        lists them. Masked weights have no edge.
      values: a number for every path: its value, its share of an output, an eigenvector's entry.
      active: which paths to draw in full; all by default.
      ax: axes to draw on.
      label: what the colours mean.
      limit: the value of the fullest colour, for pictures to be compared; by default the largest that is drawn.

    Raises: ValueError where there is no path, where lengths differ, and for paths that do not lead from layer to layer.

    Source: the paths of equations 9 and 10 of Gebhart et al. (2021).

    >>> route = Path(source=0, parameters=("a[0,1]", "b[1,0]"), output=0)
    >>> paths([route], np.array([2.0])).axes[0].get_title(loc="left")
    '1 path'
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    values, shown = np.asarray(values), np.ones(len(paths), bool) if active is None else np.asarray(active)
    if not len(paths) == len(values) == len(shown) > 0:
        raise ValueError(f"values and active must hold a number for each path, of which there must be one, got "
                         f"{len(values)} and {len(shown)} for {len(paths)} paths")
    depth = max(sum("," in name for name in path.parameters) for path in paths)
    routes = [_route(path, depth) for path in paths]
    edges: dict[Any, list[int]] = {}
    for p, route in enumerate(routes):
        for edge in pairwise(route):
            edges.setdefault(edge, []).append(p)
    nodes = {node for route in routes for node in route}
    rows = [1 + max((i for layer, i, _ in nodes if layer == at), default=0) for at in range(depth + 1)]

    def place(node: tuple[int, int, bool]) -> np.ndarray:
        layer, i, bias = node
        return np.array([1.7 * layer, (rows[layer] - 1) / 2 - i + 0.5 * bias])       # no edge is above a node

    ax = _axes(ax, 4.6, 3.4)
    limit = limit or float(np.abs(values[shown]).max(initial=0.0)) or 1.0
    colours = LinearSegmentedColormap.from_list("signed", [BLUE, "#B8C4CC", VERMILLION])
    norm = Normalize(-limit, limit)
    for (start, end), through in edges.items():
        a, b = place(start), place(end)
        across = np.array([a[1] - b[1], b[0] - a[0]]) / np.hypot(*(b - a))
        for lane, p in enumerate(through):
            shift = min(0.055, 0.3 / len(through)) * (lane - (len(through) - 1) / 2) * across
            style = {"color": colours(norm(values[p])), "linewidth": 2.2} if shown[p] else (
                {"color": "#9A9A9A", "linewidth": 0.8, "linestyle": ":"})
            ax.plot(*np.stack([a + shift, b + shift], 1), zorder=2 if shown[p] else 1, gid=f"path {p}", **style)
    lit = {node for route, on in zip(routes, shown, strict=True) if on for node in route}
    for node in sorted(nodes):
        (layer, i, bias), (x, y) = node, place(node)
        ax.plot(x, y, "s" if bias else "o", markersize=7 if bias else 16, markeredgecolor=BLACK, zorder=3,
                markerfacecolor="#FFF3D6" if node in lit else "white")
        if not bias and layer in (0, depth):
            ax.text(x, y, f"$x_{{{i + 1}}}$" if layer == 0 else f"$f_{{{i + 1}}}$", fontsize=SMALL,
                    ha="center", va="center_baseline", zorder=4)
    ax.set(xlim=(-0.3, 1.7 * depth + 0.3), ylim=(-max(rows) / 2 + 0.2, max(rows) / 2 + 0.15), aspect="equal")
    ax.set_axis_off()
    bar = ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, pad=0.02, shrink=0.8, aspect=30)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL - 1)
    title = f"{len(paths)} path{'s' if len(paths) > 1 else ''}"
    return _finish(ax, title if active is None else f"{title}, {shown.sum()} active", "", "")


def _route(path: Path, depth: int) -> list[tuple[int, int, bool]]:
    """The nodes of a path: layer, place in it, and whether it is a bias."""
    index = [tuple(map(int, re.findall(r"\d+", name[name.rfind("["):]))) for name in path.parameters]
    kernels = [i for i in index if len(i) == 2]
    first = depth - len(kernels)
    if path.source is None and index and len(index[0]) == 1:
        nodes, rest = [(first, index[0][0], True), (first, index[0][0], False)], index[1:]
    elif path.source is not None and first == 0:
        nodes, rest = [(0, path.source, False)], index
    else:
        nodes, rest = [], index
    ends = [*(i for i, _ in kernels), path.output]
    if not nodes or rest != kernels or ends != [nodes[-1][1], *(j for _, j in kernels)]:
        raise ValueError("only paths through kernels (inputs, outputs), one after the other, and their biases can be "
                         f"drawn, but one runs from input {path.source} over {', '.join(path.parameters)}")
    return nodes + [(first + 1 + n, j, False) for n, (_, j) in enumerate(kernels)]


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
