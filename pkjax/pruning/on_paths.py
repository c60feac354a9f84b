"""Which leaves lie on paths: what only makes coefficients is not for scores of paths to rank."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.frozen import unit_coefficients, with_gates
from pkjax.paths.scaled import widest
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.prunable import prunable_leaves
from pkjax.pruning.scores.data_free import synflow
from pkjax.trees import ApplyFn, Choice, is_floating, kernels

__all__ = ["on_paths"]

INPUTS = 4
"""Inputs drawn to see which weights the outputs depend on."""


@automatic_axes
def on_paths(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
             prunable: Choice = kernels, gates: str | None = None) -> PyTree:
    """Choose the leaves whose weights lie on paths, for ``prunable`` of ``prune``.

    With frozen gates, weights that only make coefficients (queries and keys of attention, the gate of a gated unit, a
    squeeze-and-excite branch) lie on no path. Scores of paths give them 0, so that a global threshold would prune all
    of them first: attention would become uniform, a gate constant. These leaves are left out of pruning, and densities
    refer to the others.

    A leaf is left out if no path leads through it, or if some of its weights change the outputs through coefficients
    alone: of queries, keys and values in one kernel, all. Weights that nothing depends on (of a dead unit, or of a
    kernel wider than its padded image) leave no leaf out. The answer follows from the network's form, with every weight
    and every coefficient taken as 1; a gradient at drawn inputs, near ``params``, tells what the outputs depend on.
    Runs outside of ``jit``.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: its parameters.
        x: an input ``(1, *input)`` of ones (``pkjax.ones_input``), or tokens.
        prunable: the leaves to choose from, as in ``prune``.
        gates: None or "frozen", as in ``synflow``.

    Returns:
        A tree like ``params`` of one boolean a leaf.

    Raises:
        ValueError: no leaf is left, or as in ``synflow``.
        NotPathNetworkError: the network is not a sum over paths, and gates are not frozen.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> gated = lambda p, x: (jax.nn.sigmoid(x @ p["gate"]) * (x @ p["value"])) @ p["out"]
        >>> params = {"gate": jnp.ones((2, 3)), "out": jnp.ones((3, 1)), "value": jnp.ones((2, 3))}
        >>> on_paths(gated, params, jnp.ones((1, 2)), gates="frozen")
        {'gate': False, 'out': True, 'value': True}
    """
    chosen = prunable_leaves(params, prunable)
    with widest(apply_fn, (params, x)) as (theta, z):
        network = unit_coefficients(with_gates(apply_fn, theta, z, gates, None))
        through = jax.device_get(jax.tree.leaves(synflow(network, jax.tree.map(_even, theta), jax.tree.map(_unit, z))))
    felt = jax.device_get(_slopes(read(apply_fn, params, x).fixed, x))
    on = [c and bool((s > 0).any()) and not bool(((g != 0) & (s == 0)).any())
          for c, s, g in zip(chosen, through, felt, strict=True)]
    if not any(on):
        raise ValueError("no leaf that prunable selects has all its weights on paths: pass another prunable, or prune "
                         "by a score that needs no paths")
    return jax.tree.unflatten(jax.tree.structure(params), on)


def _unit(leaf: Any) -> Any:
    return np.ones(jnp.shape(leaf), leaf.dtype) if is_floating(leaf) else leaf


def _even(leaf: Any) -> Any:
    """Positive weights, with which a layer of any width passes on about what it gets."""
    return _unit(leaf) / (leaf.size // leaf.shape[-1] or 1) if is_floating(leaf) and leaf.ndim > 1 else _unit(leaf)


def _slopes(network: Network, x: PyTree) -> list[Array]:
    """Derivative of a random sum of outputs at drawn inputs, near the parameters, by each leaf."""
    draw = np.random.default_rng(0).standard_normal

    def inputs(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        drawn = draw((INPUTS, *leaf.shape[1:])) if is_floating(leaf) else np.repeat(leaf[:1], INPUTS, axis=0)
        return drawn.astype(leaf.dtype)

    def near(leaf: Any) -> Any:
        if not is_floating(leaf):
            return leaf
        values = np.asarray(leaf, np.float64)
        size = np.sqrt((values**2).mean()) / 10 if values.any() else (np.prod(values.shape[:-1]) or 1)**-0.5
        return jnp.asarray(values + size * draw(values.shape), jnp.result_type(leaf))

    readout = jnp.asarray(draw((INPUTS, network.size)), network.fn.out.dtype)
    return _gradient(network, jax.tree.map(near, network.params), network.batch(jax.tree.map(inputs, x)), readout)


@jax.jit
def _gradient(network: Network, params: PyTree, X: Array, readout: Array) -> list[Array]:
    """Derivative of the outputs' sum with weights, by each leaf; 0 for leaves of no floating-point numbers."""
    leaves, structure = jax.tree.flatten(params)
    floating = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

    def weighted(part: list[Array]) -> Array:
        values = dict(zip(floating, part, strict=True))
        theta = jax.tree.unflatten(structure, [values.get(i, leaf) for i, leaf in enumerate(leaves)])
        return jnp.vdot(readout, network.over(theta, X))

    slopes = dict(zip(floating, jax.grad(weighted)([leaves[i] for i in floating]), strict=True))
    return [slopes.get(i, jnp.zeros(jnp.shape(leaf))) for i, leaf in enumerate(leaves)]
