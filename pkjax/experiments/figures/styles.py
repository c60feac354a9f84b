"""Style and layout of a sweep's figures: one style per pruner, grids of panels, legends and notes.

The colours are those of Okabe and Ito (2008), then grey and two of Tol (2021); markers and line styles differ too.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkjax.experiments.run_tables import Finished
from pkjax.experiments.user_code import is_own
from pkjax.plots import panels as shared
from pkjax.plots.panels import BLACK, BLUE, GREEN, ORANGE, SMALL, VERMILLION, axes_of_all, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["STYLES", "UNUSED", "Style", "below", "by_data", "count", "finish", "first_in_row", "grid", "left_out",
           "legend", "line_style", "note", "percent", "r2_text", "scale", "styles_of"]

SKY, YELLOW, PURPLE, GREY = "#56B4E9", "#F0E442", "#CC79A7", "#8C8C8C"
INDIGO, WINE = "#332288", "#882255"
ACROSS = 4
"""Panels side by side at most."""
FAILED = ("failed run", "failed runs")
DIVERGED = ("diverged run", "diverged runs")
UNUSED = ("point without a positive trace and a value", "points without a positive trace and a value")
"""What a note counts, in singular and plural."""


class Style(NamedTuple):
    """How a pruner is drawn."""

    label: str
    colour: Any
    marker: str
    dashes: Any
    filled: bool = True


STYLES = {
    "random": Style("Random", GREY, "X", (0, (1, 1))),
    "magnitude": Style("Magnitude", YELLOW, "^", (0, (5, 1))),
    "snip": Style("SNIP", GREEN, "v", "-."),
    "grasp": Style("GraSP", PURPLE, "P", (0, (5, 1, 1, 1, 1, 1))),
    "synflow": Style("SynFlow", BLUE, "o", "-"),
    "synflow-dist": Style("SynFlow-Dist", SKY, "o", (0, (4, 1.5)), False),
    "synflow-l2": Style("SynFlow-L2", VERMILLION, "s", "-"),
    "synflow-l2-dist": Style("SynFlow-L2-Dist", ORANGE, "s", (0, (4, 1.5)), False),
    "path-exclusion": Style("PX", INDIGO, "D", (0, (3, 1, 1, 1))),
    "ntk-trace": Style("NTK trace", WINE, "p", (0, (7, 1.5))),
    "iterative-snip": Style("Iterative SNIP", "#44AA99", "v", (0, (3, 2)), False),
    "fisher": Style("Fisher", "#CC6677", "P", (0, (2, 2)), False),
    "ntk-sap": Style("NTK-SAP", "#D81B60", "p", (0, (5, 3)), False),
    "phew": Style("PHEW", "#8C564B", "D", (0, (8, 1)), False),
    "magnitude-after-training": Style("Magnitude after training", "#A6761D", "^", (0, (6, 1, 1, 1)), False),
    "imp": Style("IMP", "#1B1B6F", "X", (0, (9, 2)), False),
    "none": Style("dense", BLACK, "*", "--"),
}
"""Pruner → style; a -Dist variant is paler, open and dashed beside its counterpart."""


_OWN = tuple(zip(("#661100", "#999933", "#AA4499", "#117733", "#6699CC"), "<>hHd",
                 ((0, (2, 1)), (0, (6, 1, 2, 1)), "-.", (0, (1, 2)), "--"), strict=True))
"""Colour, marker and dashes of the user's own pruners, in turn; the colours are Tol's."""


def styles_of(names: Iterable[Any]) -> dict[str, Style]:
    """Return the style of each pruner among `names`: in the order of `STYLES`, the user's own before the dense network.

    Raises:
        ValueError: a pruner has no style, and is not the user's own.

    Examples:
        >>> [style.label for style in styles_of(["none", "my_module:score", "synflow", "snip", "snip"]).values()]
        ['SNIP', 'SynFlow', 'my_module:score', 'dense']
    """
    names = set(names)
    own = sorted(name for name in names if isinstance(name, str) and is_own(name))
    if unknown := sorted(map(str, names - {*STYLES, *own})):
        raise ValueError(f"no style for pruner {', '.join(map(repr, unknown))}; known are {', '.join(STYLES)}")
    # Matplotlib leaves labels that begin with "_" out of legends.
    styles = {name: Style(literal(name).lstrip("_"), *look) for name, look in zip(own, cycle(_OWN), strict=False)}
    return {name: {**STYLES, **styles}[name] for name in (*list(STYLES)[:-1], *own, "none") if name in names}


def line_style(style: Style) -> dict[str, Any]:
    """Return the keyword arguments with which `plot` draws a style."""
    faint = style.colour == YELLOW                       # hard to see on white without a dark edge
    return {"color": style.colour, "linestyle": style.dashes, "gapcolor": "#555555" if faint else None,
            "linewidth": 1.4, "marker": style.marker, "markersize": 4.5,
            "markerfacecolor": style.colour if style.filled else "white",
            "markeredgecolor": "#444444" if faint else style.colour, "markeredgewidth": 0.5 if style.filled else 1.0,
            "label": style.label}


def scale(values: Iterable[float]) -> dict[float, Style]:
    """Give every compression a colour from light to dark, with markers and dashes in turn."""
    import matplotlib

    levels = sorted(set(values))
    colours = map(tuple, matplotlib.colormaps["cividis_r"](np.linspace(0.1, 1.0, len(levels))))
    looks = zip(cycle("os^vDPX*"), cycle(("-", "--", "-.", ":")), strict=False)
    return {level: Style(f"ρ = {level:g}", colour, marker, dashes)
            for level, colour, (marker, dashes) in zip(levels, colours, looks, strict=False)}


def grid(count: int, width: float, height: float, given: "Sequence[Axes] | None" = None, *, across: int = ACROSS,
         **shared: Any) -> tuple[Any, list[Any]]:
    """Return a figure and one axes per panel, `across` side by side; sizes are a panel's, in inches.

    Raises:
        ValueError: axes are given, but not one per panel.
    """
    if given is not None:
        return _given(given, count)
    columns = min(count, across)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows + 0.5)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _given(axes: "Sequence[Axes]", count: int) -> tuple[Any, list[Any]]:
    panels = axes_of_all(axes, count, f"this figure is drawn on {count} panels")
    return panels[0].figure, panels


def by_data(groups: list[tuple[str, str, str, Any]], given: "Sequence[Axes] | None" = None, **shared: Any
            ) -> tuple[Any, list[Any]]:
    """Return a figure and one axes per group, a new row for each data set, of at most `ACROSS`.

    Raises:
        ValueError: axes are given, but not one per group.
    """
    if given is not None:
        return _given(given, len(groups))
    places: list[tuple[int, int]] = []
    for i, (data, *_) in enumerate(groups):
        row, column = places[-1] if places else (-1, 0)
        new = not places or data != groups[i - 1][0] or column + 1 == ACROSS
        places.append((row + 1, 0) if new else (row, column + 1))
    rows, columns = (max(place) + 1 for place in zip(*places, strict=True))
    figure = new_figure(max(min(2.6 * columns, 7.5), 5.2), (2.5 if columns < 3 else 2.1) * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for place in set(np.ndindex(rows, columns)) - set(places):
        axes[place].remove()
    return figure, [axes[place] for place in places]


def finish(ax: Any, title: str, x: str, y: str) -> None:
    """Title and label a panel."""
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    shared.finish(ax, title, x, y)


def first_in_row(ax: Any, label: str) -> str:
    """Return the label for the first panel of a row, "" for the others that share its axis."""
    place = ax.get_subplotspec()
    return label if place is None or place.is_first_col() else ""


def legend(figure: Any, axes: list[Any]) -> None:
    """Draw one legend above all panels: each label once, pruners in their order."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    order = {style.label: place for place, style in enumerate(STYLES.values())}
    labels = sorted(handles, key=lambda label: order.get(label, len(order) - 1.5))
    if labels:
        figure.legend([handles[label] for label in labels], labels, fontsize=SMALL - 1, frameon=False,
                      loc="outside upper left", ncols=max(1, min(len(labels), int(_width(figure) / 1.2))),
                      handlelength=3)


def below(ax: Any) -> Any:
    """Return coordinates of a panel that are shifted below its ticks and label, whatever its height."""
    from matplotlib.transforms import ScaledTranslation

    return ax.transAxes + ScaledTranslation(0, -0.42, ax.figure.get_figure(root=True).dpi_scale_trans)


def _width(figure: Any) -> float:
    """Return the width in inches of a figure or subfigure."""
    return float(figure.bbox.width / figure.get_figure(root=True).dpi)


def note(figure: Any, *parts: str) -> None:
    """Write the parts below the panels, wrapped to the figure's width."""
    if parts:
        text = "\n".join(wrap("; ".join(parts), int(16 * _width(figure))))
        figure.supxlabel(text, fontsize=SMALL - 1, x=0.01, ha="left")


def count(left_out: int, one: str, many: str) -> list[str]:
    """Return the part of a note that says how many were left out; nothing for 0.

    Examples:
        >>> count(1, "run", "runs"), count(1200, "run", "runs"), count(0, "run", "runs")
        (['1 run left out'], ['1,200 runs left out'], [])
    """
    return [f"{left_out:,} {one if left_out == 1 else many} left out"] if left_out else []


def left_out(chosen: Finished) -> list[str]:
    """Return the parts of a note that say how many runs failed and diverged."""
    return [*count(chosen.failed, *FAILED), *count(chosen.diverged, *DIVERGED)]


def r2_text(value: float) -> str:
    """Write R² with two decimals, "–" for none.

    Examples:
        >>> r2_text(0.98765), r2_text(-1e-16), r2_text(float("nan"))
        ('R² 0.99', 'R² 0.00', 'R² –')
    """
    return f"R² {round(value, 2) + 0.0:.2f}" if np.isfinite(value) else "R² –"


def percent() -> Any:
    """Return a formatter of fractions as percentages."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
