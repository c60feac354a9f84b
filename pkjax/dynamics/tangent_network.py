"""The network linearised at its parameters: its outputs, on the training set and elsewhere, and its weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.dynamics.arguments import batched, floats, matrix_of
from pkjax.network import Network, read
from pkjax.programs.meshes import automatic_axes
from pkjax.tangent_kernel.arguments import along, check_kernel, restrict
from pkjax.trees import ApplyFn, Choice, check_like

__all__ = ["linearize", "predict", "weight_change"]


@automatic_axes
def linearize(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
              masks: PyTree | None = None, trainable: Choice = None) -> Callable[[PyTree], Array]:
    """Return the linearised network on a batch, a function of the parameters θ_t alone.

        f⁻(X, θ_t) = f(X, θ_0) + ∇_θ f(X, θ_0) (θ_t − θ_0)

    It takes one forward derivative and works under `grad` and `jit`. Arguments are those of `ntk`; entries that are
    masked or do not train count as unchanged.

    Returns:
        The function; it raises ValueError for parameters θ_t of another structure or other shapes.

    Raises:
        ValueError: as for `ntk`.

    Source: Gebhart, Saxena and Schrater (2021), equation 4.

    Examples:
        >>> square = linearize(lambda w, x: w**2 * x, jnp.asarray(3.), jnp.asarray([[1.]]))
        >>> square(jnp.asarray(4.))                                    # 9 + 6 · 1
        Array([[15.]], ...)
    """
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    X = network.batch(X)

    def tangent(params_t: PyTree) -> Float[Array, "N ..."]:
        check_like(params_t, params, "params_t")
        outputs = _push(network, X, params_t)
        check_kernel(network, X, outputs, "the linearised network's output")
        return network.shaped(outputs, 1)

    return automatic_axes(tangent)


@automatic_axes
def weight_change(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]],
                  coefficients: Float[Array | np.ndarray, "..."], *, masks: PyTree | None = None,
                  trainable: Choice = None) -> PyTree:
    """Return the change of the parameters that coefficients represent.

        ω_t = −∇_θ f(X, θ_0)ᵀ c_t

    Args:
        apply_fn: the network.
        params: its parameters θ_0.
        X: (N, *input), the training set.
        coefficients: (N, K) or (T, N, K), as in `Trajectory`.
        masks: booleans like `params`; masked weights do not change. Pass the masks that `ntk` had.
        trainable: which parameters train. Pass what `ntk` had.

    Returns:
        A tree like `params`, with a leading axis T if the coefficients have one; 0 in entries that do not train.

    Raises:
        ValueError: coefficients have another shape; and as for `ntk`.

    Source: Gebhart, Saxena and Schrater (2021), equation 7.

    Examples:
        >>> weight_change(lambda w, x: x @ w, jnp.zeros((2, 1)), jnp.asarray([[3., 4.]]), jnp.asarray([[-0.5]]))
        Array([[1.5],
               [2. ]], ...)
    """
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    X, entries = network.batch(X), network.entries
    c = batched(coefficients, (len(X), network.size)).astype(network.fn.out.dtype)
    moved = iter(_pull(network, X, c))
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [
        jnp.zeros((*c.shape[:-2], *jnp.shape(leaf)), jnp.result_type(leaf)) if mask is None else next(moved)
        for leaf, mask in zip(leaves, entries, strict=True)])


def predict(theta_cross: Float[Array | np.ndarray, "..."], f0: Float[Array | np.ndarray, "M K"],
            coefficients: Float[Array | np.ndarray, "..."]) -> Float[Array, "*T M K"]:
    """Return the outputs of the linearised network on inputs that it was not trained on.

        f⁻(x, θ_t) = f(x, θ_0) − Θ(x, X) c_t

    Args:
        theta_cross: (M, N, K, K) as `ntk(apply_fn, params, X2, X)` returns it, or its matrix (MK, NK).
        f0: (M, K), the network's initial outputs on X2.
        coefficients: (N, K) or (T, N, K), as in `Trajectory`.

    Returns:
        Outputs (M, K) or (T, M, K). Works under `jit`, `vmap` and `grad`.

    Raises:
        ValueError: shapes do not fit.

    Source: Gebhart, Saxena and Schrater (2021), equations 4 and 7.

    Examples:
        >>> predict(jnp.ones((1, 2, 1, 1)), jnp.zeros((1, 1)), jnp.asarray([[-1.], [-2.]]))
        Array([[3.]], ...)
    """
    start = floats(f0)
    columns = np.shape(coefficients)[-2] if np.ndim(coefficients) > 1 else 0
    c = batched(coefficients, (columns, start.shape[1])).astype(start.dtype)
    matrix = matrix_of(theta_cross, start.shape, columns, "theta_cross")
    moved = jnp.matmul(c.reshape(*c.shape[:-2], -1), matrix.T, precision="highest")
    return start - moved.reshape(*c.shape[:-2], *start.shape)


@jax.jit
def _pull(network: Network, X: Array, c: Array) -> list[Array]:
    """Return −Jᵀ c, one time of c after the other."""
    with jax.default_matmul_precision("highest"):
        f, theta = restrict(network.fn, network.params, network.entries)
        _, pullback = jax.vjp(lambda p: jax.vmap(f, (None, 0))(p, X), theta)

        def change(v: Array) -> list[Array]:
            return [-g for g in pullback(v)[0]]

        return change(c) if c.ndim == 2 else lax.map(change, c)


@jax.jit
def _push(network: Network, X: Array, params_t: PyTree) -> Array:
    """Evaluate f + J (θ_t − θ_0)."""
    with jax.default_matmul_precision("highest"):
        f, theta = restrict(network.fn, network.params, network.entries)
        moving = zip(jax.tree.leaves(params_t), network.entries, strict=True)
        there = [leaf for leaf, mask in moving if mask is not None]
        omega = [jnp.asarray(a).astype(b.dtype) - b for a, b in zip(there, theta, strict=True)]
        out, change = along(network.fn, lambda p: jax.vmap(f, (None, 0))(p, X), theta, omega)
        return out + change
