"""What every score does with trees: take out the leaves to score, put scores back, refuse NaN."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pkjax.programs.checks import all_finite, check_parameters
from pkjax.pruning.prunable import prunable_leaves
from pkjax.trees import Choice, accumulator, is_floating, leaf_names

__all__ = ["finite", "split", "widened"]

OVERFLOW = (
    "they overflow their type. Pass float64 parameters (jax_enable_x64), scale the loss down, or choose a "
    "score that grows less with depth"
)


def widened(tree: PyTree) -> PyTree:
    """Cast floating-point leaves narrower than float32 to float32, in which scores are computed at least.

    Examples:
        >>> widened({"kernel": jnp.ones(2, jnp.bfloat16), "steps": jnp.array(3)})["kernel"].dtype
        dtype('float32')
    """
    def wide(leaf: Any) -> Any:
        if not is_floating(leaf) or accumulator(jnp.result_type(leaf)) == jnp.result_type(leaf):
            return leaf
        return jnp.asarray(leaf).astype(accumulator(jnp.result_type(leaf)))

    return jax.tree.map(wide, tree)


def split(params: PyTree, prunable: Choice = None) -> tuple[list[Array], Callable[..., PyTree]]:
    """Take out the leaves to score, in float32 or wider, with the function that puts such leaves back.

    ``rebuild(leaves)`` fills the rest with zeros (scores), ``rebuild(leaves, params)`` with the parameters'
    own, widened too.

    Raises:
        ValueError: parameters are complex, NaN or infinite (traced ones pass).
    """
    check_parameters(params)
    everything, structure = jax.tree.flatten(widened(params))
    chosen = prunable_leaves(params, prunable, required=prunable is not None)

    def rebuild(part: Sequence[Array], rest: PyTree | None = None) -> PyTree:
        new = iter(part)
        others = everything if rest is None else jax.tree.leaves(widened(rest))
        filled = [next(new) if want else _zeros(other) if rest is None else other
                  for want, other in zip(chosen, others, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return [jnp.asarray(leaf) for leaf, want in zip(everything, chosen, strict=True) if want], rebuild


def _zeros(leaf: Any) -> Array:
    return jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf) if is_floating(leaf) else jnp.float32)


def finite(scores: PyTree, name: str) -> PyTree:
    """Return the scores; raise FloatingPointError where one is NaN or infinite (traced scores pass)."""
    for leaf_name, leaf in zip(leaf_names(scores), jax.tree.leaves(scores), strict=True):
        if not isinstance(leaf, jax.core.Tracer) and not all_finite(leaf):
            raise FloatingPointError(f"{name} gives scores that are not finite at leaf {leaf_name!r}: {OVERFLOW}")
    return scores
