"""Whether each row of a network's output depends on its own example alone, read off the program for two examples.

Every value is followed by where its examples lie: along one axis, whose size is ``outer`` · N · ``inner``. An operation
that joins examples (a sum over that axis, a contraction, a sort) makes the network one that pkjax refuses. What the
rules do not know is uncertain, and the caller then compares numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pkjax.programs.equations import closed, live_equations

__all__ = ["EXAMPLES", "Joined", "Rows", "Uncertain", "follow"]

EXAMPLES = 2
"""N of the program that is followed: a prime, which no reshape can split over two axes."""


@dataclass(frozen=True)
class Rows:
    """The examples lie along ``axis``, with ``outer`` entries around and ``inner`` entries within each."""

    axis: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Free:
    """No example has a part in the value, which is the same all along the axes ``uniform``."""

    uniform: frozenset[int] = frozenset()


class Joined(Exception):
    """An operation joins examples; ``args`` are the operation."""


class Uncertain(Exception):
    """No rule says where an operation leaves the examples; ``args`` are the operation."""


Value = Rows | Free
Rule = Callable[[Any, Sequence[Value]], Sequence[Value]]


def follow(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """Follow the examples through a jaxpr from its inputs to its outputs.

    Args:
        jaxpr: an open jaxpr, traced on ``EXAMPLES`` examples.
        consts: what its ``constvars`` hold.
        inputs: where the examples lie in its arguments.

    Returns:
        Where they lie in its results.

    Raises:
        Joined: an operation joins examples.
        Uncertain: an operation has no rule for where they lie.
    """
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return Free(frozenset(range(np.ndim(atom.val)))) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in live_equations(jaxpr):
        ins = [read(a) for a in eqn.invars]
        name = eqn.primitive.name
        if all(isinstance(v, Free) for v in ins):
            outs: Sequence[Value] = _free(eqn, ins)
        elif name in ELEMENTWISE:
            outs = [_elementwise(eqn, ins)] * len(eqn.outvars)
        elif name in RULES:
            outs = RULES[name](eqn, ins)
        else:
            raise Uncertain(eqn)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _constant(value: Any) -> Free:
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "shape"):
        return Free()
    array = np.asarray(value) if not jnp.issubdtype(value.dtype, jax.dtypes.extended) else np.zeros(0)
    return Free(frozenset(d for d, n in enumerate(array.shape) if n == EXAMPLES and
                          (np.take(array, 0, d) == np.take(array, 1, d)).all()))


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _free(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """What no example has a part in: along which axes it is uniform."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return [Free(frozenset(range(len(_shape(eqn.outvars[0])))) - {
            d for i, d in enumerate(eqn.params["broadcast_dimensions"])
            if _shape(eqn.invars[0])[i] != 1 and i not in _uniform(ins[0])})]
    if name == "iota":
        return [Free(frozenset(range(len(_shape(eqn.outvars[0])))) - {eqn.params["dimension"]})]
    if name in ELEMENTWISE and len(eqn.outvars) == 1:
        axes = frozenset(range(len(_shape(eqn.outvars[0]))))
        for variable, value in zip(eqn.invars, ins, strict=True):
            axes &= _uniform(value, variable) if len(_shape(variable)) else axes
        return [Free(axes)]
    return [Free()] * len(eqn.outvars)


def _uniform(value: Value, variable: Any = None) -> frozenset[int]:
    """The axes along which a value is uniform, among them those of size 1 that an operation broadcasts."""
    ones = frozenset() if variable is None else frozenset(d for d, n in enumerate(_shape(variable)) if n == 1)
    return value.uniform | ones if isinstance(value, Free) else frozenset()


def _joint(eqn: Any, ins: Sequence[Value], variables: Sequence[Any] | None = None) -> Rows:
    """The one place of the examples in operands of one shape; scalars and uniform ones have no say."""
    variables = eqn.invars if variables is None else variables
    places = {v for v in ins if isinstance(v, Rows)}
    if len(places) != 1:
        raise Joined(eqn)      # two axes of examples in one value: every example meets every other
    (place,) = places
    for variable, value in zip(variables, ins, strict=True):
        if isinstance(value, Free) and len(_shape(variable)) and place.axis not in _uniform(value, variable):
            raise Uncertain(eqn)
    return place


def _elementwise(eqn: Any, ins: Sequence[Value]) -> Value:
    return _joint(eqn, ins)


def _moved(place: Rows, axis: int) -> Rows:
    return Rows(axis, place.outer, place.inner)


def _reshape(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place, *_), (old,), new = ins, (_shape(eqn.invars[0]),), _shape(eqn.outvars[0])
    assert isinstance(place, Rows)
    before = prod(old[:place.axis]) * place.outer
    for axis in range(len(new)):
        ahead = prod(new[:axis])
        if before % ahead == 0 and (ahead * new[axis]) % (before * EXAMPLES) == 0:
            return [Rows(axis, before // ahead, ahead * new[axis] // (before * EXAMPLES))]
    raise Uncertain(eqn)


def _transpose(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place,) = ins
    return [_moved(place, tuple(eqn.params["permutation"]).index(place.axis))]     # type: ignore[union-attr, arg-type]


def _broadcast(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    place = ins[0]
    return [_moved(place, eqn.params["broadcast_dimensions"][place.axis])]    # type: ignore[union-attr, arg-type]


def _expand(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place,), added = ins, eqn.params["dimensions"]
    kept = [d for d in range(len(_shape(eqn.outvars[0]))) if d not in added]
    return [_moved(place, kept[place.axis])]      # type: ignore[union-attr, arg-type]


def _dropping(parameter: str) -> Rule:
    """Operations that take axes away."""
    def rule(eqn: Any, ins: Sequence[Value]) -> list[Value]:
        place = _joint(eqn, ins)
        axes = np.ravel(eqn.params[parameter])
        if place.axis in axes:
            raise Joined(eqn)
        return [_moved(place, place.axis - sum(bool(d < place.axis) for d in axes))] * len(eqn.outvars)
    return rule


def _along(parameter: str) -> Rule:
    """Operations that join what lies along one axis, and keep the shape."""
    def rule(eqn: Any, ins: Sequence[Value]) -> list[Value]:
        place = _joint(eqn, ins)
        axis = eqn.params.get(parameter, len(_shape(eqn.invars[0])) - 1)
        if place.axis == axis % len(_shape(eqn.invars[0])):
            raise Joined(eqn)
        return [place] * len(eqn.outvars)
    return rule


def _reversed(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    place = _joint(eqn, ins)
    if place.axis in eqn.params["dimensions"]:
        raise Joined(eqn)
    return [place]


def _same(test: Callable[[Any, int], bool]) -> Rule:
    """Operations that leave an axis as it is where ``test`` says so."""
    def rule(eqn: Any, ins: Sequence[Value]) -> list[Value]:
        array, *others = ins
        if not isinstance(array, Rows) or any(isinstance(v, Rows) for v in others) or not test(eqn, array.axis):
            raise Uncertain(eqn)
        return [array] * len(eqn.outvars)
    return rule


def _whole_slice(eqn: Any, axis: int) -> bool:
    strides = eqn.params["strides"] or (1,) * (axis + 1)
    return (eqn.params["start_indices"][axis], eqn.params["limit_indices"][axis], strides[axis]) == (
        0, _shape(eqn.invars[0])[axis], 1)


def _narrow_window(eqn: Any, axis: int) -> bool:
    p = eqn.params
    return bool((p["window_dimensions"][axis], p["window_strides"][axis], tuple(p["padding"][axis])) == (1, 1, (0, 0)))


def _concatenate(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    place = _joint(eqn, ins)
    if place.axis == eqn.params["dimension"]:
        raise Uncertain(eqn)
    return [place]


def _stack(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    place = _joint(eqn, ins)
    return [_moved(place, place.axis + (eqn.params["axis"] <= place.axis))]


def _update(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    operand, update, *starts = ins
    if any(isinstance(v, Rows) for v in starts):
        raise Uncertain(eqn)
    place = _joint(eqn, (operand, update), eqn.invars[:2])
    if _shape(eqn.invars[1])[place.axis] != _shape(eqn.invars[0])[place.axis]:
        raise Uncertain(eqn)
    return [place]


def _contract(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    places, kept = [], len(batch[0])
    for side, value in enumerate(ins):
        free = [d for d in range(len(_shape(eqn.invars[side]))) if d not in contracted[side] and d not in batch[side]]
        if isinstance(value, Rows):
            if value.axis in contracted[side]:
                raise Joined(eqn)
            if value.axis in batch[side]:
                pair = tuple(batch[side]).index(value.axis)
                other = ins[1 - side]
                if isinstance(other, Free) and batch[1 - side][pair] not in other.uniform:
                    raise Uncertain(eqn)
                places.append(_moved(value, pair))
            else:
                places.append(_moved(value, kept + free.index(value.axis)))
        kept += len(free)
    if len(set(places)) != 1:
        raise Joined(eqn)
    return [places[0]]


def _convolve(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    image, kernel = ins
    lhs, _, out = eqn.params["dimension_numbers"]
    if isinstance(kernel, Rows) or not isinstance(image, Rows) or image.axis != lhs[0] or (
            eqn.params["batch_group_count"] != 1):
        raise Uncertain(eqn)
    return [_moved(image, out[0])]


def _gather(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (operand, indices), d = ins, eqn.params["dimension_numbers"]
    taken = [i for i in range(len(_shape(eqn.outvars[0]))) if i not in d.offset_dims]
    if isinstance(indices, Rows) and isinstance(operand, Rows):
        pairs = list(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
        if (operand.axis, indices.axis) not in pairs:
            raise Uncertain(eqn)
        return [_moved(indices, taken[indices.axis])]
    if isinstance(indices, Rows):
        if indices.axis in d.start_indices_batching_dims:
            raise Uncertain(eqn)
        return [_moved(indices, taken[indices.axis])]
    assert isinstance(operand, Rows)
    whole = eqn.params["slice_sizes"][operand.axis] == _shape(eqn.invars[0])[operand.axis]
    if operand.axis in (*d.start_index_map, *d.operand_batching_dims, *d.collapsed_slice_dims) or not whole:
        raise Uncertain(eqn)
    window = [i for i in range(len(_shape(eqn.invars[0])))
              if i not in d.collapsed_slice_dims and i not in d.operand_batching_dims]
    return [_moved(operand, d.offset_dims[window.index(operand.axis)])]


def _scatter(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (operand, indices, updates), d = ins, eqn.params["dimension_numbers"]
    if isinstance(indices, Rows):
        raise Uncertain(eqn)
    window = [i for i in range(len(_shape(eqn.invars[0])))
              if i not in d.inserted_window_dims and i not in d.operand_batching_dims]
    sides = []
    if isinstance(operand, Rows):
        sides.append(operand)
    if isinstance(updates, Rows):
        if updates.axis not in d.update_window_dims:
            raise Uncertain(eqn)
        sides.append(_moved(updates, window[list(d.update_window_dims).index(updates.axis)]))
    (place,) = set(sides) if len(set(sides)) == 1 else (None,)
    if place is None or place.axis not in window or place.axis in d.scatter_dims_to_operand_dims:
        raise Uncertain(eqn)
    for value, axis in ((operand, place.axis), (updates, d.update_window_dims[window.index(place.axis)])):
        if isinstance(value, Free) and axis not in value.uniform:
            raise Uncertain(eqn)
    return [place]


def _inside(inner: Any, ins: Sequence[Value]) -> list[Value]:
    if isinstance(inner, jex.ClosedJaxpr):
        return follow(inner.jaxpr, inner.consts, ins)
    return follow(inner, (), ins)


def _call(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    return _inside(next(closed(eqn.params)), ins)


def _cond(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    index, *operands = ins
    if isinstance(index, Rows):
        raise Joined(eqn)
    return [_either(eqn, values) for values in zip(*(_inside(b, operands) for b in eqn.params["branches"]),
                                                   strict=True)]


def _either(eqn: Any, values: Sequence[Value]) -> Value:
    places = {v for v in values if isinstance(v, Rows)}
    if not places:
        return Free(frozenset.intersection(*(_uniform(v) for v in values)))
    (place, *others) = places
    if others or any(isinstance(v, Free) and place.axis not in v.uniform for v in values):
        raise Uncertain(eqn)
    return place


def _settled(eqn: Any, carry: list[Value], step: Callable[[list[Value]], list[Value]]) -> list[Value]:
    """Where the examples lie in what a loop carries, once another turn moves nothing."""
    for _ in range(len(carry) + 2):
        after = [_either(eqn, pair) for pair in zip(carry, step(carry), strict=True)]
        if after == carry:
            return carry
        carry = after
    raise Uncertain(eqn)


def _scan(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    body = eqn.params["jaxpr"]
    inner = body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body
    n_carry = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, inner.outvars, strict=True))
    n_consts = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.invars, inner.invars, strict=True)) - n_carry
    consts, carry, stacks = ins[:n_consts], list(ins[n_consts:n_consts + n_carry]), ins[n_consts + n_carry:]
    slices: list[Value] = []
    for value in stacks:
        if isinstance(value, Rows) and value.axis == 0:
            raise Joined(eqn)         # a loop over the examples
        slices.append(_moved(value, value.axis - 1) if isinstance(value, Rows) else
                      Free(frozenset(d - 1 for d in value.uniform if d)))
    carry = _settled(eqn, carry, lambda now: _inside(body, [*consts, *now, *slices])[:n_carry])
    outs = _inside(body, [*consts, *carry, *slices])[n_carry:]
    return [*carry, *(_moved(v, v.axis + 1) if isinstance(v, Rows) else Free(frozenset(d + 1 for d in v.uniform))
                      for v in outs)]


def _while(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    known, consts, carry = ins[:first], ins[first:first + second], list(ins[first + second:])
    carry = _settled(eqn, carry, lambda now: _inside(eqn.params["body_jaxpr"], [*consts, *now]))
    (goes_on,) = _inside(eqn.params["cond_jaxpr"], [*known, *carry])
    if isinstance(goes_on, Rows):
        raise Joined(eqn)
    return carry


ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "device_put", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log",
    "log1p", "logistic", "lt", "lt_to", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not",
    "optimization_barrier", "or", "polygamma", "population_count", "pow", "random_gamma_grad", "real",
    "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "sharding_constraint",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "zeta",
))
"""Operations that take every entry by itself."""

RULES: dict[str, Rule] = {
    "reshape": _reshape, "transpose": _transpose, "broadcast_in_dim": _broadcast, "expand_dims": _expand,
    "squeeze": _dropping("dimensions"), "rev": _reversed,
    **{name: _dropping("axes") for name in (
        "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax",
        "argmin")},
    "reduce": _dropping("dimensions"),
    **{name: _along("axis") for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k", "split")},
    "sort": _along("dimension"),
    "slice": _same(_whole_slice),
    "pad": _same(lambda eqn, axis: tuple(eqn.params["padding_config"][axis]) == (0, 0, 0)),
    "dynamic_slice": _same(lambda eqn, axis: eqn.params["slice_sizes"][axis] == _shape(eqn.invars[0])[axis]),
    **{f"reduce_window_{name}": _same(_narrow_window) for name in ("sum", "max", "min")},
    "tile": _same(lambda eqn, axis: tuple(eqn.params["reps"])[axis] == 1),
    "concatenate": _concatenate, "stack": _stack, "unstack": _dropping("axis"), "dynamic_update_slice": _update,
    "dot_general": _contract, "conv_general_dilated": _convolve, "gather": _gather,
    **{name: _scatter for name in ("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul")},
    **{name: _call for name in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call",
                                "custom_vjp_call", "custom_vjp_call_jaxpr")},
    "cond": _cond, "scan": _scan, "while": _while,
}
