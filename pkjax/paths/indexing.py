"""The rules for what indices pick: gathers, slices and scatters.

Constant indices make these linear in the array. Indices that are a gate (an argmax, a sorted order) choose among
candidates, the entries that any index would pick: the sum of all, each with its own gate, as for max-pooling.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pkjax.paths.activations import require
from pkjax.paths.interpreter import Const, Gate, Interpreter, PathSum, Rule, Value

__all__ = ["INDEXING", "among"]


def among(interp: Interpreter, x: PathSum, candidates: Callable[[Array], Array], one_hot: Callable[[], Array]
          ) -> PathSum:
    """Choose each entry of the result among candidates, which lie along the last axis."""
    gated = interp.gated(interp.linear("windows", candidates, [x]), one_hot)
    return interp.linear("reduce_sum", lambda v: v.sum(-1), [gated])


def indexed(operands: Sequence[int]) -> Rule:
    """Operations that are linear in the given operands, the other ones being constant indices."""
    def rule(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
        slots = [i for i in operands if i < len(ins)]
        rest = {i: v for i, v in enumerate(ins) if i not in slots}
        _known(interp, eqn, list(rest.values()))

        def fn(*values: Any) -> Any:
            full = dict(zip(slots, values, strict=True)) | {i: v.value for i, v in rest.items()}
            return eqn.primitive.bind(*(full[i] for i in range(len(ins))), **eqn.params)
        # What indices of one example pick is not a fixed function of the operands.
        fn.of_input = any(v.of_input for v in rest.values())  # type: ignore[attr-defined]
        return [interp.linear(eqn.primitive.name, fn, [ins[i] for i in slots], like=eqn.outvars[0].aval)]
    return rule


def _known(interp: Interpreter, eqn: Any, indices: Sequence[Value]) -> None:
    if not all(isinstance(v, Const) for v in indices):
        raise interp.error(f"'{eqn.primitive.name}' takes indices that depend on the signal")


def gather(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Entries at constant indices, or among all that the indices may pick."""
    x, indices = ins
    if not isinstance(indices, Gate):
        return indexed([0])(interp, eqn, ins)
    d, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    limits = [x.shape[axis] - eqn.params["slice_sizes"][axis] + 1 for axis in d.start_index_map]
    starts = np.indices(limits).reshape(len(limits), -1).T.astype(eqn.invars[1].aval.dtype)

    def candidates(v: Array) -> Array:
        def at(start: Array) -> Array:
            return eqn.primitive.bind(v, jnp.broadcast_to(start, indices.shape), **eqn.params)
        return jax.vmap(at, out_axes=-1)(jnp.asarray(starts))

    def one_hot() -> Array:
        at = indices.value
        if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            at = jnp.clip(at, 0, jnp.asarray(limits, at.dtype) - 1)
        hot = (at[..., None, :] == starts).all(-1)
        spread = [1 if i in d.offset_dims else n for i, n in enumerate(shape)]
        return jnp.broadcast_to(hot.reshape(*spread, len(starts)), (*shape, len(starts)))
    return [among(interp, x, candidates, one_hot)]


def dynamic_slice(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """A block at a constant place, or among all places where the block may start."""
    x, *places = ins
    if not any(isinstance(v, Gate) for v in places):
        return indexed([0])(interp, eqn, ins)
    if any(isinstance(v, PathSum) for v in places):
        _known(interp, eqn, places)
    shape = eqn.outvars[0].aval.shape
    limits = [n - size + 1 for n, size in zip(x.shape, shape, strict=True)]
    starts = np.indices(limits, np.int32).reshape(len(limits), -1).T

    def candidates(v: Array) -> Array:
        return jax.vmap(lambda start: lax.dynamic_slice(v, start, shape), out_axes=-1)(jnp.asarray(starts))

    def one_hot() -> Array:
        at = jnp.stack([jnp.asarray(v.value, np.int32) for v in places])
        at = jnp.clip(at, 0, jnp.asarray(limits, np.int32) - 1)
        return jnp.broadcast_to((at == starts).all(-1), (*shape, len(starts)))
    return [among(interp, x, candidates, one_hot)]


def _scatter_add(eqn: Any, operand: Any, indices: Any, updates: Any) -> Array:
    names = ("indices_are_sorted", "unique_indices", "mode")
    return lax.scatter_add(operand, indices, updates, eqn.params["dimension_numbers"],
                           **{name: eqn.params[name] for name in names})


def scatter_sub(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Subtraction at indices; the path polynomial adds."""
    operand, indices, updates = ins
    _known(interp, eqn, [indices])
    sign = -1 if interp.algebra.signed else 1

    def fn(held: Array, added: Array) -> Array:
        return _scatter_add(eqn, held, indices.value, sign * added)
    fn.of_input = indices.of_input  # type: ignore[attr-defined]
    return [interp.linear("scatter-add", fn, [operand, updates], like=eqn.outvars[0].aval)]


def scatter_mul(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Multiplication at indices, by constants, gates or parameters."""
    operand, indices, updates = ins
    _known(interp, eqn, [indices])
    aval, spread = eqn.outvars[0].aval, eqn.invars[2].aval
    ones = jnp.ones(aval.shape, aval.dtype)

    def factor(value: Any) -> Array:
        return eqn.primitive.bind(ones, indices.value, value, **eqn.params)
    if isinstance(updates, Const):
        with_ones = Const(factor(updates.value), updates.of_input or indices.of_input)
        return [interp.bilinear("mul", lax.mul, operand, with_ones, parent=(operand, with_ones.value), like=aval)]
    if isinstance(updates, Gate):
        return [interp.gated(operand, lambda: factor(updates.value))]
    if isinstance(indices.value, jax.core.Tracer) or indices.of_input:
        raise interp.error("'scatter-mul' multiplies by a signal at indices that are not known while tracing")
    with jax.ensure_compile_time_eval():
        hits = np.asarray(_scatter_add(eqn, jnp.zeros(aval.shape), indices.value, jnp.ones(spread.shape)))
    if hits.max(initial=0) > 1:
        raise interp.error("'scatter-mul' multiplies one entry by several signals or parameters")
    untouched = Const(jnp.asarray(hits == 0, aval.dtype))
    whole = interp.linear("scatter-add", lambda held, added: _scatter_add(eqn, held, indices.value, added),
                          [untouched, updates], like=aval)
    return [interp.bilinear("mul", lax.mul, operand, whole, like=aval)]


def scatter_extremum(largest: bool) -> Rule:
    """Maxima or minima at indices: of the entry that is there and of all updates to it, each with its own gate."""
    def rule(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
        operand, indices, updates = ins
        _known(interp, eqn, [indices])
        for v in (operand, updates):
            require(interp, v, (0.0, -np.inf if largest else np.inf), f"one side of '{eqn.primitive.name}'")

        def shares() -> tuple[Array, Array]:
            at = interp.trues([operand, updates])
            out, pull = jax.vjp(lambda o, u: eqn.primitive.bind(o, indices.value, u, **eqn.params), *at)
            return pull(jnp.ones_like(out))     # each entry of an operand has a part in one entry of the result

        def share(i: int) -> Array:
            return shares()[i]

        held, added = (interp.gated(v, partial(share, i)) if isinstance(v, PathSum) else
                       Const(jnp.zeros(a.aval.shape, a.aval.dtype))
                       for i, (v, a) in enumerate(((operand, eqn.invars[0]), (updates, eqn.invars[2]))))
        return [interp.linear("scatter-add", lambda o, u: _scatter_add(eqn, o, indices.value, u), [held, added],
                              like=eqn.outvars[0].aval)]
    return rule


INDEXING: dict[str, Rule] = {
    "gather": gather, "dynamic_slice": dynamic_slice, "dynamic_update_slice": indexed([0, 1]),
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add"), indexed([0, 2])),
    **dict.fromkeys(("scatter-sub", "scatter_sub"), scatter_sub),
    **dict.fromkeys(("scatter-mul", "scatter_mul"), scatter_mul),
    **dict.fromkeys(("scatter-max", "scatter_max"), scatter_extremum(True)),
    **dict.fromkeys(("scatter-min", "scatter_min"), scatter_extremum(False)),
    **dict.fromkeys(("select_and_scatter_add", "select_and_gather_add"), indexed([0])),
}
