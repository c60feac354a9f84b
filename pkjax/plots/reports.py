"""A whole report in one picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pkjax.analysis.report import Report
from pkjax.plots.kept_weights import BAR, MAX_BARS, layers
from pkjax.plots.kernels import overlaps, spectra
from pkjax.plots.panels import axes_of_all, new_figure, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["report"]


def report(report: Report, title: str = "", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw the whole report: spectra, overlaps and layers side by side.

    Args:
        report: the result of `pk.analyze`.
        title: text above the panels.
        axes: three axes to draw on; None makes a figure of 13 × 3.8 inches, higher where there are many layers.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: `axes` are not three Matplotlib axes, or the report is the quick form.
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
    height = max(3.8, 1.0 + BAR * min(len(report.layers), MAX_BARS))
    places = new_figure(13.0, height).subplots(1, 3) if axes is None else axes
    places = axes_of_all(places, 3, "a report is drawn on 3 panels")
    for ax, draw in zip(places, (spectra, overlaps, layers), strict=True):
        draw(report, ax)
    return titled(places[0].figure, title)
