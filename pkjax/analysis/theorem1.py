"""Theorem 1 of the paper, claim by claim, on the spectra of one network."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["Claim", "evaluate_claims"]


class Claim(NamedTuple):
    """One claim, tested on one network."""

    holds: bool
    """Whether the bound holds at every index, up to rounding."""
    slack: float
    """The least of 1 − (bounded quantity) / bound over all indices: negative where the bound fails (1 − 30 means that
    it is exceeded thirtyfold). For products, of geometric means."""
    worst: int
    """The index of that least slack, counted from 0."""
    proven: bool
    """Whether the claim is a theorem; the others are false in general."""
    text: str
    """The claim in formulae."""


def evaluate_claims(lam: Float[np.ndarray, "n"], nu: Float[np.ndarray, "l"], pi: Float[np.ndarray, "k"], *,
                    rest: tuple[float, float] = (0.0, 0.0), tolerance: float = 1e-5) -> dict[str, Claim]:
    """Test every bound that relates the spectra of Θ = J Π Jᵀ, A = J Jᵀ and Π, with J = J_v^f.

    λ_i ≤ ν_i π_i for every i is the paper's first claim and false in general; true are the bound on λ_1, the sums
    (Horn, von Neumann), the products (Horn's log-majorisation) and λ_{i+j-1} ≤ ν_i π_j. With singular values of J in
    place of the eigenvalues of A, neither bound holds in general.

    Args:
        lam: eigenvalues of Θ, descending.
        nu: eigenvalues of A, as many, descending.
        pi: the largest eigenvalues of Π, descending. Where there are fewer than ``lam``, the last one stands in as an
            upper bound on the rest, which keeps the sums and products valid; bounds index by index stop there.
        rest: sums of the λ and of the ν that are not listed. Σ λ_i ≤ Σ ν_i π_i includes them, the other claims are
            tested on what is listed; Σ λ_i ≤ Σ σ_i π_i is omitted, for it needs every σ.
        tolerance: relative rounding that a bound may be exceeded by.

    Returns:
        A dictionary from the claim's name to the outcome.

    Raises:
        ValueError: lists of differing lengths, an empty list, or one that is not descending.

    Source: Gebhart, Saxena and Schrater (2021), theorem 1 and appendix A.1; Horn (1950) for the products.

    Examples:
        >>> outcome = evaluate_claims(np.array([2., 2.]), np.array([2., 1.]), np.array([2., 1.]))
        >>> outcome["per index"].holds, outcome["partial sums"].holds, outcome["partial products"].holds
        (False, True, True)
    """
    for name, values in (("lam", lam), ("nu", nu), ("pi", pi)):
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"{name} must be a non-empty list of finite eigenvalues, but has shape {values.shape}")
        if (np.diff(values) > tolerance * np.abs(values).max()).any():
            raise ValueError(f"{name} must be in descending order")
    if lam.size != nu.size:
        raise ValueError(f"lam and nu must be equally long, but hold {lam.size} and {nu.size} eigenvalues")
    n, known = lam.size, min(lam.size, pi.size)
    lam, nu, pi = (np.maximum(v.astype(np.float64), 0) for v in (lam, nu, pi))
    upper = np.concatenate([pi[:n], np.full(n - known, pi[-1])])
    # Below the rounding of the largest eigenvalue an eigenvalue is as good as zero.
    floor = tolerance * lam[0]

    def verdict(left: np.ndarray, right: np.ndarray, proven: bool, text: str) -> Claim:
        meaningful = left > floor
        ratio = np.where(meaningful, left / np.maximum(right, np.finfo(float).tiny), 0.0)
        worst = int(np.argmax(ratio))
        return Claim(bool(ratio[worst] <= 1 + tolerance), float(1 - ratio[worst]), worst, proven, text)

    def products() -> Claim:
        count = int(np.sum((lam > floor) & (nu * upper > 0))) or 1
        with np.errstate(divide="ignore"):
            gap = np.cumsum(np.log(nu[:count] * upper[:count]) - np.log(lam[:count])) / np.arange(1, count + 1)
        gap = np.where(np.isnan(gap), np.inf, gap)
        worst = int(np.argmin(gap))
        return Claim(bool(gap[worst] >= -tolerance), float(-np.expm1(-gap[worst])), worst, True,
                     "λ_1 ⋯ λ_n ≤ ν_1 π_1 ⋯ ν_n π_n for every n")

    def shifted() -> Claim:
        bounds = np.full(n, np.inf)
        for i in range(n):
            reach = min(known, n - i)
            bounds[i:i + reach] = np.minimum(bounds[i:i + reach], nu[i] * pi[:reach])
        return verdict(lam, bounds, True, "λ_{i+j-1} ≤ ν_i π_j for every i and j")
    sums: Callable[[np.ndarray], np.ndarray] = np.cumsum
    sigma = np.sqrt(nu)
    total = lam.sum(keepdims=True) + rest[0]
    outcome = {
        "per index": verdict(lam[:known], nu[:known] * pi[:known], False, "λ_i ≤ ν_i π_i for every i"),
        "largest": verdict(lam[:1], nu[:1] * pi[:1], True, "λ_1 ≤ ν_1 π_1"),
        "total": verdict(total, (nu * upper).sum(keepdims=True) + rest[1] * upper[-1], True, "Σ λ_i ≤ Σ ν_i π_i"),
        "partial sums": verdict(sums(lam), sums(nu * upper), True, "Σ_{i≤n} λ_i ≤ Σ_{i≤n} ν_i π_i for every n"),
        "partial products": products(),
        "shifted": shifted(),
        "by largest ν": verdict(lam[:known], nu[0] * pi[:known], True, "λ_i ≤ ν_1 π_i for every i"),
        "by largest π": verdict(lam, pi[0] * nu, True, "λ_i ≤ π_1 ν_i for every i"),
        "per index, σ for ν": verdict(lam[:known], sigma[:known] * pi[:known], False,
                                      "λ_i ≤ σ_i(J) π_i for every i"),
        "total, σ for ν": verdict(total, sums(sigma * upper)[-1:], False, "Σ λ_i ≤ Σ σ_i(J) π_i"),
    }
    if rest[1]:
        del outcome["total, σ for ν"]
    return outcome
