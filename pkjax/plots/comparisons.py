"""A comparison in one picture: spectra of Θ by name, traces against them, rank correlations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.analysis.comparison import TARGETS, Comparison, Row
from pkjax.plots.panels import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SMALL,
    VERMILLION,
    axes_of_all,
    blank,
    finish,
    literal,
    new_figure,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["compare"]

COLOURS = (BLACK, "#8C8C8C", "#882255", GREEN, "#CC79A7", BLUE, VERMILLION, "#56B4E9", ORANGE, "#332288", "#F0E442")
MARKERS = "*X^vPosDph<"
DASHES: tuple[Any, ...] = ("-", (0, (1, 1)), (0, (5, 1)), "-.", (0, (5, 1, 1, 1, 1, 1)), "-", "-", (0, (4, 1.5)),
                           (0, (4, 1.5)), (0, (3, 1, 1, 1)), (0, (7, 1.5)))
"""Names are told apart by all three, in their order."""
PANELS = 4
"""Panels of spectra at most."""
KINDS = {"seeds": ("over seeds", BLUE, "o"), "compressions": ("over ρ", ORANGE, "s"),
         "names": ("over names", VERMILLION, "^"), "all": ("over all", BLACK, "D")}
SCATTERS = {"trace_ntk": "Σ λ = Tr Θ", "largest": "$\\lambda_1$", "decay": "decay of λ"}


def compare(comparison: Comparison, title: str = "", axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Draw a comparison: spectra by name, Tr Π against their sum, largest value and decay, rank correlations.

    Above, λ of Θ by compression: the median over seeds, and a band from the least to the largest, as far as all seeds
    have eigenvalues. Below, Tr Π against
    Σ λ, λ_1 and the exponent α of λ_i ~ i^−α, with smaller marks for sparser networks, and Spearman's rank correlation
    of Tr Π with each (5 to 95 % of the bootstrap). Networks whose inputs reach no output are left out.

    Args:
        comparison: the result of `pk.compare`.
        title: text above the panels.
        axes: one axes for each compression that is drawn (four at most, evenly chosen) and four more; None makes a
            figure of 13 × 7.4 inches.

    Returns:
        the figure of the axes.

    Raises:
        ValueError: `axes` are not as many Matplotlib axes.
        ImportError: Matplotlib is missing.

    Source: Gebhart, Saxena and Schrater (2021), section 3.1, where Tr Π stands for the spectrum of Θ.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> result = pk.compare(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), masks={"dense": None})
        >>> len(compare(result).axes)
        5
    """
    shown = _shown(comparison)
    if axes is None:
        figure = new_figure(13.0, 7.4)
        grid = figure.add_gridspec(2, 12)
        step = 12 // len(shown)
        panels = [figure.add_subplot(grid[0, i * step:(i + 1) * step]) for i in range(len(shown))]
        panels += [figure.add_subplot(grid[1, 3 * i:3 * i + 3]) for i in range(4)]
    else:
        panels = axes_of_all(axes, len(shown) + 4, f"this comparison is drawn on {len(shown) + 4} panels")
    names = list(dict.fromkeys(row.name for row in comparison.rows))
    style = {name: (COLOURS[i % 11], MARKERS[i % 11], DASHES[i % 11]) for i, name in enumerate(names)}
    for ax, compression in zip(panels, shown, strict=False):
        _spectra(ax, comparison, compression, style)
    highest = max((ax.get_ylim()[1] for ax in panels[:len(shown)]), default=1.0)
    lowest = min((ax.get_ylim()[0] for ax in panels[:len(shown)]), default=0.1)
    for ax in panels[:len(shown)]:
        if ax.lines:
            ax.set_ylim(lowest, highest)
    for ax, target in zip(panels[len(shown):-1], SCATTERS, strict=True):
        _scatter(ax, comparison, target, style)
    _correlations(panels[-1], comparison)
    _legend(panels, style, outside=axes is None)
    return titled(panels[0].figure, title)


def _shown(comparison: Comparison) -> list[float | None]:
    """The compressions that have a panel; one that no name but "dense" has is a reference in all of them."""
    names: dict[float | None, set[str]] = {}
    for row in comparison.rows:
        names.setdefault(row.compression, set()).add(row.name)
    references = _references(comparison)
    several = [c for c, of in names.items() if of - references] or list(names)
    if None not in several:
        several.sort(key=lambda c: c or 0.0)
    if len(several) > PANELS:
        several = [several[round(i * (len(several) - 1) / (PANELS - 1))] for i in range(PANELS)]
    return several


def _references(comparison: Comparison) -> set[str]:
    """Names with nothing pruned (no compression, or one of 0) beside others that are."""
    pruned = {row.name for row in comparison.rows if row.compression}
    return {row.name for row in comparison.rows} - pruned if pruned else set()


def _spectra(ax: Any, comparison: Comparison, compression: float | None, style: dict[str, Any]) -> None:
    of_names: dict[str, list[np.ndarray]] = {}
    references = _references(comparison)
    for row in comparison.rows:
        if (row.compression == compression or row.name in references) and row.connected and row.largest > 0:
            of_names.setdefault(row.name, []).append(comparison.spectra[row[:3]])
    text = "λ of Θ" if compression is None else f"λ of Θ, ρ = {compression:g}"
    if not of_names:
        blank(ax, text, "inputs reach no output")
        return
    for name, each in of_names.items():
        common = min(map(len, each))
        values = np.stack([lam[:common] for lam in each])
        index, (colour, marker, dashes) = np.arange(1, common + 1), style[name]
        ax.plot(index, np.median(values, axis=0), color=colour, linestyle=dashes, linewidth=1.3,
                marker=marker if common <= 12 else None, markersize=3)
        if len(each) > 1:
            ax.fill_between(index, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    finish(ax, text, "index $i$", "$\\lambda_i$")


def _scatter(ax: Any, comparison: Comparison, target: str, style: dict[str, Any]) -> None:
    """Tr Π against a target; the logarithm of the trace is known at any size."""
    rows = [row for row in comparison.rows if row.connected and np.isfinite(getattr(row, target))
            and (target == "decay" or getattr(row, target) > 0)]
    text = f"Tr Π against {SCATTERS[target]}"
    if not rows:
        blank(ax, text, "nothing to compare")
        return
    sizes = _sizes(rows)
    wide = any(abs(row.log10_trace_pi) > 300 for row in rows)
    for row in rows:
        colour, marker, _ = style[row.name]
        ax.scatter(row.log10_trace_pi if wide else 10.0**row.log10_trace_pi, getattr(row, target), color=colour,
                   marker=marker, s=sizes[row.compression], alpha=0.8, linewidths=0.3, edgecolors="white")
    if not wide:
        ax.set_xscale("log")
    if target != "decay":
        ax.set_yscale("log")
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    finish(ax, text, "log10 Tr Π" if wide else "Tr Π", "α of $\\lambda_i \\sim i^{-α}$" if target == "decay" else
           SCATTERS[target])


def _sizes(rows: list[Row]) -> dict[float | None, float]:
    """Compression → area of its marks: the sparser, the smaller."""
    order = sorted({row.compression for row in rows}, key=lambda c: -1.0 if c is None else c)
    return {c: 60.0 * 0.62**i for i, c in enumerate(order)}


def _correlations(ax: Any, comparison: Comparison) -> None:
    kinds = [kind for kind in KINDS if comparison.correlations.get(kind, {}).get("trace_pi")]
    if not kinds:
        blank(ax, "Rank correlations of Tr Π", "fewer than three networks to a group")
        return
    for n, kind in enumerate(kinds):
        label, colour, marker = KINDS[kind]
        for place, target in enumerate(TARGETS):
            c = comparison.correlations[kind]["trace_pi"].get(target)
            if c is not None:
                y = place + 0.18 * (n - (len(kinds) - 1) / 2)
                ax.plot([c.low, c.high], [y, y], color=colour, linewidth=1.2)
                ax.plot([c.value], [y], marker, color=colour, markersize=4.5, label=label if place == 0 else None)
    ax.axvline(0.0, color=BLACK, linewidth=0.6)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    ax.set_ylim(len(TARGETS) - 0.5, -0.5)
    ax.grid(True, axis="x", linewidth=0.4, alpha=0.5)
    finish(ax, "Rank correlations of Tr Π", "Spearman's coefficient, 5 to 95 %", "")
    ax.set_yticks(range(len(TARGETS)), ["Σ λ", "$\\lambda_1$", "eff. rank", "decay"], fontsize=SMALL)
    ax.legend(fontsize=SMALL - 1, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=4,
              columnspacing=0.6, handletextpad=0.1)


def _legend(panels: list[Any], style: dict[str, Any], *, outside: bool) -> None:
    """Show names once, below all panels, or on the first of the user's own."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker, linestyle=dashes, linewidth=1.3, markersize=5,
                      label=literal(name)) for name, (colour, marker, dashes) in style.items()]
    if outside:
        panels[0].figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9),
                                fontsize=SMALL, frameon=False, handlelength=3)
    else:
        panels[0].legend(handles=handles, fontsize=SMALL - 2, frameon=False, handlelength=3)
