"""Numbers of any size: an array of mantissas over one power of two, which is kept aside.

Every value is held as m · 2^e, with an array m whose largest entry lies between 1 and 2 and one exponent e. Sums bring
their terms to the largest of their exponents; everything else multiplies mantissas and adds exponents. Multiplying by a
power of two rounds nothing. Exponents are constants to differentiation, so that derivatives of the mantissa are those
of the number, over 2^e.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["NOTHING", "Scaled", "added", "beyond", "combined", "exponent_of", "extreme", "log_of", "multiplied",
           "normalized", "plain", "power_of_two", "powered", "raised", "shifted"]


class Scaled(NamedTuple):
    """m · 2^e. ``growth`` bounds log2 of m's largest entry, which is 1 or more; NaN where neither is known."""

    mantissa: Array
    exponent: Array
    growth: float = math.nan


NOTHING = -(1 << 24)  # the exponent of zero: below any other, so that sums pass over it
ENOUGH = 40.0  # the growth at which a mantissa is brought back
REARRANGED = frozenset(("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "copy", "neg"))
SUMMED = frozenset(("add", "add_any", "sub", "concatenate"))


def combined(op: str, fn: Callable[..., Any], terms: Sequence[Scaled], skip_zeros: bool) -> Scaled:
    """Apply an operation that is jointly linear in its operands, to operands of one exponent."""
    if len(terms) == 1:
        out = terms[0]._replace(mantissa=fn(terms[0].mantissa))
        return out if op in REARRANGED else normalized(out, skip_zeros)
    terms = [normalized(t, skip_zeros) if math.isnan(t.growth) else t for t in terms]
    mantissas, top = _aligned([t.mantissa for t in terms], [t.exponent for t in terms])
    growth = max(t.growth for t in terms) + math.log2(len(terms))
    out = Scaled(fn(*mantissas), top, growth)
    # Beside zeros that have a say in the exponent, the largest entry may be far below 1.
    return out if skip_zeros and op in SUMMED and growth <= ENOUGH else normalized(out, skip_zeros)


def multiplied(fn: Callable[..., Any], a: Scaled, b: Scaled, skip_zeros: bool) -> Scaled:
    """Apply an operation that is linear in each of two operands: to the mantissas, adding the exponents."""
    return normalized(Scaled(fn(a.mantissa, b.mantissa), a.exponent + b.exponent), skip_zeros)


def added(mantissas: Array, exponents: Array) -> tuple[Array, Array]:
    """Add up numbers with an exponent each, along the first axis: the sum's mantissa and exponent.

    Examples:
        >>> mantissa, exponent = added(jnp.array([1.0, 1.5]), jnp.array([200, 199], jnp.int32))
        >>> float(mantissa), int(exponent)
        (1.75, 200)
    """
    top = exponents.max()
    by = (exponents - top).reshape(-1, *(1,) * (mantissas.ndim - 1))
    return normalized(Scaled(shifted(mantissas, by).sum(0), top), True)[:2]


def raised(value: Any, power: int) -> Scaled:
    """Hold |value|^power, which may be beyond the range of its type.

    Examples:
        >>> held = raised(jnp.array([1e30, -2e30], jnp.float32), 2)
        >>> bool(jnp.isfinite(held.mantissa).all()), int(held.exponent)
        (True, 200)
    """
    base = normalized(Scaled(jnp.abs(value), jnp.zeros((), jnp.int32)), True)
    return Scaled(base.mantissa**power, jnp.maximum(base.exponent * power, NOTHING), float(power))


def extreme(arrays: Sequence[Any], power: int) -> bool:
    """Say whether the largest entry of an array is so large or small that its power may leave the range of its type.

    False of traced arrays, of which nothing is known: programs that keep the exponents of weights aside take longer to
    compile.

    Examples:
        >>> extreme([jnp.ones(3), jnp.zeros(2)], 4), extreme([jnp.full(3, 1e-30, jnp.float32)], 4)
        (False, True)
    """
    for leaf in arrays:
        if isinstance(leaf, jax.core.Tracer):
            continue
        values, most = np.asarray(leaf), float(jnp.finfo(leaf.dtype).maxexp)
        peak = float(np.abs(values).max(initial=0))
        if peak and abs(math.log2(peak)) * power > most * 3 / 4:
            return True
    return False


def powered(value: Array, power: int, apart: bool) -> Scaled:
    """Hold |value|^power: with its exponent kept apart, or as it stands."""
    return raised(value, power) if apart else Scaled(jnp.abs(value) ** power, jnp.zeros((), jnp.int32))


def plain(mantissa: Array, exponent: Array) -> Array:
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
    mantissa, exponent = _normalized(held.mantissa, held.exponent, skip_zeros)
    return Scaled(mantissa, exponent, 1.0)


@partial(jax.jit, static_argnames="skip_zeros")  # traced once a shape
def _normalized(value: Array, exponent: Array, skip_zeros: bool) -> tuple[Array, Array]:
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(value), initial=0))
    shift = exponent_of(peak)
    nothing = NOTHING if skip_zeros else exponent
    return value * power_of_two(-shift, value.dtype), largest([jnp.where(peak > 0, exponent + shift, nothing)])


def largest(exponents: Sequence[Array]) -> Array:
    """The largest of some exponents, the last of them sorted: XLA fuses no sort.

    It would fuse a maximum, with all that an exponent comes from, into each operation that uses it: in a deep network
    the sum of the shifts of all layers before, which takes minutes to compile.
    """
    return jnp.sort(jnp.stack([*exponents, jnp.full_like(exponents[0], NOTHING)]))[-1]


def exponent_of(peak: Array) -> Array:
    """The e with 2^e ≤ peak < 2^(e+1) within the exponents of normal numbers, and 0 for 0."""
    whole, digits, bias = layout(peak.dtype)
    field = (jax.lax.bitcast_convert_type(peak, whole) >> digits).astype(jnp.int32)
    # Both this power of two and its inverse are normal numbers.
    return jnp.where(peak > 0, jnp.clip(field - bias, 1 - bias, bias - 1), 0)


def shifted(value: Array, by: Array) -> Array:
    """Multiply by 2^by, in two steps: the power itself may lie outside of the type's range."""
    half = by // 2
    return value * power_of_two(half, value.dtype) * power_of_two(by - half, value.dtype)


@jax.jit
def _aligned(mantissas: list[Array], exponents: list[Array]) -> tuple[list[Array], Array]:
    top = largest(exponents)
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
