"""Exact counting of the path kernel's eigenvalues in a fully connected network, by eliminating ``G − λI``.

The inertia of ``G − λI`` is that of a block-tridiagonal system with one block for each hidden layer (see
``pkjax.path_kernel.dense_gram``). Sylvester's law turns its negative pivots into the number of eigenvalues above λ,
multiplicities included, whatever the numbers of parameters and paths. The same elimination solves ``(G − λI) u = v``.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkjax.path_kernel.dense_gram import EdgeChain, build, gather, scatter
from pkjax.path_kernel.shifted_system import NEAR, ShiftedSystem, nearness, shifted_system
from pkjax.paths.layers import Layer

__all__ = ["Elimination", "count_above", "eliminate", "one_thread", "solve_shifted"]

# Beyond this growth the layer-by-layer elimination loses digits; the whole system is taken at once, up to this size.
_MOST_GROWTH = 1e7
_MOST_DENSE = 4000


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class Elimination:
    """``G − λI`` eliminated: how many eigenvalues lie above λ, and what ``solve_shifted`` needs."""

    shift: float
    above: int
    steps: tuple[_Step, ...]


class _SingularError(ArithmeticError):
    """λ is an eigenvalue of a leading part of the system to the last digit."""


def count_above(layers: Sequence[Layer], thresholds: Any, *, inputs: np.ndarray | None = None) -> np.ndarray:
    """Count the eigenvalues of Π that are greater than each threshold, multiplicities included.

        #{π > λ} = m − (#{d < λ} + #{negative pivots} − H)

    for m parameters that train and H hidden nodes.

    Args:
        layers: the network's layers of edges.
        thresholds: numbers greater than 0, of any shape.
        inputs: the (n_0,) energies at the inputs, z of ``R_2(·, z)``; ones by default.

    Returns:
        Integers of the thresholds' shape. A threshold within rounding of an eigenvalue (about 1e-13 of it) may count
        it or not.

    Raises:
        ValueError: the layers do not fit together, or a threshold is not a finite number above 0.

    Examples:
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
    """Keep BLAS to one thread where blocks are small: more threads would take up to a hundred times as long."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1) if max(chain.widths, default=0) < 400 else contextlib.nullcontext()


def eliminate(chain: EdgeChain, shift: float, *, keep: bool = False) -> Elimination:
    """Eliminate ``G − shift·I`` without the trivial eigenvectors; ``keep`` keeps what ``solve_shifted`` needs.

    With ``keep`` the shift moves by up to a relative 1e-6 where it lies next to a pole d.
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
    return float(candidates[0] if distance[0] > NEAR * shift else candidates[np.argmax(distance)])


def _eliminate(chain: EdgeChain, shift: float, keep: bool) -> Elimination:
    if not chain.widths:  # every edge ends at an output: all eigenvectors are trivial
        return Elimination(shift, 0, ())
    system = shifted_system(chain, shift, 0.0 if keep else nearness(chain, shift))
    whole_fits = not keep and chain.offsets[-1] + len(system.near) <= _MOST_DENSE
    try:
        negative, steps, growth = _by_blocks(system, keep)
    except _SingularError:
        if not whole_fits:
            raise
        negative, steps, growth = 0, [], np.inf
    if growth > _MOST_GROWTH and whole_fits:
        # λ is nearly an eigenvalue of the first layers by themselves: pivot over the whole system instead.
        negative = system.negative + _negative_pivots(system.matrix())
    # Of the system's variables H = sum(widths) are multipliers; Sylvester's law counts one negative for each.
    return Elimination(shift, chain.size - (negative - sum(chain.widths)), tuple(steps))


def _by_blocks(system: ShiftedSystem, keep: bool) -> tuple[int, list[_Step], float]:
    """Eliminate layer by layer: number of negative pivots, what solving needs, growth of the numbers.

    A layer's block is ((A, −Eᵀ), (−E, P)) on (near unknowns, μ) and b, with P diagonal and E = (F, 1). Counting from
    μ + F·near in the place of μ makes F zero; then its negative pivots are those of P and of A − P⁻¹ on μ, scaled to
    ``√|P| A √|P| − sign P``, and its inverse on b is that of ``A P − 1`` times A. No P is too small for either.
    """
    negative, steps, growth = system.negative, [], 0.0
    carried: np.ndarray | None = None  # what the earlier layers leave on (near unknowns, μ) of this one
    last = len(system.widths) - 1
    for h, n in enumerate(system.widths):
        start = system.offsets[h]
        e = len(system.near_of(h))
        mu, p = system.diagonal[start : start + n], system.diagonal[start + n : start + 2 * n]
        simple = carried is None and not e and not keep
        if simple:
            a = mu   # of the first layer, A is diagonal
        else:
            a = np.zeros((e + n, e + n)) if carried is None else carried
            a[np.arange(e, e + n), np.arange(e, e + n)] += mu
            system.add_near(a, h)
        root, sign = np.sqrt(np.abs(p)), np.where(p < 0, -1.0, 1.0)
        x = system.ahead(h)
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


def solve_shifted(chain: EdgeChain, elimination: Elimination, v: np.ndarray) -> np.ndarray:
    """Solve ``(G − shift·I) u = v`` for the columns of v (unknowns, columns), after ``eliminate(…, keep=True)``."""
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
