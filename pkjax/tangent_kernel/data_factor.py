"""The data factor A = J_v^f J_v^fᵀ of the tangent kernel, without listing paths."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax import paths
from pkjax.trees import ApplyFn, apply_masks, check_finite, check_masks, check_network, is_floating

__all__ = ["data_blocks", "data_factor"]

ENTRIES = 2**25
"""How many numbers the gates and inputs of the pairs taken at once may hold."""


def data_factor(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."], *,
                masks: PyTree | None = None) -> Float[Array, "K N N"]:
    """Return the blocks of A = J_v^f J_v^fᵀ, one for each output; between different outputs A is zero.

        A_k[x, x'] = Σ_{p→k} a_p(x) a_p(x') x_s x'_s

    the sum over the paths that end in output k and are alive for both inputs: one forward pass of the path network
    for each pair, with the gates and the inputs of the two multiplied together, every weight 1 (or its mask) and
    every constant 1. For a dense network without masks all pairs are taken at once as Gram matrices of gates: without
    biases (x·x') Π_l (g_l(x)·g_l(x')), g_l the gates of layer l. Each block is symmetric to the last bit and positive
    semi-definite; its eigenvalues are ν_i = σ_i(J_v^f)².

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters; they decide which gates are open.
        X: inputs.
        masks: booleans shaped like ``params``: a weight that is False is 0 and carries no path.

    Raises:
        ValueError: for masks of another structure, NaN or infinity in params or X, an empty X.
        NotPathNetworkError: where the network is no sum over paths.
        FloatingPointError: where the paths are too many for the type (convolutional networks in float32).

    Source: Gebhart et al. 2021, equations 10 and 11 (the factor J_v^f of the path decomposition of the tangent kernel).

    >>> import jax.numpy as jnp
    >>> x = jnp.asarray([[1., 0.], [1., 2.]])
    >>> data_factor(lambda w, x: x @ w, jnp.ones((2, 1)), x)
    Array([[[1., 1.],
            [1., 5.]]], ...)
    """
    X = jnp.asarray(X)
    check_masks(masks, params)
    check_network(apply_fn, params, X)
    check_finite(params, "params")
    check_finite(X, "X")
    blocks = data_blocks(apply_fn, params, X, masks)
    if not isinstance(blocks, jax.core.Tracer) and not np.isfinite(blocks).all():
        raise FloatingPointError(f"the paths of this network are too many for {blocks.dtype}: call data_factor on "
                                 "float64 parameters and inputs, with jax.enable_x64(True)")
    return blocks


def data_blocks(apply_fn: ApplyFn, params: PyTree, X: Array, masks: PyTree | None, dtype: Any = None
                ) -> Float[Array, "K N N"]:
    """A, unchecked. Gates are in the parameters' type, sums over paths in ``dtype`` (None: the same)."""
    present = apply_masks(params, masks)
    n = X.shape[0]
    rows, columns = np.triu_indices(n)

    def wide(leaf: Array) -> Array:
        return leaf if dtype is None or not is_floating(leaf) else leaf.astype(dtype)

    @jax.jit
    def upper(present: PyTree, X: Array, masks: PyTree | None) -> Array:
        with jax.default_matmul_precision("highest"):
            gates = jax.vmap(lambda x: paths.gates(apply_fn, present, x[None]))(X)
            ones, X = jax.tree.map(wide, (paths.unit_weights(present), X))
            if masks is None:
                with contextlib.suppress(paths.NotDensePairsError):
                    full = paths.dense_pairs(apply_fn, ones, X, gates)
                    return jnp.triu(full) + jnp.triu(full, 1).transpose(0, 2, 1)

            def pair(ij: tuple[Array, Array]) -> Array:
                i, j = ij
                joint = jax.tree.map(lambda g: wide(g[i] * g[j]), gates)
                return paths.polynomial(apply_fn, ones, (X[i] * X[j])[None], q=0, gates=joint, masks=masks)[0]

            each = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves((gates, X)))
            batch = max(1, min(len(rows), ENTRIES // max(1, each)))
            values = jax.lax.map(pair, (jnp.asarray(rows), jnp.asarray(columns)), batch_size=batch)
            half = jnp.zeros((values.shape[1], n, n), values.dtype).at[:, rows, columns].set(values.T)
            return half + jnp.triu(half, 1).transpose(0, 2, 1)

    return upper(present, X, masks)
