"""Exact selection of the k highest scores of a list of arrays, on a processor without joining or sorting them.

Floats are ordered like integers once their bits are rearranged, so the k-th highest score lies in a bracket of
integers that shrinks: a pass over the scores counts how many reach each of a few thresholds. A sample says where to
begin, interpolation where to go on, and the middle of the bracket is always tried too, so that no input takes more
than one pass a bit; usual scores take five or six. The outcome is exact for every float and every layout of the
leaves, and needs no memory of the size of all scores together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

__all__ = ["count_dtype", "keep_largest", "order_keys", "reserve", "runs_of"]

CHUNK = 1 << 18   # entries counted at once: what is made on the way stays in a processor's cache
JOINED = 1 << 20  # entries of neighbouring leaves that are handled as one
SAMPLE = 1 << 14  # entries of the sample at most
SPARSE = 1 << 5   # half of the least distance between these
COLUMNS = 1 << 11  # entries of a bracket that are few enough to be looked up
GATHERED = 1 << 7  # columns looked up at once


def count_dtype() -> np.dtype:
    """Widest integer type at hand for counting weights: int64 in x64 mode, int32 otherwise."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64))


def order_keys(scores: Sequence[Float[Array, "..."]], alive: Sequence[Bool[Array, "..."]]) -> list[UInt[Array, "..."]]:
    """Map scores to unsigned integers in the same order, what is not alive below everything that is.

    −0 and +0 get the same key. Half precision is widened, which is exact; scores of mixed types share the
    widest. What is not finite has no place in the order: an infinity gets the second highest key, NaN the highest.

    Examples:
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


def reserve(key: UInt[Array, "..."], k: int) -> UInt[Array, "..."]:
    """Raise the k highest keys of a leaf to the highest there is, so that a selection takes them before all others.

    Keys 0, of what is not alive, stay.

    Examples:
        >>> import jax.numpy as jnp
        >>> reserve(jnp.array([3, 9, 4], jnp.uint32), 1).tolist()
        [3, 4294967295, 4]
    """
    (marks,), _ = keep_largest([key], jnp.asarray(min(k, key.size), count_dtype()))
    return jnp.where(marks & (key > 0), key.dtype.type(np.iinfo(key.dtype).max), key)


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

    Examples:
        >>> import jax.numpy as jnp
        >>> keys = [jnp.array([1, 7], jnp.uint32), jnp.array([7, 7], jnp.uint32)]
        >>> marks, counts = keep_largest(keys, jnp.array(2))
        >>> [m.tolist() for m in marks], counts.tolist()
        ([[False, True], [True, False]], [1, 1])
    """
    if jax.default_backend() != "cpu":
        return _keep_sorted(keys, k)
    runs = runs_of([key.size for key in keys])
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


def _keep_sorted(keys: Sequence[Array], k: Array) -> tuple[list[Array], Array]:
    """``keep_largest`` by sorting, which is the fastest on an accelerator: no step waits for a number there."""
    flat = jnp.concatenate([key.reshape(-1) for key in keys])
    number = count_dtype()
    last = jnp.sort(flat)[flat.size - jnp.maximum(k, 1)]
    above, equal = flat > last, flat == last
    room = k.astype(number) - above.sum(dtype=number)
    marks = (above | equal & (jnp.cumsum(equal, dtype=number) <= room)) & (k > 0)
    ends = np.cumsum([key.size for key in keys])
    parts = [part.reshape(key.shape) for part, key in zip(jnp.split(marks, ends[:-1]), keys, strict=True)]
    return parts, jnp.stack([part.sum(dtype=number) for part in parts])


def runs_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
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
    sizes = jnp.asarray([key.size for key in flat], number)
    wanted = jnp.maximum(k.astype(number), 1)
    total = sum(key.size for key in flat)

    def everywhere(thresholds: Array) -> Array:
        return jnp.stack([_count(key, thresholds) for key in flat], 1)

    def shrink(bracket: Bracket, thresholds: Array, count: Callable[[Array], Array], least: int) -> Bracket:
        def body(state: tuple[Bracket, Array]) -> tuple[Bracket, Array]:
            narrower = _narrow(*state, wanted, count)
            return narrower, _interpolated(narrower, wanted)

        return lax.while_loop(
            lambda s: (s[0].low < s[0].high) & (s[0].reach.sum() > wanted)
            & (s[0].reach.sum() - s[0].above.sum() > least), body, (bracket, thresholds))[0]

    bracket = Bracket(jnp.zeros((), dtype), jnp.asarray(np.iinfo(dtype).max, dtype), sizes, jnp.zeros_like(sizes))
    if total <= JOINED:
        bracket = shrink(bracket, _sampled(flat, wanted), everywhere, 0)
    else:
        # Once the bracket holds few entries, only the columns in which these are have to be looked at.
        bracket = shrink(bracket, _sampled(flat, wanted), everywhere, COLUMNS)
        bracket = lax.cond((bracket.low < bracket.high) & (bracket.reach.sum() > wanted),
                           lambda b: shrink(b, _interpolated(b, wanted), _count_columns(flat, b), 0), lambda b: b,
                           bracket)

    # All that reach the low end stay; or, where these are too many, all above it and the first of those equal to it.
    exact = bracket.reach.sum() == k
    ties = bracket.reach - bracket.above
    room = jnp.where(k > 0, k.astype(number) - bracket.above.sum(), 0)
    taken = jnp.where(exact, ties, jnp.clip(room - (jnp.cumsum(ties) - ties), 0, ties))
    marks = []
    for key, n, m in zip(flat, taken, ties, strict=True):
        def first_of_equals(key: Array, low: Array, n: Array) -> Array:
            return (key > low) | (key == low) & (jnp.arange(key.size, dtype=number) < _place(key, low, n))

        def all_or_none(key: Array, low: Array, n: Array) -> Array:
            return (key > low) & (k > 0) | (key == low) & (n > 0)

        marks.append(lax.cond((n > 0) & (n < m), first_of_equals, all_or_none, key, bracket.low, n)
                     if key.size else jnp.zeros(0, bool))
    return marks, jnp.where(k > 0, bracket.above + taken, 0)


def _sampled(flat: Sequence[Array], k: Array) -> Array:
    """Thresholds around the k-th highest key, from a sample at even distances."""
    total = sum(key.size for key in flat)
    # Odd, lest it fall into step with the columns of a matrix; long enough that sorting costs less than a pass.
    stride = 2 * max(total // (2 * SAMPLE), SPARSE) + 1
    sample = jnp.sort(jnp.concatenate([key[::stride] for key in flat]))
    share = k.astype(jnp.float32) / total
    rank = (1 - share) * sample.size
    spread = 3 * jnp.sqrt(share * (1 - share) * sample.size) + 1
    # Not among what is not alive: its key is far below all others, with nothing between.
    dead = (sample == 0).sum(dtype=jnp.int32)
    places = jnp.stack([rank - spread, rank, rank + spread]).astype(jnp.int32)
    places = jnp.clip(places, dead, sample.size - 1)
    return sample[places] + jnp.asarray([0, 0, 1], sample.dtype)


def _interpolated(bracket: Bracket, wanted: Array) -> Array:
    """Thresholds around the k-th highest key, as if the keys in the bracket lay evenly; and the middle."""
    dtype = bracket.low.dtype
    inside = (bracket.reach.sum() - bracket.above.sum()).astype(jnp.float32)
    share = (bracket.reach.sum() - wanted).astype(jnp.float32) / inside
    margin = 1 / jnp.sqrt(inside)
    width = bracket.high - bracket.low
    # Below 1, so that the product stays within the width when it is rounded to the key's type.
    shares = jnp.clip(jnp.stack([share - margin, share + margin]), 0, 1 - 2**-20)
    steps = (shares * width.astype(jnp.float32)).astype(dtype)
    return bracket.low + jnp.append(steps, width // dtype.type(2)) + dtype.type(1)


def _narrow(bracket: Bracket, thresholds: Array, wanted: Array, count: Callable[[Array], Array]) -> Bracket:
    """Draw the ends of the bracket to the thresholds around the k-th highest key."""
    dtype = bracket.low.dtype
    thresholds = jnp.clip(thresholds, bracket.low + dtype.type(1), bracket.high)
    counts = count(thresholds)
    enough = counts.sum(1) >= wanted
    low = jnp.argmax(jnp.where(enough, thresholds, dtype.type(0)))
    ends = jnp.where(enough, dtype.type(np.iinfo(dtype).max), thresholds)
    high = jnp.argmax(~enough & (thresholds == ends.min()))
    some, few = enough.any(), ~enough.all()
    return Bracket(jnp.where(some, thresholds[low], bracket.low),
                   jnp.where(few, thresholds[high] - dtype.type(1), bracket.high),
                   jnp.where(some, counts[low], bracket.reach), jnp.where(few, counts[high], bracket.above))


def _by_chunk(flat: Array, look: Callable[[Array], Array]) -> list[Array]:
    """What ``look`` makes of each chunk, seen as 128 rows: of the whole ones as one array, of the rest, and of its end.

    Rows are what a processor adds as vectors, and counts of 128 fit into bytes. The end is one column, filled up with
    keys 0.
    """
    whole, even = flat.size // CHUNK * CHUNK, flat.size // 128 * 128
    seen = []
    if whole:
        seen.append(lax.map(lambda i: look(lax.dynamic_slice(flat, (i * CHUNK,), (CHUNK,)).reshape(128, -1)),
                            jnp.arange(whole // CHUNK)))
    if whole < even:
        seen.append(look(flat[whole:even].reshape(128, -1)))
    if even < flat.size:
        seen.append(look(jnp.pad(flat[even:], (0, 128 - flat.size % 128)).reshape(128, 1)))
    return seen


def _count(flat: Array, thresholds: Array) -> Array:
    """How many entries reach each of three thresholds, all of which are above 0."""
    def count(chunk: Array) -> Array:
        # One word holds the counts of a column for all thresholds, a byte each: one pass and no narrow arithmetic.
        words = sum((chunk >= t).astype(jnp.uint32) << 8 * i for i, t in enumerate(thresholds)).sum(0)
        return jnp.stack([(words >> 8 * i & 255).sum(dtype=count_dtype()) for i in range(thresholds.size)])

    seen = [part.reshape(-1, thresholds.size).sum(0) for part in _by_chunk(flat, count)]
    return sum(seen, jnp.zeros(thresholds.shape, count_dtype()))


def _count_columns(flat: Sequence[Array], bracket: Bracket) -> Callable[[Array], Array]:
    """``_count`` of all leaves for thresholds within a bracket that holds at most COLUMNS entries."""
    number, width = count_dtype(), bracket.high - bracket.low

    def inside(key: Array) -> Array:
        return key - bracket.low <= width  # modulo 2^bits: one comparison for two

    def gather(key: Array, counts: Array, first: Array, columns: Array) -> Array:
        """Write the columns of a leaf that hold anything inside behind the ``first`` ones, GATHERED at a time."""
        marked = jnp.concatenate([part.reshape(-1) for part in _by_chunk(key, lambda chunk: inside(chunk).any(0))])
        order = jnp.cumsum(marked, dtype=number)
        # Rows of a whole chunk, of the rest and of its end differ in length.
        row, whole, last = CHUNK // 128, key.size // CHUNK, key.size % CHUNK // 128

        def some(done: Array, columns: Array) -> Array:
            slot = done * GATHERED + jnp.arange(GATHERED, dtype=number)
            column = jnp.searchsorted(order, slot + 1).astype(number)
            chunk = jnp.minimum(column // row, whole)
            within = column - chunk * row
            end = (chunk == whole) & (within == last)
            index = chunk * CHUNK + jnp.where(end, 128 * last, within)
            stride = jnp.where(chunk < whole, row, jnp.where(end, 1, last))
            index = index + jnp.arange(128, dtype=number)[:, None] * stride
            there = (index < key.size) & (slot < order[-1])
            entries = key[jnp.where(there, index, 0)]
            entries = jnp.where(there & inside(entries), entries, key.dtype.type(0))
            return lax.dynamic_update_slice(columns, entries, (number.type(0), first + done * GATHERED))

        return lax.fori_loop(number.type(0), (counts + GATHERED - 1) // GATHERED, some, columns)

    counts = bracket.reach - bracket.above
    firsts = jnp.cumsum(counts) - counts
    columns = jnp.zeros((128, COLUMNS + GATHERED), flat[0].dtype)
    for key, n, first in zip(flat, counts, firsts, strict=True):
        if key.size:
            columns = gather(key, n, first, columns)
    place = jnp.arange(columns.shape[1], dtype=number)
    owned = (place >= firsts[:, None]) & (place < (firsts + counts)[:, None])

    def count(thresholds: Array) -> Array:
        reach = (columns >= thresholds[:, None, None]).sum(1, dtype=jnp.uint8)
        return bracket.above + jnp.where(owned, reach[:, None], jnp.uint8(0)).sum(2, dtype=number)

    return count


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

    # Under vmap it runs for leaves without so many equal entries too, and must end there.
    start, left = lax.while_loop(lambda s: (s[0] < flat.size) & (full(s[0]) < s[1]),
                                 lambda s: (s[0] + size, s[1] - full(s[0])), (jnp.zeros_like(n), n))
    within = jnp.argmax(jnp.cumsum(equal(start), dtype=n.dtype) >= left).astype(n.dtype)
    return jnp.minimum(start, flat.size - size) + within + 1

