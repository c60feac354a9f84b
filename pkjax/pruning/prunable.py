"""Which leaves are pruned."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.trees import Choice, is_floating, leaf_names, select

__all__ = ["prunable_leaves"]


def prunable_leaves(params: PyTree, prunable: Choice, *, required: bool = True) -> list[bool]:
    """Say of every leaf of the parameters, in flattening order, whether it is prunable.

    Args:
        params: the parameters.
        prunable: a predicate, a tree of single booleans, or None (see ``pkjax.trees.select``).
        required: raise where no weight is chosen.

    Raises:
        ValueError: no weight is chosen, or a tree of booleans has other leaves than ``params``.
        TypeError: a chosen leaf does not hold floating-point numbers, or ``prunable`` chooses among a leaf's entries.

    Examples:
        >>> import jax.numpy as jnp
        >>> prunable_leaves({"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}, {"bias": False, "kernel": True})
        [False, True]
    """
    names, leaves = leaf_names(params), jax.tree.leaves(params)
    chosen = []
    for name, leaf, choice in zip(names, leaves, jax.tree.leaves(select(prunable, params)), strict=True):
        if np.ndim(choice):
            raise TypeError(f"prunable chooses among the entries of the leaf {name!r}, but must be one boolean a "
                            "leaf; pass masks to keep single weights out")
        chosen.append(bool(choice))
        if chosen[-1] and not is_floating(leaf):
            raise TypeError(f"prunable selects the leaf {name!r}, which holds no floating-point numbers but "
                            f"{jnp.result_type(leaf)}")
    if required and not any(np.size(leaf) for leaf, choice in zip(leaves, chosen, strict=True) if choice):
        raise ValueError(f"prunable selects no weight of params (leaves: {', '.join(names) or 'none'}): pass a "
                         "function of (key path, leaf) that is True for the leaves to prune, or a tree of booleans")
    return chosen
