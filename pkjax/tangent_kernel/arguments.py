"""A network as a function of what trains: the checks and the closures that everything about Θ begins with."""

import contextlib
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.trees import (
    ApplyFn,
    Trainable,
    apply_masks,
    check_finite,
    check_masks,
    check_network,
    hashable,
    is_floating,
    shapes,
    trainable_leaves,
    trainable_masks,
)

__all__ = ["chosen", "prepare", "restrict"]


def prepare(apply_fn: ApplyFn, params: PyTree, X: Array, masks: PyTree | None, trainable: Trainable
            ) -> tuple[PyTree, list[Any], tuple[bool, ...]]:
    """Check the input; return masked parameters, and what of each leaf trains, as ``chosen`` says it."""
    leaves, treedef = jax.tree.flatten(shapes((params, X)))
    _check_network(hashable(apply_fn), tuple(leaves), treedef)
    entries, whole = chosen(params, masks, trainable)
    check_finite(params, "params")
    check_finite(X, "X")
    return apply_masks(params, masks), entries, whole


def chosen(params: PyTree, masks: PyTree | None, trainable: Trainable) -> tuple[list[Any], tuple[bool, ...]]:
    """Say which entries of each leaf train (None: none does; a single True: all), and of which leaves all do."""
    check_masks(masks, params)
    leaves = jax.tree.leaves(trainable_leaves(params, trainable))
    if masks is None and all(isinstance(train, bool) for train in leaves):
        return [np.ones((), bool) if train else None for train in leaves], tuple(leaves)
    given = [leaf for leaf in jax.tree.leaves((masks, trainable)) if not callable(leaf)]
    # Booleans known while tracing stay known, so that whole layers keep their cheaper route under jit.
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in given)
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        train = jax.tree.leaves(trainable_masks(params, trainable, masks))
    flags = [(bool(np.asarray(t).any()), bool(np.asarray(t).all())) if known else (True, False) for t in train]
    entries = [t if some and is_floating(leaf) else None
               for t, (some, _), leaf in zip(train, flags, jax.tree.leaves(params), strict=True)]
    return entries, tuple(all_ for _, all_ in flags)


@lru_cache(maxsize=256)
def _check_network(apply_fn: ApplyFn, leaves: tuple[Any, ...], treedef: Any) -> None:
    """Check a network once for each set of shapes."""
    check_network(apply_fn, *jax.tree.unflatten(treedef, leaves))


def restrict(apply_fn: ApplyFn, params: PyTree, entries: list[Any]) -> tuple[ApplyFn, list[Array]]:
    """Make the network a function of the leaves that train; entries that do not train are held fixed."""
    leaves, treedef = jax.tree.flatten(params)
    moving = {i: mask for i, mask in enumerate(entries) if mask is not None}

    def restricted(theta: list[Array], x: Array) -> Array:
        full = list(leaves)
        for (i, mask), value in zip(moving.items(), theta, strict=True):
            full[i] = jnp.where(mask, value, leaves[i])
        return apply_fn(jax.tree.unflatten(treedef, full), x)

    return restricted, [leaves[i] for i in moving]
