"""A picture of a small network and of the paths through its edges."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Shaped

from pkjax.paths import Path
from pkjax.plots.panels import BLACK, BLUE, SMALL, VERMILLION, axes_of, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["paths"]


def paths(paths: Sequence[Path], values: Shaped[np.ndarray, " p"], active: Bool[np.ndarray, " p"] | None = None,
          ax: "Axes | None" = None, label: str = "path value $v_p$", limit: float | None = None) -> "Figure":
    """Draw a small fully connected network with its paths side by side on the edges they run through.

    A path has one colour from its input to its output: vermillion for values above 0, blue below, paler near 0. Paths
    that are not `active` are thin, grey and dotted. A path that starts at a bias starts at a square.

    Args:
        paths: the paths of a network whose layers are kernels (inputs, outputs) with or without biases, as
            `pk.paths.factorize` lists them. Masked weights have no edge.
        values: a number for every path: its value, its share of an output, an eigenvector's entry.
        active: which paths to draw in full; all by default.
        ax: axes to draw on.
        label: the meaning of the colours.
        limit: the value of the fullest colour, to make pictures comparable; by default the largest value drawn.

    Raises:
        ValueError: there is no path, the lengths differ, or a path does not lead from layer to layer.
        ImportError: Matplotlib is missing.

    Source: the paths of equations 9 and 10 of Gebhart et al. (2021).

    Examples:
        >>> route = Path(source=0, parameters=("a[0,1]", "b[1,0]"), output=0)
        >>> paths([route], np.array([2.0])).axes[0].get_title(loc="left")
        '1 path'
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    values, shown = np.asarray(values), np.ones(len(paths), bool) if active is None else np.asarray(active)
    if not len(paths) == len(values) == len(shown) > 0:
        raise ValueError(f"values and active must hold one entry for each path, and there must be a path, got "
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

    ax = axes_of(ax, 4.6, 3.4)
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
    return finish(ax, title if active is None else f"{title}, {shown.sum()} active", "", "")


def _route(path: Path, depth: int) -> list[tuple[int, int, bool]]:
    """List the nodes of a path: layer, place in it, and whether it is a bias."""
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
        raise ValueError("only paths through consecutive kernels (inputs, outputs) and their biases can be drawn, but "
                         f"one runs from input {path.source} over {', '.join(path.parameters)}")
    return nodes + [(first + 1 + n, j, False) for n, (_, j) in enumerate(kernels)]
