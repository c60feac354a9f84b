"""A network as a function of what trains: the closure that everything about Θ differentiates."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.network import Network
from pkjax.paths import NotPathNetworkError
from pkjax.paths.algebras import Polynomial
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.exponents import shifted
from pkjax.paths.interpret import interpret
from pkjax.paths.polynomial import recorded_gates
from pkjax.paths.scaled_signals import ScaledSignals
from pkjax.programs.equations import closed, opened
from pkjax.programs.program import BoundProgram
from pkjax.trees import is_floating

__all__ = ["along", "check_count", "check_kernel", "restrict"]


def restrict(fn: BoundProgram, params: PyTree, entries: list[Any]
             ) -> tuple[Callable[[list[Array], Array], Array], list[Array]]:
    """Make the network, for one example, a function of the leaves that train.

    Args:
        fn: the network's program for one example.
        params: its parameters.
        entries: for each leaf which of its entries train, None where none does; the others are held fixed.

    Returns:
        A function that maps (leaves that train, x (*input)) to outputs (K,), and these leaves.
    """
    leaves, treedef = jax.tree.flatten(params)
    moving = {i: mask for i, mask in enumerate(entries) if mask is not None}

    def restricted(theta: list[Array], x: Array) -> Array:
        full = list(leaves)
        for (i, mask), value in zip(moving.items(), theta, strict=True):
            full[i] = jnp.where(mask, value, leaves[i])
        return fn(jax.tree.unflatten(treedef, full), x[None])[0]

    return restricted, [jnp.asarray(leaves[i]) for i in moving]


def along(fn: BoundProgram, f: Callable[[list[Array]], Array], theta: list[Array], tangent: list[Array]
          ) -> tuple[Array, Array]:
    """Return f, which evaluates a program on the leaves that train, and its derivative along a tangent.

    Raises:
        ValueError: a `custom_vjp` rule is not linear in the cotangent.
    """
    if not _has_backward_rules(fn.program.jaxpr):
        return jax.jvp(f, (theta,), (tangent,))
    # `custom_vjp` has no forward derivative; the backward one is linear in the cotangent.
    out, pull = jax.vjp(f, theta)
    try:
        (change,) = jax.linear_transpose(lambda cotangent: pull(cotangent)[0], out)(tangent)
    except NotImplementedError as error:
        raise ValueError(f"apply_fn has a custom_vjp rule that is not linear in the cotangent ({error}), so that Θ has "
                         "no products with vectors: compute ntk, or give the rule a linear backward pass") from error
    return out, change


def _has_backward_rules(jaxpr: Any) -> bool:
    """Whether an operation of a program, or one within it, has a derivative rule by ``custom_vjp``."""
    return any(eqn.primitive.name.startswith("custom_vjp_call")
               or any(_has_backward_rules(opened(inner)[0]) for inner in closed(eqn.params)) for eqn in jaxpr.eqns)


def check_count(name: str, value: Any, unit: str, none: bool = True) -> None:
    """Raise ValueError unless an option is a whole number of 1 or more; `none` says that it may be None as well."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of {unit}, 1 or more{', or None' * none}, got {value!r}")


def check_kernel(network: Network, X: Array, values: PyTree, what: str, v: Array | None = None) -> None:
    """Raise FloatingPointError where what was computed of Θ is not finite, or 0 because it vanished (traced: passes).

    Outputs f are linear in the parameters of the last layer. So where everything trains, Θ is 0 only if f is or no
    open path has a parameter, and Θ v likewise for the inner product of v and f.

    Args:
        network: the network.
        X: the batch that it took in.
        values: the result.
        what: its name.
        v: where the result is Θ v, (N, K).
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((network, X, values, v))):
        return
    finite, present = _state(values)
    if finite and (present or not all(network.whole) or not _responds(network, X, v)):
        return
    fault = "vanishes" if finite else "is not finite"
    raise FloatingPointError(f"{what} {fault}: numbers on the way to it are outside of what {network.fn.out.dtype} "
                             "holds. Pass float64 parameters and inputs (with jax_enable_x64), or rescale the weights")


@jax.jit
def _state(values: PyTree) -> tuple[Array, Array]:
    leaves = jax.tree.leaves(values)
    return (jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all(),
            jnp.stack([(leaf != 0).any() for leaf in leaves]).any())


def _responds(network: Network, X: Array, v: Array | None) -> bool:
    """Whether outputs (weighted by v) are not 0, however small, and open paths have parameters.

    False where the network is not a sum over paths.
    """
    weights = jnp.ones((len(X), network.size), network.fn.out.dtype) if v is None else v
    try:
        return bool(_response(network, X, weights, v is not None)) and bool(_is_parametric(network, X))
    except NotPathNetworkError:
        return False


@partial(jax.jit, static_argnames="signed")
def _response(network: Network, X: Array, v: Array, signed: bool) -> Array:
    def one(x: Array) -> tuple[Array, Array]:
        algebra = ScaledSignals()
        out = interpret(algebra, network.fn, network.params, x[None], algebra.parameter, algebra.input)
        return out.value.mantissa[0], out.value.exponent

    mantissas, exponents = jax.lax.map(one, X)
    terms = shifted(mantissas, (exponents - exponents.max())[:, None]) * v
    sizes = jnp.abs(terms).sum()
    return jnp.abs(terms.sum()) > 1e-3 * sizes if signed else sizes > 0


@jax.jit
def _is_parametric(network: Network, X: Array) -> Array:
    """Whether an open path has a parameter: then their number changes with the size of all parameters."""
    _, gates = recorded_gates(network, X)
    z = (X != 0).astype(X.dtype) if is_floating(X) else X

    def count(size: Array) -> Array:
        params = jax.tree.map(lambda leaf: jnp.where(leaf != 0, size, 0).astype(leaf.dtype) if is_floating(leaf)
                              else leaf, network.params)
        return evaluate_paths(partial(Polynomial, 1), replace(network, params=params), z, gates).sum()

    return jax.grad(count)(jnp.ones((), network.fn.out.dtype)) != 0
