"""What a tangent kernel will cost, before any of it is computed; and the tiles that keep it within memory."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pkjax import paths, tables
from pkjax.linalg.memory import default_memory_limit
from pkjax.tangent_kernel.leaf_costs import Costs, Use, route, uses
from pkjax.trees import ApplyFn, accumulator, leaf_names, shapes

__all__ = ["LeafPlan", "NtkPlan", "plan_kernel"]


@dataclass(frozen=True)
class LeafPlan:
    """How one leaf of the parameters enters Θ, over all tiles.

    A part of ``NtkPlan``, so returned by ``ntk_plan``.

    >>> LeafPlan(name="kernel", route="Gram", operations=1000, bytes=4000).route
    'Gram'
    """

    name: str
    """Its key path."""
    route: str
    """"Gram", "Gram over places", "masked Gram", "Jacobian of the layer" or "Jacobian of the leaf"."""
    operations: int
    """Floating-point operations of its contraction."""
    bytes: int
    """Bytes that the contraction writes and reads."""


@dataclass(frozen=True)
class NtkPlan:
    """How a tangent kernel would be computed, and an estimate of what that costs.

    Returned by ``ntk_plan``. Shows itself as a short text, as lines where it is printed, and as a table of its leaves
    in a notebook.

    >>> import jax.numpy as jnp, pkjax as pk
    >>> print(pk.ntk_plan(lambda w, x: x @ w["a"], {"a": jnp.ones((3, 2))}, jnp.ones((4, 3)), memory_limit=10**6))
    Θ (4, 4, 2, 2) by the structured engine
    1 tile of 4 × 4 examples on 1 device
    ... (limit 1 MB)
      a  Gram ...
    """

    engine: str
    """"structured", "jacobian" or "neural-tangents"."""
    examples: tuple[int, int]
    """(N, M)."""
    outputs: int
    """K."""
    tile: int
    """Examples to a side of a tile."""
    tiles: int
    """How many tiles there are to compute."""
    devices: int
    """Devices that compute tiles side by side."""
    leaves: tuple[LeafPlan, ...]
    """The leaves that train, in flattening order; empty for engines that do not go leaf by leaf."""
    operations: int
    """Floating-point operations in all, backward passes included."""
    bytes: int
    """Bytes written and read in all."""
    peak_memory: int
    """Bytes that one device holds at a time, the finished kernel included where it is a processor's memory."""
    memory_limit: int
    """Bytes that one device was allowed."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        rows = [[leaf.name, leaf.route, f"{leaf.operations:.3g}", _size(leaf.bytes)] for leaf in self.leaves]
        return tables.html(["leaf", "route", "operations", "moved"],
                           [*rows, ["all, backward passes included", "", f"{self.operations:.3g}", _size(self.bytes)]],
                           caption="; ".join(str(self).split("\n")[:3]), left=2)

    def __str__(self) -> str:
        """A few lines for people."""
        n, m = self.examples
        tiles, devices = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((self.tiles, "tile"), (self.devices, "device")))
        lines = [f"Θ ({n}, {m}, {self.outputs}, {self.outputs}) by the {self.engine} engine",
                 f"{tiles} of {self.tile} × {self.tile} examples on {devices}",
                 f"{self.operations:.3g} operations, {_size(self.bytes)} moved, {_size(self.peak_memory)} at a time "
                 f"(limit {_size(self.memory_limit)})"]
        width = max((len(leaf.name) for leaf in self.leaves), default=0)
        lines += [f"  {leaf.name:{width}}  {leaf.route:21}  {leaf.operations:9.3g} operations"
                  for leaf in self.leaves]
        return "\n".join(lines)


class _Work(NamedTuple):
    """What one tile takes."""

    leaves: tuple[Costs, ...]
    operations: int
    numbers: int    # written and read
    held: int       # at one time


@dataclass(frozen=True)
class _Request:
    """A kernel asked for, in sizes alone."""

    engine: str
    n: int
    m: int | None                     # None: against itself
    k: int
    itemsize: int
    image: int                        # bytes of an example
    sizes: tuple[int, ...]            # of the leaves that train
    masked: tuple[bool, ...]          # which of them train in part
    used: tuple[tuple[Use, ...], ...]  # their uses; empty for a leaf that taps do not reach
    all_uses: tuple[Use, ...]

    def tile(self, rows: int, columns: int | None) -> _Work:
        """A tile of so many examples; None for one on the diagonal."""
        result = rows * (columns or rows) * self.k**2
        examples = rows + (columns or 0)
        # A bias has the cotangent of the operation before it.
        passes = sum(use.operand + self.k * use.output * bool(use.operand) for use in self.all_uses)
        working = 2 * self.k * max((use.output for use in self.all_uses), default=0)
        forward = sum(2 * prod(use.matrix) if use.matrix else use.output for use in self.all_uses)
        operations, numbers = examples * (1 + self.k) * forward, 2 * examples * passes
        if self.engine != "structured":
            size = sum(self.sizes)
            return _Work((), operations + 2 * result * size + 2 * examples * self.k * size,
                         numbers + (result // self.k + examples * self.k) * size,
                         examples * (8 * self.k * size + passes + working) + 5 * result)
        costs = tuple(route(rows, columns, self.k, size, list(used), masked)
                      for size, used, masked in zip(self.sizes, self.used, self.masked, strict=True))
        return _Work(costs, operations + sum(c.operations for c in costs), numbers + sum(c.numbers for c in costs),
                     examples * (passes + working) + max(c.held for c in costs) + 3 * result)

    def tiles(self, side: int) -> list[tuple[int, _Work]]:
        """The kinds of tiles that cover the kernel, and how many there are of each."""
        rows, columns = ceil(self.n / side), ceil((self.m or self.n) / side)
        if self.m is not None:
            return [(rows * columns, self.tile(min(side, self.n), min(side, self.m)))]
        kinds = [(rows, self.tile(min(side, self.n), None))]
        return kinds if rows == 1 else [*kinds, (rows * (rows - 1) // 2, self.tile(side, side))]

    def peak(self, side: int) -> int:
        """Bytes that one device holds at a time; finished tiles wait on the host, on a processor the same memory."""
        kinds = self.tiles(side)
        whole = sum(count for count, _ in kinds) == 1
        kernel = 0 if whole or jax.default_backend() != "cpu" else self.n * (self.m or self.n) * self.k**2
        return (self.itemsize * (kernel + max(work.held for _, work in kinds))
                + 2 * min(side, max(self.n, self.m or 0)) * self.image)


def plan_kernel(apply_fn: ApplyFn, params: PyTree, entries: list[Any], whole: tuple[bool, ...], x: Any,
              examples: tuple[int, int | None], engine: str, *, tile: int | None = None,
              memory_limit: int | None = None, devices: int = 1) -> NtkPlan:
    """Choose engine and tiles from shapes.

    Args:
        apply_fn: the network (hashable).
        params: its parameters, or their shapes.
        entries: for each leaf what trains, None where nothing does.
        whole: for each leaf whether all of it trains.
        x: a batch of one, or its shape.
        examples: how many rows and columns; None for columns that are the rows.
        engine: the engine asked for, "auto" included.
        tile: the tile asked for; None means the largest that fits.
        memory_limit: bytes for one device; None means half of its memory.
        devices: how many share the tiles.

    Raises: ValueError where the tile asked for does not fit the limit, or none does; NotPathNetworkError where engine
    "structured" is asked for a network without paths.
    """
    leaves, treedef = jax.tree.flatten(shapes((params, x)))
    limit = default_memory_limit(devices) if memory_limit is None else memory_limit
    trains = tuple(entry is not None for entry in entries)
    return _plan_kernel(apply_fn, tuple(leaves), treedef, trains, whole, examples, engine, tile, limit, devices)


@lru_cache(maxsize=256)
def _plan_kernel(apply_fn: ApplyFn, like: tuple[Any, ...], treedef: Any, trains: tuple[bool, ...],
               whole: tuple[bool, ...], examples: tuple[int, int | None], engine: str, tile: int | None, limit: int,
               devices: int) -> NtkPlan:
    params, x = jax.tree.unflatten(treedef, like)
    leaves = jax.tree.leaves(params)
    found = uses(apply_fn, params, x)
    if engine == "auto":
        engine = "structured" if found else "jacobian"
    if engine == "structured" and not found:
        paths.sites(apply_fn, params, x)     # raises, and names the operation
    all_uses, covered = found or ((), frozenset())
    out = jax.eval_shape(apply_fn, params, x)
    train = [i for i, moves in enumerate(trains) if moves]
    request = _Request(
        engine, *examples, out.shape[1], accumulator(out.dtype).itemsize, prod(x.shape) * x.dtype.itemsize,
        tuple(prod(jnp.shape(leaves[i])) for i in train), tuple(not whole[i] for i in train),
        tuple(tuple(use for use in all_uses if use.leaf == i and i in covered) for i in train), all_uses)
    side = _largest(request, limit, devices) if tile is None else min(tile, max(examples[0], examples[1] or 0))
    if request.peak(side) > limit:
        _refuse(request, side, limit)
    kinds = request.tiles(side)
    names = leaf_names(params)
    listed = []
    for n, i in enumerate(train if kinds[0][1].leaves else ()):
        each = [(count, work.leaves[n]) for count, work in kinds]
        listed.append(LeafPlan(names[i], each[-1][1].name, sum(count * c.operations for count, c in each),
                               request.itemsize * sum(count * c.numbers for count, c in each)))
    return NtkPlan(
        engine, (request.n, request.m or request.n), request.k, side, sum(count for count, _ in kinds), devices,
        tuple(listed), sum(count * work.operations for count, work in kinds),
        request.itemsize * sum(count * work.numbers for count, work in kinds), request.peak(side), limit)


def _largest(request: _Request, limit: int, devices: int) -> int:
    """The largest side that fits, its tiles spread evenly: no remainder of a few examples, no device idle."""
    most = max(request.n, request.m or 0)
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if request.peak(middle) <= limit else (low, middle - 1)
    count = ceil(most / low)
    while devices > 1 and count < most and sum(c for c, _ in request.tiles(ceil(most / count))) < devices:
        count += 1
    return ceil(most / count)


def _refuse(request: _Request, side: int, limit: int) -> None:
    kernel = request.itemsize * request.n * (request.m or request.n) * request.k**2
    least = min(request.peak(1), request.peak(max(request.n, request.m or 0)))
    fits = next((s for s in (2**e for e in range(20, -1, -1)) if s < side and request.peak(s) <= limit), None)
    advice = (f"tile={fits} would fit" if fits else
              f"at least memory_limit={least} is needed; fewer examples, fewer trainable leaves, or the functions that "
              "do not form the kernel (ntk_trace, ntk_matvec, ntk_eigenpairs) need less")
    raise ValueError(f"a tangent kernel of {_size(kernel)}, in tiles of {side} × {side} by the {request.engine} engine "
                     f"takes about {_size(request.peak(side))} at a time, more than memory_limit={limit} "
                     f"({_size(limit)}): {advice}")


def _size(count: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
