"""Pictures of a training: accuracies after each epoch, and the network beside its linearisation and forecast."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.plots.panels import (
    BLACK,
    BLUE,
    SMALL,
    VERMILLION,
    axes_of,
    axes_of_all,
    blank,
    finish,
    new_figure,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pkjax.experiments.descent import Trajectories

__all__ = ["training", "trajectories"]


def training(history: Sequence[Mapping[str, Any]], ax: "Axes | None" = None, title: str = "") -> "Figure":
    """Draw the accuracy on training and test images after each epoch, as `pk.training.fit` records it.

    Args:
        history: rows with epoch, train_accuracy and test_accuracy (fractions), as in `Fit.history`; the row of epoch 0,
            before training, is left out.
        ax: the axes to draw on; None makes a figure of 4.6 × 3.4 inches.
        title: text above the panel; "Training" by default.

    Returns:
        the figure of the axes: percent of the images whose largest output is that of their label.

    Raises:
        ValueError: `ax` is not the axes of one panel.
        ImportError: Matplotlib is missing.

    Examples:
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


def trajectories(result: "Trajectories", title: str = "", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw ‖ω_t‖, ‖f_t‖ and the loss of a network, of its linearisation, and as Tr Π forecasts them.

    Args:
        result: the result of `pk.experiments.trajectories`.
        title: text above the panels.
        axes: three axes to draw on; None makes a figure of 10 × 3.2 inches.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: `axes` are not three Matplotlib axes.
        ImportError: Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), equations 7, 8 and 18; figure 1 for the forecast.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> run = pk.experiments.trajectories(lambda w, x: x @ w, jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)),
        ...                                   steps=4, points=3)
        >>> [panel.get_title(loc="left") for panel in trajectories(run).axes][-1]
        'loss $L$'
    """
    names = {"weight_change": "$\\|\\omega_t\\|$", "output_norm": "$\\|f_t\\|$", "loss": "loss $L$"}
    places = new_figure(10.0, 3.2).subplots(1, 3) if axes is None else axes
    places = axes_of_all(places, 3, "trajectories are drawn on 3 panels")
    kinds = (("network", result.measured, VERMILLION, "-"), ("linearised", result.linearized, BLUE, "--"),
             ("forecast by Tr Π", result.forecast, BLACK, ":"))
    for ax, (name, symbol) in zip(places, names.items(), strict=True):
        for label, values, colour, style in kinds:
            if name in values and np.isfinite(values[name]).any():
                ax.plot(result.steps, values[name], style, color=colour, label=label, linewidth=1.6)
        ax.set_xscale("log")
        ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
        ax.legend(fontsize=SMALL - 1, frameon=False)
        finish(ax, symbol, "step of gradient descent", "")
    return titled(places[0].figure, title)
