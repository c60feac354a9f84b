"""The tangent kernel without its matrix: exact trace and products with vectors, for any number of examples."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.linalg.memory import budget
from pkjax.network import Network, read
from pkjax.programs.meshes import automatic_axes
from pkjax.tangent_kernel import layerwise
from pkjax.tangent_kernel.arguments import along, check_count, check_kernel, restrict
from pkjax.tangent_kernel.compilation import compiled
from pkjax.tangent_kernel.leaf_costs import ENTRIES, uses
from pkjax.trees import ApplyFn, Choice, check_finite

__all__ = ["examples_at_once", "ntk_matvec", "ntk_trace", "theta_times"]


@automatic_axes
def ntk_trace(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
              masks: PyTree | None = None, trainable: Choice = None) -> Float[Array, ""]:
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
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    X = network.batch(X)
    value = _trace(network, X)
    check_kernel(network, X, value, "Tr Θ")
    return value


@automatic_axes
def ntk_matvec(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
               masks: PyTree | None = None, trainable: Choice = None, batch_size: int | None = None
               ) -> Callable[[Float[Array, "N ..."]], Float[Array, "N ..."]]:
    """Return the map v → Θ v of arrays (N, K), by one backward and one forward derivative per product.

        (Θ v)[x, k] = Σ_{x', l} Θ[x, x', k, l] v[x', l] = J_θ^f (J_θ^fᵀ v)

    It holds one batch and two sets of parameters in memory, whatever N is.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters, a pytree.
        X: (N, *input), the inputs.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time; None means as many as have activations of 256 MB
            (less where memory is short).

    Returns:
        The map; it raises ValueError for a v of another shape than (N, K), or one that is complex, NaN or infinite.

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
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    X = network.batch(X)
    size = examples_at_once(network, X, batch_size)
    shape = (len(X), *network.outputs)

    def matvec(v: Float[Array, "..."]) -> Float[Array, "..."]:
        v = jnp.asarray(v)
        if v.shape != shape:
            raise ValueError(f"v must have the shape {shape} of the network's outputs, got {v.shape}")
        if jnp.issubdtype(v.dtype, jnp.complexfloating):
            raise ValueError(f"v must be real, got {v.dtype}: multiply its real and imaginary parts one by one")
        check_finite(v, "v")
        flat = v.reshape(len(X), network.size).astype(network.fn.out.dtype)
        product = theta_times(network, X, flat, size=size)
        check_kernel(network, X, product, "Θ v", flat)
        return network.shaped(product, 1)

    return automatic_axes(matvec)


def examples_at_once(network: Network, X: Array, batch_size: int | None, outputs: int = 1) -> int:
    """Return the number of examples whose operands, and cotangents of so many outputs, are `ENTRIES` numbers.

    Raises:
        ValueError: a `batch_size` was asked for, and is not a whole number of 1 or more.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size, "examples")
        return min(len(X), int(batch_size))
    each = sum(u.operand + 2 * outputs * u.output
               for u in uses(network.fn.program, network.params, network.example).each)
    return max(1, min(len(X), budget(ENTRIES) // max(1, each)))


@compiled()
def _trace(network: Network, X: Array) -> Array:
    def energy(x: Array) -> Array:
        return layerwise.energy(network.fn, network.params, network.entries, network.whole, x)

    with jax.default_matmul_precision("highest"):
        return jnp.sum(jax.lax.map(energy, X, batch_size=examples_at_once(network, X, None, network.size)))


@partial(jax.jit, static_argnames="size")
def theta_times(network: Network, X: Array, v: Array, *, size: int) -> Array:
    """Return Θ v, (N, K), from batches of `size` examples; the last is padded with examples of weight 0."""
    with jax.default_matmul_precision("highest"):
        f, theta = restrict(network.fn, network.params, network.entries)
        over = jax.vmap(f, (None, 0))
        n = X.shape[0]
        full = -(-n // size) * size
        batches = X[np.minimum(np.arange(full), n - 1)].reshape(-1, size, *X.shape[1:])
        weights = jnp.pad(v, ((0, full - n), (0, 0))).reshape(-1, size, v.shape[1])

        def add(total: list[Array], batch: tuple[Array, Array]) -> tuple[list[Array], None]:
            x, w = batch
            (part,) = jax.vjp(lambda t: over(t, x), theta)[1](w)
            return jax.tree.map(jnp.add, total, part), None

        tangent, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, theta), (batches, weights))
        out = jax.lax.map(lambda x: along(network.fn, lambda t: over(t, x), theta, tangent)[1], batches)
        return out.reshape(full, -1)[:n]
