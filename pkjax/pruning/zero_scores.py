"""Scores of exactly 0: when they decide what is pruned, and which parameters of 0 stand behind them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.pruning.result import LayerReport
from pkjax.tables import listed
from pkjax.trees import is_floating, leaf_names

__all__ = ["LEAVE_OUT", "ZeroScoresWarning", "leaves_behind", "pathless_parts", "warn_of_parts",
           "warn_of_zero_scores"]

ADDED = frozenset(("bias", "offset", "beta"))
"""Names of parameters that are added to signals: zeros there hide no other parameter."""
SINGLY = 32
"""Up to how many leaves of one name are tried one by one."""


LEAVE_OUT = ("With frozen gates, what only makes coefficients (queries, keys, a gated unit's gate) lies on no path "
             "and scores 0, so that it goes first: leave it out with prunable=pk.on_paths(apply_fn, params, x, "
             'gates="frozen")')
"""What to do about leaves that score 0 because they lie on no path."""
LARGE = 4
"""A part of a leaf is told of where it is one in so many of its weights or more."""


class ZeroScoresWarning(UserWarning):
    """Scores of exactly 0 decide what is pruned, and say nothing of the weights.

    Given by ``prune``, which names the leaves of zeros that stand behind them.

    Examples:
        >>> import warnings, jax.numpy as jnp, pkjax as pk
        >>> net = lambda p, x: (x @ p["kernel"]) * p["scale"]
        >>> params, ones = {"kernel": jnp.ones((4, 3)), "scale": jnp.zeros(3)}, jnp.ones((1, 4))
        >>> with warnings.catch_warnings(record=True, action="always") as given:
        ...     result = pk.prune(lambda p: pk.synflow(net, p, ones), params, density=0.5)
        >>> [warning.category.__name__ for warning in given], result.zero_scores
        (['ZeroScoresWarning'], 12)
    """


def warn_of_zero_scores(zeros: np.ndarray, kept: np.ndarray, total: int, params: PyTree,
                        count: Callable[[PyTree], int] | None) -> None:
    """Warn where weights with a score of 0 are pruned because a leaf is 0, or as most are, while others of 0 are kept.

    Args:
        zeros: (steps, leaves), live scores of 0.
        kept: (steps, leaves), weights that are kept with a score of 0.
        total: how many weights are prunable.
        params: the parameters.
        count: how many scores of the first step are 0 of other parameters; None where that would cost too much.
    """
    pruned, left = int((zeros - kept).sum()), int(kept[-1].sum())
    if not pruned:
        return
    first = int(zeros[0].sum())
    behind = leaves_behind(params, first, count) if first and count is not None else []
    names = behind if count is not None else [name for name, _ in _empty(params)]
    if not names and not (left and 2 * first >= total):      # a few dead weights, which none knows better than others
        return
    told = f"{first:,} of {total:,} scores are exactly 0"
    if left:
        told += f", and {left:,} of the weights that are kept have such a score: position decides which ones"
    if names:
        shown = listed(names)
        told += (f". Parameters that are all 0 stand behind them: {shown}" if behind else
                 f". Parameters that are all 0 may stand behind them: {shown}")
        told += ". Score with ones in their place, or after a few steps of training"
    warnings.warn(f"{told}. See the guide to pruning, 'Scores that are all 0'", ZeroScoresWarning, stacklevel=4)


def pathless_parts(zeros: np.ndarray, zeros_kept: np.ndarray, kept: np.ndarray, layers: Sequence[LayerReport]
                   ) -> dict[str, int]:
    """Name the leaves of which all scores, or a large part, are 0 from the start, and all these weights are pruned.

    Args:
        zeros: (steps, leaves), live scores of 0.
        zeros_kept: (steps, leaves), weights that are kept with a score of 0.
        kept: (steps, leaves), weights that are kept.
        layers: the prunable leaves.

    Returns:
        Name → how many scores are 0.

    Examples:
        >>> layers = [LayerReport("query", (4,), 0, 4, True), LayerReport("value", (4,), 2, 4, False)]
        >>> pathless_parts(np.array([[4, 0]]), np.array([[0, 0]]), np.array([[0, 2]]), layers)
        {'query': 4}
    """
    return {layer.name: int(zero) for layer, zero, tied, left in zip(layers, zeros[0], zeros_kept[-1], kept[-1],
                                                                    strict=True)
            if LARGE * zero >= layer.total > 0 and left < layer.total and not tied}


def warn_of_parts(pathless: Mapping[str, int], layers: Sequence[LayerReport]) -> None:
    """Warn of leaves that lose a part which lies on no path, and keep others of their weights."""
    parts = [f"{pathless[layer.name]:,} of {layer.total:,} in {layer.name}" for layer in layers
             if layer.name in pathless and not layer.emptied]
    if parts:
        warnings.warn(f"scores are exactly 0 for {listed(parts)}, and all these weights are pruned. {LEAVE_OUT}",
                      ZeroScoresWarning, stacklevel=4)


def leaves_behind(params: PyTree, zeros: int, count: Callable[[PyTree], int]) -> list[str]:
    """Name the leaves of nothing but zeros that make scores 0.

    With ones in all such leaves fewer scores are 0; a leaf stands behind them if putting its zeros back makes more 0.

    Args:
        params: the parameters.
        zeros: how many scores are 0.
        count: how many are of other parameters.

    Examples:
        >>> params = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2)), "scale": jnp.zeros(2)}
        >>> leaves_behind(params, 6, lambda p: 0 if p["scale"].any() else 6)
        ['scale']
    """
    empty = _empty(params)
    if not empty:
        return []
    names, behind = leaf_names(params), []
    filled = count(_filled(params, [i for _, i in empty]))
    if filled >= zeros:
        return []
    kinds: dict[str, list[int]] = {}
    for name, i in empty:
        kinds.setdefault(name.rsplit("/", 1)[-1], []).append(i)
    for members in kinds.values():
        if len(kinds) > 1 and count(_filled(params, [i for _, i in empty if i not in members])) <= filled:
            continue
        if 1 < len(members) <= SINGLY:
            members = [i for i in members if count(_filled(params, [j for _, j in empty if j != i])) > filled]
        behind += members
    return [names[i] for i in sorted(behind)]


def _empty(params: PyTree) -> list[tuple[str, int]]:
    """Names and places of the leaves of zeros that may hide other parameters."""
    def hides(name: str, leaf: Any) -> bool:
        last = name.rsplit("/", 1)[-1]
        return (is_floating(leaf) and np.size(leaf) > 0 and last not in ADDED and (last != "b" or np.ndim(leaf) > 1)
                and not np.asarray(leaf).astype(np.float64).any())

    pairs = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    return [(name, i) for i, (name, leaf) in enumerate(pairs) if hides(name, leaf)]


def _filled(params: PyTree, which: Sequence[int]) -> PyTree:
    """Put ones in the place of leaves."""
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [jnp.ones_like(leaf) if i in which else leaf for i, leaf in enumerate(leaves)])
