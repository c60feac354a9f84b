"""Picture of what frozen gates leave out of the tangent kernel, leaf by leaf."""

from typing import TYPE_CHECKING

import numpy as np

from pkjax.analysis.report import Report
from pkjax.plots.kept_weights import BAR, MAX_BARS, shortened
from pkjax.plots.panels import BLACK, SMALL, VERMILLION, axes_of, finish, literal, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["frozen_leaves"]


def frozen_leaves(report: Report, ax: "Axes | None" = None) -> "Figure":
    """Draw ‖Θ − Θ_frozen‖ / ‖Θ‖ of every leaf's part of the two, the largest parts where there are more than fit."""
    if report.frozen is None:
        raise ValueError('the report has no frozen part: call analyze with gates="frozen"')
    shown = report.frozen.leaves
    ax = axes_of(ax, 4.6, 0.9 + 0.22 * min(max(len(shown), 3), MAX_BARS))
    width, height = size(ax)
    most = min(MAX_BARS, max(1, int((height - 0.5) / BAR)))
    if len(shown) > most:
        largest = sorted(range(len(shown)), key=lambda i: -shown[i].rest)[:most]
        shown = tuple(shown[i] for i in sorted(largest))
    place, rests = np.arange(len(shown)), np.array([leaf.rest for leaf in shown])
    rests = np.where(np.isfinite(rests), rests, 0.0)      # of a leaf that adds nothing to Θ there is no share
    ax.barh(place, rests, color=VERMILLION, height=0.7)
    end = max(1.0, float(rests.max(initial=0.0)))
    for i, rest in enumerate(rests):
        inside = rest > 0.6 * end
        ax.text(rest + (-0.01 if inside else 0.01) * end, i, f"{100 * rest:.3g} %", va="center", fontsize=SMALL - 2,
                ha="right" if inside else "left", color="white" if inside else BLACK)
    ax.set_yticks(place, [literal(name) for name in shortened([leaf.name for leaf in shown], int(6.5 * width))])
    ax.set_ylim(max(len(shown), 3) - 0.5, -0.5)
    ax.set_xlim(0, 1.02 * end)
    title = f"Not in $\\Theta_\\mathrm{{frozen}}$, in all {100 * report.frozen.rest:.3g} %"
    return finish(ax, title, "$\\|\\Theta - \\Theta_\\mathrm{frozen}\\| / \\|\\Theta\\|$ of the leaf", "")
