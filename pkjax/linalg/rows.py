"""Long rows, a few at a time: the linear algebra of an iteration whose vectors are too long for a square of them.

Products of rows with rows leave as float64 on the host. The rows themselves stay where the operator works: in the
host's memory or on an accelerator, in the type of its products.
"""

from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["DeviceRows", "HostRows", "RowSpace", "Rows", "one_thread"]

Rows: TypeAlias = Any
"""Rows (r, dimension): an array of NumPy or JAX."""

_PIECE = 2**15   # entries of a row that are taken at a time and stay in cache


@lru_cache(maxsize=1)
def _threads() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def one_thread() -> Any:
    """Keep BLAS to one thread: several that wait for each other, and for JAX's, can take ten times as long."""
    return _threads().limit(limits=1, user_api="blas")


class HostRows:
    """Rows in the host's memory.

    The work is split into pieces that stay in cache, on one thread: memory bounds it.
    """

    def __init__(self, dimension: int, dtype: Any = np.float64, seed: int = 0) -> None:
        self.dimension, self.dtype = dimension, np.dtype(dtype)
        self._rng = np.random.default_rng(seed)

    def empty(self, count: int) -> Rows:
        """Return a buffer of so many rows."""
        return np.empty((count, self.dimension), self.dtype)

    def random(self, count: int) -> Rows:
        """Return rows of normal random numbers."""
        return self._rng.standard_normal((count, self.dimension), self.dtype)

    def put(self, buffer: Rows, start: int, rows: Rows) -> Rows:
        """Return the buffer with rows written from one place on; the buffer given is used up."""
        buffer[start:start + len(rows)] = rows
        return buffer

    def join(self, a: Rows, b: Rows) -> Rows:
        """Return rows below rows."""
        return np.concatenate([a, b])

    def scaled(self, x: Rows, factors: np.ndarray | float) -> Rows:
        """Return new rows, each times its factor."""
        return np.multiply(x, np.reshape(factors, (-1, 1)).astype(self.dtype))

    def lengths(self, x: Rows) -> np.ndarray:
        """Return the rows' Euclidean norms."""
        return np.sqrt([self.products(row[None], row[None], 0, 1)[0, 0] for row in x])

    def products(self, x: Rows, y: Rows, start: int, stop: int) -> np.ndarray:
        """Return x yᵀ for the rows of y from start to stop."""
        out = np.zeros((len(x), stop - start))
        with one_thread():
            for piece in self._pieces():
                out += x[:, piece] @ y[start:stop, piece].T
        return out

    def subtract(self, x: Rows, coefficients: np.ndarray, y: Rows, start: int, stop: int) -> Rows:
        """Return x less coefficients times those rows of y; x is used up."""
        coefficients = coefficients.astype(self.dtype)
        with one_thread():
            for piece in self._pieces():
                x[:, piece] -= coefficients @ y[start:stop, piece]
        return x

    def combine(self, coefficients: np.ndarray, y: Rows) -> Rows:
        """Return coefficients times the first rows of y."""
        out, coefficients = self.empty(len(coefficients)), coefficients.astype(self.dtype)
        with one_thread():
            for piece in self._pieces():
                out[:, piece] = coefficients @ y[:coefficients.shape[1], piece]
        return out

    def largest(self, x: Rows) -> float:
        """Return the largest magnitude of an entry."""
        return float(max(abs(x.max(initial=0.0)), abs(x.min(initial=0.0))))

    def host(self, x: Rows) -> np.ndarray:
        """Return rows in float64 on the host."""
        return np.asarray(x, np.float64)

    def _pieces(self) -> list[slice]:
        return [slice(start, start + _PIECE) for start in range(0, self.dimension, _PIECE)]


class DeviceRows:
    """Rows on JAX's device: only coefficients travel to the host.

    Buffers are taken whole, rows that do not count with coefficient 0, so that one program serves any number of rows.
    """

    def __init__(self, dimension: int, dtype: Any = np.float32, seed: int = 0) -> None:
        self.dimension, self.dtype = dimension, np.dtype(dtype)
        self._key = jax.random.key(seed)

    def empty(self, count: int) -> Rows:
        """Return a buffer of so many rows."""
        return jnp.zeros((count, self.dimension), self.dtype)

    def random(self, count: int) -> Rows:
        """Return rows of normal random numbers."""
        self._key, key = jax.random.split(self._key)
        return _normal(key, count, self.dimension, self.dtype)

    def put(self, buffer: Rows, start: int, rows: Rows) -> Rows:
        """Return the buffer with rows written from one place on; the buffer given is used up."""
        return _put(buffer, rows, jnp.asarray(start, jnp.int32))

    def join(self, a: Rows, b: Rows) -> Rows:
        """Return rows below rows."""
        return jnp.concatenate([a, b])

    def scaled(self, x: Rows, factors: np.ndarray | float) -> Rows:
        """Return new rows, each times its factor."""
        return _scaled(x, np.broadcast_to(np.asarray(factors, self.dtype), len(x))[:, None])

    def lengths(self, x: Rows) -> np.ndarray:
        """Return the rows' Euclidean norms."""
        return np.asarray(_lengths(x), np.float64)

    def products(self, x: Rows, y: Rows, start: int, stop: int) -> np.ndarray:
        """Return x yᵀ for the rows of y from start to stop."""
        if not len(x) or not len(y):
            return np.zeros((len(x), stop - start))
        return np.asarray(_products(x, y), np.float64)[:, start:stop]

    def subtract(self, x: Rows, coefficients: np.ndarray, y: Rows, start: int, stop: int) -> Rows:
        """Return x less coefficients times those rows of y; x is used up."""
        if not len(x) or start == stop:
            return x
        whole = np.zeros((len(x), len(y)), self.dtype)
        whole[:, start:stop] = coefficients
        return _subtract(x, whole, y)

    def combine(self, coefficients: np.ndarray, y: Rows) -> Rows:
        """Return coefficients times the first rows of y."""
        whole = np.zeros((len(coefficients), len(y)), self.dtype)
        whole[:, :coefficients.shape[1]] = coefficients
        return _combine(whole, y)

    def largest(self, x: Rows) -> float:
        """Return the largest magnitude of an entry."""
        return float(_largest(x))

    def host(self, x: Rows) -> np.ndarray:
        """Return rows in float64 on the host."""
        return np.asarray(x).astype(np.float64)


RowSpace: TypeAlias = HostRows | DeviceRows
"""Operations on rows over one dimension."""

_matmul = partial(jnp.matmul, precision="highest")


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, count: int, dimension: int, dtype: Any) -> jax.Array:
    return jax.random.normal(key, (count, dimension), dtype)


@partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, 0)


@jax.jit
def _scaled(x: jax.Array, factors: jax.Array) -> jax.Array:
    return x * factors


@jax.jit
def _lengths(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=1)


@jax.jit
def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    return _matmul(x, y.T)


@jax.jit
def _subtract(x: jax.Array, coefficients: jax.Array, y: jax.Array) -> jax.Array:
    return x - _matmul(coefficients, y)


@jax.jit
def _combine(coefficients: jax.Array, y: jax.Array) -> jax.Array:
    return _matmul(coefficients, y)


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
    return jnp.abs(x).max(initial=0)
