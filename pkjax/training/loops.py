"""A compiled loop over batches, in the form that is fast on the device."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pkjax.linalg.memory import budget, default_memory_limit
from pkjax.programs.equations import closed, opened

__all__ = ["compiled_loop", "examples_at_once", "networks_at_once", "one_by_one"]

Body = Callable[..., tuple[PyTree, PyTree]]
"""(carry, x, …) → (carry, y)."""


def one_by_one(params: PyTree) -> bool:
    """Decide whether a loop over this network is faster as one call for each batch than as one program.

    XLA on CPUs runs a convolution inside a loop 25 times as slowly as outside (ResNet-20, 64 images).

    Examples:
        >>> one_by_one({"kernel": jnp.ones((3, 2))})
        False
    """
    return jax.default_backend() == "cpu" and any(jnp.ndim(leaf) > 2 for leaf in jax.tree.leaves(params))


def examples_at_once(fn: Callable[..., Any], *arguments: PyTree, most: int) -> int:
    """Return how many examples a network may take at a time, from what it computes for the arguments, one example.

    Examples:
        >>> examples_at_once(lambda x: x @ jnp.ones((3, 2)), jnp.ones((1, 3)), most=500)
        500
    """
    return max(1, min(most, budget(2**30) // _widest(_traced(fn, arguments))))


def networks_at_once(step: Callable[..., Any], *arguments: PyTree, own: PyTree, most: int) -> int:
    """Return how many networks may train together, from a step of one and the arrays that each has for its own.

    All of a network's own arrays are held three times at most: as they are, as they become, and between.

    Examples:
        >>> weights = jnp.ones((3, 2))
        >>> networks_at_once(lambda w, x: (x @ w).sum(), weights, jnp.ones((8, 3)), own=weights, most=24)
        24
    """
    held = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(own))
    return max(1, min(most, budget(2**40) // _widest(_traced(step, arguments)), default_memory_limit() // (held or 1)))


def _traced(fn: Callable[..., Any], arguments: PyTree) -> Any:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), arguments)
    return jax.make_jaxpr(lambda *given: fn(*given))(*shapes).jaxpr


def _widest(jaxpr: Any) -> int:
    """The entries of the largest array that a program computes."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [_widest(opened(part)[0]) for eqn in jaxpr.eqns for part in closed(eqn.params)]
    return max([1, *sizes, *inner])


def compiled_loop(body: Body, *, one_by_one: bool) -> Callable[..., tuple[PyTree, PyTree]]:
    """Compile (carry, xs, …) → (carry, ys), where the arguments after xs are constant; the carry is overwritten.

    Examples:
        >>> add = compiled_loop(lambda total, x, scale: (total + scale * x, total), one_by_one=True)
        >>> total, before = add(jnp.zeros(()), jnp.arange(4.0), jnp.asarray(2.0))
        >>> float(total), before.tolist()
        (12.0, [0.0, 0.0, 2.0, 6.0])
    """
    if not one_by_one:
        return jax.jit(lambda carry, xs, *rest: jax.lax.scan(lambda c, x: body(c, x, *rest), carry, xs),
                       donate_argnums=0)
    step = jax.jit(body, donate_argnums=0)

    def run(carry: PyTree, xs: PyTree, *rest: Any) -> tuple[PyTree, PyTree]:
        rows = []
        for i in range(len(jax.tree.leaves(xs)[0])):
            carry, row = step(carry, jax.tree.map(lambda v, i=i: v[i], xs), *rest)
            rows.append(row)
        return carry, jax.tree.map(lambda *values: jnp.stack(values), *rows)

    return run
