"""Exact selection of the k highest scores of a list of arrays, without joining or sorting them.

Floats are ordered like integers once their bits are rearranged, so the k-th largest score is found bit by
bit: each bit costs one count over the leaves, 32 for float32 and 64 for float64. That is exact for every
float, needs no memory of the size of all scores together, and is the same for any layout of the leaves.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

__all__ = ["count_dtype", "keep_largest", "order_keys"]


def count_dtype() -> np.dtype:
    """Widest integer type at hand for counting weights: int64 in x64 mode, int32 otherwise."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64))


def order_keys(
    scores: Sequence[Float[Array, "..."]], alive: Sequence[Bool[Array, "..."]]
) -> list[UInt[Array, "..."]]:
    """Map scores to unsigned integers in the same order, what is not alive below everything that is.

    −0 and +0 get the same key. Half precision is widened, which is exact; scores of mixed types share the
    widest. NaN has no place in the order: its key is meaningless.

    >>> import jax.numpy as jnp
    >>> keys, = order_keys([jnp.array([-1.5, -0.0, 0.0, 2.0, 9.0])], [jnp.array([True] * 4 + [False])])
    >>> bool(keys[0] < keys[1]), bool(keys[1] == keys[2]), bool(keys[2] < keys[3]), int(keys[4])
    (True, True, True, 0)
    """
    wide = any(jnp.result_type(s) == jnp.float64 for s in scores)
    number, signed, unsigned = (
        (jnp.float64, jnp.int64, jnp.uint64) if wide else (jnp.float32, jnp.int32, jnp.uint32)
    )
    magnitude, sign = signed(np.iinfo(signed).max), unsigned(1 << (np.iinfo(signed).bits - 1))

    def key(score: Array, live: Array) -> Array:
        bits = lax.bitcast_convert_type(score.astype(number), signed)
        # Negative floats count downwards: turning their magnitude bits over makes the integers ascend.
        ordered = jnp.where(bits < 0, bits ^ magnitude, bits)
        # −0 became −1. Compared as integers: a processor that flushes denormals would find them equal to 0.
        ordered = jnp.where(ordered == -1, signed(0), ordered)
        return jnp.where(live, lax.bitcast_convert_type(ordered, unsigned) ^ sign, unsigned(0))

    return [key(s, a) for s, a in zip(scores, alive, strict=True)]


def keep_largest(keys: Sequence[UInt[Array, "..."]], k: Int[Array, ""]) -> list[Bool[Array, "..."]]:
    """Mark exactly k entries of all the leaves together: the largest, and among equals the first.

    First by the order of the leaves, and within a leaf in row-major order. k may be traced, and lies between
    0 and the number of entries.

    >>> import jax.numpy as jnp
    >>> keys = [jnp.array([1, 7], jnp.uint32), jnp.array([7, 7], jnp.uint32)]
    >>> [marks.tolist() for marks in keep_largest(keys, jnp.array(2))]
    [[False, True], [True, False]]
    """
    dtype, count = keys[0].dtype, count_dtype()
    k = k.astype(count)
    offsets = np.cumsum([0, *(key.size for key in keys)])
    bits = 8 * dtype.itemsize

    def total(marks: Sequence[Array]) -> Array:
        return sum((jnp.sum(m, dtype=count) for m in marks), jnp.zeros((), count))

    threshold = _largest(dtype, bits, lambda t: total([key >= t for key in keys]) >= k)
    spare = k - total([key > threshold for key in keys])

    def before(end: Array) -> list[Array]:
        """Ties whose index over all leaves is below ``end``."""
        return [
            (key == threshold) & (_index(key, int(start), count) < end)
            for key, start in zip(keys, offsets, strict=False)
        ]

    # The ties to keep are those before the furthest end that lets in no more than the spare places.
    end = _largest(count, int(offsets[-1]).bit_length(), lambda e: total(before(e)) <= spare)
    return [(key > threshold) | tie for key, tie in zip(keys, before(end), strict=True)]


def _index(key: Array, start: int, dtype: np.dtype) -> Array:
    """Row-major index of every entry, counted from ``start``."""
    return (jnp.arange(key.size, dtype=dtype) + dtype.type(start)).reshape(key.shape)


def _largest(dtype: np.dtype, bits: int, holds: Callable[[Array], Array]) -> Array:
    """Largest integer of so many bits for which a downward-closed condition holds, built from its highest."""

    def extend(i: Array, found: Array) -> Array:
        trial = found | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        return jnp.where(holds(trial), trial, found)

    return lax.fori_loop(0, bits, extend, jnp.zeros((), dtype))
