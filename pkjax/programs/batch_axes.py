"""Where single operations leave the examples of a batch: along which axis of their results.

An operation that joins them (a sum over that axis, a contraction) raises ``Joined``; one that moves them as no rule
follows raises ``Uncertain``.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from pkjax.programs.examples import EXAMPLES, Free, Joined, Rows, Rule, Uncertain, Value, moved, shape, uniform

__all__ = ["ELEMENTWISE", "OPERATIONS", "elementwise"]


def _joint(eqn: Any, ins: Sequence[Value], variables: Sequence[Any] | None = None) -> Rows:
    """The one place of the examples in operands of one shape; scalars and uniform ones have no say."""
    variables = eqn.invars if variables is None else variables
    places = {v for v in ins if isinstance(v, Rows)}
    if len(places) != 1:
        raise Joined(eqn)      # two axes of examples in one value: every example meets every other
    (place,) = places
    for variable, value in zip(variables, ins, strict=True):
        if isinstance(value, Free) and len(shape(variable)) and place.axis not in uniform(value, variable):
            raise Uncertain(eqn)
    return place


def elementwise(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """Operations that take every entry by itself."""
    return [_joint(eqn, ins)] * len(eqn.outvars)


def _reshape(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place, *_), old, new = ins, shape(eqn.invars[0]), shape(eqn.outvars[0])
    assert isinstance(place, Rows)
    order = tuple(eqn.params["dimensions"] or range(len(old)))        # a transposition comes first
    before = prod(old[d] for d in order[:order.index(place.axis)]) * place.outer
    for axis in range(len(new)):
        ahead = prod(new[:axis])
        if before % ahead == 0 and (ahead * new[axis]) % (before * EXAMPLES) == 0:
            return [Rows(axis, before // ahead, ahead * new[axis] // (before * EXAMPLES))]
    raise Uncertain(eqn)


def _transpose(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place,) = ins
    return [moved(place, tuple(eqn.params["permutation"]).index(place.axis))]     # type: ignore[union-attr, arg-type]


def _broadcast(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    place = ins[0]
    return [moved(place, eqn.params["broadcast_dimensions"][place.axis])]    # type: ignore[union-attr, arg-type]


def _expand(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place,), added = ins, eqn.params["dimensions"]
    kept = [d for d in range(len(shape(eqn.outvars[0]))) if d not in added]
    return [moved(place, kept[place.axis])]      # type: ignore[union-attr, arg-type]


def _dropping(parameter: str, refusal: type[Exception] = Joined) -> Rule:
    """Operations that take axes away."""
    def rule(eqn: Any, ins: Sequence[Value]) -> list[Value]:
        place = _joint(eqn, ins)
        axes = [int(d) for d in np.ravel(eqn.params[parameter])]
        if place.axis in axes:
            raise refusal(eqn)
        return [moved(place, place.axis - sum(d < place.axis for d in axes))] * len(eqn.outvars)
    return rule


def _along(parameter: str, refusal: type[Exception] = Joined) -> Rule:
    """Operations that join what lies along one axis, and keep the others; those of several operands may be undone."""
    def rule(eqn: Any, ins: Sequence[Value]) -> list[Value]:
        place = _joint(eqn, ins)
        rank = len(shape(eqn.invars[0]))
        if place.axis == eqn.params.get(parameter, rank - 1) % rank:
            raise refusal(eqn) if len(ins) == 1 else Uncertain(eqn)
        return [place] * len(eqn.outvars)
    return rule


def _matrices(axes: Callable[[Any], int]) -> Rule:
    """Operations on the last axes of arrays, for each place of the others."""
    def rule(eqn: Any, ins: Sequence[Value]) -> list[Value]:
        place = _joint(eqn, ins)
        if place.axis >= len(shape(eqn.invars[0])) - axes(eqn):
            raise Uncertain(eqn)
        return [place] * len(eqn.outvars)
    return rule


def _each(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """Operations that give back their operands."""
    return list(ins)


def _reversed(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (place,) = ins
    if place.axis in eqn.params["dimensions"]:      # type: ignore[union-attr]
        raise Uncertain(eqn)
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
        0, shape(eqn.invars[0])[axis], 1)


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
    return [moved(place, place.axis + (eqn.params["axis"] <= place.axis))]


def _update(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    operand, update, *starts = ins
    if any(isinstance(v, Rows) for v in starts):
        raise Uncertain(eqn)
    place = _joint(eqn, (operand, update), eqn.invars[:2])
    if shape(eqn.invars[1])[place.axis] != shape(eqn.invars[0])[place.axis]:
        raise Uncertain(eqn)
    return [place]


def _contract(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    places, kept = [], len(batch[0])
    for side, value in enumerate(ins):
        free = [d for d in range(len(shape(eqn.invars[side]))) if d not in contracted[side] and d not in batch[side]]
        if isinstance(value, Rows):
            if value.axis in contracted[side]:
                raise Joined(eqn)
            if value.axis in batch[side]:
                pair = tuple(batch[side]).index(value.axis)
                other = ins[1 - side]
                if isinstance(other, Free) and batch[1 - side][pair] not in other.uniform:
                    raise Uncertain(eqn)
                places.append(moved(value, pair))
            else:
                places.append(moved(value, kept + free.index(value.axis)))
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
    return [moved(image, out[0])]


def _gather(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (operand, indices), d = ins, eqn.params["dimension_numbers"]
    taken = [i for i in range(len(shape(eqn.outvars[0]))) if i not in d.offset_dims]
    if isinstance(indices, Rows) and isinstance(operand, Rows):
        pairs = list(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
        if (operand.axis, indices.axis) not in pairs:
            raise Uncertain(eqn)
        return [moved(indices, taken[indices.axis])]
    if isinstance(indices, Rows):
        if indices.axis in d.start_indices_batching_dims:
            raise Uncertain(eqn)
        return [moved(indices, taken[indices.axis])]
    assert isinstance(operand, Rows)
    whole = eqn.params["slice_sizes"][operand.axis] == shape(eqn.invars[0])[operand.axis]
    if operand.axis in (*d.start_index_map, *d.operand_batching_dims, *d.collapsed_slice_dims) or not whole:
        raise Uncertain(eqn)
    window = [i for i in range(len(shape(eqn.invars[0])))
              if i not in d.collapsed_slice_dims and i not in d.operand_batching_dims]
    return [moved(operand, d.offset_dims[window.index(operand.axis)])]


def _scatter(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    (operand, indices, updates), d = ins, eqn.params["dimension_numbers"]
    if isinstance(indices, Rows):
        raise Uncertain(eqn)
    window = [i for i in range(len(shape(eqn.invars[0])))
              if i not in d.inserted_window_dims and i not in d.operand_batching_dims]
    sides = []
    if isinstance(operand, Rows):
        sides.append(operand)
    if isinstance(updates, Rows):
        if updates.axis not in d.update_window_dims:
            raise Uncertain(eqn)
        sides.append(moved(updates, window[list(d.update_window_dims).index(updates.axis)]))
    (place,) = set(sides) if len(set(sides)) == 1 else (None,)
    if place is None or place.axis not in window or place.axis in d.scatter_dims_to_operand_dims:
        raise Uncertain(eqn)
    for value, axis in ((operand, place.axis), (updates, d.update_window_dims[window.index(place.axis)])):
        if isinstance(value, Free) and axis not in value.uniform:
            raise Uncertain(eqn)
    return [place]


ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p", "cos",
    "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p",
    "log2", "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter", "not",
    "one_minus_square", "or", "polygamma", "population_count", "pow", "random_gamma_grad", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor", "zeta",
))
"""Operations that take every entry by itself."""

OPERATIONS: dict[str, Rule] = {
    "reshape": _reshape, "transpose": _transpose, "broadcast_in_dim": _broadcast, "expand_dims": _expand,
    "squeeze": _dropping("dimensions"), "rev": _reversed,
    **{name: _dropping("axes") for name in ("reduce_sum", "reduce_prod", "reduce_xor", "argmax", "argmin")},
    # A maximum may steady what it does not change, and a loop for each example asks whether any goes on.
    **{name: _dropping("axes", Uncertain) for name in ("reduce_max", "reduce_min", "reduce_and", "reduce_or")},
    "reduce": _dropping("dimensions"),
    **{name: _along("axis") for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k")},
    "sort": _along("dimension"), "split": _along("axis", Uncertain), "approx_top_k": _along("reduction_dimension"),
    **{name: _matrices(lambda _: 2) for name in ("cholesky", "eig", "eigh", "lu", "qr", "schur", "svd",
                                                 "triangular_solve")},
    "fft": _matrices(lambda eqn: len(eqn.params["fft_lengths"])), "bitcast_convert_type": _matrices(lambda _: 1),
    "optimization_barrier": _each, "device_put": _each,
    "slice": _same(_whole_slice),
    "pad": _same(lambda eqn, axis: tuple(eqn.params["padding_config"][axis]) == (0, 0, 0)),
    "dynamic_slice": _same(lambda eqn, axis: eqn.params["slice_sizes"][axis] == shape(eqn.invars[0])[axis]),
    **{f"reduce_window{name}": _same(_narrow_window) for name in ("", "_sum", "_max", "_min")},
    "tile": _same(lambda eqn, axis: tuple(eqn.params["reps"])[axis] == 1),
    "concatenate": _concatenate, "stack": _stack, "unstack": _dropping("axis", Uncertain),
    "dynamic_update_slice": _update,
    "dot_general": _contract, "conv_general_dilated": _convolve, "gather": _gather,
    **{f"scatter{name}": _scatter for name in ("", "_add", "_mul", "-add", "-mul", "-sub", "-max", "-min")},
}
"""What each operation that has an operand with examples in it leaves of them."""
