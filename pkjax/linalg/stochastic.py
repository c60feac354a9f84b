"""Spectral quantities of a symmetric positive semidefinite operator from its products with vectors alone."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pkjax import tables

__all__ = ["SpectralDensity", "frobenius", "quadrature", "trace"]

Product = Callable[[Array], Array]
"""Maps a flat vector to the operator's product with it."""

_MASSLESS = 1e-10  # below this fraction of the largest node a quadrature node stands for zero eigenvalues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectralDensity:
    """A spectral density: how many eigenvalues to a decade, and the quadrature that it comes from.

    Returned by ``path_kernel.density`` and ``ntk_density``.

    >>> points = jnp.array([1.0, 10.0])
    >>> SpectralDensity(points, density=2 * points, nodes=points[None], weights=points[None])
    SpectralDensity(
        points=float...[2] 1 … 10,
        density=float...[2] 2 … 20,
        nodes=float...[1,2],
        weights=float...[1,2]
    )
    """

    points: Float[Array, "points"]
    """Eigenvalues, evenly spaced in their logarithm."""
    density: Float[Array, "points"]
    """Number of eigenvalues to a decade."""
    nodes: Float[Array, "samples depth"]
    """Nodes of the quadratures."""
    weights: Float[Array, "samples depth"]
    """Their weights; each row adds up to the operator's dimension."""

    __repr__ = tables.brief


def trace(multiply: Product, like: Array, key: Array, samples: int) -> tuple[Array, Array]:
    """XTrace (Epperly, Tropp and Webber 2024) from 2 · samples products: the estimate and its standard error."""
    from matfree import stochtrace

    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(
        stochtrace.leave_one_out_xtrace(), stochtrace.sampler_normal(like, num=samples))
    with jax.numpy_dtype_promotion("standard"):
        mean, error = estimate(multiply, key)
    return mean.astype(like.dtype), error.astype(like.dtype)


def frobenius(multiply: Product, draws: Array, scale: Array, batch_size: int | None = None) -> tuple[Array, Array]:
    """Estimate ``‖A‖_F² / scale²``, the mean of ``‖A s‖²`` over random signs s, and its standard error.

    ``multiply`` maps each of the draws to A s: signs themselves, or keys that it draws them by.
    """
    squares = jax.lax.map(lambda s: ((multiply(s) / scale) ** 2).sum(), draws, batch_size=batch_size)
    return squares.mean(), squares.std(ddof=1) / len(draws) ** 0.5


def quadrature(multiply: Product, draws: Array, mass: Array, key: Array, *, depth: int, points: int, decades: float,
               width: float) -> SpectralDensity:
    """Stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao 2019, section 3) by matfree.

    Args:
        multiply: the operator.
        draws: (samples, dimension) random signs, 0 where the operator has no entry.
        mass: the number of eigenvalues.
        key: for the operator's size, found before Lanczos.
        depth: Lanczos steps with each draw.
        points: how many eigenvalues to evaluate the density at, from the largest downwards.
        decades: how far down they go.
        width: standard deviation in decades of the Gaussian that stands for a node.
    """
    from matfree import decomp

    u = jax.random.normal(key, draws.shape[1:], draws.dtype) * jnp.abs(draws[0])
    # The operator's size to the nearest factor of a few keeps Lanczos in range.
    scale = jnp.maximum(jnp.linalg.norm(multiply(u)) / jnp.linalg.norm(u), jnp.finfo(draws.dtype).tiny)
    tridiagonal = decomp.tridiag_sym(min(depth, draws.shape[1]), reortho="full")

    def one(s: Array) -> tuple[Array, Array]:
        with jax.numpy_dtype_promotion("standard"):  # matfree mixes its counters with floats
            _, matrix, *_ = tridiagonal(lambda v: multiply(v) / scale, s / jnp.linalg.norm(s))
        nodes, rows = jnp.linalg.eigh(_invariant(matrix))
        return nodes * scale, rows[0] ** 2 * mass

    nodes, weights = jax.lax.map(one, draws)
    top = nodes.max()
    decade = jnp.linspace(-decades, 0.2, points, dtype=draws.dtype)
    level = jnp.log10(jnp.maximum(nodes / top, _MASSLESS))
    kept = jnp.where(nodes > _MASSLESS * top, weights, 0)
    bell = jnp.exp(-(((decade[:, None, None] - level) / width) ** 2) / 2) / (width * (2 * np.pi) ** 0.5)
    return SpectralDensity(top * 10**decade, (bell * kept).sum((1, 2)) / len(draws), nodes, weights)


def _invariant(matrix: Array) -> Array:
    """Cut a tridiagonal matrix where its coupling is rounding: what follows an invariant subspace is noise or NaN."""
    side = jnp.diagonal(matrix, 1)
    size = jnp.maximum(jnp.abs(matrix[0, 0]), jnp.abs(side[:1]).max(initial=0.0))
    small = ~(jnp.abs(side) > 100 * jnp.finfo(matrix.dtype).eps * size)
    inside = jnp.concatenate([jnp.ones(1, bool), jnp.cumsum(small) == 0])
    return jnp.where(inside[:, None] & inside, matrix, 0)
