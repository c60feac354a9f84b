"""Spearman's rank correlation over groups of pairs, with its spread by bootstrap."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["Correlation", "correlation", "spearman"]

FEWEST = 3
"""Entries that a group has at least."""
RESAMPLED = 5
"""Groups, or entries of the only one, that tell a spread at least."""
DRAWS = 1000
LEVELS = (0.05, 0.95)


class Correlation(NamedTuple):
    """Spearman's rank correlation of two columns.

    Examples:
        >>> Correlation(0.5, low=0.1, high=0.8, groups=1, entries=12).value
        0.5
    """

    value: float
    """The mean over the groups."""
    low: float
    """The 5 % quantile of the bootstrap: groups are drawn anew, or entries where there is one group. NaN of fewer than
    five."""
    high: float
    """Its 95 % quantile."""
    groups: int
    """Groups of three entries or more in which neither column is constant."""
    entries: int
    """Entries in them."""


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN where a column is constant.

    Examples:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 9.0, 4.0]))
        0.5
    """
    return float(_spearman(a[None], b[None])[0])


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row."""
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (a, b))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(scale > 0, (a * b).sum(1) / np.where(scale > 0, scale, 1), np.nan)


def correlation(groups: Iterable[tuple[np.ndarray, np.ndarray]]) -> Correlation | None:
    """Return the mean over groups of two columns each, with its spread; None if no group has several entries.

    Examples:
        >>> correlation([(np.arange(6.0), np.array([0.0, 2, 1, 3, 4, 5]))]).entries
        6
    """
    pairs = []
    for a, b in groups:
        known = np.isfinite(a) & np.isfinite(b)
        if known.sum() >= FEWEST and np.isfinite(spearman(a[known], b[known])):
            pairs.append((a[known], b[known]))
    if not pairs:
        return None
    each, draw = np.array([spearman(a, b) for a, b in pairs]), np.random.default_rng(0)
    low = high = np.nan
    if len(pairs) >= RESAMPLED:
        low, high = np.quantile(each[draw.integers(len(each), size=(DRAWS, len(each)))].mean(1), LEVELS)
    elif len(pairs) == 1 and len(pairs[0][0]) >= RESAMPLED:
        chosen = draw.integers(len(pairs[0][0]), size=(DRAWS, len(pairs[0][0])))
        low, high = np.nanquantile(_spearman(*(column[chosen] for column in pairs[0])), LEVELS)
    return Correlation(float(each.mean()), float(low), float(high), len(pairs), sum(len(a) for a, _ in pairs))
