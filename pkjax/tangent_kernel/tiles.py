"""The tangent kernel tile by tile: on one device, or on all devices of a mesh side by side."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from pkjax.tables import Progress, reporter
from pkjax.tangent_kernel.compilation import compiled

__all__ = ["fill"]

Block = Callable[..., Array]
"""Maps (*network, rows, columns or None) to a tile of Θ; hashable, and equal to blocks that compute the same."""


def fill(block: Block, network: tuple[PyTree, ...], X: Array, X2: Array | None, tile: int, mesh: Mesh | None,
         progress: Progress) -> Array:
    """Compute Θ in tiles of `tile` by `tile` examples; if X2 is None, only those on one side of the diagonal.

    The last tile of each side is padded with its last example, so that only one shape compiles.
    """
    Y = X if X2 is None else X2
    traced = any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((network, X, Y)))
    if mesh is not None and traced:
        raise ValueError("ntk with a mesh compiles its own program: call it outside jit, vmap and grad")
    if mesh is None and tile >= max(X.shape[0], Y.shape[0]):
        return _whole(block, network, X, X2)
    starts = [(r, c) for r in range(0, X.shape[0], tile) for c in range(0, Y.shape[0], tile)
              if X2 is not None or c >= r]
    tiles = _one_by_one(block, network, X, X2, starts, tile) if mesh is None else (
        _side_by_side(block, network, X, Y, starts, tile, mesh))
    report = reporter(progress)
    out: Any = None
    for done, ((r, c), values) in enumerate(zip(starts, tiles, strict=True), start=1):
        # Finished tiles wait on the host: an accelerator holds one at a time.
        cut = values[:X.shape[0] - r, :Y.shape[0] - c]
        if out is None:
            out = (jnp if traced else np).empty((X.shape[0], Y.shape[0], *cut.shape[2:]), cut.dtype)
        out = _put(out, r, c, cut)
        if X2 is None and r != c:
            out = _put(out, c, r, cut.transpose(1, 0, 3, 2))
        report(f"ntk: tile {done} of {len(starts)}")
    return jnp.asarray(out)


def _put(out: Any, r: int, c: int, values: Any) -> Any:
    at = (slice(r, r + values.shape[0]), slice(c, c + values.shape[1]))
    if isinstance(out, np.ndarray):
        out[at] = values
        return out
    return out.at[at].set(values)


def _part(batch: Any, start: int, tile: int) -> Any:
    return batch[np.minimum(np.arange(start, start + tile), batch.shape[0] - 1)]


def _one_by_one(block: Block, network: tuple[PyTree, ...], X: Array, X2: Array | None,
                starts: list[tuple[int, int]], tile: int) -> Iterator[Any]:
    Y = X if X2 is None else X2
    for r, c in starts:
        columns = None if X2 is None and r == c else _part(Y, c, tile)
        values = _whole(block, network, _part(X, r, tile), columns)
        yield values if isinstance(values, jax.core.Tracer) else np.asarray(values)


def _side_by_side(block: Block, network: tuple[PyTree, ...], X: Array, Y: Array, starts: list[tuple[int, int]],
                  tile: int, mesh: Mesh) -> Iterator[np.ndarray]:
    spread, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec(mesh.axis_names), PartitionSpec()))
    left, right = np.asarray(X), np.asarray(Y)
    network = jax.tree.map(partial(_place, everywhere), network)
    for first in range(0, len(starts), mesh.size):
        now = [starts[min(n, len(starts) - 1)] for n in range(first, first + mesh.size)]
        rows = _place(spread, np.stack([_part(left, r, tile) for r, _ in now]))
        columns = _place(spread, np.stack([_part(right, c, tile) for _, c in now]))
        values = _sharded(block, mesh, network, rows, columns)
        if not values.is_fully_addressable:
            from jax.experimental.multihost_utils import process_allgather

            values = process_allgather(values, tiled=True)
        yield from np.asarray(values)[:len(starts) - first]


def _place(sharding: NamedSharding, value: Any) -> Array:
    """Put an array that every process holds onto the devices of a mesh, each process its own part."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@compiled(static_argnames="block", curved=lambda block: block.curved)
def _whole(block: Block, network: tuple[PyTree, ...], X: Array, X2: Array | None) -> Array:
    return block(*network, X, X2)


@compiled(static_argnames=("block", "mesh"), curved=lambda block: block.curved)
def _sharded(block: Block, mesh: Mesh, network: tuple[PyTree, ...], rows: Array, columns: Array) -> Array:
    """Compute one tile per device: rows and columns (devices, tile, ...) to (devices, tile, tile, K, K)."""
    spread = PartitionSpec(mesh.axis_names)

    def one(network: tuple[PyTree, ...], rows: Array, columns: Array) -> Array:
        return block(*network, rows[0], columns[0])[None]

    return jax.shard_map(one, mesh=mesh, in_specs=(PartitionSpec(), spread, spread), out_specs=spread,
                         check_vma=False)(network, rows, columns)
