"""The network itself in scaled values: its gates are right where its signals overflow or vanish."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pkjax.paths.algebras import TrueValues
from pkjax.paths.exponents import Scaled, Scaling, normalized, plain, shifted
from pkjax.paths.interpreter import PathSum
from pkjax.paths.magnitudes import Magnitudes

__all__ = ["ScaledSignals"]


class ScaledSignals(TrueValues):
    """The network as it stands, with every signal as mantissas over a power of two, and every gate recorded.

    Args:
        scaling: how far mantissas may grow; by default each is brought back.
        sizes: what is known of the sizes of the network's arrays, for a scaling that lets them grow.
    """

    def __init__(self, scaling: Scaling | None = None, sizes: Magnitudes | None = None):
        super().__init__()
        self.scaling, self.sizes = scaling or Scaling(skip_zeros=True), sizes

    def lift(self, constant: Any) -> Scaled:
        """Hold the constant itself."""
        value = jnp.asarray(constant)
        if not self.scaling.enough or not jnp.issubdtype(value.dtype, jnp.floating):
            return normalized(Scaled(value, 0), True)
        return self.scaling.constant(value, value, 1)

    def parameter(self, i: int, value: Any) -> Scaled:
        """Hold a parameter."""
        if self.sizes is None or not self.scaling.enough:
            return normalized(Scaled(value, 0), True)
        return self.sizes.held(i, value, 1)._replace(mantissa=value)

    def input(self, value: Any) -> Scaled:
        """Hold the input."""
        if self.sizes is None or not self.scaling.enough:
            return normalized(Scaled(value, 0), True)
        return self.sizes.input(value)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Scaled:
        """Apply the operation to operands of one exponent."""
        return self.scaling.combined(op, fn, [s.value for s in operands])

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Scaled:
        """Apply the operation to the mantissas and add the exponents."""
        return self.scaling.multiplied(op, fn, a.value, b.value)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Scaled:
        """Record the gate and multiply by it."""
        factor = jax.lax.stop_gradient(jnp.asarray(gate()).astype(operand.dtype))
        product = self.gated_again(operand, factor)
        self.last = (operand, len(self.recorded), product)
        self.recorded.append(factor)
        return product

    def exact_value(self, operand: PathSum) -> Array:
        """Return the value, which may be outside of the range of its type."""
        return self.true_values([operand], True)[0]

    def gated_again(self, operand: PathSum, gate: Array) -> Scaled:
        """Multiply by a gate that stands recorded already."""
        held: Scaled = operand.value
        return self.scaling.kept(held._replace(mantissa=held.mantissa * gate), held.growth)

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
