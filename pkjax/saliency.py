"""Saliencies: how much each weight matters, before training.

Every function takes parameters and returns scores, a tree like the parameters in which a higher score is
kept. All are pure and run under ``jit``. Leaves without a score of their own (integers, keys) score 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from pkjax import paths
from pkjax.trees import ApplyFn, Predicate, is_floating, kernels, leaf_names, select

__all__ = ["Loss", "grasp", "magnitude", "random", "snip", "synflow", "synflow_l2"]

Loss = Callable[[PyTree], Float[Array, ""]]
"""A loss of the parameters alone: the batch, labels and temperature are inside."""

OVERFLOW = (
    "they overflow their type. Pass float64 parameters (jax_enable_x64), scale the loss down, or choose a "
    "score that grows less with depth"
)


def random(params: PyTree, *, key: Key[Array, ""]) -> PyTree:
    """Score weights at random, uniformly in [0, 1): the baseline of pruning without information.

    The same key gives the same scores, so pruning in several steps ranks the weights alike in every step.

    Raises TypeError where ``key`` is no typed key.

    >>> import jax, jax.numpy as jnp
    >>> scores = random({"kernel": jnp.ones((3, 2))}, key=jax.random.key(0))
    >>> scores["kernel"].shape
    (3, 2)
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(f"random needs a typed key, jax.random.key(seed), but got {key!r}")
    leaves, rebuild = _split(params, None)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.uniform(k, t.shape, t.dtype) for k, t in zip(keys, leaves, strict=True)]
    return rebuild(draws)


def magnitude(params: PyTree) -> PyTree:
    """Score weights by their size.

        S = |θ|

    >>> import jax.numpy as jnp
    >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[2.0, 1.0]]
    """
    leaves, rebuild = _split(params, None)
    return rebuild([jnp.abs(leaf) for leaf in leaves])


def snip(loss_fn: Loss, params: PyTree) -> PyTree:
    """Score weights by how strongly the loss reacts to their removal, to first order.

        S = |θ ∘ ∂L/∂θ|

    ``loss_fn(params)`` is the loss of one labelled batch, a scalar. Source: SNIP, Lee et al. 2019,
    without the normalisation, which changes no order; Gebhart et al. 2021, section 4.1.

    Raises TypeError where the loss is no scalar, and FloatingPointError where a score is not finite.

    >>> import jax.numpy as jnp
    >>> snip(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[8.0, 2.0]]
    """
    leaves, rebuild = _split(params, None)
    gradient = jax.grad(lambda part: loss_fn(rebuild(part, params)))(leaves)
    return _finite(rebuild([jnp.abs(t * g) for t, g in zip(leaves, gradient, strict=True)]), "snip")


def grasp(loss_fn: Loss, params: PyTree, *, prunable: Predicate = kernels) -> PyTree:
    """Score weights by how much they help the gradient flow, to first order.

        S = θ ∘ (H g),   g = ∂L/∂θ,   H = ∂²L/∂θ²

    over the prunable weights alone; the others score 0. Scores have both signs. The lowest are pruned: the
    order of the original authors' code (the papers write −(H g) ∘ θ, of which that code prunes the
    highest). The published code divides the logits by a temperature of 200 inside the loss. Costs one
    Hessian-vector product, forward over reverse. Source: GraSP, Wang et al. 2020; Gebhart et al. 2021,
    section 4.3.

    Raises ValueError where no leaf is prunable, TypeError where the loss is no scalar or a prunable leaf
    holds no floating-point numbers, and FloatingPointError where a score is not finite.

    >>> import jax.numpy as jnp
    >>> grasp(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[16.0, 4.0]]
    """
    leaves, rebuild = _split(params, prunable)
    gradient_fn = jax.grad(lambda part: loss_fn(rebuild(part, params)))
    gradient = gradient_fn(leaves)
    _, product = jax.jvp(gradient_fn, (leaves,), (gradient,))
    return _finite(rebuild([t * h for t, h in zip(leaves, product, strict=True)]), "grasp")


def synflow(apply_fn: ApplyFn, params: PyTree, x: Float[Array | np.ndarray, "N *input"], *,
            pool: str = "sum", return_exponent: bool = False) -> PyTree:
    """Score weights by the ℓ1 path norm that flows through them: SynFlow.

        S = |θ| ∘ ∂R_1/∂|θ|,   R_1 = Σ_k R_1(|θ|, x)_k

    with the path polynomial R_q of the network (``pkjax.paths.polynomial``): every activation linear, every
    constant by its absolute value. With x of ones it needs no data; with x the mean of the inputs
    (``pkjax.mean_input``) it is SynFlow-Dist. ``pool="max"`` leaves max-pooling in place as the published
    code does, where "sum" counts every path. Source: Tanaka et al. 2020; Gebhart et al. 2021, equation 16.

    Scores are computed as multiples of a power of two, so that no depth makes them overflow or vanish. They come out
    as they are where R_1 lies between 2^−32 and 2^64 (float32; between 2^−256 and 2^512 in float64), and divided by the
    power of two 2^exponent that brings it there elsewhere; ``return_exponent=True`` returns (scores, exponent).

    Raises ValueError where x is negative or not finite, and FloatingPointError where a score is not finite.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
    >>> synflow(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)))["kernel"].tolist()
    [[2.0], [1.0]]
    """
    return _path_scores(apply_fn, params, x, 1, 1, pool, return_exponent, "synflow")


def synflow_l2(
    apply_fn: ApplyFn,
    params: PyTree,
    x: Float[Array | np.ndarray, "N *input"],
    *,
    variant: str = "paper",
    pool: str = "sum",
    return_exponent: bool = False,
) -> PyTree:
    """Score weights by the squared ℓ2 path norm that flows through them: SynFlow-L2.

        S = |θ| ∘ ∂R_2/∂θ²     variant "paper"
        S = θ² ∘ ∂R_2/∂θ²      variant "conserved": the saliency of R_2, conserved from layer to layer
        S = θ² ∘ ∂R_1/∂|θ|     variant "released": the authors' code

    with R_2 = Σ_k R_2(θ², x)_k, the squared ℓ2 path norm. x, ``pool`` and ``return_exponent`` as in ``synflow``;
    with x the mean of the inputs it is SynFlow-L2-Dist. Source: Gebhart et al. 2021, section 4.2 and equation 15.

    Raises ValueError where the variant is unknown or x is negative or not finite, and FloatingPointError
    where a score is not finite.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
    >>> scores = synflow_l2(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)), variant="conserved")
    >>> scores["kernel"].tolist()
    [[4.0], [1.0]]
    """
    weights = {"paper": (1, 2), "conserved": (2, 2), "released": (2, 1)}
    if variant not in weights:
        raise ValueError(f"variant must be one of {', '.join(map(repr, weights))}, but got {variant!r}")
    power, q = weights[variant]
    return _path_scores(apply_fn, params, x, power, q, pool, return_exponent, f"synflow_l2(variant={variant!r})")


def _path_scores(apply_fn: ApplyFn, params: PyTree, x: Array | np.ndarray, power: int, q: int, pool: str,
                 return_exponent: bool, name: str) -> PyTree:
    """|θ|^power ∘ ∂R_q/∂φ at φ = |θ|^q, and the power of two that it is over."""
    x = _checked_input(x)
    leaves, rebuild = _split(params, None)
    sizes = [jnp.abs(leaf) for leaf in leaves]

    def objective(phi: list[Array]) -> tuple[Array, Array]:
        mantissa, exponent = paths.scaled_polynomial(apply_fn, rebuild(phi, params), x, q=q, pool=pool,
                                                       skip_zeros=True)
        return jnp.sum(mantissa), exponent

    total, pull, exponent = jax.vjp(objective, [t * t if q == 2 else t for t in sizes], has_aux=True)
    largest = jnp.finfo(total.dtype).maxexp // 2
    kept = jnp.clip(exponent, -largest // 2, largest)
    (slopes,) = pull(paths.power_of_two(kept, total.dtype))
    scores = [(t * t if power == 2 else t) * g for t, g in zip(sizes, slopes, strict=True)]
    tree = _finite(rebuild(scores), name)
    return (tree, exponent - kept) if return_exponent else tree


def _split(params: PyTree, predicate: Predicate | None) -> tuple[list[Array], Callable[..., PyTree]]:
    """Take out the leaves to score, floating or chosen, with the function that puts such leaves back.

    ``rebuild(leaves)`` fills the rest with zeros (scores), ``rebuild(leaves, params)`` with the parameters'
    own.
    """
    everything, structure = jax.tree.flatten(params)
    chosen = [is_floating(leaf) for leaf in everything]
    if predicate is not None:
        wanted = jax.tree.leaves(select(predicate, params))
        if not any(wanted):
            raise ValueError(f"prunable selects no leaf of params (leaves: {', '.join(leaf_names(params))})")
        for name, want, floating in zip(leaf_names(params), wanted, chosen, strict=True):
            if want and not floating:
                raise TypeError(f"prunable selects the leaf {name!r}, which holds no floating-point numbers")
        chosen = wanted

    def rebuild(part: Sequence[Array], rest: PyTree | None = None) -> PyTree:
        new = iter(part)
        others = [_zeros(leaf) for leaf in everything] if rest is None else jax.tree.leaves(rest)
        filled = [next(new) if want else other for want, other in zip(chosen, others, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return [jnp.asarray(leaf) for leaf, want in zip(everything, chosen, strict=True) if want], rebuild


def _zeros(leaf: Any) -> Array:
    return jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf) if is_floating(leaf) else jnp.float32)


def _checked_input(x: Array | np.ndarray) -> Array:
    if isinstance(x, jax.core.Tracer):
        return x
    values = np.asarray(x)
    if not np.isfinite(values).all():
        raise ValueError("x holds NaN or infinity: the input of a path norm is finite and not negative")
    if (values < 0).any():
        raise ValueError(
            f"x must not be negative, but its smallest entry is {values.min()}: a path norm weighs "
            "each path by its input. Pass ones, the mean of the raw inputs, or absolute values "
            "(pk.mean_input)"
        )
    return jnp.asarray(x)


def _finite(scores: PyTree, name: str) -> PyTree:
    """Let no infinity or NaN out unnoticed; under ``jit`` it is ``prune`` that looks."""
    for leaf_name, leaf in zip(leaf_names(scores), jax.tree.leaves(scores), strict=True):
        if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.isfinite(leaf).all()):
            raise FloatingPointError(f"{name} gives scores that are not finite at leaf {leaf_name!r}: {OVERFLOW}")
    return scores
