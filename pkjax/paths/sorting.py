"""The rules for order: sorting, the largest entries, cumulative maxima.

Each entry of the result is one entry of its line. Which one is a gate, one-hot over the line; in the path polynomial,
whose gates are open, each adds all that may come to its place, as a max-pool adds its window: a path leads from every
candidate, and the gate says which of them the network takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pkjax.paths.indexing import among
from pkjax.paths.interpreter import Const, Gate, Interpreter, PathSum, Rule, Value

__all__ = ["SORTING"]


def lines(interp: Interpreter, x: PathSum, axis: int, size: int, pick: Callable[[Array], Array],
          reach: np.ndarray | None = None, natural: bool = True) -> PathSum:
    """Entries of a line along an axis, each of which ``pick`` takes from one entry of that line.

    Args:
        interp: the interpreter.
        x: the path sum.
        axis: along which the lines lie.
        size: how many entries a line of the result has.
        pick: maps an array to the picked entries; only called on true values.
        reach: (size, n) booleans, which entries may be picked for which place; None for all.
        natural: whether ``pick`` is itself positively homogeneous in what algebras hold.
    """
    if interp.algebra.natural_max and natural:
        return interp.linear("max", pick, [x])
    n = x.shape[axis]
    allowed = np.ones((size, n), bool) if reach is None else reach

    def candidates(v: Array) -> Array:
        moved = jnp.moveaxis(v, axis, -1)[..., None, :]
        return jnp.where(allowed, moved, jnp.zeros((), v.dtype))

    def one_hot() -> Array:
        v = interp.true(x)

        def along(entry: Array) -> Array:
            tangent = jnp.broadcast_to(entry.reshape(n, *(1,) * (v.ndim - 1 - axis)), v.shape)
            return jnp.moveaxis(jax.jvp(pick, (v,), (tangent,))[1], axis, -1)
        return jax.vmap(along, out_axes=-1)(jnp.eye(n, dtype=v.dtype))
    picked = among(interp, x, candidates, one_hot)
    return interp.linear("transpose", lambda v: jnp.moveaxis(v, -1, axis), [picked])


def sort(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Sorting by keys: a permutation of each line, fixed where the keys are constants, else a gate."""
    axis, keys = eqn.params["dimension"], ins[:eqn.params["num_keys"]]
    if len(ins) == 1:
        return [lines(interp, ins[0], axis, ins[0].shape[axis], lambda v: eqn.primitive.bind(v, **eqn.params)[0])]
    shape = eqn.invars[0].aval.shape
    fixed = all(isinstance(v, Const) for v in keys)
    of_input = any(isinstance(v, Const) and v.of_input for v in keys)
    known = fixed or interp.algebra.known

    def order() -> Array:
        values = list(map(jnp.asarray, interp.trues(keys)))
        return lax.sort((*values, lax.broadcasted_iota(np.int32, shape, axis)), dimension=axis,
                        num_keys=len(keys), is_stable=True)[-1]

    def permuted(v: Any) -> Array:
        return jnp.take_along_axis(jnp.asarray(v), order(), axis)
    permuted.of_input = of_input  # type: ignore[attr-defined]
    outs: list[Value] = []
    for v in ins:
        if isinstance(v, PathSum):
            outs.append(interp.linear("gather", permuted, [v]) if fixed else
                        lines(interp, v, axis, shape[axis], permuted, natural=False))
        elif isinstance(v, Const) and fixed:
            outs.append(Const(permuted(v.value), v.of_input or of_input))
        else:
            outs.append(Gate(permuted(interp.true(v)) if known and interp.true(v) is not None else None, shape))
    return outs


def top_k(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """The largest entries of each line, and where they were."""
    (x,) = ins
    axis = eqn.params.get("axis", len(x.shape) - 1) % len(x.shape)

    def both(v: Array) -> tuple[Array, Array]:
        values, places = eqn.primitive.bind(v, **eqn.params)
        return values, places
    values = lines(interp, x, axis, eqn.params["k"], lambda v: both(v)[0])
    places = both(interp.true(x))[1] if interp.algebra.known else None
    return [values, Gate(places, tuple(eqn.outvars[1].aval.shape))]


def cumulative(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Cumulative maxima and minima: each among the entries up to its place."""
    (x,), axis = ins, eqn.params["axis"]
    n = x.shape[axis]
    before = np.tril(np.ones((n, n), bool))
    return [lines(interp, x, axis, n, lambda v: eqn.primitive.bind(v, **eqn.params),
                  before.T if eqn.params["reverse"] else before)]


SORTING: dict[str, Rule] = {"sort": sort, "top_k": top_k, **dict.fromkeys(("cummax", "cummin"), cumulative)}
