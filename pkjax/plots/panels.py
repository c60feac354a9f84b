"""What all pictures share: colours, figures and axes, titles and labels."""

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.extras import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLACK", "BLUE", "GREEN", "ORANGE", "SMALL", "VERMILLION", "axes_of", "axes_of_all", "blank", "finish",
           "literal", "new_figure", "size", "titled"]

BLUE = "#0072B2"
"""Of Okabe and Ito's colours, the first: what is measured."""
ORANGE = "#E69F00"
"""Of Okabe and Ito's colours, the second."""
GREEN = "#009E73"
"""Of Okabe and Ito's colours, the third."""
VERMILLION = "#D55E00"
"""Of Okabe and Ito's colours, the fourth: bounds and failures."""
BLACK = "#000000"
"""For lines that other curves are compared with."""
SMALL = 8


def new_figure(width: float, height: float) -> "Figure":
    """Make a figure of the given size in inches, unknown to pyplot.

    Raises:
        ImportError: Matplotlib is missing.

    Examples:
        >>> image, shown = new_figure(2.0, 1.0)._repr_png_()
        >>> image[1:4], shown
        (b'PNG', {'width': 160, 'height': 80})
    """
    return _figure_class()(figsize=(width, height), dpi=160, layout="constrained")


@cache
def _figure_class() -> Any:
    needed("matplotlib.figure", "plots", "pictures need Matplotlib")
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that notebooks show without pyplot: it draws itself."""

        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            """Draw at the figure's resolution, for display at 80 pixels per inch: sharp on dense screens too."""
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=self.dpi)
            width, height = (round(80 * inches) for inches in self.get_size_inches())
            return buffer.getvalue(), {"width": width, "height": height}

    return NotebookFigure


def axes_of(ax: "Axes | None", width: float, height: float) -> Any:
    """Return the given axes, or those of a new figure of the given size in inches.

    Raises:
        ValueError: `ax` is not the axes of one panel.
    """
    if ax is None:
        return new_figure(width, height).add_subplot()
    return axes_of_all([ax], 1, "ax must be the axes of one panel")[0]


def axes_of_all(axes: Any, count: int, what: str) -> list[Any]:
    """Check that there is one axes per panel; arrays of axes, as `subplots` returns them, are flattened.

    Raises:
        ValueError: with `what`, the requirement, and what was received.

    Examples:
        >>> axes_of_all([], 3, "a report draws 3 panels")
        Traceback (most recent call last):
            ...
        ValueError: a report draws 3 panels, but 0 axes were received
    """
    panels = list(np.asarray(axes, dtype=object).ravel())
    other = next((type(ax).__name__ for ax in panels if not hasattr(ax, "get_subplotspec")), None)
    if other is not None:
        raise ValueError(f"{what}, Matplotlib axes each, but {other} was received")
    if len(panels) != count:
        raise ValueError(f"{what}, but {len(panels)} axes were received")
    return panels


def size(ax: Any) -> tuple[float, float]:
    """Return the width and height in inches of a panel with its labels, before layout."""
    place, (width, height) = ax.get_position(), ax.figure.get_figure(root=True).get_size_inches()
    return width * place.width / 0.775, height * place.height / 0.77     # Matplotlib's margins


def blank(ax: Any, title: str, text: str) -> "Figure":
    """Write on a panel why there is nothing to draw."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, fontsize=SMALL)
    ax.set_xticks([])
    ax.set_yticks([])
    return finish(ax, title, "", "")


def finish(ax: Any, title: str, x: str, y: str) -> "Figure":
    """Title and label a panel, and return its figure."""
    ax.set_title(title, fontsize=SMALL + 1, loc="left")
    ax.set_xlabel(x, fontsize=SMALL)
    ax.set_ylabel(y, fontsize=SMALL)
    ax.tick_params(which="both", labelsize=SMALL - 1)
    return ax.figure


def literal(name: str) -> str:
    r"""Escape a name, which Matplotlib would read as a formula between two dollar signs.

    Examples:
        >>> print(literal(r"$\frac$"))
        \$\frac\$
    """
    return name.replace("$", r"\$")


def titled(figure: Any, title: str) -> "Figure":
    """Write a title above all panels, and return the figure."""
    if title:
        figure.suptitle(title, fontsize=SMALL + 3, x=0.01, ha="left")
    return figure
