"""The data factor A = J_v^f J_v^fᵀ of the tangent kernel, without listing paths."""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax import paths
from pkjax.linalg.memory import budget
from pkjax.network import Network, read
from pkjax.paths.algebras import Polynomial
from pkjax.paths.dense_pairs import network_pairs
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.frozen import is_frozen
from pkjax.paths.polynomial import recorded_gates
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, is_floating

__all__ = ["data_blocks", "data_factor"]

ENTRIES = 2**20
"""Largest number of entries of the gates and inputs of the pairs that a CPU, which works within its cache, takes at a
time; less where memory is short."""
ACCELERATED = 32
"""How many times as many an accelerator takes."""


@automatic_axes
def data_factor(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
                masks: PyTree | None = None, gates: str | None = None) -> Float[Array, "*K N N"]:
    """Return the blocks of A = J_v^f J_v^fᵀ, one per output; between different outputs A is zero.

        A_k[x, x'] = Σ_{p→k} a_p(x) a_p(x') x_s x'_s

    the sum over the paths that end in output k and are alive for both inputs. It takes one forward pass of the path
    network per pair, with the gates and the inputs of the two multiplied together, every weight 1 (or its mask) and
    every constant 1. A dense network without masks takes all pairs at once, as Gram matrices of gates: without biases
    (x·x') Π_l (g_l(x)·g_l(x')), where g_l are the gates of layer l. Each block is symmetric to the last bit and
    positive semidefinite; its eigenvalues are ν_i = σ_i(J_v^f)².

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters; they decide which gates are open.
        X: (N, *input), the inputs.
        masks: booleans like `params`; a masked weight is 0 and carries no path.
        gates: "frozen" takes networks whose activations are not piecewise linear too, with the coefficients of each
            input among its a_p (``pkjax.paths.frozen``).

    Returns:
        The blocks (K, N, N), in the dtype of the parameters.

    Raises:
        ValueError: masks have another structure, params or X hold NaN or infinity, or X is empty; with "frozen", the
            network chooses entries by its signal, and differently for different examples.
        TypeError: masks are not booleans.
        NotPathNetworkError: the network is not a sum over paths.
        FloatingPointError: the number of paths exceeds the dtype's range (convolutional networks in float32).

    Source: Gebhart, Saxena and Schrater (2021), equations 10 and 11: J_v^f is a factor of the path decomposition of Θ.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.asarray([[1., 0.], [1., 2.]])
        >>> data_factor(lambda w, x: x @ w, jnp.ones((2, 1)), x)
        Array([[[1., 1.],
                [1., 5.]]], ...)
    """
    blocks = data_blocks(apply_fn, params, X, masks, frozen=is_frozen(gates))
    if not isinstance(blocks, jax.core.Tracer) and not np.isfinite(blocks).all():
        raise FloatingPointError(f"this network has too many paths for {blocks.dtype}: call data_factor on float64 "
                                 "parameters and inputs, with jax.enable_x64(True)")
    return blocks


def data_blocks(apply_fn: ApplyFn, params: PyTree, X: PyTree, masks: PyTree | None, dtype: Any = None,
                frozen: bool = False, units: Mapping[int, Array] = MappingProxyType({})) -> Float[Array, "*K N N"]:
    """Return A without checking that its sums are finite.

    Gates have the dtype of the parameters, sums over paths have `dtype`; None means the same. The gates at the places
    that ``units`` names count in these units, numbers of at least 0.
    """
    def wide(tree: PyTree) -> PyTree:
        """In the type of the sums; known numbers by NumPy, which compiles no program for each shape."""
        def convert(leaf: Any) -> Any:
            as_type = jnp.asarray if isinstance(leaf, jax.core.Tracer) else np.asarray
            return as_type(leaf, dtype) if is_floating(leaf) else leaf
        return tree if dtype is None else jax.tree.map(convert, tree)

    def ones(tree: PyTree) -> PyTree:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
        return paths.unit_weights(tree) if traced else jax.tree.map(
            lambda leaf: np.ones(np.shape(leaf), leaf.dtype) if is_floating(leaf) else leaf, tree)

    gated = read(apply_fn, params, X, masks=masks, paths=True).fixed
    gates = _gates(gated, gated.batch(X), frozen=frozen)
    if any(not is_floating(g) and not _alike(g) for g in gates):
        raise ValueError("the network chooses entries by its signal, and differently for the examples of X: products "
                         "of their gates say nothing of the paths that they share; pass examples that choose alike, "
                         "such as one at a time")
    gates = tuple(_in_units(g, units.get(place)) for place, g in enumerate(gates))
    counted = read(apply_fn, ones(wide(params)), wide(X), masks=masks, paths=True).fixed
    Z = counted.batch(wide(X))
    blocks = None
    if masks is None and not frozen:
        with contextlib.suppress(paths.NotDensePairsError):
            # Where constants decide, they must be known, as they are outside of jit.
            blocks = _mirrored((_dense_pairs if not counted.fn.constants else network_pairs)(counted, Z, gates))
    if blocks is None:
        blocks = _pair_by_pair(counted, Z, gates)
    return blocks.reshape(*counted.outputs, len(Z), len(Z))


def _in_units(gate: Array, unit: Array | None) -> Array:
    """The gates of all examples in units that are 0 where no example needs any."""
    if unit is None or not is_floating(gate):
        return gate
    none = unit == 0
    if bool((none & (jnp.abs(gate) > jnp.finfo(gate.dtype).eps * jnp.abs(gate).max())).any()):
        raise ValueError("a coefficient is 0 at the reference and not on X, so that the path kernel at the reference "
                         "lacks paths of X: choose another reference, or none, which takes X itself")
    return jnp.where(none, 0, gate / jnp.where(none, 1, unit))


def _alike(choice: Array) -> bool:
    """Whether all examples make the same choice; traced ones may not."""
    return len(choice) == 1 or (not isinstance(choice, jax.core.Tracer) and bool((choice == choice[:1]).all()))


@partial(jax.jit, static_argnames="frozen")
def _gates(network: Network, Z: Array, *, frozen: bool) -> tuple[Array, ...]:
    """Gates of each example as a batch of one, stacked."""
    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda z: recorded_gates(network, z[None], frozen)[1])(Z)


@jax.jit
def _dense_pairs(network: Network, Z: Array, gates: tuple[Array, ...]) -> Array:
    return network_pairs(network, Z, gates)


@jax.jit
def _mirrored(blocks: Array) -> Array:
    """Write the upper triangles over the lower ones: within one program that takes one copy."""
    first = jnp.arange(blocks.shape[1])
    return jnp.where(first[:, None] <= first, blocks, blocks.transpose(0, 2, 1))


@jax.jit
def _pair_by_pair(network: Network, Z: Array, gates: tuple[Array, ...]) -> Array:
    """One forward pass of the path network for each pair, the gates and the inputs of the two multiplied."""
    n = len(Z)
    rows, columns = np.triu_indices(n)
    gates = tuple(g.astype(Z.dtype) if is_floating(g) else g for g in gates)

    def pair(ij: tuple[Array, Array]) -> Array:
        i, j = ij
        joint = tuple(g[i] * g[j] if is_floating(g) else g[i] for g in gates)      # of a choice, that of both
        return evaluate_paths(partial(Polynomial, 0), network, (Z[i] * Z[j])[None], joint)[0]

    with jax.default_matmul_precision("highest"):
        each = sum(math.prod(leaf.shape[1:]) for leaf in (*gates, Z))
        most = ENTRIES if jax.default_backend() == "cpu" else ENTRIES * ACCELERATED
        batch = max(1, min(len(rows), budget(most, Z.dtype.itemsize) // max(1, each)))
        # Whole batches, the last one filled up with the first pair: a part of one would be compiled once more.
        fill = (0, -len(rows) % batch)
        values = jax.lax.map(pair, (jnp.asarray(np.pad(rows, fill)), jnp.asarray(np.pad(columns, fill))),
                             batch_size=batch)[:len(rows)]
        number = np.zeros((n, n), np.int32)
        number[rows, columns] = number[columns, rows] = np.arange(len(rows))
        return jax.lax.map(lambda of_output: of_output[number], values.T)
