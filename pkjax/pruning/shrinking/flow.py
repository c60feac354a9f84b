"""Which entries of a program's values carry nothing: decided by 0 and 1 alone, without any tolerance.

An entry is *driven* if a path of weights that are not 0 leads to it from the input; one that is not driven is a
constant, whose value is known. It is *needed* if such a path leads from it to an output. An entry is idle if it is not
needed, or not driven and exactly 0. Of a product of two entries that are 0 the second counts as needed, so that it
stays 0 whatever becomes of the first. Nothing is asked of matrices: their rows and columns go with the units on either
side.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pkjax.pruning.shrinking.operations import CONTRACTIONS, ELEMENTWISE, Operation, Operations, run

__all__ = ["Flow", "driven_and_values", "idle_entries"]

Flow = dict[int, Array]
"""Of each value, booleans of its shape."""


def driven_and_values(operations: Operations, arguments: list[Any]) -> tuple[Flow, Flow]:
    """Say which entries are driven, and which of the others are other than 0 (the former are, too).

    Args:
        operations: the network.
        arguments: its parameters and one input, whatever it is.
    """
    values = run(operations, operations.constants, arguments)
    driven: Flow = {i: jnp.zeros(jnp.shape(v), bool) for i, v in values.items()}
    driven[operations.arguments[-1]] = jnp.ones(jnp.shape(arguments[-1]), bool)
    present: Flow = {i: v != 0 for i, v in values.items()}
    present[operations.arguments[-1]] = driven[operations.arguments[-1]]
    for op in operations.each:
        moving, there = [driven[i] for i in op.inputs], [present[i] for i in op.inputs]
        if op.name == "mul":
            driven[op.output] = moving[0] & there[1] | there[0] & moving[1]
        elif op.name in CONTRACTIONS:
            sides = [_product(op, *pair) for i, pair in zip(op.inputs, ((moving[0], there[1]), (there[0], moving[1])),
                                                            strict=True) if i in operations.signals]
            driven[op.output] = jnp.stack([*sides, jnp.zeros(operations.shapes[op.output].shape, bool)]).any(0)
        elif op.name in ELEMENTWISE:
            shape = operations.shapes[op.output].shape
            driven[op.output] = jnp.stack([jnp.broadcast_to(m, shape) for m in moving]).any(0)
        else:
            driven[op.output] = _spread(op, *moving)
        present[op.output] = driven[op.output] | (values[op.output] != 0)
    return driven, present


def idle_entries(operations: Operations, present: Flow, gone: Mapping[int, Any]) -> Flow:
    """Say which entries are idle, of all values but matrices, where those in ``gone`` need nothing."""
    needed: Flow = {i: jnp.zeros(shape.shape, bool) for i, shape in enumerate(operations.shapes)}
    needed[operations.result] = jnp.ones(operations.shapes[operations.result].shape, bool)
    for op in reversed(operations.each):
        asked = needed[op.output] & ~gone[op.output]
        there = [present[i] for i in op.inputs]
        if op.name == "mul":
            a, b = there
            parts = [_gathered(asked & b, a.shape), _gathered(asked & (a | ~b), b.shape)]
        elif op.name in CONTRACTIONS:
            parts = _factors(operations, op, there, asked)
        elif op.name in ELEMENTWISE:
            parts = [_gathered(asked, jnp.shape(t)) for t in there]
        else:
            parts = _pulled_all(op, there, asked)
        for i, part in zip(op.inputs, parts, strict=True):
            needed[i] = needed[i] | part
    return {i: ~needed[i] | ~present[i] for i in needed if i not in operations.matrices}


def _ones(truth: Array) -> Array:
    return truth.astype(jnp.float32)


def _more_than_none(count: Array) -> Array:
    """Whether a sum of zeros and ones has a one, however convolutions round."""
    return count > 0.5


def _product(op: Operation, a: Array, b: Array) -> Array:
    return _more_than_none(_typed(op)(_ones(a), _ones(b)))


def _typed(op: Operation) -> Any:
    """The operation in float32, whatever type its own sums have."""
    named = {"preferred_element_type": None} if "preferred_element_type" in op.params else {}
    return lambda *values: op.call(*values, **{**op.params, **named})


def _linear(op: Operation) -> Any:
    """A linear operation that reaches the same entries: maxima become sums."""
    if op.name in ("reduce_max", "reduce_min"):
        return lambda x: x.sum(op.params["axes"])
    if op.name.startswith("reduce_window"):
        window = [op.params[name] for name in ("window_dimensions", "window_strides", "padding", "base_dilation",
                                               "window_dilation")]
        return lambda x: lax.reduce_window(x, np.float32(0), lax.add, *window)
    return op


def _factors(operations: Operations, op: Operation, there: list[Array], asked: Array) -> list[Array]:
    """Which entries of both factors are needed; matrices follow the units of what they are multiplied with."""
    (left, right), (a, b) = op.inputs, there
    none = [jnp.zeros(t.shape, bool) for t in there]
    if left in operations.matrices:
        return [none[0], _factor(op, 1, a, b, asked)]
    first = _factor(op, 0, b, a, asked)
    if right in operations.matrices:
        return [first, none[1]]
    return [first, _factor(op, 1, a, b, asked) | ~b & _factor(op, 1, jnp.ones_like(a), b, asked)]


def _factor(op: Operation, side: int, other: Array, like: Array, asked: Array) -> Array:
    """Which entries of one factor reach those that are asked for, by entries of the other that are there."""
    call, held = _typed(op), _ones(other)
    return _pulled(lambda v: call(v, held) if side == 0 else call(held, v), like, asked)


def _spread(op: Operation, *truths: Array) -> Array:
    return _more_than_none(_linear(op)(*map(_ones, truths)))


def _pulled(fn: Any, like: Array, asked: Array) -> Array:
    """Which entries of an operand reach those that are asked for."""
    _, pull = jax.vjp(fn, _ones(like))
    return _more_than_none(pull(_ones(asked))[0])


def _pulled_all(op: Operation, there: list[Array], asked: Array) -> list[Array]:
    _, pull = jax.vjp(_linear(op), *map(_ones, there))
    return [_more_than_none(part) for part in pull(_ones(asked))]


def _gathered(asked: Array, shape: tuple[int, ...]) -> Array:
    """Undo a broadcast."""
    if not shape:
        return asked.any()
    over = tuple(axis for axis, (n, m) in enumerate(zip(shape, asked.shape, strict=True)) if n != m)
    return asked.any(over, keepdims=True)
