"""The cost of a tangent kernel before any of it is computed, and the tiles that keep it within memory."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pkjax import tables
from pkjax.linalg.memory import budget, default_memory_limit
from pkjax.network import Network
from pkjax.programs.program import Program
from pkjax.tangent_kernel import leaf_costs
from pkjax.tangent_kernel.leaf_costs import Costs, Use, cheapest_route, uses
from pkjax.trees import accumulator, leaf_names, shapes

__all__ = ["LeafPlan", "NtkPlan", "plan_kernel"]


@dataclass(frozen=True)
class LeafPlan:
    """How one leaf of the parameters enters Θ, over all tiles.

    Part of the `NtkPlan` that `ntk_plan` returns.

    Examples:
        >>> LeafPlan(name="kernel", route="Gram", operations=1000, bytes=4000).route
        'Gram'
    """

    name: str
    """Key path of the leaf."""
    route: str
    """One of "Gram", "Gram over places", "masked Gram", "Jacobian of the layer", "Jacobian of the leaf", "unused"."""
    operations: int
    """Floating-point operations of the contraction."""
    bytes: int
    """Bytes that the contraction writes and reads."""


@dataclass(frozen=True)
class NtkPlan:
    """How a tangent kernel would be computed, and an estimate of its cost.

    Returned by `ntk_plan`. Its `str` takes one line per leaf; in a notebook it prints as a table of its leaves.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> print(pk.ntk_plan(lambda w, x: x @ w["a"], {"a": jnp.ones((3, 2))}, jnp.ones((4, 3)), memory_limit=10**6))
        Θ (4, 4, 2, 2) by the structured engine
        1 tile of 4 × 4 examples on 1 device
        ... (limit 1 MB)
          a  Gram ...
    """

    engine: str
    """One of "structured", "jacobian" and "neural-tangents"."""
    examples: tuple[int, int]
    """Numbers of examples of the rows and columns (N, M)."""
    outputs: int
    """Number of outputs K."""
    tile: int
    """Examples per side of a tile."""
    tiles: int
    """Number of tiles to compute."""
    devices: int
    """Number of devices that compute tiles side by side."""
    leaves: tuple[LeafPlan, ...]
    """The leaves that train, in flattening order; empty for engines that do not work leaf by leaf."""
    operations: int
    """Total floating-point operations, including backward passes."""
    bytes: int
    """Total bytes written and read."""
    peak_memory: int
    """Bytes that one device holds at a time, including the finished kernel if the device is a CPU."""
    memory_limit: int
    """Bytes that one device may hold."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        rows = [[leaf.name, leaf.route, f"{leaf.operations:.3g}", _size(leaf.bytes)] for leaf in self.leaves]
        return tables.html(["leaf", "route", "operations", "moved"],
                           [*rows, ["total, with backward passes", "", f"{self.operations:.3g}", _size(self.bytes)]],
                           caption="; ".join(str(self).split("\n")[:3]), left=2)

    def __str__(self) -> str:
        """Format the plan as a few lines of text."""
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
    """The cost of one tile."""

    leaves: tuple[Costs, ...]
    operations: int
    numbers: int    # written and read
    held: int       # at one time


@dataclass(frozen=True)
class _Request:
    """A requested kernel, as sizes alone."""

    engine: str
    n: int
    m: int | None                     # None: the columns are the rows
    k: int
    itemsize: int
    image: int                        # bytes per example
    sizes: tuple[int, ...]            # of the leaves that train
    masked: tuple[bool, ...]          # which of them train in part
    used: tuple[tuple[Use, ...], ...]  # their uses
    all_uses: tuple[Use, ...]         # of all leaves

    def tile(self, rows: int, columns: int | None) -> _Work:
        """Return the cost of a tile; `columns` is None for a tile on the diagonal."""
        result = rows * (columns or rows) * self.k**2
        examples = rows + (columns or 0)
        passes = sum(use.operand + self.k * use.cotangents for uses in self.used for use in uses)
        working = 2 * self.k * max((use.output for use in self.all_uses), default=0)
        forward = sum(2 * prod(use.matrix) if use.matrix else use.output for use in self.all_uses)
        operations, numbers = examples * (1 + self.k) * forward, 2 * examples * passes
        if self.engine != "structured":
            size = sum(self.sizes)
            return _Work((), operations + 2 * result * size + 2 * examples * self.k * size,
                         numbers + (result // self.k + examples * self.k) * size,
                         examples * (8 * self.k * size + passes + working) + 5 * result)
        costs = tuple(cheapest_route(rows, columns, self.k, size, list(used), masked)
                      for size, used, masked in zip(self.sizes, self.used, self.masked, strict=True))
        return _Work(costs, operations + sum(c.operations for c in costs), numbers + sum(c.numbers for c in costs),
                     examples * (passes + working) + max((c.held for c in costs), default=0) + 3 * result)

    def tiles(self, side: int) -> list[tuple[int, _Work]]:
        """Return the kinds of tiles that cover the kernel, each with its number."""
        rows, columns = ceil(self.n / side), ceil((self.m or self.n) / side)
        if self.m is not None:
            return [(rows * columns, self.tile(min(side, self.n), min(side, self.m)))]
        kinds = [(rows, self.tile(min(side, self.n), None))]
        return kinds if rows == 1 else [*kinds, (rows * (rows - 1) // 2, self.tile(side, side))]

    def peak(self, side: int) -> int:
        """Return the bytes that one device holds at a time; finished tiles wait on the host, a CPU's own memory."""
        kinds = self.tiles(side)
        whole = sum(count for count, _ in kinds) == 1
        kernel = 0 if whole or jax.default_backend() != "cpu" else self.n * (self.m or self.n) * self.k**2
        return (self.itemsize * (kernel + max(work.held for _, work in kinds))
                + 2 * min(side, max(self.n, self.m or 0)) * self.image)


def plan_kernel(network: Network, examples: tuple[int, int | None], engine: str, *, tile: int | None = None,
                memory_limit: int | None = None, devices: int = 1) -> NtkPlan:
    """Choose engine and tiles from shapes.

    Args:
        network: the network.
        examples: numbers of rows and columns; None for columns that are the rows.
        engine: the requested engine, which may be "auto".
        tile: the requested tile; None means the largest that fits.
        memory_limit: bytes that one device may hold; None means half of its memory.
        devices: number of devices that share the tiles.

    Raises:
        ValueError: the requested tile, or every tile, exceeds the limit.
    """
    leaves, treedef = jax.tree.flatten(shapes((network.params, network.example)))
    limit = default_memory_limit(devices) if memory_limit is None else memory_limit
    trains = tuple(entry is not None for entry in network.entries)
    return _plan_kernel(network.fn.program, tuple(leaves), treedef, trains, network.whole, examples, engine, tile,
                        limit, devices, budget(leaf_costs.ENTRIES))


@lru_cache(maxsize=256)
def _plan_kernel(program: Program, like: tuple[Any, ...], treedef: Any, trains: tuple[bool, ...],
                 whole: tuple[bool, ...], examples: tuple[int, int | None], engine: str, tile: int | None, limit: int,
                 devices: int, entries: int) -> NtkPlan:
    """Plan once for equal arguments; `entries` is what the costs of routes depend on besides."""
    params, x = jax.tree.unflatten(treedef, like)
    leaves = jax.tree.leaves(params)
    engine = "structured" if engine == "auto" else engine
    all_uses = uses(program, params, x).each
    out = program.shapes.out
    train = [i for i, moves in enumerate(trains) if moves]
    request = _Request(
        engine, *examples, out.shape[1], accumulator(out.dtype).itemsize, prod(x.shape) * x.dtype.itemsize,
        tuple(prod(jnp.shape(leaves[i])) for i in train), tuple(not whole[i] for i in train),
        tuple(tuple(use for use in all_uses if use.leaf == i) for i in train), all_uses)
    side = _largest(request, limit, devices) if tile is None else min(tile, max(examples[0], examples[1] or 0))
    if request.peak(side) > limit:
        _refuse(request, side, limit)
    kinds = request.tiles(side)
    names = leaf_names(params)
    listed = []
    for n, i in enumerate(train if kinds[0][1].leaves else ()):
        each = [(count, work.leaves[n]) for count, work in kinds]
        listed.append(LeafPlan(names[i], each[-1][1].route, sum(count * c.operations for count, c in each),
                               request.itemsize * sum(count * c.numbers for count, c in each)))
    return NtkPlan(
        engine, (request.n, request.m or request.n), request.k, side, sum(count for count, _ in kinds), devices,
        tuple(listed), sum(count * work.operations for count, work in kinds),
        request.itemsize * sum(count * work.numbers for count, work in kinds), request.peak(side), limit)


def _largest(request: _Request, limit: int, devices: int) -> int:
    """Return the largest side that fits, evened out: no remainder of a few examples, no idle device."""
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
