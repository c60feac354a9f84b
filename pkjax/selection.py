"""Exact selection of the k highest scores of a list of arrays, without joining or sorting them.

Floats are ordered like integers once their bits are rearranged, so the k-th highest score lies in a bracket of
integers that shrinks: a pass over the scores counts how many reach each of a few thresholds. A sample says where to
begin, interpolation where to go on, and the middle of the bracket is always tried too, so that no input takes more
than one pass a bit; usual scores take five or six. The outcome is exact for every float and every layout of the
leaves, and needs no memory of the size of all scores together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

__all__ = ["count_dtype", "keep_largest", "not_finite", "order_keys", "reserve"]

CHUNK = 1 << 18   # entries counted at once: what is made on the way stays in a processor's cache
JOINED = 1 << 20  # entries of neighbouring leaves that are handled as one
SAMPLE = 1 << 14  # entries of the sample


def count_dtype() -> np.dtype:
    """Widest integer type at hand for counting weights: int64 in x64 mode, int32 otherwise."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64))


def order_keys(scores: Sequence[Float[Array, "..."]], alive: Sequence[Bool[Array, "..."]]) -> list[UInt[Array, "..."]]:
    """Map scores to unsigned integers in the same order, what is not alive below everything that is.

    −0 and +0 get the same key. Half precision is widened, which is exact; scores of mixed types share the
    widest. What is not finite has no place in the order: an infinity gets the second highest key, NaN the highest.

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
    infinity, top = np.array(np.inf, number).view(signed), unsigned(np.iinfo(unsigned).max)

    def key(score: Array, live: Array) -> Array:
        bits = lax.bitcast_convert_type(score.astype(number), signed)
        # Negative floats count downwards: turning their magnitude bits over makes the integers ascend.
        ordered = jnp.where(bits < 0, bits ^ magnitude, bits)
        # −0 became −1. Compared as integers: a processor that flushes denormals would find them equal to 0.
        ordered = jnp.where(ordered == -1, signed(0), ordered)
        rank = lax.bitcast_convert_type(ordered, unsigned) ^ sign
        size = bits & magnitude
        rank = jnp.where(size == infinity, top - unsigned(1), jnp.where(size > infinity, top, rank))
        return jnp.where(live, rank, unsigned(0))

    return [key(s, a) for s, a in zip(scores, alive, strict=True)]


def not_finite(keys: Sequence[UInt[Array, "..."]]) -> Bool[Array, "2 leaves"]:
    """Say of every leaf whether it holds NaN, and whether it holds an infinity (seen where there is no NaN).

    >>> import jax.numpy as jnp
    >>> scores = [jnp.array([1.0, jnp.inf]), jnp.array([jnp.nan]), jnp.array([2.0])]
    >>> not_finite(order_keys(scores, [jnp.ones(s.shape, bool) for s in scores])).tolist()
    [[False, True, False], [True, False, False]]
    """
    top = keys[0].dtype.type(np.iinfo(keys[0].dtype).max)
    highest = jnp.stack([jnp.max(key, initial=0) for key in keys])
    return jnp.stack([highest == top, highest == top - keys[0].dtype.type(1)])


def reserve(key: UInt[Array, "..."], k: int) -> UInt[Array, "..."]:
    """Raise the k highest keys of a leaf to the highest there is, so that a selection takes them before all others.

    >>> import jax.numpy as jnp
    >>> reserve(jnp.array([3, 9, 4], jnp.uint32), 1).tolist()
    [3, 4294967295, 4]
    """
    (marks,), _ = keep_largest([key], jnp.asarray(min(k, key.size), count_dtype()))
    return jnp.where(marks, key.dtype.type(np.iinfo(key.dtype).max), key)


class Bracket(NamedTuple):
    """The highest key that at least k entries reach lies in [low, high]."""

    low: Array
    high: Array
    reach: Array   # (leaves,) entries of each leaf with key ≥ low: k or more together
    above: Array   # (leaves,) entries of each leaf with key > high: fewer than k together


def keep_largest(keys: Sequence[UInt[Array, "..."]],
                 k: Integer[Array, ""]) -> tuple[list[Bool[Array, "..."]], Int[Array, "leaves"]]:
    """Mark exactly k entries of all the leaves together, the largest, and among equals the first; count them by leaf.

    First by the order of the leaves, and within a leaf in row-major order. k may be traced, and lies between
    0 and the number of entries.

    >>> import jax.numpy as jnp
    >>> keys = [jnp.array([1, 7], jnp.uint32), jnp.array([7, 7], jnp.uint32)]
    >>> marks, counts = keep_largest(keys, jnp.array(2))
    >>> [m.tolist() for m in marks], counts.tolist()
    ([[False, True], [True, False]], [1, 1])
    """
    runs = _runs([key.size for key in keys])
    flat = [keys[i].reshape(-1) if i + 1 == j else jnp.concatenate([key.reshape(-1) for key in keys[i:j]])
            for i, j in runs]
    joined, counts = _keep_largest(flat, k)
    marks: list[Array] = []
    for (i, j), mark in zip(runs, joined, strict=True):
        ends = np.cumsum([key.size for key in keys[i:j]])
        marks += [part.reshape(key.shape) for part, key in zip(jnp.split(mark, ends[:-1]), keys[i:j], strict=True)]
    own = [count if i + 1 == j else jnp.stack([mark.sum(dtype=count_dtype()) for mark in marks[i:j]])
           for (i, j), count in zip(runs, counts, strict=True)]
    return marks, jnp.hstack(own)


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Cut the leaves into runs of neighbours: small leaves together, as one is handled faster than many."""
    runs: list[tuple[int, int]] = []
    for i in range(len(sizes)):
        if runs and sum(sizes[runs[-1][0]:i + 1]) <= JOINED:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def _keep_largest(flat: Sequence[Array], k: Array) -> tuple[list[Array], Array]:
    """``keep_largest`` of flat leaves."""
    dtype, number = flat[0].dtype, count_dtype()
    one = dtype.type(1)
    sizes = jnp.asarray([key.size for key in flat], number)
    wanted = jnp.maximum(k.astype(number), 1)

    def narrow(bracket: Bracket, thresholds: Array) -> Bracket:
        thresholds = jnp.clip(thresholds, bracket.low + one, bracket.high)
        counts = jnp.stack([_count(key, thresholds) for key in flat], 1)
        enough = counts.sum(1) >= wanted
        low = jnp.argmax(jnp.where(enough, thresholds, dtype.type(0)))
        high = jnp.argmin(jnp.where(enough, dtype.type(np.iinfo(dtype).max), thresholds))
        some, few = enough.any(), ~enough.all()
        return Bracket(jnp.where(some, thresholds[low], bracket.low),
                       jnp.where(few, thresholds[high] - one, bracket.high),
                       jnp.where(some, counts[low], bracket.reach), jnp.where(few, counts[high], bracket.above))

    def interpolated(bracket: Bracket) -> Array:
        inside = (bracket.reach.sum() - bracket.above.sum()).astype(jnp.float32)
        share = (bracket.reach.sum() - wanted).astype(jnp.float32) / inside
        margin = 1 / jnp.sqrt(inside)
        width = bracket.high - bracket.low
        # Below 1, so that the product stays within the width when it is rounded to the key's type.
        shares = jnp.clip(jnp.stack([share - margin, share + margin]), 0, 1 - 2**-20)
        steps = (shares * width.astype(jnp.float32)).astype(dtype)
        return bracket.low + jnp.append(steps, width // dtype.type(2)) + one

    start = Bracket(dtype.type(0), dtype.type(np.iinfo(dtype).max), sizes, jnp.zeros_like(sizes))
    bracket = lax.while_loop(
        lambda b: (b.low < b.high) & (b.reach.sum() > wanted),
        lambda b: narrow(b, interpolated(b)),
        narrow(Bracket(*map(jnp.asarray, start)), _sampled(flat, wanted)))

    # All that reach the low end stay; or, where these are too many, all above it and the first of those equal to it.
    exact = bracket.reach.sum() == k
    ties = bracket.reach - bracket.above
    room = jnp.where(k > 0, k.astype(number) - bracket.above.sum(), 0)
    taken = jnp.where(exact, ties, jnp.clip(room - (jnp.cumsum(ties) - ties), 0, ties))
    marks = []
    for key, n, m in zip(flat, taken, ties, strict=True):
        end = jnp.asarray(key.size, number)
        if key.size:
            end = lax.cond((n > 0) & (n < m), lambda key, low, n, _: _place(key, low, n), lambda *rest: rest[-1],
                           key, bracket.low, n, end)
        equal = (key == bracket.low) & (jnp.arange(key.size, dtype=number) < jnp.where(n > 0, end, 0))
        marks.append((key > bracket.low) & (k > 0) | equal)
    return marks, jnp.where(k > 0, bracket.above + taken, 0)


def _sampled(flat: Sequence[Array], k: Array) -> Array:
    """Thresholds around the k-th highest key, from a sample at even distances."""
    total = sum(key.size for key in flat)
    stride = 2 * (total // (2 * SAMPLE)) + 1  # odd, lest it fall into step with the columns of a matrix
    sample = jnp.sort(jnp.concatenate([key[::stride] for key in flat]))
    share = k.astype(jnp.float32) / total
    rank = (1 - share) * sample.size
    spread = 3 * jnp.sqrt(share * (1 - share) * sample.size) + 1
    # Not among what is not alive: its key is far below all others, with nothing between.
    dead = (sample == 0).sum(dtype=jnp.int32)
    places = jnp.stack([rank - spread, rank, rank + spread]).astype(jnp.int32)
    places = jnp.clip(places, dead, sample.size - 1)
    return sample[places] + jnp.asarray([0, 0, 1], sample.dtype)


def _count(flat: Array, thresholds: Array) -> Array:
    """How many entries reach each threshold, chunk by chunk."""
    number = count_dtype()

    def count(chunk: Array) -> Array:
        # Rows of bytes are added first, as vectors: 128 of them do not overflow.
        even = chunk.size // 128 * 128
        reach = chunk[:even].reshape(128, -1) >= thresholds[:, None, None]
        rest = chunk[even:] >= thresholds[:, None]
        return reach.sum(1, dtype=jnp.uint8).sum(1, dtype=number) + rest.sum(1, dtype=number)

    whole = flat.size // CHUNK
    counts = count(flat[whole * CHUNK:])
    return counts if whole == 0 else lax.fori_loop(
        0, whole, lambda i, sofar: sofar + count(lax.dynamic_slice(flat, (i * CHUNK,), (CHUNK,))), counts)


def _place(flat: Array, value: Array, n: Array) -> Array:
    """The index behind the n-th entry equal to ``value``."""
    size = min(CHUNK, flat.size)

    def equal(start: Array) -> Array:
        # The last chunk begins earlier, to end with the leaf; what lies before ``start`` has been counted.
        first = jnp.minimum(start, flat.size - size)
        index = jnp.arange(size, dtype=n.dtype) + first
        return (lax.dynamic_slice(flat, (first,), (size,)) == value) & (index >= start)

    def full(start: Array) -> Array:
        return equal(start).sum(dtype=n.dtype)

    start, left = lax.while_loop(lambda s: full(s[0]) < s[1], lambda s: (s[0] + size, s[1] - full(s[0])),
                                 (jnp.zeros_like(n), n))
    within = jnp.argmax(jnp.cumsum(equal(start), dtype=n.dtype) >= left).astype(n.dtype)
    return jnp.minimum(start, flat.size - size) + within + 1

