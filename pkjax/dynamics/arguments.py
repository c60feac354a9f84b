"""Checks and conversions of the arguments that the functions about linearised training share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

__all__ = ["batched", "common_shape", "floats", "matrix_of", "nonnegative", "problem", "rounding_of"]


def floats(value: ArrayLike) -> Array:
    """Return an array of the widest enabled floating-point dtype."""
    return jnp.asarray(value, jnp.result_type(float))


def nonnegative(name: str, value: ArrayLike) -> Array:
    """Return such an array; raise ValueError if an entry is negative or not finite (traced values pass)."""
    numbers = floats(value)
    if not isinstance(numbers, jax.core.Tracer):
        known = np.asarray(numbers)
        if not ((known >= 0) & (known < np.inf)).all():
            raise ValueError(f"{name} must be finite and 0 or more, got {value}")
    return numbers


def common_shape(**arrays: Array) -> tuple[int, ...]:
    """Return the shape that named arrays broadcast to, or raise ValueError with their shapes."""
    try:
        return np.broadcast_shapes(*(a.shape for a in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise ValueError(f"the arguments must have shapes that broadcast, got {shapes}") from None


def rounding_of(theta: Any) -> float:
    """Return how far a computed Θ may be from symmetric or positive, relative to its largest entry or eigenvalue."""
    return float(jnp.finfo(theta.dtype).eps) ** 0.5


def matrix_of(theta: Any, rows: tuple[int, ...], columns: int, name: str) -> Array:
    """Return Θ as a matrix of `rows[0]` · K rows and `columns` · K columns."""
    n, k = rows
    if theta.shape not in ((n, columns, k, k), (n * k, columns * k)):
        raise ValueError(f"{name} must have the shape {(n, columns, k, k)} that pkjax.ntk returns, or "
                         f"{(n * k, columns * k)} as a matrix, for outputs of shape {rows}, got {theta.shape}")
    return _flat(floats(theta))


@jax.jit
def _flat(theta: Array) -> Array:
    return theta if theta.ndim == 2 else theta.transpose(0, 2, 1, 3).reshape(theta.shape[0] * theta.shape[2], -1)


def problem(theta: Any, f0: Any, learning_rate: ArrayLike, t: ArrayLike) -> tuple[Array, Array, Array, Array]:
    """Check what all trajectories share: symmetric matrix, outputs, times and learning rate; return them as arrays."""
    start, times, rate = floats(f0), nonnegative("t", t), nonnegative("learning_rate", learning_rate)
    if times.ndim > 1 or rate.ndim:
        raise ValueError(f"t must be a number or a vector and learning_rate a number, got shapes {times.shape} and "
                         f"{rate.shape}")
    if not start.size:
        raise ValueError(f"f0 must hold the outputs (N, K) of one example or more, got shape {start.shape}")
    matrix = matrix_of(theta, start.shape, start.shape[0], "theta")
    matrix, skew, size = _symmetric(matrix)
    if not isinstance(matrix, jax.core.Tracer) and not float(skew) <= rounding_of(theta) * float(size):
        raise ValueError(f"theta must be symmetric and finite, as ntk(apply_fn, params, X) is, but differs from "
                         f"its transpose by {skew:.3g} where its largest entry is {size:.3g}")
    return matrix, start, times, rate


@jax.jit
def _symmetric(matrix: Array) -> tuple[Array, Array, Array]:
    return (matrix + matrix.T) / 2, jnp.abs(matrix - matrix.T).max(), jnp.abs(matrix).max()


def batched(coefficients: Any, shape: tuple[int, ...]) -> Array:
    """Return coefficients as an array, or raise ValueError if they are not (N, K) or (T, N, K)."""
    c = jnp.asarray(coefficients)
    if c.ndim not in (2, 3) or c.shape[-2:] != shape:
        raise ValueError(f"coefficients must have the shape {shape} of the outputs on the training set, or "
                         f"(T, {', '.join(map(str, shape))}), got {c.shape}")
    return c
