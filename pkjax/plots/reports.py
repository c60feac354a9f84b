"""A whole report in one picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pkjax.analysis.report import Report
from pkjax.plots.frozen_leaves import frozen_leaves
from pkjax.plots.kept_weights import BAR, MAX_BARS, layers
from pkjax.plots.kernels import overlaps, spectra
from pkjax.plots.panels import axes_of_all, new_figure, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["report"]


def report(report: Report, title: str = "", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw the whole report: spectra, overlaps and layers side by side; with frozen gates, what they leave out.

    Args:
        report: the result of `pk.analyze`.
        title: text above the panels.
        axes: three axes to draw on, with frozen gates four; None makes a figure of 13 × 3.8 inches, higher where there
            are many layers, wider with frozen gates.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: `axes` are not as many Matplotlib axes, or the report is the quick form.
        ImportError: Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), theorem 1 and equation 13.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> figure = report(pk.analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2)))
        >>> len(figure.axes)                                           # three panels and a colour bar
        4
    """
    if report.quick:
        raise ValueError("a report is drawn whole, got its quick form: call analyze without quick=True")
    panels = [spectra, overlaps, layers, *([] if report.frozen is None else [frozen_leaves])]
    bars = max(len(report.layers), len(report.frozen.leaves) if report.frozen else 0)
    height, count = max(3.8, 1.0 + BAR * min(bars, MAX_BARS)), len(panels)
    places = new_figure(13.0 * count / 3, height).subplots(1, count) if axes is None else axes
    for ax, draw in zip(axes_of_all(places, count, f"a report is drawn on {count} panels"), panels, strict=True):
        draw(report, ax)
    return titled(ax.figure, title)
