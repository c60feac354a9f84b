"""Picture of what masks leave of every layer."""

from typing import TYPE_CHECKING

import numpy as np

from pkjax.analysis.report import Report
from pkjax.plots.panels import BLACK, GREEN, SMALL, VERMILLION, axes_of, finish, literal, size
from pkjax.pruning.connectivity import Connectivity
from pkjax.pruning.result import PruneResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BAR", "MAX_BARS", "layers", "shortened"]

MAX_BARS = 30
"""Layers drawn in one panel at most."""
BAR = 0.14
"""Inches that a layer's bar and name need at least."""


def layers(report: Report | PruneResult | Connectivity, ax: "Axes | None" = None) -> "Figure":
    """Draw the share of its weights that every layer keeps; the labels of emptied layers are vermillion.

    Where there are more layers than fit, at most 30, those that keep least are drawn, and the title says so. Long names
    lose the ending that all of them share, and then their middle.

    Args:
        report: the result of `pk.analyze`, `pk.prune` or `pk.connectivity`.
        ax: the axes to draw on; None makes a figure as high as the layers need.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: `ax` is not the axes of one panel.
        ImportError: Matplotlib is missing.

    Source: the paper counts only the weights of kernels (Gebhart, Saxena and Schrater 2021, appendix A.4.2).

    Examples:
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
    ax.set_yticks(place, [literal(name) for name in shortened([layer.name for layer in shown], int(6.5 * width))])
    ax.set_ylim(max(len(shown), 3) - 0.5, -0.5)
    ax.set_xlim(0, 1.02)
    title = f"Least kept, {most} of {len(report.layers)} layers" if len(report.layers) > most else "Weights kept"
    return finish(ax, title, "share of the layer's weights", "")


def shortened(names: list[str], most: int) -> list[str]:
    """Bring names to `most` characters: without the last part that all share, then without their middle."""
    if max(map(len, names), default=0) > most and len({name.rpartition("/")[2] for name in names}) == 1:
        names = [name.rpartition("/")[0] or name for name in names]
    most = max(most, 4)
    short = names
    for tail in (most // 2, most // 4, 1, most - 2):     # the first that leaves different names different
        short = [name if len(name) <= most else f"{name[:most - tail - 1]}…{name[-tail:]}" for name in names]
        if len(set(short)) == len(set(names)):
            break
    return short
