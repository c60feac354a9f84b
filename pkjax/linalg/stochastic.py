"""Random estimates of a symmetric positive semidefinite operator from its products with vectors alone.

Its trace, its Frobenius norm and the density of its eigenvalues. The random vectors are called probes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pkjax import tables

__all__ = ["Estimate", "SpectralDensity", "frobenius", "inverse", "quadrature", "trace"]

Product = Callable[[Array], Array]
"""Maps a flat vector to the operator's product with it."""

_MASSLESS = 1e-10  # below this fraction of the largest node a quadrature node stands for zero eigenvalues


class Estimate(NamedTuple):
    """A random estimate with its standard error.

    Returned by `ntk_trace_estimate`, `ntk_frobenius` and `ntk_effective_rank`. Unpacks as `value, standard_error`.

    Examples:
        >>> value, standard_error = Estimate(jnp.array(3.0), standard_error=jnp.array(0.1))
        >>> float(value), round(float(standard_error), 3)
        (3.0, 0.1)
    """

    value: Float[Array, ""]
    """The estimate."""
    standard_error: Float[Array, ""]
    """The standard deviation of the estimate, itself estimated."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """A spectral density, the number of eigenvalues per decade, and the quadrature that it comes from.

    Returned by `path_kernel.density` and `ntk_density`.

    Examples:
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
    """Eigenvalues at which the density is given, evenly spaced in their logarithm."""
    density: Float[Array, "points"]
    """Number of eigenvalues per decade."""
    nodes: Float[Array, "probes depth"]
    """Nodes of the quadratures, one row per probe."""
    weights: Float[Array, "probes depth"]
    """Weights of the nodes; each row sums to the operator's dimension."""

    __repr__ = tables.brief


def trace(multiply: Product, like: Array, key: Array, probes: int) -> Estimate:
    """Estimate the trace of an operator by XTrace, from 2 · `probes` products.

    Args:
        multiply: the operator.
        like: a vector of its dimension and dtype.
        key: a typed random key.
        probes: number of random vectors.

    Source: Epperly, Tropp and Webber (2024), "XTrace", section 2.
    """
    from matfree import stochtrace

    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(
        stochtrace.leave_one_out_xtrace(), stochtrace.sampler_normal(like, num=probes))
    with _as_matfree_needs():
        mean, error = estimate(multiply, key)
    return Estimate(mean.astype(like.dtype), error.astype(like.dtype))


@contextlib.contextmanager
def _as_matfree_needs() -> Iterator[None]:
    """It mixes its counters with floats, and leaves the precision of its own products to the caller."""
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


def frobenius(multiply: Product, probes: Array, scale: Array, batch_size: int | None = None) -> Estimate:
    """Estimate `‖A‖_F² / scale²`, the mean of `‖A s‖² / scale²` over random signs s.

    Args:
        multiply: maps each entry of `probes` to A s.
        probes: the signs themselves, or keys by which `multiply` draws them; at least two.
        scale: about the size of A, so that squares stay within the dtype's range.
        batch_size: number of probes multiplied at a time; None multiplies one after the other.
    """
    squares = jax.lax.map(lambda s: ((multiply(s) / scale) ** 2).sum(), probes, batch_size=batch_size)
    return Estimate(squares.mean(), squares.std(ddof=1) / len(probes) ** 0.5)


def inverse(mean: Array, error: Array) -> tuple[Array, Array]:
    """Invert an estimate of `‖A‖_F² / Tr(A)²`: the effective rank with its standard error, both 0 where A is 0.

    Examples:
        >>> [float(v) for v in inverse(jnp.array(0.5), jnp.array(0.125))]
        [2.0, 0.5]
    """
    safe = jnp.where(mean == 0, 1, mean)
    return jnp.where(mean == 0, 0, 1 / safe), jnp.where(mean == 0, 0, error / safe**2)


def quadrature(multiply: Product, probes: Array, mass: Array, key: Array, *, depth: int, points: int, decades: float,
               width: float) -> SpectralDensity:
    """Estimate a spectral density by stochastic Lanczos quadrature, with matfree's Lanczos vectors.

    Args:
        multiply: the operator.
        probes: (probes, dimension) random signs, 0 where the operator has no entry.
        mass: the number of eigenvalues.
        key: probes the vector that gives the operator's size before Lanczos.
        depth: Lanczos steps per probe.
        points: number of eigenvalues to evaluate the density at, from the largest downwards.
        decades: how far down they go.
        width: standard deviation, in decades, of the Gaussian that replaces each node.

    Source: Ghorbani, Krishnan and Xiao (2019), section 3.
    """
    from matfree import decomp

    u = jax.random.normal(key, probes.shape[1:], probes.dtype) * jnp.abs(probes[0])
    # The operator's size to the nearest factor of a few keeps Lanczos in range.
    image = multiply(u)
    peak = jnp.maximum(jnp.abs(image).max(), jnp.finfo(probes.dtype).tiny)     # lest the norm's squares overflow
    scale = jnp.maximum(jnp.linalg.norm(image / peak) / jnp.linalg.norm(u) * peak, jnp.finfo(probes.dtype).tiny)
    lanczos = decomp.hessenberg(min(depth, probes.shape[1]), reortho="full", custom_vjp=False)

    def one(s: Array) -> tuple[Array, Array]:
        with _as_matfree_needs():
            _, hessenberg, *_ = lanczos(lambda v: multiply(v) / scale, s / jnp.linalg.norm(s))
        nodes, rows = jnp.linalg.eigh(_tridiagonal(hessenberg))
        return nodes * scale, rows[0] ** 2 * mass

    nodes, weights = jax.lax.map(one, probes)
    top = nodes.max()
    decade = jnp.linspace(-decades, 0.2, points, dtype=probes.dtype)
    level = jnp.log10(jnp.maximum(nodes / jnp.where(top == 0, 1, top), _MASSLESS))
    kept = jnp.where(nodes > _MASSLESS * top, weights, 0)
    bell = jnp.exp(-(((decade[:, None, None] - level) / width) ** 2) / 2) / (width * (2 * np.pi) ** 0.5)
    return SpectralDensity(top * 10**decade, (bell * kept).sum((1, 2)) / len(probes), nodes, weights)


def _tridiagonal(hessenberg: Array) -> Array:
    """Return Lanczos' tridiagonal matrix, cut where a coupling is rounding: beyond an invariant subspace it is noise.

    The couplings stand below the diagonal. Above it, past such a subspace, stand products with normalised noise, so the
    mean of the two, which `matfree.decomp.tridiag_sym` returns, would hide that a coupling is 0.
    """
    side = jnp.diagonal(hessenberg, -1)
    size = jnp.maximum(jnp.abs(hessenberg[0, 0]), jnp.abs(side[:1]).max(initial=0.0))
    small = ~(jnp.abs(side) > 100 * jnp.finfo(hessenberg.dtype).eps * size)     # NaN is small, too
    inside = jnp.concatenate([jnp.ones(1, bool), jnp.cumsum(small) == 0])
    matrix = jnp.diag(jnp.diagonal(hessenberg)) + jnp.diag(side, 1) + jnp.diag(side, -1)
    return jnp.where(inside[:, None] & inside, matrix, 0)
