"""Random estimates of the path kernel's spectrum: effective rank and spectral density.

Both multiply the dual Gram matrix G, which has the non-zero eigenvalues of Π, with random vectors ("probes").
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from pkjax.linalg.stochastic import SpectralDensity, frobenius, inverse, quadrature
from pkjax.network import Network
from pkjax.path_kernel.gram import flat_product, make_problem, read_start
from pkjax.path_kernel.traces import check_size, trace_number
from pkjax.programs.checks import check_result
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, Choice

__all__ = ["Estimate", "density", "effective_rank", "effective_rank_by",
           "effective_rank_estimate"]


class Estimate(NamedTuple):
    """A random estimate with its standard error.

    Returned by ``path_kernel.effective_rank_estimate``.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(Estimate(jnp.array(3.0), standard_error=jnp.array(0.1)).value)
        3.0
    """

    value: Float[Array, ""]
    """The estimate."""
    standard_error: Float[Array, ""]
    """The standard deviation of the estimate, itself estimated."""


@automatic_axes
def effective_rank(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, key: Key[Array, ""],
                   probes: int = 64, masks: PyTree | None = None, trainable: Choice = None, gates: str | None = None,
                   reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Float[Array, ""]:
    """Effective rank of the path kernel: how many equal eigenvalues would have its trace and its Frobenius norm.

        Tr(Π)² / ‖Π‖_F²

    The trace is exact; the norm is Hutchinson's estimate, the mean of ``‖G s‖²`` over random signs s.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        key: a typed random key.
        probes: number of random vectors s.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        A scalar of the parameters' dtype, float32 for narrower ones; 0 where Π is 0. Works under jit, where no number
        can be checked. ``effective_rank_estimate`` returns the standard error too.

    Raises:
        ValueError: as for ``trace``, and for fewer than 2 probes.
        FloatingPointError: Tr Π is outside of the range of its type (not checked under jit).
        NotPathNetworkError: an operation has no paths.

    Source: Hutchinson (1990) for the norm; the ratio is the participation ratio of Π's eigenvalues.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1))}
        >>> rank = effective_rank(lambda w, x: x @ w["a"] @ w["b"], w, jnp.ones((1, 2)), key=jax.random.key(0))
        >>> 1.0 < float(rank) < 3.0
        True
    """
    return effective_rank_estimate(apply_fn, params, x, key=key, probes=probes, masks=masks, trainable=trainable,
                                   gates=gates, reference=reference).value


@automatic_axes
def effective_rank_estimate(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *,
                            key: Key[Array, ""], probes: int = 64, masks: PyTree | None = None,
                            trainable: Choice = None, gates: str | None = None,
                            reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Estimate:
    """Effective rank of the path kernel with its standard error.

        Tr(Π)² / ‖Π‖_F²

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        key: a typed random key.
        probes: number of random vectors.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        The estimate and its standard error, scalars of the parameters' dtype, float32 for narrower ones. Works
        under jit.

    Raises:
        ValueError: as for ``trace``, and for fewer than 2 probes.
        FloatingPointError: Tr Π is outside of the range of its type (not checked under jit).
        NotPathNetworkError: an operation has no paths.

    Source: Hutchinson (1990) for the norm, the delta method for its error.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1))}
        >>> net = lambda w, x: x @ w["a"] @ w["b"]
        >>> rank, error = effective_rank_estimate(net, w, jnp.ones((1, 2)), key=jax.random.key(0))
        >>> abs(float(rank) - 1.6) < 4 * float(error)     # the eigenvalues are 3 and 1: 4² / (3² + 1²)
        True
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    network, z = read_start(apply_fn, params, x, masks, trainable, gates, reference)
    check_size(network, z)
    estimate = _rank(network, z, key, probes=int(probes))
    check_result(estimate, "the effective rank of Π")
    return estimate


def effective_rank_by(multiply: Callable[[np.ndarray], np.ndarray], size: int, scale: float, key: Array,
                      probes: int = 64) -> float:
    """Estimate the effective rank from products of G with rows on the host, of which ``scale`` is Tr Π.

    It is for callers that have compiled such products: ``effective_rank`` compiles a program of its own.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    squares = []
    for _ in range(probes):
        signs = rng.integers(0, 2, (1, size), np.int8) * np.int8(2) - np.int8(1)
        image = multiply(signs.astype(np.float32)).astype(np.float64) / (scale or 1.0)
        squares.append(float(np.einsum("ij,ij->", image, image)))
    mean = float(np.mean(squares))
    return 1 / mean if mean else 0.0


@partial(jax.jit, static_argnames="probes")
def _rank(network: Network, z: Array, key: Array, *, probes: int) -> Estimate:
    scale = trace_number(network, z).value
    multiply, flat, train = flat_product(make_problem(network, z))
    # Products of G divided by its trace neither overflow nor vanish when squared. Signs are drawn as they are needed.
    mean, deviation = frobenius(lambda draw: multiply(jax.random.rademacher(draw, flat.shape, flat.dtype) * train),
                                jax.random.split(key, probes), jnp.where(scale > 0, scale, 1),
                                batch_size=max(1, min(8, 2**22 // flat.size)))
    return Estimate(*inverse(mean.astype(scale.dtype), deviation.astype(scale.dtype)))


@automatic_axes
def density(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, key: Key[Array, ""],
            probes: int = 8, depth: int = 64, points: int = 200, decades: float = 6.0, width: float = 0.08,
            masks: PyTree | None = None, trainable: Choice = None, gates: str | None = None,
            reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> SpectralDensity:
    """Spectral density of the path kernel by stochastic Lanczos quadrature.

        Σ_i δ(λ − π_i),   each δ a Gaussian in log10 λ

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        key: a typed random key.
        probes: number of random vectors.
        depth: Lanczos steps with each, at most the number of parameters that train.
        points: how many eigenvalues to evaluate the density at, from the largest downwards.
        decades: how far down they go.
        width: standard deviation in decades of the Gaussian that stands for a node.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        The density (eigenvalues per decade), and its nodes and weights.

    Raises:
        ValueError: as for ``trace``.
        FloatingPointError: Tr Π is outside of the range of its type (not checked under jit).
        NotPathNetworkError: an operation has no paths.

    Source: Ghorbani, Krishnan and Xiao (2019), section 3, for Hessians; Lanczos by matfree.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
        >>> estimate = density(lambda w, x: x @ w["a"] @ w["b"], w, jnp.ones((1, 2)), key=jax.random.key(0))
        >>> float(estimate.weights[0].sum().round(2))
        12.0
    """
    network, z = read_start(apply_fn, params, x, masks, trainable, gates, reference)
    check_size(network, z)
    estimate = _density(network, z, key, probes=int(probes), depth=int(depth), points=int(points),
                        decades=float(decades), width=float(width))
    check_result(estimate, "the spectral density of Π")
    return estimate


@partial(jax.jit, static_argnames=("probes", "depth", "points", "decades", "width"))
def _density(network: Network, z: Array, key: Array, *, probes: int, **options: Any) -> SpectralDensity:
    multiply, flat, train = flat_product(make_problem(network, z))
    draws = jax.random.rademacher(key, (probes, flat.size), flat.dtype) * train
    return quadrature(multiply, draws, train.sum(), key, **options)
