"""Algebras on arrays: the network itself with its gates recorded, and the path polynomial."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pkjax.paths.custom_rules import slope
from pkjax.paths.interpreter import PathSum, Value

__all__ = ["Polynomial", "TrueValues"]


class TrueValues:
    """The network as it stands: path sums hold its true values, and every gate is recorded in order."""

    signed = True
    known = True
    natural_max = False

    def __init__(self) -> None:
        self.recorded: list[Array] = []
        self.last: tuple[PathSum, int, Any] | None = None   # the last gate's operand, its number, and their product

    def lift(self, constant: Any) -> Any:
        """Hold the constant itself."""
        return constant

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply the operation."""
        return fn(*(s.value for s in operands))

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Apply the operation."""
        return fn(a.value, b.value)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Record the gate and multiply by it."""
        return self._multiplied(operand.value, operand, gate)

    def _multiplied(self, value: Any, operand: PathSum, gate: Callable[[], Any]) -> Any:
        # A gate is piecewise constant, so no gradient flows into it.
        factor = jax.lax.stop_gradient(jnp.asarray(gate()).astype(operand.dtype))
        product = value * factor
        self.last = (operand, len(self.recorded), product)
        self.recorded.append(factor)
        return product

    def coefficient(self, value: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """Record a coefficient and hold it; no gradient flows into it."""
        self.recorded.append(jax.lax.stop_gradient(jnp.asarray(value)))
        return self.lift(self.recorded[-1]) if jnp.issubdtype(dtype, jnp.floating) else self.recorded[-1]

    def true_value(self, operand: PathSum) -> Any:
        """Return what the path sum holds."""
        return operand.value

    def refine(self, eqn: Any, ins: list[Value], outs: list[Value]) -> list[Value]:
        """Give a custom activation the slope that its own derivative rule has: it settles ties (relu'(0) = 0)."""
        if len(ins) != 1 or len(outs) != 1 or self.last is None:
            return outs
        (x,), (out,), (operand, index, _) = ins, outs, self.last
        if not isinstance(out, PathSum) or x is not operand or not self.is_last(out):
            return outs        # the function is not a gate on its operand alone
        assert isinstance(x, PathSum)
        self.recorded[index] = jax.lax.stop_gradient(slope(eqn, self.true_value(x)))
        held = self.gated_again(x, self.recorded[index])
        return [replace(out, value=held, parent=None)]

    def gated_again(self, operand: PathSum, gate: Array) -> Any:
        """Multiply by a gate that stands recorded already."""
        return operand.value * gate

    def is_last(self, out: PathSum) -> bool:
        """Whether a path sum is the last gate's product."""
        return self.last is not None and self.true_value(out) is self.last[2]


class Polynomial:
    """The path polynomial: constants to the power |c|^q, additions only, gates open or as given.

    With q None, constants and signs stay as they are: with the gates of x, the sum over paths that is f(x).
    """

    known = False

    def __init__(self, q: Any, gates: Sequence[Any] | None, natural_max: bool):
        self.q = q
        self.signed = q is None
        self.gates = None if gates is None else list(gates)
        self.used = 0
        self.natural_max = natural_max and gates is None

    def lift(self, constant: Any) -> Any:
        """Return |c|^q, where 0^0 = 0: a zero constant carries no path."""
        if self.q is None or not jnp.issubdtype(constant.dtype, jnp.floating):
            return constant
        if self.q == 1:
            return jnp.abs(constant)
        if self.q == 2:
            return constant * constant
        present = (constant != 0).astype(constant.dtype)
        return present if self.q == 0 else present * jnp.abs(constant) ** self.q

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply the operation."""
        return fn(*(s.value for s in operands))

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Apply the operation."""
        return fn(a.value, b.value)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Multiply by the next of the given gates."""
        return self.opened(operand.value, operand.shape)

    def opened(self, held: Array, shape: tuple[int, ...]) -> Array:
        """Multiply an array of this shape by the next of the given gates; without gates, all are open."""
        return held if self.gates is None else held * self.given(shape).astype(held.dtype)

    def coefficient(self, value: None, shape: tuple[int, ...], dtype: Any) -> Any:
        """Hold the next of the given gates."""
        return self.given(shape).astype(dtype)

    def given(self, shape: tuple[int, ...]) -> Array:
        """The next of the given gates, of this shape."""
        assert self.gates is not None
        if self.used == len(self.gates):
            raise ValueError(f"gates holds {len(self.gates)} arrays, but this network has more gates; record them with "
                             "pkjax.paths.gates on the same apply_fn")
        value = self.gates[self.used]
        self.used += 1
        if jnp.size(value) == 1 and shape == (1,):      # (N,) is the shape of such gates of a batch, as of scalars'
            value = jnp.reshape(value, shape)
        if jnp.shape(value) != shape:
            raise ValueError(f"gate {self.used - 1} has shape {jnp.shape(value)}, but acts on a signal of shape "
                             f"{shape}; record gates with pkjax.paths.gates on a batch of the same size")
        return jnp.asarray(value)

    def true_value(self, operand: PathSum) -> Any:
        """Return nothing: the polynomial does not know the network's own values."""
        return None
