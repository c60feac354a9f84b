"""Exact counting of the path kernel's eigenvalues in a fully connected network.

The inertia of ``G − λI`` is that of a block-tridiagonal system with a block per hidden layer (see
:mod:`pkjax.path_kernel.dense_gram`): Sylvester's law turns its negative pivots into the number of eigenvalues above λ,
multiplicities included, whatever the numbers of parameters and of paths. The same elimination solves
``(G − λI) u = v``.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkjax.path_kernel.dense_gram import EdgeChain, build, gather, scatter
from pkjax.paths.dense_layers import DenseLayer

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
    """What the elimination of a hidden layer leaves for solving, its block being ((A, −1), (−1, P)) on μ and b."""

    a: np.ndarray        # (n, n)
    p: np.ndarray        # (n,)
    lu: np.ndarray       # of A P − 1
    pivots: np.ndarray
    x: np.ndarray        # (n, n_next) coupling of b with the next layer's μ

    def solve(self, mu: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Solve for (μ, b) with these right-hand sides."""
        solved = _lu_solve(self.lu, self.pivots, mu + self.a @ b)
        return self.p[:, None] * solved - b, solved


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
    >>> from pkjax.paths.dense_layers import DenseLayer
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

    def count(threshold: float) -> int:
        return len(isolated) - int(np.searchsorted(isolated, threshold, "right")) + eliminate(chain, threshold).above

    with one_thread(chain):
        counts = [count(threshold) for threshold in values.ravel().tolist()]
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
    width = _NEAR * shift
    all_d = [chain.single_d, *(layer.d for layer in chain.inner)]
    if sum(int(np.count_nonzero(np.abs(d - shift) < width)) for d in all_d) <= _MOST_NEAR:
        return width
    return float(np.partition(np.abs(chain.d - shift), _MOST_NEAR)[_MOST_NEAR])


def _system(chain: EdgeChain, shift: float, width: float) -> _System:
    column, norm = chain.bundles.column[chain.single], chain.bundles.norm[chain.single]
    d = chain.single_d - shift
    near = np.abs(d) < width
    far = ~near
    diagonal = np.bincount(column[far], -(norm[far] ** 2) / d[far], minlength=chain.offsets[-1]).astype(np.float64)
    negative = int((d[far] < 0).sum())
    layer = np.searchsorted(np.asarray(chain.offsets), column[near], "right") - 1
    kept = [(d[near], np.stack([column[near]] * 2, 1), np.stack([0 * norm[near], norm[near]], 1), layer)]
    links = []
    for h, inner in enumerate(chain.inner):
        d = inner.d - shift
        near = np.abs(d) < width
        near &= inner.trained
        with np.errstate(divide="ignore"):
            inverse = np.divide(1.0, d, out=d)
        whole = bool(inner.trained.all()) and not near.any()
        if not whole:
            fixed = ~inner.trained | near
            i, j = np.nonzero(near)
            distances = inner.d[i, j] - shift
            inverse[fixed] = 0.0
        negative += int(np.count_nonzero(inverse < 0))
        inverse *= inner.energy
        b, mu = chain.offsets[h] + chain.widths[h], chain.offsets[h + 1]
        tails, heads = inner.squares(inverse)
        diagonal[b : b + len(tails)] -= tails
        diagonal[mu : mu + len(heads)] -= heads
        link = np.multiply(inverse, -shift, out=inverse)
        if not whole:
            link[fixed] = inner.energy[fixed]
            kept.append((distances, np.stack([b + i, mu + j], 1), np.stack(inner.couplings(i, j), 1),
                         np.full(len(i), h + 1)))
        links.append(link)
    values, columns, couplings, layers = (np.concatenate(part) for part in zip(*kept, strict=True))
    return _System(diagonal, tuple(links), values, columns, couplings, layers, negative)


def _by_blocks(chain: EdgeChain, system: _System, keep: bool) -> tuple[int, list[_Step], float]:
    """Eliminate layer by layer: number of negative pivots, what solving needs, growth of the numbers.

    A layer's block is ((A, −Eᵀ), (−E, P)) on (near unknowns, μ) and b, with P diagonal and E = (F, 1). Counting from
    μ + F·near in the place of μ makes F zero; then its negative pivots are those of P and of A − P⁻¹ on μ, scaled to
    ``√|P| A √|P| − sign P``, and its inverse on b is that of ``A P − 1`` times A. No P is too small for either.
    """
    negative, steps, growth = system.negative, [], 0.0
    carried: np.ndarray | None = None  # what the earlier layers leave on (near unknowns, μ) of this one
    last = len(chain.widths) - 1
    for h, n in enumerate(chain.widths):
        start = chain.offsets[h]
        mine = np.flatnonzero(system.near_layer == h)
        e = len(mine)
        mu, p = system.diagonal[start : start + n], system.diagonal[start + n : start + 2 * n]
        simple = carried is None and not e and not keep
        if simple:
            a = mu   # of the first layer, A is diagonal
        else:
            a = np.zeros((e + n, e + n)) if carried is None else carried
            a[np.arange(e, e + n), np.arange(e, e + n)] += mu
            _add_near(a, system, mine, start, n)
        root, sign = np.sqrt(np.abs(p)), np.where(p < 0, -1.0, 1.0)
        x = _ahead(chain, system, h)
        negative += int((p < 0).sum()) + _negative(a, root, sign, e)
        if keep or h < last:
            if simple:
                answer = (a / _nonzero(a * p - 1))[:, None] * x
            else:
                times_p = a.copy()
                times_p[:, e:] *= p
                times_p[np.arange(e, e + n), np.arange(e, e + n)] -= 1
                lu, pivots = _factor(times_p)
                answer = _lu_solve(lu, pivots, a[:, e:] @ x)
                if keep:
                    steps.append(_Step(a, p, lu, pivots, x))
        if h < last:
            carried = _symmetric(x, answer[e:])
            np.negative(carried, out=carried)
            answer[e:] *= p[:, None]
            answer[e:] -= x   # how near unknowns and μ answer to the next layer
            growth = max(growth, float(answer.max(initial=0.0)), -float(answer.min(initial=0.0)))
    return negative, steps, growth


def _add_near(a: np.ndarray, system: _System, mine: np.ndarray, start: int, n: int) -> None:
    """Add the near unknowns of a layer to its A, and change the variables μ so that only μ meets b."""
    e = len(mine)
    near, local, couplings = np.arange(e), system.near_columns[mine, 1] - start, system.near_couplings[mine, 1]
    a[near, near] += system.near[mine]
    to_mu, to_b = local < n, local >= n
    a[near[to_mu], e + local[to_mu]] += couplings[to_mu]
    a[e + local[to_mu], near[to_mu]] += couplings[to_mu]
    if to_b.any():
        f = np.zeros((n, e))
        f[local[to_b] - n, near[to_b]] = -couplings[to_b]
        mixed = a[:e, e:] @ f
        across = f.T @ a[e:, e:]
        a[:e, :e] += across @ f - mixed - mixed.T
        a[:e, e:] -= across
        a[e:, :e] = a[:e, e:].T


def _symmetric(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The product xᵀ y, known to be symmetric: a quarter of it is not computed."""
    half = x.shape[1] // 2
    out = np.empty((x.shape[1],) * 2)
    np.matmul(x[:, :half].T, y, out=out[:half])
    np.matmul(x[:, half:].T, y[:, half:], out=out[half:, half:])
    out[half:, :half] = out[:half, half:].T
    return out


def _negative(a: np.ndarray, root: np.ndarray, sign: np.ndarray, e: int) -> int:
    """Negative pivots of A, its last rows and columns scaled by a root and less a sign on the diagonal."""
    if a.ndim == 1:
        return int((_nonzero(a * root**2 - sign) < 0).sum())
    scaled = a.copy()
    scaled[:, e:] *= root
    scaled[e:] *= root[:, None]
    scaled[np.arange(e, len(a)), np.arange(e, len(a))] -= sign
    return _negative_pivots(scaled)


def _nonzero(pivots: np.ndarray) -> np.ndarray:
    if not pivots.all():
        raise _SingularError
    return pivots


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
    inverse = 1 / (chain.d - elimination.shift)
    scaled = np.asfortranarray(v * inverse[:, None])
    if not chain.widths:
        return scaled
    right = -gather(chain, scaled)
    w = np.empty_like(right)
    last = len(chain.widths) - 1
    ends = [(start, start + n, start + 2 * n) for start, n in zip(chain.offsets, chain.widths, strict=False)]
    for h, step in enumerate(elimination.steps[:last]):
        low, middle, high = ends[h]
        right[high : ends[h + 1][1]] -= step.x.T @ step.solve(right[low:middle], right[middle:high])[1]
    for h, step in reversed(list(enumerate(elimination.steps))):
        low, middle, high = ends[h]
        b = right[middle:high]
        if h < last:
            b = b - step.x @ w[high : ends[h + 1][1]]
        w[low:middle], w[middle:high] = step.solve(right[low:middle], b)
    for column, image in zip(scaled.T, scatter(chain, w).T, strict=True):
        image *= inverse
        column -= image
    return scaled
