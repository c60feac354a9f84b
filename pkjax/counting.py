"""Exact counting of the path kernel's eigenvalues in a fully connected network.

The inertia of ``G − λI`` is that of a block-tridiagonal system with a block per hidden layer (see
:mod:`pkjax.edge_chain`): Sylvester's law turns its negative pivots into the number of eigenvalues above λ,
multiplicities included, whatever the numbers of parameters and of paths. The same elimination solves
``(G − λI) u = v``.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkjax.edge_chain import EdgeChain, build
from pkjax.paths.layers import DenseLayer

__all__ = ["Elimination", "count_above", "eliminate", "one_thread", "solve"]

# An unknown whose d lies this close to λ, relatively, is not eliminated by dividing by d − λ: it joins its layer's
# block, so that λ may lie on d itself.
_NEAR = 1e-7
_MOST_NEAR = 1500
# Beyond this growth the layer-by-layer elimination loses digits; the whole system is taken at once, up to this size.
_MOST_GROWTH = 1e7
_MOST_DENSE = 4000


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
    with one_thread(chain):
        counts = [len(isolated) - int(np.searchsorted(isolated, v, "right")) + eliminate(chain, float(v)).above
                  for v in values.ravel()]
    return np.asarray(counts, np.int64).reshape(values.shape)


def one_thread(chain: EdgeChain) -> Any:
    """Keep BLAS to one thread where blocks are small: threads then cost up to a hundred times what they bring."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1) if max(chain.widths, default=0) < 400 else contextlib.nullcontext()


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
    if not chain.widths:  # every edge ends at an output: all eigenvectors are trivial
        return Elimination(shift, 0, ())
    system = _system(chain, shift, 0.0 if keep else _nearness(chain, shift))
    whole_fits = not keep and chain.offsets[-1] + len(system.near) <= _MOST_DENSE
    try:
        negative, steps, growth = _by_blocks(chain, system, keep)
    except _SingularError:
        if not whole_fits:
            raise
        negative, steps, growth = 0, [], np.inf
    if growth > _MOST_GROWTH and whole_fits:
        # λ is nearly an eigenvalue of the first layers by themselves: pivot over the whole system instead.
        negative = system.negative + _negative_pivots(_whole(chain, system))
    # Of the system's variables H = sum(widths) are multipliers; Sylvester's law counts one negative for each.
    return Elimination(shift, chain.size - (negative - sum(chain.widths)), tuple(steps))


@dataclass(frozen=True)
class _System:
    """``G − λI`` with the far unknowns eliminated: what is left on the near ones and on the nodes."""

    diagonal: np.ndarray           # (node variables,)
    links: tuple[np.ndarray, ...]  # (n_h, n_h+1) coupling of b with the next layer's μ
    near: np.ndarray               # (e,) d − λ of the unknowns that stay
    near_columns: np.ndarray       # (e, 2) the node variables that each couples to; the second has the later layer
    near_couplings: np.ndarray     # (e, 2)
    near_layer: np.ndarray         # (e,) the hidden layer of the second
    negative: int                  # number of negative d − λ among the far unknowns


def _nearness(chain: EdgeChain, shift: float) -> float:
    distance = np.abs(chain.d - shift)
    if int((distance < _NEAR * shift).sum()) <= _MOST_NEAR:
        return _NEAR * shift
    return float(np.partition(distance, _MOST_NEAR)[_MOST_NEAR])


def _system(chain: EdgeChain, shift: float, width: float) -> _System:
    column, norm = chain.bundles.column[chain.single], chain.bundles.norm[chain.single]
    d = chain.d[: len(column)] - shift
    near = np.abs(d) < width
    far = ~near
    diagonal = np.bincount(column[far], -(norm[far] ** 2) / d[far], minlength=chain.offsets[-1])
    negative = int((d[far] < 0).sum())
    layer = np.searchsorted(np.asarray(chain.offsets), column[near], "right") - 1
    kept = [(d[near], np.stack([column[near]] * 2, 1), np.stack([0 * norm[near], norm[near]], 1), layer)]
    links = []
    for h, inner in enumerate(chain.inner):
        d = inner.d - shift
        near = inner.trained & (np.abs(d) < width)
        far = inner.trained & ~near
        inverse = np.zeros_like(d)
        np.divide(1.0, d, out=inverse, where=far)
        b, mu = chain.offsets[h] + chain.widths[h], chain.offsets[h + 1]
        diagonal[b : b + d.shape[0]] -= np.einsum("ij,ij,ij->i", inner.to_b, inner.to_b, inverse)
        diagonal[mu : mu + d.shape[1]] -= np.einsum("ij,ij,ij->j", inner.to_mu, inner.to_mu, inverse)
        links.append(np.where(far, -shift * inverse, 1.0) * inner.energy)
        negative += int((inverse < 0).sum())
        if near.any():
            i, j = np.nonzero(near)
            kept.append((d[near], np.stack([b + i, mu + j], 1),
                         np.stack([inner.to_b[near], inner.to_mu[near]], 1), np.full(len(i), h + 1)))
    values, columns, couplings, layers = (np.concatenate(part) for part in zip(*kept, strict=True))
    return _System(diagonal, tuple(links), values, columns, couplings, layers, negative)


def _by_blocks(chain: EdgeChain, system: _System, keep: bool) -> tuple[int, list[_Step], float]:
    """Eliminate layer by layer: number of negative pivots, what solving needs, growth of the numbers."""
    negative, steps, growth = system.negative, [], 0.0
    carried: np.ndarray | None = None  # what the earlier layers leave on (near unknowns, μ) of this one
    last = len(chain.widths) - 1
    for h, n in enumerate(chain.widths):
        start = chain.offsets[h]
        mine = np.flatnonzero(system.near_layer == h)
        e = len(mine)
        mu, pivot_b = system.diagonal[start : start + n], system.diagonal[start + n : start + 2 * n]
        # Each b_i goes by its own diagonal, unless that is small beside its coupling −1 with μ_i: then it joins the
        # block, and so does one that a near unknown of this block couples to.
        scale = np.abs(mu).max() + (np.abs(carried).max() if carried is not None else 0.0)
        good = np.abs(pivot_b) * scale > 1e-5
        local = system.near_columns[mine, 1] - start
        good[local[local >= n] - n] = False
        bad = np.flatnonzero(~good)
        negative += int((pivot_b[good] < 0).sum())
        inverse_b = np.where(good, 1 / np.where(good, pivot_b, 1.0), 0.0)

        place = np.full(2 * n, -1)  # rows of the block: near unknowns, μ, the bad b
        place[:n] = e + np.arange(n)
        place[n + bad] = e + n + np.arange(len(bad))
        block = np.zeros((e + n + len(bad),) * 2)
        if carried is not None:
            block[: e + n, : e + n] = carried
        block[place[:n], place[:n]] += mu - inverse_b
        block[place[n + bad], place[n + bad]] = pivot_b[bad]
        block[place[n + bad], place[bad]] = block[place[bad], place[n + bad]] = -1
        block[np.arange(e), np.arange(e)] += system.near[mine]
        block[np.arange(e), place[local]] += system.near_couplings[mine, 1]
        block[place[local], np.arange(e)] += system.near_couplings[mine, 1]
        negative += _negative_pivots(block)

        x, y = _ahead(chain, system, h), np.zeros((len(block), 0))
        lu = pivots = np.zeros(0)
        if keep or h < last:
            lu, pivots = _factor(block)
            y = np.zeros((len(block), x.shape[1]))
            y[place[:n]] = x * inverse_b[:, None]
            y[place[n + bad]] = x[bad]
        if h < last:
            through = _lu_solve(lu, pivots, y)
            growth = max(growth, float(np.abs(through).max(initial=0.0)))
            carried = -(x.T * inverse_b) @ x - y.T @ through
        if keep:
            steps.append(_Step(lu, pivots, pivot_b, good, x, y))
    return negative, steps, growth


def _ahead(chain: EdgeChain, system: _System, h: int) -> np.ndarray:
    """Coupling of layer h's b with the next block's near unknowns and μ: (n, e + n_next)."""
    n, first = chain.widths[h], chain.offsets[h] + chain.widths[h]
    if h + 1 == len(chain.widths):
        return np.zeros((n, 0))
    mine = np.flatnonzero(system.near_layer == h + 1)
    extra = np.zeros((n, len(mine)))
    tail = system.near_columns[mine, 0] - first
    here = (tail >= 0) & (tail < n)
    extra[tail[here], np.flatnonzero(here)] = system.near_couplings[mine[here], 0]
    return np.concatenate([extra, system.links[h]], axis=1)


def _whole(chain: EdgeChain, system: _System) -> np.ndarray:
    """The whole system as one dense matrix: near unknowns, then the node variables."""
    e = len(system.near)
    whole = np.diag(np.concatenate([system.near, system.diagonal]))
    rows = np.arange(e)
    for side in range(2):
        columns = e + system.near_columns[:, side]
        whole[rows, columns] += system.near_couplings[:, side]
        whole[columns, rows] += system.near_couplings[:, side]
    for h, n in enumerate(chain.widths):
        mu, b = e + chain.offsets[h] + np.arange(n), e + chain.offsets[h] + n + np.arange(n)
        whole[mu, b] = whole[b, mu] = -1
        if h + 1 < len(chain.widths):
            following = e + chain.offsets[h + 1] + np.arange(chain.widths[h + 1])
            whole[np.ix_(b, following)] = system.links[h]
            whole[np.ix_(following, b)] = system.links[h].T
    return whole


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
