"""BatchNorm's running averages from a few batches, for scores of a network that has not been trained."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.pruning.scores.batches import Inputs, inputs
from pkjax.training.flax_modules import Forward, placed, split_module
from pkjax.trees import apply_masks, leaf_names

__all__ = ["warm_batch_norm"]


def warm_batch_norm(module: Any, X: Inputs, *, variables: PyTree | None = None, masks: PyTree | None = None,
                    seed: int = 0) -> Any:
    """Set BatchNorm's running averages to those of some batches, and leave everything else as it is.

        mean = Σ_b n_b mean_b / Σ_b n_b,   var = Σ_b n_b var_b / Σ_b n_b

    over the batches b of n_b examples, where mean_b and var_b are what the layer normalises the batch by in training
    mode (var_b divides by the number of its entries). Scores take networks in evaluation mode, whose averages are 0 and
    1 at initialisation: with these, signals have the size that they have in training. Momentum plays no part: one batch
    gives its own averages, to 1e-5 in float32.

    Averages are found from two updates of each batch, from averages of 0 and of a large number: any layer whose update
    is m · old + (1 − m) · new is understood, and one that does not update keeps what it has.

    Args:
        module: a Linen or NNX module; its arguments put BatchNorm and Dropout into training mode, as in `fit`.
        X: one batch (N, *input), or an iterable of batches.
        variables: a Linen module's variables, as `module.init` returns them.
        masks: booleans like the parameters, for the averages of the pruned network.
        seed: seed of Dropout.

    Returns:
        A Linen module's variables with new averages, or a copy of an NNX module.

    Raises:
        TypeError: `module` is not a Flax module.
        ValueError: the module has no running averages, or updates them in another way; a Linen module comes without
            variables; X is empty, holds NaN, or its batches differ in the shape of an example.

    Source: the warm-up of arXiv 2502.11450; averages over batches as in PyTorch's BatchNorm with `momentum=None`.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> norm = nn.BatchNorm()
        >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]], jnp.float32)
        >>> variables = norm.init(jax.random.key(0), x, use_running_average=True)
        >>> warm = warm_batch_norm(norm, x, variables=variables)
        >>> warm["batch_stats"]["mean"].round(4).tolist(), warm["batch_stats"]["var"].round(4).tolist()
        ([2.0, 0.0], [1.0, 0.0])
    """
    import flax.linen as nn

    if isinstance(module, nn.Module) and variables is None:
        raise ValueError("a Linen module needs its variables: pass variables=module.init(key, x)")
    first, stream = inputs(X)
    net = split_module(module, variables, first, seed)
    params = net.params if masks is None else apply_masks(net.params, masks)
    old, update, rebuild = _averages(net.forward, net.state, jax.random.key(seed), type(module).__name__)
    leaves, structure = jax.tree.flatten(old)
    moving, momenta = [True] * len(leaves), [0.0] * len(leaves)
    total, count = [jnp.zeros_like(leaf) for leaf in leaves], 0

    def updated(value: float, batch: Array) -> list[Array]:
        """Update averages that are all of this value, where the layer updates them at all."""
        held = [jnp.full_like(leaf, value) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
        return jax.tree.leaves(update(params, jax.tree.unflatten(structure, held), batch))

    for size, batch in stream:
        if not count:
            moving = [any(pair) for pair in zip(*(_moved(update, params, jax.tree.map(lambda v, d=d: v + d, old), batch)
                                                  for d in (0, 1)), strict=True)]
        own = updated(0.0, batch)
        if not count:
            largest = max([1.0, *(float(jnp.abs(v).max(initial=0)) for v in own)])
            far = 1024.0 * 2.0 ** math.ceil(math.log2(largest))
            momenta = [_momentum(name, a, b, far) if moves else 1.0 for name, moves, a, b in zip(
                leaf_names(old), moving, own, updated(far, batch), strict=True)]
        total, count = [t + size * v for t, v in zip(total, own, strict=True)], count + size
    new = [(t / (count * (1 - m))).astype(leaf.dtype) if moves else leaf
           for leaf, moves, t, m in zip(leaves, moving, total, momenta, strict=True)]
    module, variables = placed(module, net.params, rebuild(jax.tree.unflatten(structure, new)))
    return module if variables is None else variables


Update = Callable[[PyTree, PyTree, Array], PyTree]
"""(params, averages, batch) → averages."""


def _averages(forward: Forward, state: PyTree, key: Array, name: str
              ) -> tuple[PyTree, Update, Callable[[PyTree], PyTree]]:
    """Take the running averages out of a module's state: they, their update by a batch, and how to put others back."""
    from flax import nnx

    if isinstance(state, nnx.State):
        averages, rest = nnx.split_state(state, nnx.BatchStat, ...)

        def rebuild(averages: PyTree) -> PyTree:
            return nnx.merge_state(averages, rest)

        def taken(state: PyTree) -> PyTree:
            return nnx.filter_state(state, nnx.BatchStat)
    else:
        averages = state.get("batch_stats", {})

        def rebuild(averages: PyTree) -> PyTree:
            return {**state, "batch_stats": averages}

        def taken(state: PyTree) -> PyTree:
            return state["batch_stats"]

    if not jax.tree.leaves(averages):
        raise ValueError(f"{name} has no running averages of BatchNorm to set")
    return averages, jax.jit(lambda params, averages, x: taken(forward(params, rebuild(averages), x, key)[1])), rebuild


def _moved(update: Update, params: PyTree, averages: PyTree, batch: Array) -> list[bool]:
    """Say of each leaf of averages whether an update changes it."""
    pairs = zip(jax.tree.leaves(averages), jax.tree.leaves(update(params, averages, batch)), strict=True)
    return [bool((a != b).any()) for a, b in pairs]


def _momentum(name: str, own: Array, moved: Array, far: float) -> float:
    """Find the momentum of a layer from its updates of averages that were 0 and of others that were far from it."""
    momenta = (np.asarray(moved, np.float64) - np.asarray(own, np.float64)) / far
    m = float(np.median(momenta))
    if np.ptp(momenta) > 1e-4 or not -1e-4 < m < 1 - 1e-6:
        raise ValueError(f"the averages {name!r} are not updated as m · old + (1 − m) · new with one m below 1, but "
                         f"with {momenta.min():.4g} to {momenta.max():.4g}")
    return m
