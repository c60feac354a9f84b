"""The path kernel's largest eigenvalues and eigenvectors in a fully connected network, by spectrum slicing.

Exact counts split the spectrum into intervals of a few eigenvalues each. One elimination at an interval's centre then
drives a shift-and-invert block Krylov space, until it holds as many converged pairs as the count says: no eigenvalue
is missed and no copy of a multiple one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkjax.path_kernel.dense_gram import EdgeChain, build, lift, lift_isolated, matmul
from pkjax.path_kernel.inertia import eliminate, one_thread, solve_shifted
from pkjax.paths.layers import Layer

__all__ = ["TopSpectrum", "top_spectrum"]

_MOST = 12      # eigenvalues to an interval
_BLOCK = 4      # columns of a Krylov block
_LARGE = 2**21  # unknowns from which single vectors and a residual of 1e-10 must do: each takes much memory
_TIGHT = 1e-12  # relative width at which an interval is one multiple eigenvalue


@dataclass(frozen=True, eq=False)
class TopSpectrum:
    """The k largest eigenvalues: each lies within its bound of the value given."""

    values: np.ndarray          # (k,) descending
    bounds: np.ndarray          # (k,)
    residuals: np.ndarray       # (k,) ‖G z − π z‖
    vectors: np.ndarray | None  # (k, parameters)


@dataclass(frozen=True, eq=False)
class _Slice:
    """The eigenpairs of one interval."""

    values: np.ndarray
    bounds: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray | None  # (unknowns, values)


def top_spectrum(layers: Sequence[Layer], k: int, *, inputs: np.ndarray | None = None, vectors: bool = False,
                 size: int | None = None, trained: np.ndarray | None = None,
                 dense_below: int = 500) -> TopSpectrum:
    """The k largest eigenvalues of Π with multiplicities, error bounds and eigenvectors of its dual Gram.

    Args:
        layers: the network's layers of edges.
        k: how many; where Π has fewer non-zero eigenvalues, zeros fill up.
        inputs: the (n_0,) energies at the inputs; ones by default.
        vectors: return eigenvectors, orthonormal rows over all parameters.
        size: number of entries of the flattened parameters; by default one more than the greatest index.
        trained: positions of the parameters that train, by default those that the layers hold.
        dense_below: solve densely while fewer unknowns than this are left.

    Returns:
        Values, bounds and residuals (k,), and the vectors (k, size) where they are asked for.

    Raises:
        ValueError: the layers do not fit together, or k exceeds the number of parameters that train.

    Examples:
        >>> from pkjax.paths import DenseLayer
        >>> weights = np.array([[1.0], [1.0]])
        >>> zero, none = np.zeros(1), np.array([-1])
        >>> first = DenseLayer(weights, np.ones((2, 1)), np.array([[0], [1]]), zero, zero, none, zero)
        >>> second = DenseLayer(np.array([[2.0]]), np.ones((1, 1)), np.array([[2]]), zero, zero, none, zero)
        >>> top_spectrum([first, second], 3).values.round(9)
        array([6., 4., 0.])
    """
    if trained is None:
        trained = np.concatenate([np.append(layer.index.ravel(), layer.bias_index) for layer in layers])
        trained = np.sort(trained[trained >= 0])
    size = int(trained.max(initial=-1)) + 1 if size is None else size
    if not 0 < k <= len(trained):
        raise ValueError(f"k must be between 1 and the number of parameters that train, {len(trained)}, got {k}")
    chain = build(layers, inputs)
    with one_thread(chain):
        slices = _dense(chain) if chain.size < dense_below else _slice(chain, k, vectors)
        return _merge(chain, slices, k, size, trained if vectors else None)


def _dense(chain: EdgeChain) -> list[_Slice]:
    if not chain.size:
        return []
    gram = matmul(chain, np.eye(chain.size))
    values, u = np.linalg.eigh((gram + gram.T) / 2)
    residuals = np.linalg.norm(gram @ u - u * values, axis=0)
    rounding = 16 * np.finfo(float).eps * values[-1]
    return [_Slice(values, residuals + rounding, residuals, u)]


def _slice(chain: EdgeChain, k: int, vectors: bool) -> list[_Slice]:
    isolated = np.sort(chain.isolated)
    counts: dict[float, int] = {}

    def above(shift: float) -> int:
        if shift not in counts:
            counts[shift] = eliminate(chain, shift).above
        return counts[shift]

    def total(shift: float) -> int:
        return above(shift) + len(isolated) - int(np.searchsorted(isolated, shift, "right"))

    high = _estimate(chain) if chain.size else 0.0
    if not high > 0:
        return []
    while above(high):
        high *= 1.25
    # Where enough trivial eigenvalues are known, the search ends at the last of them.
    top = high
    low = float(isolated[-k]) * (1 - 1e-9) if len(isolated) >= k and isolated[-k] > 1e-13 * top else high
    while total(low) < k and low > 1e-13 * top:
        low /= 2
        if not above(low):
            top = low
    # Narrow the gap between low, above which enough lie, and high, above which too few do.
    high = min((s for s in counts if s > low), default=high)
    while above(low) > k + k // 8 + 4 and high - low > _TIGHT * high:
        middle = _middle(low, high)
        low, high = (middle, high) if total(middle) >= k else (low, middle)

    todo = list(itertools.pairwise(sorted(s for s in counts if s >= low)))
    slices: list[_Slice] = []
    rng = np.random.default_rng(0)
    have = 0
    while todo:
        a, b = todo.pop()
        count = above(a) - above(b)
        if not count or have + len(isolated) - int(np.searchsorted(isolated, b, "left")) >= k:
            continue
        middle = _middle(a, b)
        tight = b - a <= _TIGHT * b
        if not tight and (count > _MOST or (b - a > 1e-3 * b and above(middle) in (above(a), above(b)))):
            todo += [(a, middle), (middle, b)]
            continue
        wanted = min(count, k - have) if tight else count
        # A multiple eigenvalue needs no vectors for its value; a few copies are cheaply confirmed.
        pairs = None
        if vectors or wanted <= _MOST:
            close = [f.vectors for f in slices if f.vectors is not None
                     and np.abs(f.values - (a + b) / 2).min() < (b - a) / 2 + 1e-9 * b]
            pairs = _between(chain, a, b, count, wanted, top, rng, np.hstack([np.zeros((chain.size, 0)), *close]))
        if pairs is None and not tight:
            todo += [(a, middle), (middle, b)]
            continue
        if pairs is None:
            # The counts alone vouch for the value; vectors that were asked for are missing, and the residuals say so.
            half = np.full(wanted, (b - a) / 2)
            pairs = _Slice(np.full(wanted, (a + b) / 2), half, half * (np.inf if vectors else 1), None)
        slices.append(pairs if vectors else _Slice(pairs.values, pairs.bounds, pairs.residuals, None))
        have += wanted
    return slices


def _estimate(chain: EdgeChain) -> float:
    """1.25 times the value of a short power iteration: a first guess at an upper bound on the spectrum."""
    u = np.sqrt(chain.d)[:, None] * np.sign(chain.coupling.sum(1))[:, None] + 1e-3 * np.sqrt(chain.d.mean())
    value = 0.0
    for _ in range(8):
        length = float(np.linalg.norm(u))
        if not length > 0:
            break
        u /= length
        image = matmul(chain, u)
        value, u = float(u[:, 0] @ image[:, 0]), image
    return 1.25 * value


def _middle(low: float, high: float) -> float:
    return float(np.sqrt(low * high)) if high > 4 * low else (low + high) / 2


def _between(chain: EdgeChain, low: float, high: float, count: int, wanted: int, top: float,
             rng: np.random.Generator, known: np.ndarray) -> _Slice | None:
    """The eigenpairs between low and high, of which there are ``count``; None where they do not converge.

    The vectors are orthogonal to the ``known`` columns: rounding may share a multiple eigenvalue out between two
    intervals.
    """
    from scipy.linalg import qr

    tight = high - low <= _TIGHT * high
    edge = 1e-11 * high
    elimination = eliminate(chain, (low + high) / 2, keep=True)
    block, accuracy = (max(wanted, _BLOCK) if tight else min(_BLOCK, count + 1)), 1e-12
    if chain.size >= _LARGE:
        block, accuracy = (wanted if tight else 1), 1e-10
    block = min(block, chain.size)
    tolerance = max(accuracy * high, 1e-14 * top)
    x = rng.standard_normal((block, chain.size)).T
    steps = min(3 * count // block + 20, -(-chain.size // block))
    most = min(steps * block, chain.size)
    basis = np.empty((chain.size, most), order="F")
    projected = np.zeros((most, most))
    for step in range(steps):
        old, new = slice(0, step * block), slice(step * block, min((step + 1) * block, most))
        x = solve_shifted(chain, elimination, x)[:, : new.stop - new.start]
        for _ in range(2):
            for column in x.T:
                column /= np.linalg.norm(column)
            for other in (known, basis[:, old]):
                x -= other @ (other.T @ x)
            x = qr(x, mode="economic", overwrite_a=True, check_finite=False)[0]
        basis[:, new] = x
        projected[: new.stop, new] = basis[:, : new.stop].T @ matmul(chain, x)
        projected[new, old] = projected[old, new].T
        if step < steps - 1 and (new.stop < wanted + block or step % 2):
            continue
        small = projected[: new.stop, : new.stop]
        values, s = np.linalg.eigh((small + small.T) / 2)
        inside = np.flatnonzero((values > low - edge) & (values < high + edge))
        if len(inside) < wanted:
            continue
        u = basis[:, : new.stop] @ s[:, inside]
        remainder = matmul(chain, u) - u * values[inside]
        residuals = np.linalg.norm(remainder, axis=0)
        good = np.flatnonzero(residuals <= tolerance)
        ends = np.minimum(np.abs(values[inside[good]] - low), np.abs(values[inside[good]] - high))
        if not tight and (len(good) > wanted or (ends < edge).any()):
            return None  # an eigenvalue at an end may be counted on either side: only smaller intervals tell
        good = good[:wanted]
        if len(good) == wanted:
            # Kahan: as many eigenvalues lie within ‖R‖ of these values, one each, and no other lies in between.
            bound = float(np.linalg.norm(remainder[:, good])) + 16 * np.finfo(float).eps * top
            bound += high - low if wanted < count else 0.0
            return _Slice(values[inside[good]], np.full(wanted, bound), residuals[good], u[:, good])
        # The next step solves for the worst residuals. In exact arithmetic the space is the same; here the errors of
        # the elimination, which are large where weights are sparse, no longer limit the accuracy of the pairs.
        worst = np.argsort(-residuals)[:block]
        x[:, : len(worst)] = remainder[:, worst]
    return None


def _merge(chain: EdgeChain, slices: list[_Slice], k: int, size: int, trained: np.ndarray | None) -> TopSpectrum:
    """Sort the sliced and the trivial eigenvalues into one list of k."""
    isolated = np.argsort(-chain.isolated, kind="stable")[:k]
    exact = 4 * np.finfo(float).eps * chain.isolated[isolated]
    values = np.concatenate([chain.isolated[isolated], *[f.values for f in slices], np.zeros(k)])
    top = values.max()
    zero = np.full(k, 1e-13 * top)
    bounds = np.concatenate([exact, *[f.bounds for f in slices], zero])
    residuals = np.concatenate([exact, *[f.residuals for f in slices], zero])
    order = np.argsort(-np.maximum(values, 0), kind="stable")[:k]
    out = TopSpectrum(np.maximum(values[order], 0), bounds[order], residuals[order], None)
    if trained is None:
        return out
    vectors = np.zeros((k, size))
    at = np.full(len(values), -1)
    at[order] = np.arange(k)
    keep = at[: len(isolated)] >= 0
    vectors[at[: len(isolated)][keep]] = lift_isolated(chain, isolated[keep], size)
    position, sliced = len(isolated), []
    for f in slices:
        rows = at[position : position + len(f.values)]
        position += len(f.values)
        if f.vectors is not None and (rows >= 0).any():
            vectors[rows[rows >= 0]] = lift(chain, f.vectors[:, rows >= 0], size)
            sliced.append(rows[rows >= 0])
    _orthogonalize(vectors, np.sort(np.concatenate(sliced)) if sliced else np.zeros(0, int))
    _complete(vectors, at[position:][at[position:] >= 0], trained)
    return TopSpectrum(out.values, out.bounds, out.residuals, vectors)


def _orthogonalize(vectors: np.ndarray, rows: np.ndarray) -> None:
    """Remove the overlaps of neighbours from different intervals; the trivial vectors have none to rounding.

    An overlap is as large as the residuals in units of the distance between two eigenvalues, so the steps repeat: each
    squares what is left.
    """
    part = vectors[rows]
    for _ in range(4):
        excess = part @ part.T - np.eye(len(rows))
        if np.abs(excess).max(initial=0.0) <= 1e-13:
            break
        part -= excess @ part / 2
        vectors[rows] = part


def _complete(vectors: np.ndarray, rows: np.ndarray, trained: np.ndarray) -> None:
    """Fill rows with vectors of the null space: every eigenvector of a non-zero eigenvalue is already there."""
    rng = np.random.default_rng(1)
    others = np.setdiff1d(np.arange(len(vectors)), rows)
    if not rows.size:
        return
    fresh = np.zeros((len(rows), vectors.shape[1]))
    fresh[:, trained] = rng.standard_normal((len(rows), len(trained)))
    for _ in range(2):
        fresh -= fresh @ vectors[others].T @ vectors[others]
        fresh = np.linalg.qr(fresh.T)[0].T
    vectors[rows] = fresh
