"""Spectral quantities of the tangent kernel from its products with vectors: for kernels too large to form.

Every product is one backward and one forward derivative of the network over batches of examples, so memory does not
grow with the square of NK. Arguments that all functions share are those of ``ntk`` and ``ntk_matvec``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Key, PyTree, Shaped

from pkjax import tables
from pkjax.linalg.block_lanczos import block_lanczos
from pkjax.linalg.stochastic import SpectralDensity, frobenius, quadrature, trace
from pkjax.tangent_kernel.products import ntk_matvec, ntk_trace
from pkjax.trees import ApplyFn, Trainable

__all__ = ["NtkEigenpairs", "ntk_density", "ntk_effective_rank", "ntk_eigenpairs", "ntk_frobenius",
           "ntk_trace_estimate"]

Inputs = Shaped[Array | np.ndarray, "N ..."]


@dataclass(frozen=True)
class NtkEigenpairs:
    """The largest eigenpairs of Θ.

    Returned by ``ntk_eigenpairs``. Shows itself as a short text and, in a notebook, as a table.

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
    """λ, descending."""
    vectors: Float64[np.ndarray, "k N K"]
    """u, orthonormal."""
    residuals: Float64[np.ndarray, "k"]
    """``‖Θ u − λ u‖``: an eigenvalue lies within that of the value."""
    converged: bool
    """Whether all residuals are small and no larger eigenvalue is missing; a ``NotConvergedWarning`` was given if
    not."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        return tables.pairs({"eigenvalue": self.values, "residual": self.residuals}, "largest eigenvalues of Θ")


def ntk_trace_estimate(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], samples: int = 16,
                       masks: PyTree | None = None, trainable: Trainable = None, batch_size: int | None = None
                       ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate Tr Θ from 2 · samples products: (estimate, standard error).

        Tr Θ = Tr(Qᵀ Θ Q) + E[sᵀ (I − QQᵀ) Θ (I − QQᵀ) s],   Q an orthonormal basis of Θ times random vectors

    XTrace, the successor of Hutch++ that also says how sure it is: the trace on a random range exactly, the rest by
    sampling. ``ntk_trace`` is exact for K backward passes an example; this is for K in the thousands. With samples of
    half of NK or more it is exact, and the error 0.

    Raises: ValueError for samples < 2, and as ``ntk``.

    Source: Epperly, Tropp and Webber 2024, "XTrace", section 2 (Hutch++: Meyer, Musco, Musco and Woodruff 2021).

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.asarray([[1., 0.], [1., 1.]])
    >>> estimate, error = ntk_trace_estimate(lambda w, x: x @ w, jnp.ones((2, 3)), x, key=jax.random.key(0), samples=6)
    >>> round(float(estimate), 3)
    9.0
    """
    multiply, shape = _flat(apply_fn, params, X, masks, trainable, batch_size)
    samples = min(_several(samples), int(np.prod(shape.shape)))
    return trace(multiply, jnp.zeros(int(np.prod(shape.shape)), shape.dtype), key, samples)


def ntk_frobenius(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], samples: int = 32,
                  masks: PyTree | None = None, trainable: Trainable = None, batch_size: int | None = None
                  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate ``‖Θ‖_F`` from so many products: (estimate, standard error).

        ‖Θ‖_F² = E ‖Θ s‖²   over random signs s

    Raises: ValueError for samples < 2, and as ``ntk``.

    Source: Hutchinson (1990).

    >>> import jax, jax.numpy as jnp
    >>> norm, error = ntk_frobenius(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), key=jax.random.key(0))
    >>> round(float(norm), 3), round(float(error), 3)      # Θ is the identity
    (1.414, 0.0)
    """
    multiply, shape = _flat(apply_fn, params, X, masks, trainable, batch_size)
    scale = ntk_trace(apply_fn, params, X, masks=masks, trainable=trainable).astype(shape.dtype)
    mean, error = frobenius(multiply, _signs(key, _several(samples), shape), scale)
    norm = jnp.sqrt(mean)
    return norm * scale, error / (2 * norm) * scale


def ntk_effective_rank(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], samples: int = 32,
                       masks: PyTree | None = None, trainable: Trainable = None, batch_size: int | None = None
                       ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate ``Tr(Θ)² / ‖Θ‖_F²``, how many equal eigenvalues Θ amounts to: (estimate, standard error).

    The trace is exact, the norm estimated as by ``ntk_frobenius``.

    Raises: as ``ntk_frobenius``.

    Source: definition: the participation ratio of Θ's eigenvalues.

    >>> import jax, jax.numpy as jnp
    >>> rank, error = ntk_effective_rank(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), key=jax.random.key(0))
    >>> round(float(rank), 3), round(float(error), 3)
    (2.0, 0.0)
    """
    multiply, shape = _flat(apply_fn, params, X, masks, trainable, batch_size)
    scale = ntk_trace(apply_fn, params, X, masks=masks, trainable=trainable).astype(shape.dtype)
    mean, error = frobenius(multiply, _signs(key, _several(samples), shape), scale)
    return 1 / mean, error / mean**2


def ntk_eigenpairs(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, k: int, masks: PyTree | None = None,
                   trainable: Trainable = None, batch_size: int | None = None, tolerance: float | None = None
                   ) -> NtkEigenpairs:
    """The k largest eigenvalues of Θ with multiplicities and their eigenvectors, by block Lanczos.

        Θ u_i = λ_i u_i,   λ_1 ≥ λ_2 ≥ …

    Args: as in ``ntk_matvec``, and
        k: how many, at most NK.
        tolerance: residual at which a pair has converged, relative to the largest eigenvalue; None means 100 times
            the spacing of the numbers of the outputs' type.

    Returns: values (k,), vectors (k, N, K), residuals (k,).

    Raises: ValueError for k out of range, and as ``ntk``.

    Source: Gebhart, Saxena and Schrater (2021), λ_i of theorem 1; Golub and Underwood (1977) for block Lanczos.

    >>> import jax.numpy as jnp
    >>> x = jnp.asarray([[3., 0.], [0., 2.]])
    >>> ntk_eigenpairs(lambda w, x: x @ w, jnp.ones((2, 1)), x, k=1).values.round(3)
    array([9.])
    """
    multiply, shape = _flat(apply_fn, params, X, masks, trainable, batch_size)
    size = int(np.prod(shape.shape))
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and NK = {size}, got {k}")
    rows = jax.jit(lambda v: jax.lax.map(multiply, v))
    found = block_lanczos(lambda v: np.asarray(rows(jnp.asarray(v, shape.dtype)), np.float64), size, k,
                          tolerance=100 * float(jnp.finfo(shape.dtype).eps) if tolerance is None else tolerance)
    return NtkEigenpairs(np.maximum(found.values, 0), found.vectors.reshape(k, *shape.shape), found.residuals,
                         found.converged)


def ntk_density(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, key: Key[Array, ""], samples: int = 8, depth: int = 64,
                points: int = 200, decades: float = 6.0, width: float = 0.08, masks: PyTree | None = None,
                trainable: Trainable = None, batch_size: int | None = None) -> SpectralDensity:
    """Spectral density of Θ by stochastic Lanczos quadrature.

    Args: as in ``ntk_matvec``, and those of ``path_kernel.density``.

    Returns: the density (eigenvalues to a decade), and its nodes and weights.

    Raises: as ``ntk``.

    Source: Ghorbani, Krishnan and Xiao (2019), section 3; Lanczos by matfree.

    >>> import jax, jax.numpy as jnp
    >>> estimate = ntk_density(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.eye(2), key=jax.random.key(0))
    >>> float(estimate.weights[0].sum().round(2))          # NK eigenvalues
    6.0
    """
    multiply, shape = _flat(apply_fn, params, X, masks, trainable, batch_size)
    draws = _signs(key, samples, shape)
    mass = jnp.asarray(draws.shape[1], shape.dtype)
    return quadrature(multiply, draws, mass, key, depth=depth, points=points, decades=decades, width=width)


def _flat(apply_fn: ApplyFn, params: PyTree, X: Inputs, masks: PyTree | None, trainable: Trainable,
          batch_size: int | None) -> tuple[Callable[[Array], Array], Any]:
    """Products with flat vectors of NK entries, and the shape (N, K) of the outputs."""
    X = jnp.asarray(X)
    product = ntk_matvec(apply_fn, params, X, masks=masks, trainable=trainable, batch_size=batch_size)
    shape = jax.eval_shape(apply_fn, params, X)
    return lambda v: product(v.reshape(shape.shape)).ravel(), shape


def _several(samples: int) -> int:
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    return samples


def _signs(key: Array, samples: int, shape: Any) -> Array:
    return jax.random.rademacher(key, (samples, int(np.prod(shape.shape))), shape.dtype)
