"""Exact counting of the path kernel's eigenvalues in a fully connected network.

The inertia of ``G − λI`` is that of a block-tridiagonal system with a block per hidden layer (see
:mod:`pkjax.edge_chain`): Sylvester's law turns its negative pivots into the number of eigenvalues above λ,
multiplicities included, whatever the numbers of parameters and of paths. The same elimination solves
``(G − λI) u = v``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkjax.edge_chain import EdgeChain, build, matmul
from pkjax.paths.layers import DenseLayer

__all__ = ["Elimination", "count_above", "eliminate", "solve"]

# An unknown whose d lies this close to λ, relatively, is not eliminated by dividing by d − λ: it joins its layer's
# block, so that λ may lie on d itself.
_NEAR = 1e-7
_MOST_NEAR = 1500


@dataclass(frozen=True)
class _Step:
    """What the elimination of a hidden layer leaves for solving."""

    lu: np.ndarray
    pivots: np.ndarray
    pivot_b: np.ndarray  # (n,) diagonal of b
    good: np.ndarray     # (n,) bool: eliminated by that diagonal
    x: np.ndarray        # (n, next block) coupling of b with the next block
    y: np.ndarray        # (block, next block) coupling of the block with the next


@dataclass(frozen=True)
class Elimination:
    """``G − λI`` eliminated: how many eigenvalues lie above λ, and what :func:`solve` needs."""

    shift: float
    above: int
    steps: tuple[_Step, ...]


class _SingularError(ArithmeticError):
    """λ is an eigenvalue of a leading part of the system to the last digit."""


def count_above(layers: Sequence[DenseLayer], thresholds: Any, *, inputs: np.ndarray | None = None) -> np.ndarray:
    r"""Count the eigenvalues of Π that are greater than each threshold, multiplicities included.

    .. math:: \#\{\pi > \lambda\} = m - (\#\{d < 0\} + \#\{\text{negative pivots}\} - H)

    Args:
        layers: the network's layers of edges.
        thresholds: numbers greater than 0, of any shape.
        inputs: the (n_0,) energies at the inputs, ``R_2(·, z)``; ones by default.

    Returns: integers of the thresholds' shape. A threshold within rounding of an eigenvalue (about 1e-13 of it) may
    count it or not.

    Raises: ValueError where the layers do not fit together, or a threshold is not a finite number above 0.

    >>> import numpy as np
    >>> from pkjax.paths.layers import DenseLayer
    >>> def dense(weights, first):
    ...     none, out = np.full(weights.shape[1], -1), np.zeros(weights.shape[1])
    ...     index = first + np.arange(weights.size).reshape(weights.shape)
    ...     return DenseLayer(weights, np.ones_like(weights), index, out, out, none, out)
    >>> layers = [dense(np.array([[1.0], [1.0]]), 0), dense(np.array([[2.0]]), 2)]
    >>> count_above(layers, [0.5, 4.5, 6.5])  # two paths of value 2 through one weight: 6, 4 and 0
    array([2, 1, 0])
    """
    values = np.asarray(thresholds, np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"thresholds must be finite and greater than 0, got {thresholds}")
    chain = build(layers, inputs)
    isolated = np.sort(chain.isolated)
    counts = [len(isolated) - int(np.searchsorted(isolated, v, "right")) + eliminate(chain, float(v)).above
              for v in values.ravel()]
    return np.asarray(counts, np.int64).reshape(values.shape)


def eliminate(chain: EdgeChain, shift: float, *, keep: bool = False) -> Elimination:
    """Eliminate ``G − shift·I``, the trivial eigenvectors taken out; ``keep`` keeps what :func:`solve` needs.

    For ``keep`` the shift moves by up to a relative 1e-6 where it lies next to a pole d.
    """
    if keep:
        shift = _away_from_poles(chain, shift)
    step = 1e-15
    while True:
        try:
            return _eliminate(chain, shift, keep)
        except _SingularError:
            shift *= 1 + step
            step *= 4


def _away_from_poles(chain: EdgeChain, shift: float) -> float:
    candidates = shift * (1 + 1e-7 * np.array([0, 2, -2, 4, -4, 6, -6, 8, -8, 10]))
    near = chain.d[np.abs(chain.d - shift) < 1e-5 * shift]
    if not near.size:
        return shift
    distance = np.abs(near[:, None] - candidates).min(0)
    return float(candidates[0] if distance[0] > _NEAR * shift else candidates[np.argmax(distance)])


def _eliminate(chain: EdgeChain, shift: float, keep: bool) -> Elimination:
    if not chain.widths:
        return Elimination(shift, 0, ())
    width = 0.0 if keep else _nearness(chain, shift)
    singles = len(chain.single)
    d = chain.d[:singles] - shift
    near_single = np.abs(d) < width
    column = chain.bundles.column[chain.single]
    norm = chain.bundles.norm[chain.single]
    far = ~near_single
    diagonal = np.bincount(column[far], -norm[far] ** 2 / d[far], minlength=chain.offsets[-1])
    negative = int((d[far] < 0).sum())
    steps = []
    # What the previous layer leaves: extras are (d − λ, head j, coupling to μ_j), one column each in x.
    extras: list[tuple[float, int, float]] = []
    update: np.ndarray | None = None
    mu_diagonal: np.ndarray | float = 0.0
    for h, n in enumerate(chain.widths):
        start = chain.offsets[h]
        mine = near_single & (column >= start) & (column < start + 2 * n)
        block_extras = extras + [(d[s], int(column[s]) - start, norm[s]) for s in np.flatnonzero(mine)]
        pivot_b, mu = diagonal[start + n : start + 2 * n], diagonal[start : start + n] + mu_diagonal
        if h + 1 < len(chain.widths):
            x_mu, row_diagonal, mu_diagonal, negatives, extras, x_extra = _inner_terms(chain, h, shift, width)
            pivot_b = pivot_b + row_diagonal
            negative += negatives
        else:
            x_mu, extras, x_extra = np.zeros((n, 0)), [], np.zeros((n, 0))
        # b_i is eliminated by its own diagonal unless that is too small beside its coupling −1 with μ_i.
        scale = np.abs(mu).max() + (np.abs(update).max() if update is not None else 0.0)
        good = np.abs(pivot_b) * scale > 1e-5
        good[[i - n for _, i, _ in block_extras if i >= n]] = False
        negative += int((pivot_b[good] < 0).sum())
        bad = np.flatnonzero(~good)
        inverse_b = np.zeros(n)
        inverse_b[good] = 1 / pivot_b[good]
        e, s = len(block_extras), len(block_extras) + n + len(bad)
        block = np.zeros((s, s))
        place = e + np.arange(n)
        block[place, place] = mu - inverse_b
        if update is not None:
            t = update.shape[0] - n  # the previous layer's extras come first, then μ
            block[:t, :t] += update[:t, :t]
            block[:t, e : e + n] += update[:t, t:]
            block[e : e + n, :t] += update[t:, :t]
            block[e : e + n, e : e + n] += update[t:, t:]
        position = np.full(2 * n, -1)
        position[:n] = place
        position[n + bad] = e + n + np.arange(len(bad))
        for r, (value, i, coupling) in enumerate(block_extras):
            block[r, r] += value
            block[r, position[i]] += coupling
            block[position[i], r] += coupling
        block[position[n + bad], position[n + bad]] = pivot_b[bad]
        block[position[n + bad], position[bad]] = block[position[bad], position[n + bad]] = -1
        negative += _negative_pivots(block)
        x = np.concatenate([x_extra, x_mu], axis=1)
        y = np.zeros((s, x.shape[1]))
        y[e : e + n] = x * inverse_b[:, None]
        y[position[n + bad]] = x[bad]
        lu, pivots = _factor(block) if keep or h + 1 < len(chain.widths) else (block, block)
        if h + 1 < len(chain.widths):
            update = -(x.T * inverse_b) @ x - y.T @ _lu_solve(lu, pivots, y)
        if keep:
            steps.append(_Step(lu, pivots, pivot_b, good, x, y))
    # The d of near unknowns lie in the blocks, so the sizes add up: unknowns + 2H variables, of which H are multipliers.
    above = chain.size - (negative - sum(chain.widths))
    return Elimination(shift, above, tuple(steps))


def _nearness(chain: EdgeChain, shift: float) -> float:
    distance = np.abs(chain.d - shift)
    if int((distance < _NEAR * shift).sum()) <= _MOST_NEAR:
        return _NEAR * shift
    return float(np.partition(distance, _MOST_NEAR)[_MOST_NEAR])


def _inner_terms(chain: EdgeChain, h: int, shift: float, width: float) -> tuple[
        np.ndarray, np.ndarray, np.ndarray, int, list[tuple[float, int, float]], np.ndarray]:
    """The edges from hidden layer h to h + 1: coupling of b with μ, both diagonals, negative d, near edges."""
    layer = chain.inner[h]
    d = layer.d - shift
    near = layer.trained & (np.abs(d) < width)
    far = layer.trained & ~near
    inverse = np.zeros_like(d)
    np.divide(1.0, d, out=inverse, where=far)
    x = np.where(far, -shift * inverse, 1.0) * layer.energy
    rows = -np.einsum("ij,ij,ij->i", layer.to_b, layer.to_b, inverse)
    columns = -np.einsum("ij,ij,ij->j", layer.to_mu, layer.to_mu, inverse)
    tails, heads = np.nonzero(near)
    extras = [(float(d[i, j]), int(j), float(layer.to_mu[i, j])) for i, j in zip(tails, heads, strict=True)]
    x_extra = np.zeros((d.shape[0], len(extras)))
    x_extra[tails, np.arange(len(extras))] = layer.to_b[near]
    return x, rows, columns, int((inverse < 0).sum()), extras, x_extra


def _negative_pivots(block: np.ndarray) -> int:
    from scipy.linalg import lapack

    work = int(lapack.dsytrf_lwork(len(block), lower=1)[0])
    ldl, pivots, info = lapack.dsytrf(block, lower=1, lwork=work)
    if info:
        raise _SingularError
    # A 2×2 pivot of Bunch and Kaufman always has one eigenvalue of either sign; its two entries of pivots are negative.
    return int((np.diagonal(ldl)[pivots > 0] < 0).sum()) + int((pivots < 0).sum()) // 2


def _factor(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import lapack

    lu, pivots, info = lapack.dgetrf(block)
    if info:
        raise _SingularError
    return lu, pivots


def _lu_solve(lu: np.ndarray, pivots: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.linalg import lapack

    return lapack.dgetrs(lu, pivots, right)[0]


def solve(chain: EdgeChain, elimination: Elimination, v: np.ndarray) -> np.ndarray:
    """Solve ``(G − shift·I) u = v`` for the columns of v (unknowns, columns); the elimination was made to keep."""
    d = (chain.d - elimination.shift)[:, None]
    scaled = v / d
    if not chain.widths:
        return scaled
    right = -(chain.coupling.T @ scaled)
    w = np.empty_like(right)
    partial = []
    for h, (n, step) in enumerate(zip(chain.widths, elimination.steps, strict=True)):
        start, good = chain.offsets[h], step.good
        r_b = right[start + n : start + 2 * n]
        reduced = np.where(good, 1 / np.where(good, step.pivot_b, 1.0), 0.0)[:, None] * r_b
        t = _lu_solve(step.lu, step.pivots,
                      np.concatenate([right[start : start + n] + reduced, r_b[~good]]))
        if h + 1 < len(chain.widths):
            following = chain.offsets[h + 1]
            right[following : following + step.x.shape[1]] -= step.x.T @ reduced + step.y.T @ t
        partial.append(t)
    mu_next: np.ndarray | None = None
    for h, (n, step) in reversed(list(enumerate(zip(chain.widths, elimination.steps, strict=True)))):
        start, good, t = chain.offsets[h], step.good, partial[h]
        r_b = right[start + n : start + 2 * n]
        if mu_next is not None:
            t = t - _lu_solve(step.lu, step.pivots, step.y @ mu_next)
            r_b = r_b - step.x @ mu_next
        mu = t[:n]
        b = (r_b + mu) / np.where(good, step.pivot_b, 1.0)[:, None]
        b[~good] = t[n:]
        w[start : start + n], w[start + n : start + 2 * n] = mu, b
        mu_next = mu
    return scaled - (chain.coupling @ w) / d


def residual_norms(chain: EdgeChain, u: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``‖G u − u·value‖`` of every column of u."""
    return np.linalg.norm(matmul(chain, u) - u * values, axis=0)
