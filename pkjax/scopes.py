"""Which weights compete with which for a place in the pruned network.

A scope is a function (key path, leaf) → label. Prunable leaves with equal labels form one group, and every
group keeps ``round(density · size of the group)`` weights.
"""

from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["Scope", "global_scope", "layer_scope"]

Scope = Callable[[tuple[Any, ...], Any], Hashable]
"""Maps (key path, leaf) to the label of the group in which the leaf's weights compete."""


def global_scope(path: tuple[Any, ...], leaf: Any) -> Hashable:
    """All prunable weights compete with each other: one threshold for the whole network.

    >>> global_scope((), 0.0) == global_scope((1,), 1.0)
    True
    """
    return "all"


def layer_scope(path: tuple[Any, ...], leaf: Any) -> Hashable:
    """Each prunable leaf keeps the same fraction of its own weights: one threshold per layer.

    >>> from jax.tree_util import DictKey
    >>> layer_scope((DictKey("first"),), 0.0) == layer_scope((DictKey("last"),), 0.0)
    False
    """
    return path
