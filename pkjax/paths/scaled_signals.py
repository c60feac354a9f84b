"""The network itself in scaled values: its gates are right where its signals overflow or vanish."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pkjax.paths.algebras import TrueValues
from pkjax.paths.exponents import Scaled, Scaling, normalized, plain, shifted
from pkjax.paths.interpreter import PathSum

__all__ = ["ScaledSignals"]


_SCALING = Scaling(skip_zeros=True)


class ScaledSignals(TrueValues):
    """The network as it stands, with every signal as mantissas over a power of two, and every gate recorded."""

    def lift(self, constant: Any) -> Scaled:
        """Hold the constant itself."""
        return self.hold(jnp.asarray(constant))

    def hold(self, value: Any) -> Scaled:
        """Hold a parameter or the input."""
        return normalized(Scaled(value, jnp.zeros((), jnp.int32)), True)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Scaled:
        """Apply the operation to operands of one exponent."""
        return _SCALING.combined(op, fn, [s.value for s in operands])

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Scaled:
        """Apply the operation to the mantissas and add the exponents."""
        return _SCALING.multiplied(op, fn, a.value, b.value)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Scaled:
        """Record the gate and multiply by it."""
        factor = jax.lax.stop_gradient(jnp.asarray(gate()).astype(operand.dtype))
        product = self.gated_again(operand, factor)
        self.last = (operand, len(self.recorded), product)
        self.recorded.append(factor)
        return product

    def gated_again(self, operand: PathSum, gate: Array) -> Scaled:
        """Multiply by a gate that stands recorded already."""
        held: Scaled = operand.value
        return normalized(held._replace(mantissa=held.mantissa * gate), True)

    def is_last(self, out: PathSum) -> bool:
        """Whether a path sum is the last gate's product."""
        return self.last is not None and out.value is self.last[2]

    def true_value(self, operand: PathSum) -> Array:
        """Return the value, or a multiple of it where it is very large or very small."""
        return self.true_values([operand])[0]

    def true_values(self, operands: Sequence[PathSum], exact: bool = False) -> list[Array]:
        """Return values that compare as the true ones do, and have their signs.

        They are the true ones, or all the same multiple of them where the largest is very large or very small; unless
        they must be exact, because they are compared with numbers other than 0 and infinity.
        """
        held = [normalized(s.value, True) for s in operands]
        if exact:
            return [plain(h.mantissa, h.exponent) for h in held]
        top = jnp.stack([h.exponent for h in held]).max()
        middle = int(jnp.finfo(held[0].mantissa.dtype).maxexp) // 2
        by = jnp.clip(top, -middle, middle) - top
        return [shifted(h.mantissa, h.exponent + by) for h in held]
