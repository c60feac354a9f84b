"""The largest eigenpairs of a symmetric positive semidefinite operator, multiple eigenvalues complete.

Block Lanczos with full reorthogonalisation and thick restarts. A Krylov space of block size p holds at most p copies of
a multiple eigenvalue, however small its residuals are. Converged pairs are therefore locked, and the search restarts
from random blocks orthogonal to them until such a search ends below the k-th value: only then is the list complete.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["BlockLanczos", "NotConvergedWarning", "block_lanczos"]


class NotConvergedWarning(UserWarning):
    """An eigenvalue search ended before its results were certain; the message says how far it came.

    Issued by `path_kernel.eigenpairs`, `path_kernel.eigenvalues` and `ntk_eigenpairs`.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True, action="always") as issued:
        ...     pairs = block_lanczos(lambda rows: rows * np.linspace(0.0, 1.0, 500), 500, 20, most_products=60)
        >>> [warning.category.__name__ for warning in issued], pairs.converged
        (['NotConvergedWarning'], False)
    """


@dataclass(frozen=True, eq=False)
class BlockLanczos:
    """Eigenpairs by block Lanczos: within `residuals` of each value lies an eigenvalue."""

    values: np.ndarray     # (k,) descending
    vectors: np.ndarray    # (k, dimension) orthonormal rows
    residuals: np.ndarray  # (k,) ‖A z − π z‖
    converged: bool


def block_lanczos(multiply: Callable[[np.ndarray], np.ndarray], dimension: int, k: int, *, block: int = 8,
                  most_rows: int | None = None, tolerance: float = 1e-10, most_products: int | None = None,
                  seed: int = 0) -> BlockLanczos:
    """Find the k largest eigenpairs of a symmetric positive semidefinite operator.

    Args:
        multiply: maps a block of rows (block, dimension) to the operator's products with them.
        dimension: dimension of the operator.
        k: number of pairs.
        block: rows per block. A search that finds copies which those before it missed doubles them for the next one.
        most_rows: the number of rows at which that ends; None means ``block``.
        tolerance: the residual, relative to the largest eigenvalue, at which a pair has converged.
        most_products: stop after this many products with single vectors; None means 60 k + 3000.
        seed: seed of the random starting blocks.

    Returns:
        The pairs with their residuals. If not all of them converge, or if the search for further copies does not
        finish, `converged` is False and a `NotConvergedWarning` says how far the search came.

    Raises:
        ValueError: `k` is not between 1 and `dimension`, or `most_products` allow fewer than k pairs.

    Examples:
        >>> import numpy as np
        >>> diagonal = np.concatenate([np.full(30, 2.0), np.linspace(0, 1, 70)])
        >>> block_lanczos(lambda x: x * diagonal, 100, 31).values[[0, 29, 30]].round(8)
        array([2., 2., 1.])
    """
    if not 1 <= k <= dimension:
        raise ValueError(f"k must be between 1 and the operator's dimension, {dimension}, got {k}")
    block, most_rows = min(block, dimension), max(block, most_rows or 0)
    search = _Search(multiply, dimension, tolerance, 60 * k + 3000 if most_products is None else most_products,
                     np.random.default_rng(seed))
    locked, values, residuals = np.zeros((0, dimension)), np.zeros(0), np.zeros(0)
    complete, more = False, 1
    while not complete and len(locked) < dimension:
        # Once k pairs are locked, one value above the k-th is enough to go on; then twice as many, rows and pairs.
        missing = max(k - len(locked), more)
        floor = np.sort(values)[-k] if len(locked) >= k else -np.inf
        fresh = search.run(locked, missing, min(block, dimension - len(locked)), floor)
        if fresh is None:
            complete = True
        else:
            new_values, new_vectors, new_residuals = fresh
            if len(locked):
                block, more = min(2 * block, most_rows), 2 * more
            locked = np.concatenate([locked, new_vectors])
            values, residuals = np.append(values, new_values), np.append(residuals, new_residuals)
            if search.spent >= search.most:
                break
    complete = complete or len(locked) == dimension
    # Locked pairs of different searches are orthogonal up to rounding; one projection puts them in their final order.
    image = multiply(locked)
    projected = locked @ image.T
    values, s = np.linalg.eigh((projected + projected.T) / 2)
    order = np.argsort(-values)[:k]
    vectors = s[:, order].T @ locked
    residuals = np.linalg.norm(s[:, order].T @ image - values[order, None] * vectors, axis=1)
    settled = int((residuals <= 10 * tolerance * max(search.top, 1e-300)).sum())
    converged = complete and len(vectors) == k and settled == k
    if not converged:
        warnings.warn(f"{settled} of {k} eigenpairs converged to a residual of {10 * tolerance:g} of the largest "
                      f"eigenvalue after {search.spent} products"
                      + ("" if complete else ", and copies of multiple eigenvalues may be missing")
                      + "; allow more products, fewer pairs or a larger tolerance",
                      NotConvergedWarning, stacklevel=3)
    values = values[order]
    if len(values) < k:
        raise ValueError(f"the search found {len(values)} of {k} eigenpairs within {search.most} products; "
                         "allow more products or fewer pairs")
    return BlockLanczos(values, vectors, residuals, converged)


class _Search:
    """Consecutive searches in the space orthogonal to the locked pairs."""

    def __init__(self, multiply: Callable[[np.ndarray], np.ndarray], dimension: int, tolerance: float, most: int,
                 rng: np.random.Generator) -> None:
        self.multiply, self.dimension, self.tolerance, self.most, self.rng = multiply, dimension, tolerance, most, rng
        self.spent, self.top = 0, 0.0

    def run(self, locked: np.ndarray, count: int, block: int, floor: float
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return the `count` largest pairs orthogonal to the locked ones, or None if all lie below `floor`."""
        room = self.dimension - len(locked)
        count = min(count, room)
        largest = min(max(2 * count, count + 6 * block), room)
        space, projections = np.empty((largest, self.dimension)), np.zeros((largest, largest))
        size = steps = 0
        new = self._orthonormal(self.rng.standard_normal((block, self.dimension)), locked, space[:0])
        while True:
            image = self.multiply(new)
            self.spent += len(new)
            old, size = size, size + len(new)
            space[old:size] = new
            basis, projected = space[:size], projections[:size, :size]
            rest = np.array(image)
            column = _project_out(rest, basis).T
            projected[:, old:] = column
            projected[old:, :old] = column[:old].T
            _project_out(rest, locked)
            values, s = np.linalg.eigh((projected + projected.T) / 2)
            values, s = values[::-1], s[:, ::-1]
            self.top = max(self.top, float(values[0]))
            limit = self.tolerance * self.top
            full = size >= room
            # Only the newest block's image leaves the basis, along rows that are orthonormal.
            new = new[:0] if full else self._orthonormal(rest, locked, basis)
            residuals = np.linalg.norm(s[old:].T @ rest if full else s[old:].T @ (rest @ new.T), axis=1)
            wanted = min(count, size)
            done = wanted == count and bool((residuals[:count] <= limit).all())
            steps += 1
            if np.isfinite(floor) and (
                    values[0] <= floor * (1 - 2 * _unseen(self.dimension, steps))
                    or (values[0] + residuals[0] <= floor + 10 * limit and (residuals[0] <= 1e-3 * self.top or full)
                        and size >= min(4 * block, room))):
                return None
            if done or full or self.spent >= self.most:
                if np.isfinite(floor) and values[0] <= floor + 10 * limit and (done or full):
                    return None
                take = slice(0, wanted)
                return values[take], s[:, take].T @ basis, residuals[take]
            if size + len(new) > largest and old:
                size = min(max(count + block, 2 * block), size, largest - block)
                space[:size] = s[:, :size].T @ basis
                projections[:size, :size] = np.diag(values[:size])

    def _orthonormal(self, x: np.ndarray, locked: np.ndarray, basis: np.ndarray) -> np.ndarray:
        """Return orthonormal rows that span x, orthogonal to the rest; lost directions are replaced by random ones."""
        most = self.dimension - len(locked) - len(basis)
        norms = _lengths(x)
        scale, lost = max(float(norms.max()), self.tolerance * self.top), np.zeros(len(x), bool)
        for _ in range(8):
            # Rows of unit length: their Gram matrix shows dependence down to 1e-7, and a second round repairs the rest.
            lost = norms <= 1e-10 * scale
            x = x / np.where(lost, 1.0, norms)[:, None]
            values, u = np.linalg.eigh(np.where(lost[:, None] | lost, 0.0, x @ x.T))
            values, u = values[-most:], u[:, -most:]
            lost = values <= 1e-14 * len(x)
            x = (u / np.sqrt(np.where(lost, 1.0, values))).T @ x
            if lost.any():
                x[lost] = self.rng.standard_normal((int(lost.sum()), self.dimension))
            for other in (locked, basis):
                _project_out(x, other)
            norms = _lengths(x)
            if not lost.any() and np.abs(x @ x.T - np.eye(len(x))).max() < 1e-14 * len(x):
                break
            scale = float(norms.max())
        return np.ascontiguousarray(x[~lost])


def _unseen(dimension: int, steps: int) -> float:
    """Return the mean relative distance between the largest eigenvalue and its Lanczos estimate from a random vector.

    A block of such vectors misses by twice that distance only if every vector does.

    Source: Kuczyński and Woźniakowski (1992), theorem 3.1.
    """
    return 0.103 * (np.log(dimension * (steps - 1.0) ** 4) / (steps - 1)) ** 2 if steps >= 4 else 1.0


def _project_out(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Subtract from rows, in place, their projections on orthonormal rows; return the coefficients.

    The work is split into pieces that stay in cache: products of a few very long rows take several times as long whole.
    """
    pieces = [slice(start, start + 2**15) for start in range(0, x.shape[1], 2**15)]
    coefficients = np.zeros((len(x), len(basis)))
    for piece in pieces:
        coefficients += x[:, piece] @ basis[:, piece].T
    for piece in pieces:
        x[:, piece] -= coefficients @ basis[:, piece]
    return coefficients


def _lengths(x: np.ndarray) -> np.ndarray:
    """Return the Euclidean norms of long rows; `np.linalg.norm` takes twenty times as long."""
    return np.sqrt(np.einsum("ij,ij->i", x, x))
