"""The tangent kernel without its matrix: exact trace and products with vectors, for any number of examples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.tangent_kernel import layerwise
from pkjax.tangent_kernel.arguments import prepare, restrict
from pkjax.tangent_kernel.leaf_costs import ENTRIES, uses
from pkjax.trees import ApplyFn, Trainable, accumulator, hashable

__all__ = ["ntk_matvec", "ntk_trace"]


def ntk_trace(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."], *, masks: PyTree | None = None,
              trainable: Trainable = None) -> Float[Array, ""]:
    """Return the trace of the tangent kernel without forming it.

        Tr Θ = Σ_x Σ_k ‖∇_θ f_k(x)‖²

    It is exact and takes K backward passes per example. In a sum over paths it follows from the norms of each layer's
    operands and cotangents, without any gradient of the parameters. Arguments are those of `ntk`.

    Returns:
        The trace, a scalar of the outputs' dtype (float32 for narrower ones).

    Raises:
        ValueError: as for `ntk`.

    Source: Gebhart, Saxena and Schrater (2021), equation 3 for Θ.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.asarray([[1., 0.], [1., 1.]])
        >>> ntk_trace(lambda w, x: x @ w, jnp.ones((2, 3)), x)         # K Σ_x ‖x‖² for a linear layer
        Array(9., ...)
    """
    X = jnp.asarray(X)
    params, entries, whole = prepare(apply_fn, params, X, masks, trainable)
    return _trace(hashable(apply_fn), params, entries, X, whole=whole)


def ntk_matvec(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."], *,
               masks: PyTree | None = None, trainable: Trainable = None, batch_size: int | None = None
               ) -> Callable[[Float[Array, "N K"]], Float[Array, "N K"]]:
    """Return the map v → Θ v of arrays (N, K), by one backward and one forward derivative per product.

        (Θ v)[x, k] = Σ_{x', l} Θ[x, x', k, l] v[x', l] = J_θ^f (J_θ^fᵀ v)

    It holds one batch and two sets of parameters in memory, whatever N is.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters, a pytree.
        X: (N, *input), the inputs.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time; None means as many as have activations of 256 MB.

    Returns:
        The map; it raises ValueError for a v of another shape than (N, K).

    Raises:
        ValueError: `batch_size` is below 1; and as for `ntk`.

    Source: Gebhart, Saxena and Schrater (2021), equation 3 for Θ.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.asarray([[1., 0.], [1., 1.]])
        >>> ntk_matvec(lambda w, x: x @ w, jnp.ones((2, 1)), x)(jnp.ones((2, 1)))
        Array([[2.],
               [3.]], ...)
    """
    X = jnp.asarray(X)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, or None, got {batch_size}")
    params, entries, _ = prepare(apply_fn, params, X, masks, trainable)
    shape = jax.eval_shape(apply_fn, params, X)
    net = hashable(apply_fn)
    size = min(X.shape[0], _batch(net, params, X, 1) if batch_size is None else batch_size)

    def matvec(v: Float[Array, "..."]) -> Float[Array, "..."]:
        v = jnp.asarray(v)
        if v.shape != shape.shape:
            raise ValueError(f"v must have the shape {shape.shape} of the network's outputs, got {v.shape}")
        return _product(net, params, entries, X, v.astype(shape.dtype), size=size)

    return matvec


def _batch(apply_fn: ApplyFn, params: PyTree, X: Array, outputs: int) -> int:
    """Return the number of examples whose operands, and cotangents of so many outputs, are `ENTRIES` numbers."""
    network_uses = uses(apply_fn, params, X[:1])
    # Without paths the activations are unknown: count as many as inputs and parameters.
    each = sum(u.operand + 2 * outputs * u.output for u in network_uses[0]) if network_uses else (
        X[:1].size + outputs * sum(leaf.size for leaf in jax.tree.leaves(params)))
    return max(1, min(X.shape[0], ENTRIES // max(1, each)))


@partial(jax.jit, static_argnames=("apply_fn", "whole"))
def _trace(apply_fn: ApplyFn, params: PyTree, entries: list[Any], X: Array, *, whole: tuple[bool, ...]
           ) -> Array:
    with jax.default_matmul_precision("highest"):
        out = jax.eval_shape(apply_fn, params, X)

        def energy(x: Array) -> Array:
            if uses(apply_fn, params, X[:1]):
                return layerwise.energy(apply_fn, params, entries, whole, x)
            f, theta = restrict(apply_fn, params, entries)
            _, pullback = jax.vjp(lambda t: f(t, x[None])[0], theta)
            gradients = jax.vmap(lambda e: pullback(e)[0])(jnp.eye(out.shape[1], dtype=out.dtype))
            return sum((jnp.sum(g.astype(accumulator(out.dtype))**2) for g in gradients),
                       start=jnp.zeros((), accumulator(out.dtype)))

        return jnp.sum(jax.lax.map(energy, X, batch_size=_batch(apply_fn, params, X, out.shape[1])))


@partial(jax.jit, static_argnames=("apply_fn", "size"))
def _product(apply_fn: ApplyFn, params: PyTree, entries: list[Any], X: Array, v: Array, *, size: int) -> Array:
    """Return Θ v from batches of `size` examples; the last batch is padded with examples of weight 0."""
    with jax.default_matmul_precision("highest"):
        f, theta = restrict(apply_fn, params, entries)
        n = X.shape[0]
        full = -(-n // size) * size
        batches = X[np.minimum(np.arange(full), n - 1)].reshape(-1, size, *X.shape[1:])
        weights = jnp.pad(v, ((0, full - n), (0, 0))).reshape(-1, size, v.shape[1])

        def add(total: list[Array], batch: tuple[Array, Array]) -> tuple[list[Array], None]:
            x, w = batch
            (part,) = jax.vjp(lambda t: f(t, x), theta)[1](w)
            return jax.tree.map(jnp.add, total, part), None

        tangent, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, theta), (batches, weights))
        out = jax.lax.map(lambda x: jax.jvp(lambda t: f(t, x), (theta,), (tangent,))[1], batches)
        return out.reshape(full, -1)[:n]
