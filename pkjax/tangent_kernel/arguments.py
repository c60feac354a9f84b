"""A network as a function of what trains: the closure that everything about Θ differentiates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pkjax.programs.program import BoundProgram

__all__ = ["restrict"]


def restrict(fn: BoundProgram, params: PyTree, entries: list[Any]
             ) -> tuple[Callable[[list[Array], Array], Array], list[Array]]:
    """Make the network, for one example, a function of the leaves that train.

    Args:
        fn: the network's program for one example.
        params: its parameters.
        entries: for each leaf which of its entries train, None where none does; the others are held fixed.

    Returns:
        A function that maps (leaves that train, x (*input)) to outputs (K,), and these leaves.
    """
    leaves, treedef = jax.tree.flatten(params)
    moving = {i: mask for i, mask in enumerate(entries) if mask is not None}

    def restricted(theta: list[Array], x: Array) -> Array:
        full = list(leaves)
        for (i, mask), value in zip(moving.items(), theta, strict=True):
            full[i] = jnp.where(mask, value, leaves[i])
        return fn(jax.tree.unflatten(treedef, full), x[None])[0]

    return restricted, [jnp.asarray(leaves[i]) for i in moving]
