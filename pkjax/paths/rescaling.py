"""Rescaling units: other parameters of the same function, at random or so that the path kernel's diagonal is even."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.algebras import Polynomial
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.scaled import widest
from pkjax.paths.units import NotRescalableError, Units, read_units
from pkjax.programs.checks import REMEDY, check_parameters, check_result
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, is_floating, leaf_names

__all__ = ["PathConditioned", "path_condition", "rescale"]


class PathConditioned(NamedTuple):
    """Parameters of the same function whose path kernel has a more even diagonal.

    Returned by ``path_condition``. The divergence is that of the diagonal of G from the nearest multiple of the
    identity: ln of its arithmetic over its geometric mean, over the parameters that lie on a path; 0 where it is even.

    Examples:
        >>> w = {"a": jnp.array([[100.]]), "b": jnp.array([[1.]])}
        >>> result = path_condition(lambda w, x: x @ w["a"] @ w["b"], w, jnp.ones((1, 1)))
        >>> round(result.before, 2), abs(result.after) < 1e-6, result.units
        (3.91, True, 1)
    """

    params: PyTree
    """The parameters, rescaled."""
    before: float
    """Divergence of the given parameters."""
    after: float
    """Divergence of the returned ones."""
    units: int
    """How many units could be scaled."""
    steps: int
    """Newton's steps that were taken."""


@automatic_axes
def rescale(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, key: Key[Array, ""],
            spread: float = 1.0) -> PyTree:
    """Scale every hidden unit at random: other parameters of the same function, for tests of invariance.

        what enters unit h times λ_h, what leaves it over λ_h,   ln λ_h ~ N(0, spread²)

    The network's function, its path values Φ(θ), its path norms and the trace of the data factor stay; θ, Π and Θ
    change. Units that the network ties are scaled together: both sides of a residual sum, the places of a convolution.
    What a constant is added to, as before a frozen BatchNorm's mean that is not 0, does not scale.

    Args:
        apply_fn: the network, of dense layers, convolutions, scales, biases, sums and positively homogeneous
            activations.
        params: its parameters θ, concrete.
        x: (1, *input), an input (its shape decides).
        key: a typed key, ``jax.random.key(seed)``.
        spread: the standard deviation of ln λ.

    Returns:
        Parameters like ``params``.

    Raises:
        ValueError: ``spread`` is negative or not finite.
        NotRescalableError: parameters are tied or multiplied, or enter in another way.
        NotPathNetworkError: an operation has no paths.
        FloatingPointError: a scale takes a parameter out of the range of its type.

    Source: Neyshabur, Salakhutdinov and Srebro (2015), Path-SGD, section 2.

    Examples:
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [2.]])}
        >>> other = rescale(net, w, jnp.ones((1, 1)), key=jax.random.key(0))
        >>> bool(jnp.allclose(other["a"].T * other["b"], w["a"].T * w["b"])), bool(jnp.allclose(other["a"], w["a"]))
        (True, False)
    """
    check_parameters(params)
    if not (np.isfinite(spread) and spread >= 0):
        raise ValueError(f"spread must be finite and at least 0, but is {spread}")
    with widest(apply_fn, (params, x)) as (wide, z):
        network = read(apply_fn, wide, z, paths=True)
        units = read_units(network, network.batch(z, "x")[:1])
    draws = spread * np.asarray(jax.random.normal(key, (units.free,)), np.float64)
    return _scaled(network, params, units, draws)


@automatic_axes
def path_condition(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *,
                   masks: PyTree | None = None, steps: int = 200, tolerance: float = 1e-9) -> PathConditioned:
    """Scale hidden units so that the diagonal of the path kernel's Gram matrix G is as even as scaling can make it.

        min_u  m ln Σ_j G_jj e^(Bu)_j − Σ_j (Bu)_j,   G_jj = ∂R_2(θ², x)/∂φ_j

    the log-determinant divergence of diag(G) from the multiples of the identity, up to a constant. u_h is ln λ_h²; B
    has 1 where a parameter leaves a unit and −1 where it enters it. The problem is convex, and solved for all units at
    once by Newton's method in a trust region. Parameters on no path have G_jj = 0 and count for nothing. The function,
    path norms and the data factor stay; the spectrum of Π changes, as ``pkjax.path_kernel`` shows.

    Args:
        apply_fn: the network, as in ``rescale``.
        params: its parameters θ, concrete.
        x: (1, *input), the start values of R_2, ones for the path kernel.
        masks: booleans like ``params``; a masked weight carries no path.
        steps: Newton's steps at most.
        tolerance: stop where the slope of the divergence in u is at most this.

    Returns:
        The parameters, and the divergence before and after.

    Raises:
        NotRescalableError: parameters are tied or multiplied, or enter in another way.
        NotPathNetworkError: an operation has no paths.
        FloatingPointError: a slope of R_2 is outside of the range of its type, or a parameter, scaled, of its own.

    Source: Lebeurrier, Vayer and Gribonval (2026), path-conditioned training (arXiv 2602.19799).

    Examples:
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[100.]]), "b": jnp.array([[1.]])}         # G = diag(b², a²)
        >>> result = path_condition(net, w, jnp.ones((1, 1)))
        >>> float(result.params["a"][0, 0]).__round__(3), float(result.params["b"][0, 0]).__round__(3)
        (10.0, 10.0)
    """
    check_parameters(params)
    with widest(apply_fn, (params, x)) as (wide, z):
        network = read(apply_fn, wide, z, masks=masks, paths=True)
        z = network.batch(z, "x")
        units = read_units(network, z[:1])
        slopes = _slopes(network, z)
    check_result(slopes, "the diagonal of G", REMEDY)
    diagonal = np.concatenate([np.asarray(s, np.float64).ravel() for s in slopes])
    if masks is not None:
        diagonal *= np.concatenate([np.broadcast_to(np.asarray(m), np.shape(leaf)).ravel() for m, leaf in
                                    zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True)])
    scales, taken = _conditioned(diagonal, units, steps, tolerance)
    live = diagonal > 0
    moved = np.log(diagonal[live]) + (scales[units.start] - scales[units.end])[live]
    scaled = _scaled(network, params, units, scales[1:] / 2)
    return PathConditioned(scaled, _divergence(np.log(diagonal[live])), _divergence(moved), units.free, taken)


@jax.jit
def _slopes(network: Network, z: Array) -> list[Array]:
    """∂R_2/∂φ at φ = θ², leaf by leaf; zeros of leaves that are not floating."""
    leaves, structure = jax.tree.flatten(network.params)
    moving = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

    def total(phi: Sequence[Array]) -> Array:
        given = dict(zip(moving, phi, strict=True))
        full = jax.tree.unflatten(structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        return evaluate_paths(partial(Polynomial, 2), replace(network, params=full), z, None).sum()

    slopes = dict(zip(moving, jax.grad(total)([leaves[i] ** 2 for i in moving]), strict=True))
    return [slopes.get(i, jnp.zeros(jnp.shape(leaf))) for i, leaf in enumerate(leaves)]


def _conditioned(diagonal: np.ndarray, units: Units, steps: int, tolerance: float) -> tuple[np.ndarray, int]:
    """Minimise the divergence: u of each unit (0 for the one that does not scale), and the steps taken.

    Parameters between the same units scale alike, so that their G_jj count as one. With the shares p of the scaled G_jj
    in their sum, the slope is Bᵀp − Bᵀ1/m and the curvature Bᵀ(diag(p) − p pᵀ)B.
    """
    from scipy.optimize import minimize

    live, n = diagonal > 0, units.free + 1
    if not live.any() or n == 1:
        return np.zeros(n), 0
    pairs, at = np.unique(units.start[live] * n + units.end[live], return_inverse=True)
    start, end = pairs // n, pairs % n
    sizes, shares = np.log(np.bincount(at, diagonal[live] / diagonal.max())), np.bincount(at) / live.sum()

    def differences(u: np.ndarray) -> np.ndarray:
        padded = np.concatenate([[0.0], u])
        return padded[start] - padded[end]

    def transposed(v: np.ndarray) -> np.ndarray:
        return (np.bincount(start, v, n) - np.bincount(end, v, n))[1:]

    def weights(u: np.ndarray) -> tuple[float, np.ndarray]:
        logarithms = sizes + differences(u)
        top = logarithms.max()
        terms = np.exp(logarithms - top)
        return float(np.log(terms.sum()) + top), terms / terms.sum()

    linear = transposed(shares)

    def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, p = weights(u)
        return value - float(linear @ u), transposed(p) - linear

    def curved(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        p = weights(u)[1]
        along = p * differences(v)
        return transposed(along) - transposed(p) * along.sum()

    found = minimize(objective, np.zeros(units.free), jac=True, hessp=curved, method="trust-ncg",
                     options={"gtol": tolerance, "maxiter": steps})
    return np.concatenate([[0.0], found.x]), int(found.nit)


def _divergence(logarithms: np.ndarray) -> float:
    """Logarithm of the arithmetic over the geometric mean of numbers given by their logarithms."""
    if not logarithms.size:
        return 0.0
    top = logarithms.max()
    return float(np.log(np.exp(logarithms - top).mean()) + top - logarithms.mean())


def _scaled(network: Network, params: PyTree, units: Units, logarithms: np.ndarray) -> PyTree:
    """Multiply each parameter by the quotient of its units' factors, given by their natural logarithms."""
    each = np.concatenate([[0.0], logarithms])
    factors = np.exp(each[units.end] - each[units.start])

    def times(tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        parts = np.split(factors, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
        scaled: PyTree = jax.tree.unflatten(structure, [
            _within(name, np.asarray(leaf, np.float64) * part.reshape(np.shape(leaf)), leaf)
            if is_floating(leaf) else leaf
            for name, leaf, part in zip(leaf_names(tree), leaves, parts, strict=True)])
        return scaled

    with jax.enable_x64(network.signal.dtype == np.float64):
        X = jnp.asarray(np.random.default_rng(0).normal(size=(16, *network.signal.shape)), network.signal.dtype)
        before, after = (np.asarray(_outputs(network, p, X)) for p in (network.params, times(network.params)))
    if not np.allclose(after, before, rtol=0, atol=1e-4 * np.abs(before).max()):
        raise NotRescalableError("the network's function changes with the scales of its units, as where a branch is "
                                 "chosen by comparing signals of different units")
    return times(params)


def _within(name: str, scaled: np.ndarray, leaf: Any) -> Array:
    """Scaled numbers in the type of their leaf, which must hold them."""
    limits = jnp.finfo(leaf.dtype)
    size, least = np.abs(scaled), float(limits.tiny)
    lost = (size < least) & (np.abs(np.asarray(leaf, np.float64)) >= least)
    if (size > float(limits.max)).any() or lost.any():
        raise FloatingPointError(f"a scale takes leaf {name!r} out of the range of its type, {leaf.dtype}: pass a "
                                 "smaller spread, or float64 parameters (jax_enable_x64)")
    return jnp.asarray(scaled, leaf.dtype)


_outputs = jax.jit(lambda network, params, X: network.over(params, X))
