"""Two fits to the runs of a sweep: a line in the natural logarithm, and an exponential that saturates."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike as NumPyArrayLike
from scipy import stats
from scipy.optimize import minimize_scalar

__all__ = ["Line", "Saturation", "line", "risen", "saturation", "spearman"]

ArrayLike = NumPyArrayLike | float        # beartype takes complex, which NumPy names, not to stand for float

STEP = 0.25
"""Of the grid of ln t: the residual varies on a scale of about 1."""
NEGLIGIBLE = 1e-9
"""A column with a norm below this share of the other's does not determine its coefficient."""


class Line(NamedTuple):
    """A line fitted by least squares; NaN where no line is determined."""

    slope: float
    """Per unit of ln x."""
    intercept: float
    """At x = 1."""
    r2: float
    """Share of the variance that is explained; NaN where all values are equal."""
    runs: int
    """Points that the line is fitted to."""
    left_out: int
    """Points without a logarithm or a value: x ≤ 0, NaN or infinite."""


class Saturation(NamedTuple):
    """A fitted curve a(1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t}; NaN where a parameter is not determined."""

    a: float
    """The level at the end."""
    b: float
    """The level at the start: 0 where it is not fitted, NaN where no point determines it."""
    t: float
    """Steps, given or fitted."""
    r2: float
    """Share of the variance that is explained; below 0 where the mean fits better."""
    residuals: np.ndarray
    """(runs,) y − curve, NaN for the points left out."""
    left_out: int
    """Points whose trace is not positive and finite, or whose y is not finite."""
    at_bound: bool
    """Whether the best t lies at an end of the search: the curve is a straight line or a constant."""

    @property
    def drawn(self) -> bool:
        """Whether there is a curve."""
        return bool(np.isfinite(self.a) and np.isfinite(self.t))


def _usable(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.isfinite(x) & (np.where(np.isfinite(x), x, 0.0) > 0) & np.isfinite(y)


def _r2(residuals: np.ndarray, y: np.ndarray) -> float:
    total = float(np.sum((y - y.mean())**2)) if len(y) else 0.0
    return 1.0 - float(np.sum(residuals**2)) / total if total > 0 else float("nan")


def line(x: ArrayLike, y: ArrayLike) -> Line:
    """Fit y = intercept + slope · ln x by least squares.

    Points without a logarithm or a value are left out and counted. With fewer than three different x, slope, intercept
    and R² are NaN.

    Source: Gebhart, Saxena and Schrater (2021), figure 2.

    Examples:
        >>> line([1., np.e, np.e**2, 0.], [1., 3., 5., 9.])
        Line(slope=2.0, intercept=1.0, r2=1.0, runs=3, left_out=1)
    """
    left, right = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = _usable(left, right)
    z, values = np.log(left[kept]), right[kept]
    runs, left_out, nan = len(z), int(np.sum(~kept)), float("nan")
    if len(np.unique(z)) < 3:
        return Line(nan, nan, nan, runs, left_out)
    fit = stats.linregress(z, values)
    r2 = float(fit.rvalue**2) if np.ptp(values) > 0 else nan
    return Line(float(fit.slope), float(fit.intercept), r2, runs, left_out)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Compute Spearman's ρ, the correlation of the ranks, over the points that `line` uses.

    NaN for fewer than three different x, or where all y are equal.

    Examples:
        >>> round(spearman([1., 10., 100., 0.], [3., 4., 9., 1.]), 12)
        1.0
    """
    left, right = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = _usable(left, right)
    if len(np.unique(left[kept])) < 3 or len(np.unique(right[kept])) < 2:
        return float("nan")
    return float(stats.spearmanr(left[kept], right[kept]).statistic)


def risen(rate: ArrayLike, a: float, b: float, t: float) -> np.ndarray:
    """Evaluate a(1 − e^{−rate·t}) + b e^{−rate·t}, where rate is η Tr Π; NaN for b counts as 0.

    Examples:
        >>> risen([0., 1e9], a=3., b=1., t=1.)
        array([1., 3.])
    """
    z = np.asarray(rate, np.float64) * t
    return -a * np.expm1(-z) + np.nan_to_num(b) * np.exp(-z)


def _coefficients(rate: np.ndarray, y: np.ndarray, t: float, start: bool) -> tuple[float, float]:
    """Fit a and b by linear least squares for a given t."""
    z = rate * t
    columns = np.stack([-np.expm1(-z), np.exp(-z)] if start else [-np.expm1(-z)], axis=1)
    norms = np.linalg.norm(columns, axis=0)
    counted = norms > NEGLIGIBLE * norms.max(initial=0.0)
    fitted = np.full(len(norms), np.nan)
    if counted.any():
        fitted[counted] = np.linalg.lstsq(columns[:, counted] / norms[counted], y)[0] / norms[counted]
    return float(fitted[0]), float(fitted[1]) if start else 0.0


def saturation(trace: ArrayLike, y: ArrayLike, learning_rate: ArrayLike, *, t: float | int | Literal["fit"] = "fit",
               start: bool = False) -> Saturation:
    """Fit y = a(1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t} over all points.

    a and b enter linearly and are fitted by least squares. The t of the formula is the number of steps, by which the
    exponential of a realistic trace has long vanished; `t="fit"` searches for the effective t with the smallest
    residual: ln t on a grid, then a bounded search between the neighbours of the best point.

    Args:
        trace: (runs,) Tr Π.
        y: (runs,) ‖ω_t‖ or ‖f_t‖.
        learning_rate: (runs,) or one number, η.
        t: steps, or "fit".
        start: whether to fit b, the level at the start; otherwise b = 0.

    Raises:
        ValueError: t is neither "fit" nor a positive finite number.

    Source: Gebhart, Saxena and Schrater (2021), section 5.1 and figure 1.

    Examples:
        >>> trace = np.geomspace(1., 1e4, 9)
        >>> fit = saturation(trace, risen(0.01 * trace, a=3., b=0., t=0.5), 0.01)
        >>> round(fit.a, 6), round(fit.t, 6)
        (3.0, 0.5)
    """
    if t != "fit" and not 0 < t < np.inf:
        raise ValueError(f"t must be 'fit' or a positive number of steps, got {t!r}")
    traces, measured = np.asarray(trace, np.float64), np.asarray(y, np.float64)
    rates = traces * np.asarray(learning_rate, np.float64)
    kept = _usable(traces, measured) & _usable(rates, measured)
    residuals, left_out = np.full(len(measured), np.nan), int(np.sum(~kept))
    rate, values = rates[kept], measured[kept]
    if len(np.unique(rate)) < 2 + start + (t == "fit"):
        return Saturation(np.nan, np.nan, np.nan if t == "fit" else float(t), np.nan, residuals, left_out, False)

    def loss(ln_t: float) -> float:
        a, b = _coefficients(rate, values, np.exp(ln_t), start)
        return float(np.sum((values - risen(rate, a, b, np.exp(ln_t)))**2))

    at_bound = False
    if t == "fit":
        grid = np.arange(np.log(1e-3 / rate.max()), np.log(30.0 / rate.min()) + STEP, STEP)
        losses = [loss(point) for point in grid]
        best = int(np.argmin(losses))
        search = minimize_scalar(loss, bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
                                 method="bounded", options={"xatol": 1e-10})
        ln_t = search.x if search.fun <= losses[best] else grid[best]
        # Where no curvature is left, the residual no longer depends on t.
        at_bound = min(abs(losses[0] - loss(ln_t)), abs(losses[-1] - loss(ln_t))) <= 1e-6 * max(losses)
        time = float(np.exp(ln_t))
    else:
        time = float(t)
    a, b = _coefficients(rate, values, time, start)
    residuals[kept] = values - risen(rate, a, b, time)
    return Saturation(a, b, time, _r2(residuals[kept], values), residuals, left_out, bool(at_bound))
