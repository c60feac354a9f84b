"""A program as a list of operations without calls, whose shapes can be changed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from pkjax.programs.equations import CALLS, closed, live_equations, opened
from pkjax.programs.program import BoundProgram, Hoisted
from pkjax.programs.source import module_scope, source_line

__all__ = ["CONTRACTIONS", "ELEMENTWISE", "Operation", "Operations", "run"]

ELEMENTWISE = frozenset((
    "abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "div",
    "eq", "erf", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision", "relu",
    "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"))
"""Operations entry by entry, of operands of one shape, of length 1 along an axis, or without axes."""
OTHERS = frozenset((
    "broadcast_in_dim", "concatenate", "conv_general_dilated", "dot_general", "expand_dims", "pad", "reduce_max",
    "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "reshape", "rev",
    "slice", "squeeze", "transpose"))
CONTRACTIONS = ("dot_general", "conv_general_dilated")
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation: which values it takes, and which it makes."""

    name: str
    call: Callable[..., Any]
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    output: int

    def __call__(self, *values: Any) -> Any:
        """Apply it."""
        return self.call(*values, **self.params)

    def resized(self, shape: tuple[int, ...]) -> "Operation":
        """The operation that makes a value of another shape."""
        sizes = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}
        if self.name in sizes:
            return replace(self, params={**self.params, sizes[self.name]: shape})
        if self.name == "slice":     # only axes that are taken whole change
            start = self.params["start_indices"]
            limits = tuple(s + (n - 1) * step + 1 for s, n, step in
                           zip(start, shape, self.params["strides"] or (1,) * len(shape), strict=True))
            return replace(self, params={**self.params, "limit_indices": limits})
        return self


@dataclass(frozen=True, eq=False)
class Operations:
    """A network as operations on numbered values.

    Examples:
        >>> from pkjax.network import read
        >>> network = read(lambda w, x: jax.nn.relu(x @ w), jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> [each.name for each in Operations.of(network.fn).each]
        ['dot_general', 'relu']
    """

    each: tuple[Operation, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    """Of all values."""
    constants: Mapping[int, Any]
    """The values that are known."""
    arguments: tuple[int, ...]
    """The values that are given: the leaves of the parameters, then the input."""
    result: int

    @classmethod
    def of(cls, fn: BoundProgram) -> "Operations":
        """Read a program.

        Raises:
            ValueError: it has an operation that is not known here.
        """
        reader = _Reader(fn.constants)
        jaxpr = fn.program.jaxpr
        arguments = [reader.value(v.aval) for v in jaxpr.invars]
        consts = [reader.constant(c) for c in fn.program.consts]
        (result,) = reader.inline(jaxpr, consts, arguments)
        return cls(tuple(reader.each), tuple(reader.shapes), reader.constants, tuple(arguments), result)

    @cached_property
    def signals(self) -> frozenset[int]:
        """The values that depend on the input."""
        found = {self.arguments[-1]}
        for op in self.each:
            if found.intersection(op.inputs):
                found.add(op.output)
        return frozenset(found)

    @cached_property
    def matrices(self) -> frozenset[int]:
        """Parameters and constants that do nothing but multiply other values in dense layers and convolutions."""
        given = {*self.constants, *self.arguments[:-1]}
        others = {i for op in self.each if op.name not in CONTRACTIONS or given.issuperset(op.inputs)
                  for i in op.inputs}
        return frozenset(given - others)

    def flops(self) -> int:
        """Floating-point operations of dense layers and convolutions for one example, two for each product."""
        total = 0
        for op in self.each:
            if op.name == "dot_general":
                (contracted, _), _ = op.params["dimension_numbers"]
                left = self.shapes[op.inputs[0]].shape
                total += 2 * prod(self.shapes[op.output].shape) * prod(left[axis] for axis in contracted)
            elif op.name == "conv_general_dilated":
                kernel = self.shapes[op.inputs[1]].shape
                outputs = kernel[op.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * prod(self.shapes[op.output].shape) * prod(kernel) // max(1, outputs)
        return total


def run(operations: Operations, constants: Mapping[int, Any], arguments: Sequence[Any]) -> dict[int, Any]:
    """Evaluate all values."""
    values = {**constants, **dict(zip(operations.arguments, arguments, strict=True))}
    for op in operations.each:
        values[op.output] = op(*(values[i] for i in op.inputs))
    return values


class _Reader:
    """Numbers values, and takes calls apart."""

    def __init__(self, hoisted: Sequence[Any]):
        self.hoisted = hoisted
        self.each: list[Operation] = []
        self.shapes: list[jax.ShapeDtypeStruct] = []
        self.constants: dict[int, Any] = {}
        self.enclosing: list[Any] = []

    def value(self, like: Any) -> int:
        self.shapes.append(jax.ShapeDtypeStruct(like.shape, like.dtype))
        return len(self.shapes) - 1

    def constant(self, value: Any) -> int:
        value = jnp.asarray(self.hoisted[value.index] if isinstance(value, Hoisted) else value)
        number = self.value(value)
        self.constants[number] = value
        return number

    def inline(self, jaxpr: Any, consts: Sequence[int], arguments: Sequence[int]) -> list[int]:
        """Read a jaxpr, and those that it calls, into the list."""
        env: dict[Any, int] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def number(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                aval: Any = atom.aval
                return self.constant(jnp.asarray(atom.val, aval.dtype))
            return env[atom]

        for eqn in live_equations(jaxpr):
            self.enclosing.append(eqn)
            env.update(zip(eqn.outvars, self.equation(eqn, [number(a) for a in eqn.invars]), strict=True))
            self.enclosing.pop()
        return [number(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[int]) -> list[int]:
        name = eqn.primitive.name
        if name in ("name", "optimization_barrier"):
            return inputs
        if name in (*CALLS, *CUSTOM) and not _is_relu(eqn):
            inner, consts = opened(next(closed(eqn.params)))
            return self.inline(inner, [self.constant(c) for c in consts], inputs)
        output = self.value(eqn.outvars[0].aval)
        if _is_relu(eqn):
            self.each.append(Operation("relu", jax.nn.relu, {}, tuple(inputs), output))
        elif len(eqn.outvars) > 1 or name not in ELEMENTWISE | OTHERS or _shifts_entries(eqn):
            module = module_scope(self.enclosing)
            raise ValueError(
                f"shrink does not know which units go together in the operation '{name}'\n"
                f"  source: {source_line(self.enclosing)}" + (f"\n  module: {module}" if module else "")
                + "\n  what to do: shrink takes chains of dense and convolution layers, with biases, frozen BatchNorm, "
                "pooling, activations and residual sums; use the masks on the network as it is")
        else:
            self.each.append(Operation(name, eqn.primitive.bind, dict(eqn.params), tuple(inputs), output))
        return [output]


def _is_relu(eqn: Any) -> bool:
    """Whether a call is `jax.nn.relu`, whose slope at 0 is 0, where that of a maximum with 0 is 1/2."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    jaxpr, names = opened(eqn.params["call_jaxpr"])[0], []
    while len(jaxpr.eqns) == 1 and (inner := next(closed(jaxpr.eqns[0].params), None)) is not None:
        names.append(jaxpr.eqns[0].params.get("name"))
        jaxpr = opened(inner)[0]
    if names != ["relu"] or len(jaxpr.eqns) != 1 or jaxpr.eqns[0].primitive.name != "max":
        return False
    last = jaxpr.eqns[0].invars[-1]
    return isinstance(last, jex.Literal) and bool(last.val == 0)


def _shifts_entries(eqn: Any) -> bool:
    """Whether a reshape also reorders its operand."""
    return eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None
