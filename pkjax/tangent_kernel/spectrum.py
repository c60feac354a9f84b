"""Spectral quantities of the tangent kernel from its products with vectors: for kernels too large to form.

Every product is one backward and one forward derivative of the network over batches of examples, so memory does not
grow with the square of NK. Random vectors are called probes. Arguments that all functions share are those of `ntk` and
`ntk_matvec`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Key, PyTree, Shaped

from pkjax import tables
from pkjax.linalg.block_lanczos import block_lanczos
from pkjax.linalg.stochastic import Estimate, SpectralDensity, frobenius, inverse, quadrature, trace
from pkjax.network import Network, read
from pkjax.programs.meshes import automatic_axes
from pkjax.tangent_kernel.arguments import check_kernel
from pkjax.tangent_kernel.products import examples_at_once, ntk_trace, theta_times
from pkjax.trees import ApplyFn, Choice, accumulator

__all__ = ["NtkEigenpairs", "ntk_density", "ntk_effective_rank", "ntk_eigenpairs", "ntk_frobenius",
           "ntk_trace_estimate", "theta_rows"]

Inputs: TypeAlias = PyTree[Shaped[Array | np.ndarray, "N ..."]]


@dataclass(frozen=True, eq=False)
class NtkEigenpairs:
    """The largest eigenpairs of Θ.

    Returned by `ntk_eigenpairs`. Prints as a short text and, in a notebook, as a table.

    Examples:
        >>> import jax.numpy as jnp
        >>> ntk_eigenpairs(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.diag(jnp.array([3., 2.])), k=2)
        NtkEigenpairs(
            values=float64[2] 9 … 4,
            vectors=float64[2,2,1],
            ...
            converged=True
        )
    """

    values: Float64[np.ndarray, "k"]
    """The eigenvalues λ, descending."""
    vectors: Float64[np.ndarray, "k N ..."]
    """The eigenvectors u, orthonormal."""
    residuals: Float64[np.ndarray, "k"]
    """`‖Θ u − λ u‖`: an exact eigenvalue lies within this distance of the computed one."""
    converged: bool
    """Whether all residuals are small and no larger eigenvalue is missing; if not, a `NotConvergedWarning` was
    issued."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        return tables.pairs({"eigenvalue": self.values, "residual": self.residuals}, "largest eigenvalues of Θ")


@automatic_axes
def ntk_trace_estimate(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], probes: int = 16,
                       masks: PyTree | None = None, trainable: Choice = None, batch_size: int | None = None
                       ) -> Estimate:
    """Estimate Tr Θ from 2 · `probes` products.

        Tr Θ = Tr(Qᵀ Θ Q) + E[sᵀ (I − QQᵀ) Θ (I − QQᵀ) s],   Q an orthonormal basis of Θ times random vectors

    XTrace, the successor of Hutch++ with an error estimate, takes the trace on a random range exactly and estimates the
    rest. With `probes` ≥ NK / 2 it is exact and its standard error is 0. `ntk_trace` is exact at the cost of K backward
    passes per example; this function is for K in the thousands.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the inputs.
        key: a typed random key.
        probes: number of random vectors.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time, as in `ntk_matvec`.

    Returns:
        The estimate with its standard error, scalars of the outputs' dtype.

    Raises:
        ValueError: fewer than 2 probes; and as for `ntk`.

    Source: Epperly, Tropp and Webber (2024), "XTrace", section 2; Meyer, Musco, Musco and Woodruff (2021), Hutch++.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.asarray([[1., 0.], [1., 1.]])
        >>> trace, error = ntk_trace_estimate(lambda w, x: x @ w, jnp.ones((2, 3)), x, key=jax.random.key(0), probes=6)
        >>> round(float(trace), 3)
        9.0
    """
    network, X, size = _taken(apply_fn, params, X, masks, trainable, batch_size)
    estimate = _estimate(network, X, key, probes=min(_several(probes), len(X) * network.size), size=size)
    check_kernel(network, X, estimate, "the estimate of Tr Θ")
    return estimate


@automatic_axes
def ntk_frobenius(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], probes: int = 32,
                  masks: PyTree | None = None, trainable: Choice = None, batch_size: int | None = None) -> Estimate:
    """Estimate the Frobenius norm `‖Θ‖_F` from one product per probe.

        ‖Θ‖_F² = E ‖Θ s‖²   over random signs s

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the inputs.
        key: a typed random key.
        probes: number of random vectors s.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time, as in `ntk_matvec`.

    Returns:
        The estimate with its standard error, scalars of the outputs' dtype.

    Raises:
        ValueError: fewer than 2 probes; and as for `ntk`.

    Source: Hutchinson (1990).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> norm, error = ntk_frobenius(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), key=jax.random.key(0))
        >>> round(float(norm), 3), round(float(error), 3)      # Θ is the identity
        (1.414, 0.0)
    """
    network, X, size = _taken(apply_fn, params, X, masks, trainable, batch_size)
    scale = ntk_trace(network.fn, params, X, masks=masks, trainable=trainable).astype(network.fn.out.dtype)
    mean, error = _mean_square(network, X, key, scale, probes=_several(probes), size=size)
    norm = jnp.sqrt(mean)
    estimate = Estimate(norm * scale, error / (2 * jnp.where(norm > 0, norm, 1)) * scale)
    check_kernel(network, X, estimate, "the norm of Θ")
    return estimate


@automatic_axes
def ntk_effective_rank(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], probes: int = 32,
                       masks: PyTree | None = None, trainable: Choice = None, batch_size: int | None = None
                       ) -> Estimate:
    """Estimate how many equal eigenvalues would have the trace and the Frobenius norm of Θ.

        Tr(Θ)² / ‖Θ‖_F²

    the participation ratio of its eigenvalues. The trace is exact, the norm is estimated as in `ntk_frobenius`, whose
    arguments and errors this function shares.

    Returns:
        The estimate with its standard error, scalars of the outputs' dtype; 0 where Θ is 0.

    Raises:
        ValueError: as for `ntk_frobenius`.
        FloatingPointError: Θ overflows or vanishes in the type of its numbers (not checked under `jit`).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> rank, error = ntk_effective_rank(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), key=jax.random.key(0))
        >>> round(float(rank), 3), round(float(error), 3)
        (2.0, 0.0)
    """
    network, X, size = _taken(apply_fn, params, X, masks, trainable, batch_size)
    scale = ntk_trace(network.fn, params, X, masks=masks, trainable=trainable).astype(network.fn.out.dtype)
    mean, error = _mean_square(network, X, key, scale, probes=_several(probes), size=size)
    estimate = Estimate(*inverse(mean, error))
    check_kernel(network, X, estimate, "the effective rank of Θ")
    return estimate


@automatic_axes
def ntk_eigenpairs(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, k: int, masks: PyTree | None = None,
                   trainable: Choice = None, batch_size: int | None = None, tolerance: float | None = None
                   ) -> NtkEigenpairs:
    """Compute the k largest eigenvalues of Θ, with multiplicities, and their eigenvectors, by block Lanczos.

        Θ u_i = λ_i u_i,   λ_1 ≥ λ_2 ≥ …

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the inputs.
        k: number of pairs, at most NK.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time, as in `ntk_matvec`.
        tolerance: the residual, relative to the largest eigenvalue, at which a pair has converged; None means 100 times
            the machine epsilon of the outputs' dtype, 4 times where they are narrower than float32.

    Returns:
        Eigenvalues (k,), eigenvectors (k, N, K) and residuals (k,), in float64.

    Raises:
        ValueError: `k` or `tolerance` is out of range, or the arrays are traced; and as for `ntk`.

    Source: Gebhart, Saxena and Schrater (2021), λ_i of theorem 1; Golub and Underwood (1977) for block Lanczos.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.asarray([[3., 0.], [0., 2.]])
        >>> ntk_eigenpairs(lambda w, x: x @ w, jnp.ones((2, 1)), x, k=1).values.round(3)
        array([9.])
    """
    network, X, size = _taken(apply_fn, params, X, masks, trainable, batch_size)
    rows, dtype = len(X) * network.size, network.fn.out.dtype
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= rows:
        raise ValueError(f"k must be a whole number between 1 and NK = {rows}, got {k!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, or None, got {tolerance}")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((network, X))):
        raise ValueError("ntk_eigenpairs decides by numbers when it has converged: call it outside jit, vmap and grad")
    eps = float(jnp.finfo(dtype).eps)
    check_kernel(network, X, theta_times(network, X, jnp.ones((len(X), network.size), dtype), size=size), "Θ v",
                 jnp.ones((len(X), network.size), dtype))
    pairs = block_lanczos(lambda v: np.asarray(theta_rows(network, X, jnp.asarray(v, dtype), size=size), np.float64),
                          rows, k, tolerance=min(100 * eps, max(4 * eps, 1e-3)) if tolerance is None else tolerance)
    return NtkEigenpairs(np.maximum(pairs.values, 0), pairs.vectors.reshape(k, len(X), *network.outputs),
                         pairs.residuals, pairs.converged)


@automatic_axes
def ntk_density(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], probes: int = 8, depth: int = 64,
                points: int = 200, decades: float = 6.0, width: float = 0.08, masks: PyTree | None = None,
                trainable: Choice = None, batch_size: int | None = None) -> SpectralDensity:
    """Estimate the spectral density of Θ by stochastic Lanczos quadrature.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the inputs.
        key: a typed random key.
        probes: number of random vectors.
        depth: Lanczos steps per probe.
        points: number of eigenvalues to evaluate the density at, from the largest downwards.
        decades: how far down they go.
        width: standard deviation, in decades, of the Gaussian that replaces each node of the quadrature.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time, as in `ntk_matvec`.

    Returns:
        The density in eigenvalues per decade, with its nodes and weights.

    Raises:
        ValueError: as for `ntk`.

    Source: Ghorbani, Krishnan and Xiao (2019), section 3; Lanczos by matfree.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> estimate = ntk_density(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.eye(2), key=jax.random.key(0))
        >>> float(estimate.weights[0].sum().round(2))          # NK eigenvalues
        6.0
    """
    network, X, size = _taken(apply_fn, params, X, masks, trainable, batch_size)
    estimate = _density(network, X, key, probes=probes, size=size, depth=depth, points=points, decades=decades,
                        width=width)
    check_kernel(network, X, (estimate.nodes, estimate.density), "the spectral density of Θ")
    return estimate


def _taken(apply_fn: ApplyFn, params: PyTree, X: Inputs, masks: PyTree | None, trainable: Choice,
           batch_size: int | None) -> tuple[Network, Array, int]:
    """Read the network and its batch, and say how many examples to take at a time."""
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    X = network.batch(X)
    return network, X, examples_at_once(network, X, batch_size)


def _times(network: Network, X: Array, size: int) -> Callable[[Array], Array]:
    """Products with flat vectors of NK entries."""
    return lambda v: theta_times(network, X, v.reshape(len(X), network.size), size=size).ravel()


@partial(jax.jit, static_argnames="size")
def theta_rows(network: Network, X: Array, rows: Array, *, size: int) -> Array:
    """Return the products of Θ with rows (r, NK)."""
    return jax.lax.map(_times(network, X, size), rows)


@partial(jax.jit, static_argnames=("probes", "size"))
def _estimate(network: Network, X: Array, key: Array, *, probes: int, size: int) -> Estimate:
    like = jnp.zeros(len(X) * network.size, network.fn.out.dtype)
    return trace(_times(network, X, size), like, key, probes)


@partial(jax.jit, static_argnames=("probes", "size"))
def _mean_square(network: Network, X: Array, key: Array, scale: Array, *, probes: int, size: int
                 ) -> tuple[Array, Array]:
    """The estimate of `‖Θ‖_F² / scale²`, and its standard error."""
    return frobenius(_times(network, X, size), _signs(key, probes, network, X), jnp.where(scale > 0, scale, 1))


@partial(jax.jit, static_argnames=("probes", "size", "depth", "points", "decades", "width"))
def _density(network: Network, X: Array, key: Array, *, probes: int, size: int, **options: Any) -> SpectralDensity:
    wide, multiply = accumulator(network.fn.out.dtype), _times(network, X, size)     # in which eigenvalues are found
    signs = _signs(key, probes, network, X).astype(wide)
    return quadrature(lambda v: multiply(v.astype(network.fn.out.dtype)).astype(wide), signs,
                      jnp.asarray(signs.shape[1], wide), key, **options)


def _several(probes: int) -> int:
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    return probes


def _signs(key: Array, probes: int, network: Network, X: Array) -> Array:
    return jax.random.rademacher(key, (probes, len(X) * network.size), network.fn.out.dtype)
