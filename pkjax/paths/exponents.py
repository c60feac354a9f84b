"""Numbers of any size: an array of mantissas over one power of two, which is kept aside.

Every value is held as m · 2^e, with an array m whose largest entry lies between 1 and 2 and one exponent e. Sums bring
their terms to the largest of their exponents; everything else multiplies mantissas and adds exponents. Multiplying by a
power of two rounds nothing. Exponents are constants to differentiation, so that derivatives of the mantissa are those
of the number, over 2^e.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
    "NEAR",
    "NOTHING",
    "Scaled",
    "Scaling",
    "added",
    "beyond",
    "exponent_of",
    "log_of",
    "normalized",
    "nothing",
    "plain",
    "power_of_two",
    "raised",
    "shifted",
]


class Scaled(NamedTuple):
    """m · 2^e. ``growth`` bounds log2 of m's largest entry from above; NaN where no bound is known."""

    mantissa: Array
    exponent: Array | int
    """``NOTHING``, as a whole number of Python's, of an array that is known to hold nothing but zeros."""
    growth: float = math.nan
    maxima: int = 0
    """How many sums stand between the exponent and the last mantissa that was brought back."""

    @property
    def squared(self) -> "Scaled":
        """The squares of the entries."""
        return self._replace(mantissa=self.mantissa * self.mantissa, exponent=2 * self.exponent, growth=2 * self.growth)


NOTHING = -(1 << 24)  # the exponent of zero: below any other, so that sums pass over it
MAXIMA = 4  # the sums after which a mantissa is brought back: XLA computes their maxima anew for whatever they scale
KEPT = frozenset(("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "copy", "neg",
                  "convert_element_type"))
"""Operations that keep the largest entry."""
SUMMED = frozenset(("add", "add_any", "sub", "concatenate"))
PICKED = frozenset(("slice", "pad", "gather", "windows", "split", "dynamic_slice"))
"""Operations after which the largest entry is not larger."""


def nothing(held: Scaled) -> bool:
    """Whether nothing but zeros is known to be held."""
    return isinstance(held.exponent, int) and held.exponent == NOTHING


class Scaling:
    """How far mantissas may leave the range from 1 to 2 before they are brought back.

    Args:
        skip_zeros: let arrays of nothing but zeros have no say in the exponent of a sum.
        wide: by default every product is brought back, so that only entries far below the largest one of their own
            array can vanish. A type in which to bring back as few as its range allows makes a small program, of which
            ``sure`` says afterwards whether that still holds.
        constants: the binary logarithm that the largest entry of a traced constant does not exceed; ``sure`` says
            whether it does.
    """

    def __init__(self, skip_zeros: bool, wide: Any = None, constants: float | None = None):
        self.skip_zeros, self.bound = skip_zeros, NEAR if constants is None else constants
        most = 0 if wide is None else int(jnp.finfo(wide).maxexp)
        self.enough, self.lowest = 3 * most // 8, -most // 4
        self.reached: list[Array] = []
        self.assumed: list[Array] = []

    def back(self, held: Scaled) -> Scaled:
        """Bring a mantissa back."""
        out = normalized(held, self.skip_zeros)
        if self.enough:
            self.reached.append(jnp.asarray(out.exponent - held.exponent))
        return out

    def sure(self) -> Array:
        """Whether every mantissa that was brought back, and every constant, had the size that was expected of it."""
        reached = jnp.stack(self.reached)
        within = ((reached >= self.lowest) & (reached <= int(self.enough) - self.lowest)).all()
        if not self.assumed:
            return within
        constants = jnp.concatenate([c.ravel().astype(jnp.float32) for c in self.assumed])
        return within & (jnp.abs(constants).max(initial=0) <= 2.0**self.bound)

    def constant(self, value: Array, held: Array, power: int) -> Scaled:
        """Hold a power of a constant, of which a traced one is assumed to be as large as constants get."""
        if isinstance(value, jax.core.Tracer):
            self.assumed.append(value)
            return Scaled(held, 0, power * self.bound)
        size = math.log2(float(np.abs(value).max(initial=0)) or 1.0)
        return Scaled(held, 0, power * max(size, 0.0))

    def combined(self, op: str, fn: Callable[..., Any], terms: Sequence[Scaled]) -> Scaled:
        """Apply an operation that is jointly linear in its operands, to operands of one exponent."""
        if all(map(nothing, terms)):
            return Scaled(fn(*(t.mantissa for t in terms)), NOTHING, 0.0)
        if len(terms) == 1:
            (held,) = terms
            out = held._replace(mantissa=fn(held.mantissa))
            if op in KEPT:
                return out
            summed = math.log2(max(np.size(held.mantissa), 1)) if op == "reduce_sum" else math.inf
            return self.kept(out, held.growth + (0.0 if op in PICKED else summed))
        terms = [self.back(t) if math.isnan(t.growth) and not nothing(t) else t for t in terms]
        counted = [t for t in terms if not nothing(t)]
        aligned, top = _aligned([t.mantissa for t in counted], [t.exponent for t in counted])
        each = iter(aligned)
        out = Scaled(fn(*(t.mantissa if nothing(t) else next(each) for t in terms)), top,
                     maxima=max(t.maxima for t in counted) + any(t.exponent is not top for t in counted))
        growth = max(t.growth for t in counted) + math.log2(len(counted))
        # Beside zeros that have a say in the exponent, the largest entry may be far below 1.
        if self.skip_zeros and op in SUMMED and growth <= max(self.enough, ENOUGH) and out.maxima < MAXIMA:
            return out._replace(growth=growth)
        return self.back(out)

    def multiplied(self, op: str, fn: Callable[..., Any], a: Scaled, b: Scaled) -> Scaled:
        """Apply an operation that is linear in each of two operands: to the mantissas, adding the exponents."""
        value = fn(a.mantissa, b.mantissa)
        if nothing(a) or nothing(b):
            return Scaled(value, NOTHING, 0.0)
        # Beside an exponent that is known to be 0 the other stays the same object, with which sums have no work.
        known = [isinstance(held.exponent, int) and held.exponent == 0 for held in (a, b)]
        exponent = b.exponent if known[0] else a.exponent if known[1] else a.exponent + b.exponent
        out = Scaled(value, exponent, maxima=max(a.maxima, b.maxima))
        return self.kept(out, a.growth + b.growth + _terms(op, fn, a.mantissa, b.mantissa))

    def kept(self, out: Scaled, growth: float) -> Scaled:
        """Keep a mantissa as it is while its growth is small enough, or bring it back."""
        return out._replace(growth=growth) if growth <= self.enough else self.back(out)


ENOUGH = 40.0
"""The growth of sums at which mantissas are brought back where products are always."""
NEAR = 2.0
"""The binary logarithm of the largest entry of an array that is known to be near 1."""


def _terms(op: str, fn: Callable[..., Any], a: Any, b: Any) -> float:
    """The binary logarithm of how many products each entry of a result is the sum of; infinity where nobody knows."""
    if op == "mul":
        return 0.0
    dimensions = getattr(fn, "keywords", {}).get("dimension_numbers")
    if op == "dot_general" and dimensions is not None:
        return math.log2(max(math.prod(a.shape[d] for d in dimensions[0][0]), 1))
    if op == "conv_general_dilated" and dimensions is not None:
        return math.log2(max(b.size // b.shape[dimensions.rhs_spec[0]], 1))
    return math.inf


def added(mantissas: Array, exponents: Array) -> tuple[Array, Array]:
    """Add up numbers with an exponent each, along the first axis: the sum's mantissa and exponent.

    Examples:
        >>> mantissa, exponent = added(jnp.array([1.0, 1.5]), jnp.array([200, 199], jnp.int32))
        >>> float(mantissa), int(exponent)
        (1.75, 200)
    """
    top = exponents.max()
    by = (exponents - top).reshape(-1, *(1,) * (mantissas.ndim - 1))
    mantissa, exponent, *_ = normalized(Scaled(shifted(mantissas, by).sum(0), top), True)
    return mantissa, jnp.asarray(exponent)


def raised(value: Any, power: int) -> Scaled:
    """Hold |value|^power, which may be beyond the range of its type.

    Examples:
        >>> held = raised(jnp.array([1e30, -2e30], jnp.float32), 2)
        >>> bool(jnp.isfinite(held.mantissa).all()), int(held.exponent)
        (True, 200)
    """
    base = normalized(Scaled(jnp.abs(value), 0), True)
    return Scaled(base.mantissa**power, jnp.maximum(base.exponent * power, NOTHING), float(power))


def plain(mantissa: Array, exponent: Array | int) -> Array:
    """Return the number itself: infinity or 0 where it is outside of its type's range."""
    return jnp.where(mantissa == 0, mantissa, shifted(mantissa, exponent))


def log_of(mantissa: Array, exponent: Array) -> Array:
    """Return the natural logarithm: −∞ of 0."""
    return jnp.log(mantissa) + jnp.where(mantissa > 0, exponent, 0).astype(mantissa.dtype) * math.log(2)


def beyond(mantissa: Any, exponent: Any, dtype: Any) -> float | None:
    """Say what the decimal logarithm of a positive number is, if it is outside of the normal numbers of a type.

    None where it is inside, 0, or traced.

    Examples:
        >>> beyond(1.5, 200, jnp.float32), beyond(1.5, 100, jnp.float32)
        (60.38209..., None)
    """
    if any(isinstance(v, jax.core.Tracer) for v in (mantissa, exponent)) or not float(mantissa) > 0:
        return None
    info, size = jnp.finfo(dtype), math.log2(float(mantissa)) + int(exponent)
    return None if int(info.minexp) <= size < int(info.maxexp) else size * math.log10(2)


def normalized(held: Scaled, skip_zeros: bool) -> Scaled:
    """Bring the largest entry between 1 and 2, by a power of two (whole numbers stay as they are)."""
    if not jnp.issubdtype(held.mantissa.dtype, jnp.floating):
        return held._replace(growth=0.0)
    mantissa, exponent = _normalized(held.mantissa, jnp.asarray(held.exponent, jnp.int32), skip_zeros)
    return Scaled(mantissa, exponent, 1.0)


@partial(jax.jit, static_argnames="skip_zeros")  # traced once a shape
def _normalized(value: Array, exponent: Array, skip_zeros: bool) -> tuple[Array, Array]:
    whole, digits, bias = layout(value.dtype)
    bits = jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(value)), whole)
    # Both the power of two and its inverse are normal numbers.
    own = exponent + (jnp.clip(bits >> digits, 1, 2 * bias - 1).astype(jnp.int32) - bias)
    # XLA fuses no reduction into what scales by it: the exponent is computed once, however deep the network.
    top = jax.lax.reduce(jnp.where(bits == 0, NOTHING, own), np.int32(NOTHING), jax.lax.max, tuple(range(own.ndim)))
    empty = top == NOTHING
    by = jnp.where(empty, 0, exponent - top)
    scale = jax.lax.bitcast_convert_type((by + bias).astype(whole) << digits, value.dtype)
    return value * scale, top if skip_zeros else jnp.where(empty, exponent, top)


def exponent_of(peak: Array) -> Array:
    """The e with 2^e ≤ peak < 2^(e+1) within the exponents of normal numbers, and 0 for 0."""
    whole, digits, bias = layout(peak.dtype)
    field = (jax.lax.bitcast_convert_type(peak, whole) >> digits).astype(jnp.int32)
    # Both this power of two and its inverse are normal numbers.
    return jnp.where(peak > 0, jnp.clip(field - bias, 1 - bias, bias - 1), 0)


def shifted(value: Array, by: Array | int) -> Array:
    """Multiply by 2^by, in two steps: the power itself may lie outside of the type's range."""
    half = by >> 1
    return value * power_of_two(half, value.dtype) * power_of_two(by - half, value.dtype)


def _aligned(mantissas: Sequence[Array], exponents: Sequence[Any]) -> tuple[list[Array], Any]:
    first = exponents[0]
    if all(e is first or (isinstance(e, int) and isinstance(first, int) and e == first) for e in exponents):
        return list(mantissas), first
    return _brought_together(list(mantissas), [jnp.asarray(e, jnp.int32) for e in exponents])


@jax.jit
def _brought_together(mantissas: list[Array], exponents: list[Array]) -> tuple[list[Array], Array]:
    top = reduce(jnp.maximum, exponents)
    return [m * power_of_two(e - top, m.dtype) for m, e in zip(mantissas, exponents, strict=True)], top


def power_of_two(exponent: Any, dtype: Any) -> Float[Array, "..."]:
    """2^exponent in a floating type, 0 below its normal numbers, infinity above: its bits, written down.

    Raises:
        ValueError: the type is not floating.

    Source: IEEE 754, section 3.4.

    Examples:
        >>> power_of_two(jnp.array([-3, 0, 2000]), jnp.float32).tolist()
        [0.125, 1.0, inf]
    """
    whole, digits, bias = layout(dtype)
    field = jnp.clip(jnp.asarray(exponent) + bias, 0, 2 * bias + 1).astype(whole)
    return jax.lax.bitcast_convert_type(field << digits, dtype)


def layout(dtype: Any) -> tuple[Any, Any, int]:
    """Integer type, length of the fraction and bias of the exponent of a floating type."""
    info = jnp.finfo(dtype)
    whole = jnp.dtype(f"int{info.bits}")
    return whole, whole.type(info.nmant), int(info.maxexp) - 1
