"""Algebras on arrays: the network itself with its gates recorded, and the path polynomial."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array

from pkjax.paths.interpreter import PathSum, Value

__all__ = ["Polynomial", "TrueValues"]


class TrueValues:
    """The network as it stands: path sums hold its true values, and every gate is recorded in order."""

    signed = True
    known = True
    natural_max = False

    def __init__(self) -> None:
        self.recorded: list[Array] = []
        self.last: tuple[PathSum, int] | None = None   # the operand of the last gate, and how many came before it

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
        slope = jax.lax.stop_gradient(jnp.asarray(gate()).astype(operand.dtype))
        self.last = (operand, len(self.recorded))
        self.recorded.append(slope)
        return value * slope

    def true_value(self, operand: PathSum) -> Any:
        """Return what the path sum holds."""
        return operand.value

    def refine(self, eqn: Any, ins: list[Value], outs: list[Value]) -> list[Value]:
        """Give a custom activation the slope that its own derivative rule has: it settles ties (relu'(0) = 0)."""
        sums = [v for v in ins if isinstance(v, PathSum)]
        if (len(sums) != 1 or len(ins) != 1 or len(outs) != 1 or self.last is None or self.last[0] is not sums[0]
                or self.last[1] != len(self.recorded) - 1 or not isinstance(outs[0], PathSum)
                or outs[0].shape != sums[0].shape):
            return outs
        (x,) = sums
        value = self.true_value(x)
        inner = eqn_as_function(eqn)
        _, slope = jax.jvp(inner, (value,), (jnp.ones_like(value),))
        self.recorded[-1] = jax.lax.stop_gradient(slope)
        held = self.gated_again(x, self.recorded[-1])
        return [PathSum(held, outs[0].shape, outs[0].dtype, outs[0].on_input, outs[0].degree)]

    def gated_again(self, operand: PathSum, gate: Array) -> Any:
        """Multiply by a gate that stands recorded already."""
        return operand.value * gate


def eqn_as_function(eqn: Any) -> Callable[[Any], Any]:
    """Wrap one equation of one operand as a function."""
    inner = eqn.params["call_jaxpr"].jaxpr
    jaxpr = inner.replace(constvars=[], invars=eqn.invars, outvars=eqn.outvars, eqns=[eqn])
    fn = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
    return lambda v: fn(v)[0]


class Polynomial:
    """The path polynomial: constants to the power |c|^q, additions only, gates open or as given.

    With q None, constants and signs stay as they are: with the gates of x, the sum over paths that is f(x).
    """

    known = False

    def __init__(self, q: float | int | None, gates: Sequence[Any] | None, natural_max: bool):
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
        if self.gates is None:
            return held
        if self.used == len(self.gates):
            raise ValueError(f"gates holds {len(self.gates)} arrays, but this network has more gates; record them with "
                             "pkjax.paths.gates on the same apply_fn")
        value = self.gates[self.used]
        self.used += 1
        if jnp.shape(value) != shape:
            raise ValueError(f"gate {self.used - 1} has shape {jnp.shape(value)}, but acts on a signal of shape "
                             f"{shape}; record gates with pkjax.paths.gates on a batch of the same size")
        return held * jnp.asarray(value).astype(held.dtype)

    def true_value(self, operand: PathSum) -> Any:
        """Return nothing: the polynomial does not know the network's own values."""
        return None
