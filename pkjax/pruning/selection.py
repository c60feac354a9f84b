"""The best of several leaves, or of each block of a leaf, and what is to be known of each leaf."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from pkjax.pruning.top_k import count_dtype, keep_largest, order_keys, reserve, runs_of

__all__ = ["Selection", "select_best", "select_in_blocks"]

ROW = 1 << 6  # entries that are counted as one where leaves are joined


class Selection(NamedTuple):
    """Which entries of leaves are kept, and what is to be known of each leaf."""

    marks: list[Array]
    kept: Array
    """(leaves,) entries kept."""
    flags: Array
    """(2, leaves) whether live scores are NaN, or infinite."""
    zeros: Array
    """(leaves,) live scores that are 0."""
    zeros_kept: Array
    """(leaves,) of these, whose entries are kept."""


def select_best(scores: Sequence[Float[Array, "..."]], alive: Sequence[Bool[Array, "..."]], k: Integer[Array, ""],
                floor: int = 0) -> Selection:
    """Keep the k live entries of the highest scores, and with ``floor`` that many of each leaf before all others.

    Small leaves are handled as one array: a program has operations for each run of them, not for each leaf.

    Examples:
        >>> best = select_best([jnp.array([1.0, jnp.inf]), jnp.zeros(2)], [jnp.ones(2, bool)] * 2, jnp.array(3))
        >>> [m.tolist() for m in best.marks], best.kept.tolist(), best.flags.tolist(), best.zeros_kept.tolist()
        ([[True, True], [True, False]], [2, 1], [[False, False], [True, False]], [0, 1])
    """
    sizes = [score.size for score in scores]
    runs = runs_of(sizes)
    wide = jnp.float64 if any(s.dtype == jnp.float64 for s in scores) else jnp.float32
    live = [_joined(alive[i:j]) for i, j in runs]
    keys = order_keys([_joined([s.astype(wide) for s in scores[i:j]]) for i, j in runs], live)
    ranked = keys if not floor else [_joined([reserve(part, floor) for part in _parted(key, sizes[i:j])])
                                     for (i, j), key in zip(runs, keys, strict=True)]
    marks = [mark & one for mark, one in zip(keep_largest(ranked, k)[0], live, strict=True)]
    counts = [_counts_by_leaf(_truths(key, mark), sizes[i:j])
              for (i, j), key, mark in zip(runs, keys, marks, strict=True)]
    kept, nan, infinite, zeros, zeros_kept = jnp.concatenate(counts, 1)
    parts = [part for (i, j), mark in zip(runs, marks, strict=True) for part in _parted(mark, sizes[i:j])]
    return Selection([part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)], kept,
                     jnp.stack([nan > 0, infinite > 0]), zeros, zeros_kept)


def select_in_blocks(scores: Sequence[Float[Array, "..."]], alive: Sequence[Bool[Array, "..."]], k: Integer[Array, ""],
                     m: int, axis: int) -> Selection:
    """Keep the k live entries of the highest scores of every m consecutive ones along an axis; of equals the first.

    Examples:
        >>> scores = jnp.array([1.0, 2.0, 2.0, 5.0, 0.0, 0.0])
        >>> best = select_in_blocks([scores], [jnp.ones(6, bool)], jnp.array(1), 3, 0)
        >>> best.marks[0].tolist()
        [False, True, False, True, False, False]
    """
    keys = order_keys(scores, alive)
    marks = [_first_of_blocks(key, k, m, axis) & live for key, live in zip(keys, alive, strict=True)]
    counts = [_counts_by_leaf(_truths(key, mark), [key.size]) for key, mark in zip(keys, marks, strict=True)]
    kept, nan, infinite, zeros, zeros_kept = jnp.concatenate(counts, 1)
    return Selection(marks, kept, jnp.stack([nan > 0, infinite > 0]), zeros, zeros_kept)


def _first_of_blocks(key: Array, k: Array, m: int, axis: int) -> Array:
    """Mark the k highest keys of each block."""
    blocks = jnp.moveaxis(key, axis, -1)
    order = jnp.argsort(~blocks.reshape(-1, m), axis=-1, stable=True)
    marks = (jnp.argsort(order, axis=-1) < k).reshape(blocks.shape)
    return jnp.moveaxis(marks, -1, axis)


def _truths(key: Array, mark: Array) -> list[Array]:
    """Say of every entry whether it is kept, its score NaN, infinite, 0, and 0 and kept."""
    top = key.dtype.type(np.iinfo(key.dtype).max)
    zero = key == top.dtype.type(1 << (8 * top.dtype.itemsize - 1))
    return [mark, key == top, key == top - top.dtype.type(1), zero, zero & mark]


def _padded(size: int) -> int:
    return -(-size // ROW) * ROW


def _joined(leaves: Sequence[Array]) -> Array:
    """Leaves end to end, each filled up with zeros to whole rows where there are several."""
    if len(leaves) == 1:
        return leaves[0].reshape(-1)
    return jnp.concatenate([jnp.pad(leaf.reshape(-1), (0, _padded(leaf.size) - leaf.size)) for leaf in leaves])


def _parted(flat: Array, sizes: Sequence[int]) -> list[Array]:
    """The leaves of a joined array."""
    if len(sizes) == 1:
        return [flat]
    ends = np.cumsum([_padded(size) for size in sizes])
    return [lax.slice_in_dim(flat, end - _padded(size), end - _padded(size) + size)
            for end, size in zip(ends.tolist(), sizes, strict=True)]


def _counts_by_leaf(truths: Sequence[Array], sizes: Sequence[int]) -> Array:
    """How often each of some joined arrays of booleans is true in every leaf: (arrays, leaves)."""
    if len(sizes) == 1:
        return jnp.stack([truth.sum(dtype=count_dtype()) for truth in truths])[:, None]
    rows = jnp.stack([truth.reshape(-1, ROW).sum(1, dtype=count_dtype()) for truth in truths], 1)
    leaf = np.repeat(np.arange(len(sizes)), [_padded(size) // ROW for size in sizes])
    return jax.ops.segment_sum(rows, leaf, len(sizes), indices_are_sorted=True).T
