"""Norms of the vector of path values Φ(θ), and distances between maskings, at any depth."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.batch_norm import check_convention, power_values
from pkjax.paths.differences import changed_leaves, lost_paths, masked_leaves
from pkjax.paths.exponents import added, log_of, plain, shifted
from pkjax.paths.magnitudes import Magnitudes, magnitudes
from pkjax.paths.scaled import widest
from pkjax.programs.checks import HOLDS, REMEDY, check_parameters, check_result
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, check_masks

__all__ = ["distance", "norm"]


@automatic_axes
def norm(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, q: float | int = 1,
         masks: PyTree | None = None, batch_norm: str = "paths", pool: str = "sum", log: bool = False
         ) -> Float[Array, ""]:
    """Path norm of a network: the ℓq norm of the vector of all path values, by one forward pass.

        ‖Φ(θ)‖_q = (Σ_p |v_p(θ)|^q)^(1/q) = (Σ_k R_q(|θ|^q, 1)_k)^(1/q)

    The paths of all outputs count, those that start at biases included. Computed in float64 (in the type of the
    parameters under jit, vmap and grad), with exponents kept aside: no depth makes it overflow.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), ones (``pkjax.ones_input``); other start values weigh the paths from each input.
        q: a whole number of at least 1.
        masks: booleans like ``params``; a masked weight carries no path.
        batch_norm: what becomes of a frozen BatchNorm's mean μ before its scale c γ and its bias β: "paths" of values
            |μ c γ| and |β|, "folded" into one bias of value |β − μ c γ|, or "signed": subtracted, with the activations
            in place. All three agree where μ = 0.
        pool: "sum" (paths: a max-pool adds its window) or "max" (max-pools stay, as they must with "signed").
        log: return the natural logarithm of the norm, which stays in range at any depth; −∞ where no path is left.

    Returns:
        A scalar. Differentiable in ``params``.

    Raises:
        ValueError: q is not a whole number of at least 1; an unknown convention or pooling; an ``x`` that is not a
            batch of one or has negative entries; mismatched masks, numbers that are not finite.
        NotPathNetworkError: an operation has no paths.
        FloatingPointError: the norm is outside of the range of its type (with ``log`` there is no such bound), or
            "signed" means add up to less than 0 (neither is checked under jit).

    Source: Gonon, Brisebarre, Riccietti and Gribonval (2024), definition 3.1 (arXiv 2310.01225), with "folded";
        Neyshabur, Tomioka and Srebro (2015); Tanaka et al. (2020) for "signed".

    Examples:
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [2.]])}
        >>> float(norm(net, w, jnp.ones((1, 1)))), float(norm(net, w, jnp.ones((1, 1)), q=2))  # of (3, −4)
        (7.0, 5.0)
    """
    q = _whole(q)
    check_convention(batch_norm, pool)
    check_parameters(params)

    def evaluate(network: Network, z: Array) -> tuple[Array, Array]:
        known = magnitudes(network, z, q)
        for sizes in (known, known.careful):
            mantissa, exponent, sure = _sum(network, z, known=sizes, q=q, batch_norm=batch_norm, pool=pool)
            if not sizes.lean or bool(sure):
                break
        return mantissa, exponent

    if _traced(params, x, masks):
        network = read(apply_fn, params, x, masks=masks, paths=True)
        return _root(*evaluate(network, _start(network, x)), q, log)
    with widest(apply_fn, (params, x)) as (params, x):
        network = read(apply_fn, params, x, masks=masks, paths=True)
        mantissa, exponent = evaluate(network, _start(network, x))
    return _rooted(mantissa, exponent, q, log, "the path norm")


@automatic_axes
def distance(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], masks_a: PyTree,
             masks_b: PyTree | None = None, *, q: float | int = 1, log: bool = False) -> Float[Array, ""]:
    """Path distance of two maskings of one network: the ℓq norm of the difference of their path values.

        ‖Φ(θ∘a) − Φ(θ∘b)‖_q = (R_q(a) + R_q(b) − 2 R_q(a ∧ b))^(1/q),   R_q(m) = Σ_k R_q(|θ∘m|^q, 1)_k

    A path contributes where one masking keeps all of it and the other does not. These paths are summed themselves, by
    one forward pass that knows for each sum which part of it both maskings keep: nothing is subtracted, so that the
    distance of maskings that differ in one weight is as accurate as a norm.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), ones (``pkjax.ones_input``); other start values weigh the paths from each input.
        masks_a: booleans like ``params``.
        masks_b: booleans like ``params``; None is the network without masks.
        q: a whole number of at least 1.
        log: return the natural logarithm of the distance; −∞ where no path tells the maskings apart.

    Returns:
        A scalar, in the types of ``norm``.

    Raises:
        ValueError: as for ``norm``.
        NotPathNetworkError: an operation has no paths.
        FloatingPointError: the distance is outside of the range of its type (not checked under jit).

    Source: Gonon, Brisebarre, Riccietti and Gribonval (2025), for nested masks (arXiv 2405.15006).

    Examples:
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [2.]])}
        >>> masks = {"a": jnp.array([[True, False]]), "b": jnp.array([[True], [True]])}
        >>> float(distance(net, w, jnp.ones((1, 1)), masks))     # the path of value −4 is gone
        4.0
    """
    q = _whole(q)
    check_parameters(params)
    for masks in (masks_a, masks_b):
        check_masks(masks, params)
    traced = _traced(params, x, masks_a, masks_b)

    def evaluate(params: PyTree, x: PyTree) -> tuple[Array, Array]:
        network = read(apply_fn, params, x, paths=True)
        a, b = masked_leaves(masks_a, params), masked_leaves(masks_b, params)
        return _parted(network, _start(network, x), a, b, q=q, changed=changed_leaves(masks_a, masks_b))

    if traced:
        return _root(*evaluate(params, x), q, log)
    with widest(apply_fn, (params, x)) as (params, x):
        mantissa, exponent = evaluate(params, x)
    return _rooted(mantissa, exponent, q, log, "the path distance")


@compiled_for_few_calls(static_argnames=("known", "q", "batch_norm", "pool"))
def _sum(network: Network, z: Array, *, known: Magnitudes, q: int, batch_norm: str, pool: str
         ) -> tuple[Array, Array, Array]:
    mantissa, exponent, sure = power_values(network, z, q, batch_norm, pool, known)
    return mantissa.sum(), exponent, sure


@compiled_for_few_calls(static_argnames=("q", "changed"))
def _parted(network: Network, z: Array, a: Sequence[Array], b: Sequence[Array], *, q: int, changed: tuple[bool, ...]
            ) -> tuple[Array, Array]:
    """The sum over the paths that one of two maskings keeps, and its exponent."""
    common = [one & other for one, other in zip(a, b, strict=True)]
    sides = [lost_paths(network, z[0], q, common, alive, changed) for alive in (a, b)]
    return added(jnp.stack([mantissa.sum() for mantissa, _ in sides]), jnp.stack([exponent for _, exponent in sides]))


def _root(mantissa: Array, exponent: Array, q: int, log: bool) -> Array:
    """(mantissa · 2^exponent)^(1/q), or its natural logarithm."""
    if log:
        return log_of(mantissa, exponent) / q
    rest = exponent % q
    # Where no path is left, the root has no derivative: 0 is one.
    base = jnp.where(mantissa == 0, 1, shifted(mantissa, rest))
    return plain(jnp.where(mantissa == 0, 0, base ** (1 / q)), exponent // q)


def _rooted(mantissa: Array, exponent: Array, q: int, log: bool, what: str) -> Array:
    """The same in JAX's default type, of known numbers that are checked."""
    check_result(mantissa, what, HOLDS)
    number, power = float(mantissa), int(exponent)
    if number < 0:
        raise FloatingPointError(f'{what} is not a norm here: with batch_norm="signed" the outputs add up to less than '
                                 '0; use "paths" or "folded"')
    logarithm = (math.log(number) + power * math.log(2)) / q if number else -math.inf
    if log:
        return jnp.asarray(logarithm)
    dtype = jax.dtypes.canonicalize_dtype(float)
    limits = jnp.finfo(dtype)
    if number and not int(limits.minexp) <= logarithm / math.log(2) < int(limits.maxexp):
        raise FloatingPointError(f"{what} is 10^{logarithm / math.log(10):.4g}, outside of what {dtype} holds: pass "
                                 f"log=True for its logarithm; or {REMEDY}")
    return jnp.asarray(math.ldexp((number * 2.0 ** (power % q)) ** (1 / q), power // q))


def _whole(q: Any) -> int:
    if isinstance(q, bool) or not math.isfinite(q) or q != int(q) or q < 1:
        raise ValueError(f"q must be a whole number of at least 1, but is {q}")
    return int(q)


def _traced(*trees: PyTree) -> bool:
    return any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(trees))


def _start(network: Network, x: PyTree) -> Array:
    """The start values of paths: one example's signals, which are at least 0."""
    z = network.batch(x, "x")
    if len(z) != 1:
        raise ValueError(f"x must be a batch of one, (1, *input), but has shape {jax.tree.map(jnp.shape, x)}")
    if not isinstance(z, jax.core.Tracer) and bool((np.asarray(z) < 0).any()):
        raise ValueError(f"x must not be negative, but its smallest entry is {np.asarray(z).min()}: it holds the start "
                         "values of paths; pass ones (pkjax.ones_input), or magnitudes")
    return z
