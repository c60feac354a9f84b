"""The units of a network that may be rescaled: which entries of its signals share a factor, and where it enters.

Multiplying what enters a unit by λ > 0 and dividing what leaves it by λ changes neither the network's function nor any
path. Every entry of a signal is given a unit. Entries are of one unit where the network's operations tie them: over
the places of a convolution, within a pooling window, on both sides of a residual sum. The unit of inputs, outputs and
whatever constants are added to does not scale. A parameter leads from one unit to another, and scales by the quotient
of their factors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pkjax.network import Network
from pkjax.paths.entries import Constant, Entries, Leaf, Product
from pkjax.paths.errors import NotFullyConnectedError
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum

__all__ = ["NotRescalableError", "Units", "read_units"]

FIXED, NONE = 0, -1      # the unit that does not scale; no unit: an entry that is always 0
REARRANGEMENTS = ("reshape", "transpose", "broadcast_in_dim", "slice", "rev", "squeeze", "expand_dims", "split",
                  "gather", "dynamic_slice")
SAME = ("convert_element_type", "copy", "copy_p", "reduce_precision", "neg")


class NotRescalableError(ValueError):
    """The units of a network cannot be told apart, or a parameter lies on edges between several pairs of them.

    Examples:
        >>> raise NotRescalableError("...")
        Traceback (most recent call last):
        ...
        pkjax.paths.units.NotRescalableError: ...
    """


class Units(NamedTuple):
    """Where each parameter, in flattening order, leads from and to: numbers of units, 0 for what does not scale."""

    start: np.ndarray
    end: np.ndarray
    """The unit that a parameter's signal belongs to."""
    free: int
    """How many units scale; they are numbered from 1."""


class Joined:
    """Sets of units that have turned out to be one."""

    def __init__(self) -> None:
        self.parent = np.zeros(1, int)

    def new(self, n: int) -> np.ndarray:
        """Start units."""
        first = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(first, first + n)])
        return np.arange(first, first + n)

    def roots(self, units: np.ndarray) -> np.ndarray:
        """The least member of each unit's set; entries without a unit keep none."""
        at = np.where(units < 0, NONE, self.parent[units])
        while not np.array_equal(at, up := np.where(at < 0, NONE, self.parent[at])):
            at = up
        return at

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Make one unit of every pair."""
        one, other = np.broadcast_arrays(one, other)
        both = (one >= 0) & (other >= 0)
        while True:
            a, b = self.roots(one[both]), self.roots(other[both])
            if np.array_equal(a, b):
                return
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def along(self, groups: np.ndarray, units: np.ndarray) -> None:
        """Make one unit of all entries of each group; groups are numbered from 0, and -1 is none."""
        member = (groups.ravel() >= 0) & (units.ravel() >= 0)
        group, unit = groups.ravel()[member], units.ravel()[member]
        first = np.full(int(group.max(initial=-1)) + 1, NONE)
        first[group[::-1]] = unit[::-1]
        self.join(first[group], unit)


class UnitAlgebra:
    """The algebra that gives every entry of a signal its unit; parameters stay unread entries."""

    signed = False
    known = False
    natural_max = False

    def __init__(self, parameters: int):
        self.joined = Joined()
        self.start, self.end = np.full(parameters, FIXED), np.full(parameters, FIXED)
        self.used = np.zeros(parameters, bool)

    def lift(self, constant: Any) -> Any:
        """Hold a constant."""
        return Entries(Constant(constant))

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Keep the units: a gate is the same at any scale."""
        return self.of(operand)

    def true_value(self, operand: PathSum) -> Any:
        """Return None: gates are open."""
        return None

    def of(self, operand: PathSum) -> np.ndarray:
        """The units of an operand; what joins from parameters and constants alone comes from the unit that is fixed."""
        if isinstance(operand.value, Entries):
            return self.edges(operand.value, np.zeros(operand.shape, int), None)
        units: np.ndarray = operand.value
        return units

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Move units with their entries, or make one of those that are added up."""
        held = [s.value for s in operands]
        if op in SAME:
            return held[0]
        if all(isinstance(h, Entries) for h in held) and not getattr(fn, "of_input", False):
            if op in REARRANGEMENTS and len(held) == 1:
                return Entries(held[0].table, np.asarray(fn(jnp.asarray(held[0].position, jnp.int32))))
            raise NotRescalableError(f"the operation '{op}' joins parameters before they meet a signal")
        if op in ("add", "sub", "add_any") and len(held) == 2:
            signals = [not isinstance(h, Entries) for h in held]
            one = held[0 if signals[0] else 1]
            other = held[1] if all(signals) else self.edges(held[signals.index(False)],
                                                            np.zeros(operands[0].shape, int), one)
            self.joined.join(one, other)
            return np.maximum(one, other)
        return self.gathered(fn, [self.of(s) for s in operands], [s.dtype for s in operands])

    def gathered(self, fn: Callable[..., Any], units: Sequence[np.ndarray], dtypes: Sequence[Any]) -> np.ndarray:
        """The units of an operation's results: those of the entries that each is a sum of, read bit by bit."""
        def at(values: Sequence[np.ndarray]) -> np.ndarray:
            return np.asarray(fn(*(jnp.asarray(v, dtype) for v, dtype in zip(values, dtypes, strict=True))), np.float64)

        roots = [self.joined.roots(u) for u in units]
        count = at([u >= 0 for u in roots])
        read = np.zeros(count.shape, int)
        for bit in range(max(int(u.max(initial=0)) for u in roots).bit_length()):
            share = at([(u >= 0) & (u >> bit & 1 == 1) for u in roots])
            if not ((share == 0) | (share == count)).all():      # sums over several units, which become one
                every = np.concatenate([u.ravel() for u in roots])
                self.joined.join(every, every.max())
                return np.where(count != 0, self.joined.roots(every.max(keepdims=True))[0], NONE)
            read |= np.where((count != 0) & (share == count), 1 << bit, 0)
        return np.where(count != 0, read, NONE)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Lead from the units of a signal to new ones, along parameters."""
        if isinstance(a.value, Entries) and isinstance(b.value, Entries):
            if op != "mul":
                raise NotRescalableError(f"the operation '{op}' multiplies parameters before they meet a signal")
            return Entries(Product(a.value, b.value))
        if not (isinstance(a.value, Entries) or isinstance(b.value, Entries)):
            raise NotRescalableError(f"the operation '{op}' multiplies two signals")
        first = isinstance(b.value, Entries)
        (x, w) = (a, b) if first else (b, a)
        if not w.degree:
            factor = jnp.asarray(w.value.table.read(w.value.position.ravel()).value.reshape(w.shape) != 0, w.dtype)
            return self.gathered(lambda v: fn(v, factor) if first else fn(factor, v), [x.value], [x.dtype])
        if op == "mul":
            shape = np.broadcast_shapes(x.shape, w.shape)
            return self.scaled(np.broadcast_to(x.value, shape), Entries(w.value.table,
                                                                         np.broadcast_to(w.value.position, shape)))
        params = getattr(fn, "keywords", {})
        if op == "dot_general" and not any(params["dimension_numbers"][1]):
            return self.contracted(x, w, params["dimension_numbers"][0], first)
        if op == "conv_general_dilated" and first and params["batch_group_count"] == 1:
            return self.convolved(x, w, params, fn)
        raise NotRescalableError(f"the operation '{op}' on operands of shapes {a.shape} and {b.shape} is not a dense "
                                 "layer, a convolution or a scale")

    def scaled(self, units: np.ndarray, entries: Entries) -> np.ndarray:
        """A product entry by entry: each parameter leads to a unit of its own."""
        index, constant, _ = entries.table.read(entries.position.ravel())
        index = np.where(constant != 0, index, NONE)
        self.joined.along(index, units)
        new = np.array(units).ravel()
        distinct, at = np.unique(index, return_inverse=True)
        ends = np.where(distinct >= 0, self.joined.new(len(distinct)), NONE)
        new = np.where(index >= 0, ends[at], np.where(constant != 0, new, NONE))
        new[units.ravel() < 0] = NONE
        live = (index >= 0) & (new >= 0)
        self.record(index[live], units.ravel()[live], new[live])
        return new.reshape(units.shape)

    def contracted(self, x: PathSum, w: PathSum, axes: Any, first: bool) -> np.ndarray:
        """A product with a matrix: a unit for each of its columns, at all places."""
        of_x, of_w = axes if first else axes[::-1]
        rows = np.moveaxis(x.value, of_x, range(len(of_x))).reshape(int(np.prod([x.shape[d] for d in of_x])), -1)
        position = np.moveaxis(w.value.position, of_w, range(len(of_w)))
        free = position.shape[len(of_w):]
        places = tuple(n for d, n in enumerate(x.shape) if d not in of_x)
        ends = self.matrix(self.units_of_rows(rows), Entries(w.value.table, position.reshape(len(rows), -1)))
        if first:
            return np.broadcast_to(ends.reshape(free), (*places, *free))
        return np.broadcast_to(ends.reshape(*free, *(1 for _ in places)), (*free, *places))

    def convolved(self, x: PathSum, w: PathSum, params: Any, fn: Callable[..., Any]) -> np.ndarray:
        """A convolution: a unit for each of its channels, at all places."""
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        channels = np.moveaxis(x.value, numbers.lhs_spec[1], 0).reshape(x.shape[numbers.lhs_spec[1]], -1)
        out, into, *window = numbers.rhs_spec
        kernel = np.transpose(w.value.position, (out, into, *window))
        kernel = kernel.reshape(groups, kernel.shape[0] // groups, kernel.shape[1], -1)
        ends = []
        for kernels, starts in zip(kernel, self.units_of_rows(channels).reshape(groups, -1), strict=True):
            entries = np.transpose(kernels, (1, 2, 0))         # into, window, out
            along = np.repeat(starts, entries.shape[1])
            ends.append(self.matrix(along, Entries(w.value.table, entries.reshape(len(along), -1))))
        shape = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in (x, w))).shape
        channel_axis = [-1 if d == numbers.out_spec[1] else 1 for d in range(len(shape))]
        return np.broadcast_to(np.concatenate(ends).reshape(channel_axis), shape)

    def units_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Make one unit of each row's entries."""
        self.joined.along(np.broadcast_to(np.arange(len(rows))[:, None], rows.shape), rows)
        return rows.max(1, initial=NONE)

    def matrix(self, starts: np.ndarray, entries: Entries) -> np.ndarray:
        """Lead from units along a matrix to units of its columns."""
        index, constant, _ = entries.table.read(entries.position)
        ends = self.joined.new(index.shape[1])
        at, to = np.nonzero((constant != 0) & (starts[:, None] >= 0))
        parameter = index[at, to]
        fixed = parameter < 0
        self.joined.join(starts[at[fixed]], ends[to[fixed]])
        self.record(parameter[~fixed], starts[at[~fixed]], ends[to[~fixed]])
        reached = np.zeros(len(ends), bool)
        reached[to] = True
        return np.where(reached, ends, NONE)

    def edges(self, entries: Entries, start: np.ndarray, end: np.ndarray | None) -> np.ndarray:
        """What parameters and constants alone add to a signal: edges from the unit that is fixed."""
        position = np.broadcast_to(entries.position, start.shape).ravel()
        index, constant, value = entries.table.read(position)
        index = np.where(constant != 0, index, NONE)
        if end is None or (end < 0).any():
            distinct, at = np.unique(index, return_inverse=True)
            own = self.joined.new(len(distinct))[at]
            units = own if end is None else np.where(end.ravel() < 0, own, end.ravel())
        else:
            units = end.ravel()
        self.joined.along(index, units)
        trains = index >= 0
        self.record(index[trains], np.zeros(int(trains.sum()), int), units[trains])
        absent = np.where(trains, units, np.where(value != 0, FIXED, NONE))
        return absent.reshape(start.shape)

    def record(self, parameter: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
        """Note where parameters lead from and to, in one operation."""
        distinct, at = np.unique(parameter, return_index=True)
        if self.used[distinct].any():
            raise NotRescalableError("a parameter is used by several operations (tied weights): a unit's scale would "
                                     "have to fit all of them")
        self.used[distinct] = True
        self.start[distinct], self.end[distinct] = start[at], end[at]


def read_units(network: Network, x: Any) -> Units:
    """Read the units of a network, for one example.

    Raises:
        NotRescalableError: parameters are tied or multiplied, or meet a signal in another way than in dense layers,
            convolutions, scales and biases.
    """
    leaves = jax.tree.leaves(network.params)
    offsets = np.cumsum([0, *(int(np.size(leaf)) for leaf in leaves)])
    masks = [True] * len(leaves) if network.masks is None else jax.tree.leaves(network.masks)
    algebra = UnitAlgebra(int(offsets[-1]))
    try:
        out = interpret(algebra, network.fn, network.params, x,
                        lambda i, leaf: Entries(Leaf(leaf, True, masks[i], int(offsets[i]))),
                        lambda z: np.zeros(z.shape, int))
    except NotFullyConnectedError as error:
        raise NotRescalableError(str(error)) from None
    units = algebra.of(out)
    algebra.joined.join(units, np.zeros_like(units))
    start, end = algebra.joined.roots(algebra.start), algebra.joined.roots(algebra.end)
    known, number = np.unique(np.concatenate([[FIXED], start, end]), return_inverse=True)
    return Units(number[1:len(start) + 1], number[len(start) + 1:], len(known) - 1)
