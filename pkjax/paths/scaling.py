"""The path polynomial with an exponent beside every array, for values beyond the range of their type."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pkjax.paths.algebras import Polynomial
from pkjax.paths.interpreter import PathSum

__all__ = ["LOWEST", "Scaled", "ScaledPolynomial", "exponent_of", "normalised", "shifted"]

LOWEST = -(2**20)
"""The exponent of zero: below every other."""


class Scaled(NamedTuple):
    """The value ``array`` · 2^``exponent``."""

    array: Any
    exponent: Array


def shifted(array: Array, by: Array) -> Array:
    """Multiply by 2^by, exactly unless that leaves the range of the type.

    >>> import jax.numpy as jnp
    >>> float(shifted(jnp.asarray(3.0), jnp.asarray(-2)))
    0.75
    """
    half = by // 2
    return array * _power_of_two(half, array.dtype) * _power_of_two(by - half, array.dtype)


def _power_of_two(exponent: Array, dtype: Any) -> Array:
    """2^exponent, or the smallest or largest that the type holds: its bits, as a rounded power would not be exact."""
    info = jnp.finfo(dtype)
    bits = np.dtype(f"int{info.bits}")
    stored = jnp.clip(exponent, int(info.minexp), int(info.maxexp) - 1) + (int(info.maxexp) - 1)
    return jax.lax.bitcast_convert_type(stored.astype(bits) << np.asarray(info.nmant, bits), dtype)


def exponent_of(array: Array) -> Array:
    """The k with 2^(k-1) <= max|array| < 2^k; 0 where that maximum is 0 or infinite."""
    top = jnp.max(jnp.abs(array), initial=0)
    _, k = jnp.frexp(jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top)))
    return k.astype(jnp.int32)


def normalised(array: Array, exponent: Array) -> Scaled:
    """Bring the largest entry of ``array`` · 2^``exponent`` to between 1/2 and 1, for another exponent."""
    k = exponent_of(array)
    empty = jnp.all(array == 0)
    return Scaled(shifted(array, -k), jnp.where(empty, LOWEST, jnp.maximum(exponent + k, LOWEST)))


class ScaledPolynomial(Polynomial):
    """The path polynomial of ``Scaled`` values: no sum over paths overflows. Not to be differentiated."""

    def lift(self, constant: Any) -> Scaled:
        """Hold |c|^q."""
        return Scaled(super().lift(constant), jnp.zeros((), jnp.int32))

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Scaled:
        """Apply the operation to operands of one exponent, the largest."""
        held = [s.value for s in operands]
        top = held[0].exponent
        for s in held[1:]:
            top = jnp.maximum(top, s.exponent)
        out = fn(*(shifted(s.array, s.exponent - top) if len(held) > 1 else s.array for s in held))
        return normalised(out, top) if op == "reduce_sum" else Scaled(out, top)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Scaled:
        """Apply the operation and add the exponents."""
        return normalised(fn(a.value.array, b.value.array), a.value.exponent + b.value.exponent)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Scaled:
        """Multiply by the next of the given gates."""
        array, exponent = operand.value
        return Scaled(super().gated(replace(operand, value=array), gate), exponent)
