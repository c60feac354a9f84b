"""The largest eigenpairs of a symmetric positive semidefinite operator, multiple eigenvalues complete.

Block Lanczos with full reorthogonalisation and thick restarts. A Krylov space of block size p holds at most p copies of
a multiple eigenvalue, however small its residuals are. Converged pairs are therefore locked, and the search restarts
from random blocks orthogonal to them until such a search has seen enough to tell that nothing above the k-th value is
missing (`pkjax.linalg.unseen`): only then is the list complete. A single pair needs no second search.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from pkjax.linalg.rows import HostRows, Rows, RowSpace, one_thread
from pkjax.linalg.unseen import Weights

__all__ = ["BlockLanczos", "NotConvergedWarning", "block_lanczos", "rayleigh_ritz"]

CHANCE = 1e-4
"""The chance that an eigenvalue above the list goes unseen, at which a search for it ends."""
SLACK = 10
"""How far above the k-th value it must lie to be told from it, in units of the tolerance."""
_CLEAN = 0.05   # the part of a row that must be left of it for rounding to leave it orthogonal to what was taken away


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
    slack: float           # an eigenvalue less than this above the k-th value may be missing


def block_lanczos(multiply: Callable[[Rows], Rows], dimension: int, k: int, *, block: int = 8,
                  most_rows: int | None = None, tolerance: float = 1e-10, most_products: int | None = None,
                  capacity: int | None = None, rows: RowSpace | None = None,
                  judge: Callable[[np.ndarray], np.ndarray] | None = None, seed: int = 0) -> BlockLanczos:
    """Find the k largest eigenpairs of a symmetric positive semidefinite operator.

    Args:
        multiply: maps a block of rows (block, dimension) to the operator's products with them.
        dimension: dimension of the operator.
        k: number of pairs.
        block: rows per block. A search that finds copies which those before it missed doubles them for the next one.
        most_rows: the number of rows at which that ends; None means ``block``.
        tolerance: the residual, relative to the largest eigenvalue, at which a pair has converged.
        most_products: stop after this many products with single vectors; None means 60 k + 3000.
        capacity: rows that a search may keep before it restarts; None means 2 k, at least 64.
        rows: where rows lie, and in which type; None means float64 on the host.
        judge: products in float64 on the host, which the final values and residuals are measured with; None means
            `multiply`.
        seed: seed of the random starting blocks.

    Returns:
        The pairs with their residuals. If not all of them converge, or if the search for further copies does not
        finish, `converged` is False and a `NotConvergedWarning` says how far the search came.

    Raises:
        ValueError: `k` is not between 1 and `dimension`, or `most_products` allow fewer than k pairs.
        FloatingPointError: products are not finite.

    Examples:
        >>> import numpy as np
        >>> diagonal = np.concatenate([np.full(30, 2.0), np.linspace(0, 1, 70)])
        >>> block_lanczos(lambda x: x * diagonal, 100, 31).values[[0, 29, 30]].round(8)
        array([2., 2., 1.])
    """
    if not 1 <= k <= dimension:
        raise ValueError(f"k must be between 1 and the operator's dimension, {dimension}, got {k}")
    block, most_rows = min(block, dimension), max(block, most_rows or 0)
    rows = HostRows(dimension, seed=seed) if rows is None else rows
    search = _Search(multiply, rows, tolerance, 60 * k + 3000 if most_products is None else most_products, capacity)
    locked, values, complete, more = rows.empty(0), np.zeros(0), False, 1
    while not complete and len(locked) < dimension:
        # Once k pairs are locked, one value above the k-th is enough to go on; then twice as many, rows and pairs.
        missing = max(k - len(locked), more)
        floor = np.sort(values)[-k] if len(locked) >= k else -np.inf
        fresh = search.run(locked, missing, min(block, dimension - len(locked)), floor, alone=k == 1)
        if fresh is None:
            complete = True
        else:
            new_values, new_vectors, complete = fresh
            if len(locked):
                block, more = min(2 * block, most_rows), 2 * more
            locked, values = rows.join(locked, new_vectors), np.append(values, new_values)
            if search.spent >= search.most:
                break
    complete = complete or len(locked) == dimension
    if len(values) < k:
        raise ValueError(f"the search found {len(values)} of {k} eigenpairs within {search.most} products; "
                         "allow more products or fewer pairs")
    order = np.argsort(-values, kind="stable")[:k]
    values, vectors, residuals = rayleigh_ritz(judge or multiply, rows.host(locked)[order])
    top = max(search.top * search.scale, 1e-300)
    settled = int((residuals <= SLACK * tolerance * top).sum())
    converged = complete and settled == k
    if not converged:
        warnings.warn(f"{settled} of {k} eigenpairs converged to a residual of {SLACK * tolerance:g} of the largest "
                      f"eigenvalue after {search.spent} products"
                      + ("" if complete else ", and copies of multiple eigenvalues may be missing")
                      + "; allow more products, fewer pairs or a larger tolerance",
                      NotConvergedWarning, stacklevel=3)
    return BlockLanczos(values, vectors, residuals, converged, 0.0 if k == dimension else search.slack * search.scale)


def rayleigh_ritz(multiply: Callable[[np.ndarray], np.ndarray], rows: np.ndarray
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the eigenpairs of an operator within the span of nearly orthonormal rows, and their residuals."""
    gram = HostRows(rows.shape[1])
    size = len(rows)
    values, s = np.linalg.eigh(gram.products(rows, rows, 0, size))
    rows = gram.combine((s / np.sqrt(values) @ s.T), rows)
    image = np.asarray(multiply(rows), np.float64)
    projected = gram.products(rows, image, 0, size)
    values, s = np.linalg.eigh((projected + projected.T) / 2)
    values, s = values[::-1], s[:, ::-1]
    vectors = gram.combine(s.T, rows)
    return values, vectors, gram.lengths(gram.combine(s.T, image) - values[:, None] * vectors)


class _Search:
    """Consecutive searches in the space orthogonal to the locked pairs. Its values are in units of `scale`."""

    def __init__(self, multiply: Callable[[Rows], Rows], rows: RowSpace, tolerance: float, most: int,
                 capacity: int | None) -> None:
        self.multiply, self.rows, self.tolerance, self.most = multiply, rows, tolerance, most
        self.capacity, self.eps = capacity, float(np.finfo(rows.dtype).eps)
        self.spent, self.top, self.scale, self.slack = 0, 0.0, 0.0, 0.0

    def run(self, locked: Rows, count: int, block: int, floor: float, *, alone: bool
            ) -> tuple[np.ndarray, Rows, bool] | None:
        """Return the `count` largest pairs orthogonal to the locked ones, or None if none lies above `floor`.

        The last entry says whether the list is known to miss nothing above: of the largest pair `alone`, whose copies
        do not matter, and where the space is the whole.
        """
        rows, room = self.rows, self.rows.dimension - len(locked)
        count = min(count, room)
        largest = min(max(2 * count, count + 6 * block, self.capacity or 64), room)
        space, projections = rows.empty(largest), np.zeros((largest, largest))
        bounded = bool(np.isfinite(floor))
        level, weights = floor + SLACK * self.tolerance * self.top, Weights(block)
        size, near, starts = 0, 0, [0]
        new = self._orthonormal(rows.random(block), 0.0, locked, space, 0)
        while True:
            rest = self._image(new)
            before = float(rows.lengths(rest).max(initial=0.0))
            old, size = size, size + len(new)
            space = rows.put(space, old, new)
            # The parts that it has for certain lie along the last two blocks. Rounding leaves small ones on all rows:
            # taken away on their own, they do not grow from step to step.
            column = np.zeros((len(new), size))
            for start in (near, 0):
                coefficients = rows.products(rest, space, start, size)
                rest = rows.subtract(rest, coefficients, space, start, size)
                column[:, start:] += coefficients
            rest = self._without(rest, locked, len(locked))
            projections[old:size, :size], projections[:size, old:size] = column, column.T
            with one_thread() if size < 400 else nullcontext():
                values, s = np.linalg.eigh((projections[:size, :size] + projections[:size, :size].T) / 2)
            values, s = values[::-1], s[:, ::-1]
            self.top = max(self.top, float(values[0]))
            limit, full = self.tolerance * self.top, size >= room
            # Only the newest block's image leaves the basis, along rows that are orthonormal.
            new = rows.empty(0) if full else self._orthonormal(rest, before, locked, space, size)
            coupling = rows.products(rest, new, 0, len(new))
            residuals = np.linalg.norm(s[old:].T @ coupling, axis=1) + full * before * 10 * self.eps
            wanted = min(count, size)
            done = wanted == count and bool((residuals[:count] <= limit).all())
            certain = full
            if bounded:
                weights.grow(level, projections[old:size, :size], coupling)
                certain = certain or weights.chance(room) <= CHANCE
                if values[0] <= level and (certain or done):
                    slack = self._slack(projections, [*starts, size], coupling, floor, float(values[0]))
                    self.slack = min(slack, SLACK * limit)
                    return None
            elif full or (alone and done and starts):
                self.slack = self._slack(projections, [*starts, size], coupling, float(values[0]), float(values[0]))
                certain = self.slack < np.inf
            ready = done and (certain or bounded or not alone or not starts)
            if ready or full or self.spent >= self.most:
                take = slice(0, wanted)
                return values[take], rows.combine(s[:, take].T, space), certain and not bounded
            near = old
            if starts:
                starts.append(size)
            if size + len(new) > largest and old:
                kept = min(max(count + block, 2 * block), size, largest - block)
                space = rows.put(space, 0, rows.combine(s[:, :kept].T, space))
                if bounded:
                    weights.rotate(s[:, :kept])
                projections[:kept, :kept] = np.diag(values[:kept])
                size, near, starts = kept, 0, []

    def _image(self, new: Rows) -> Rows:
        """The products with rows, in units of `scale`, a power of two that keeps their squares within range."""
        image = self.multiply(new)
        self.spent += len(new)
        if not self.scale:
            peak = self.rows.largest(image)
            self.scale = 2.0 ** round(np.log2(peak)) if 0 < peak < np.inf else 1.0
        image = self.rows.scaled(image, 1 / self.scale)
        if not np.isfinite(self.rows.lengths(image)).all():
            raise FloatingPointError(f"products with the operator are not finite in {self.rows.dtype}: scale it down")
        return image

    def _slack(self, projections: np.ndarray, starts: list[int], coupling: np.ndarray, floor: float, value: float
               ) -> float:
        """How far above `floor` an eigenvalue must lie not to go unseen in a search whose largest is `value`.

        Infinite where the search has restarted, or cannot tell yet.
        """
        unit, rounding = self.tolerance * self.top, 10 * self.eps * self.top
        if not coupling.shape[1]:     # the basis is the whole space
            return max(value - floor, 0.0) + rounding
        for slack in (unit * SLACK * np.logspace(-5, 0, 6) if len(starts) > 1 else []):
            level, weights = floor + slack, Weights(starts[1])
            for start, stop, after in zip(starts, starts[1:], [*starts[2:], 0], strict=False):
                weights.grow(level, projections[start:stop, :stop],
                             projections[start:stop, stop:after] if after else coupling)
            if value <= level and weights.chance(self.rows.dimension) <= CHANCE:
                return float(slack) + rounding
        return np.inf

    def _without(self, x: Rows, basis: Rows, size: int) -> Rows:
        """Rows less their projections on orthonormal ones; x is used up."""
        return self.rows.subtract(x, self.rows.products(x, basis, 0, size), basis, 0, size)

    def _orthonormal(self, x: Rows, before: float, locked: Rows, space: Rows, size: int) -> Rows:
        """Return orthonormal rows that span x, orthogonal to the rest; lost directions are replaced by random ones.

        `before` is the length of x before the rest was taken away from it: the more it lost, the more of what is left
        is rounding. It is 0 where that has still to be done.
        """
        rows = self.rows
        most = rows.dimension - len(locked) - size
        for _ in range(8):
            norms = rows.lengths(x)
            scale = max(float(norms.max()), before, self.tolerance * self.top)
            # Rows of unit length: their Gram matrix shows dependence down to rounding, another round repairs the rest.
            lost = norms <= self.eps ** (2 / 3) * scale
            x = rows.scaled(x, np.where(lost, 0.0, 1 / np.where(lost, 1.0, norms)))
            left = float(norms.min()) / before if before else 0.0
            if len(x) > 1 or lost.any():
                values, u = np.linalg.eigh(rows.products(x, x, 0, len(x)))
                values, u = values[-most:], u[:, -most:]
                lost = values <= 50 * self.eps * len(x)
                left *= float(np.sqrt(max(values[0], 0.0)))
                x = rows.combine((u / np.sqrt(np.where(lost, 1.0, values))).T, x)
                for i in np.flatnonzero(lost):
                    x = rows.put(x, int(i), rows.scaled(rows.random(1), rows.dimension**-0.5))
            if left > _CLEAN and not lost.any():
                break
            x, before = self._without(self._without(x, locked, len(locked)), space, size), 1.0
        return x
