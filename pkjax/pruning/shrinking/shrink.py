"""The smaller dense network that masks leave."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax import tables
from pkjax.network import read
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.pruning.shrinking.flow import driven_and_values, idle_entries
from pkjax.pruning.shrinking.operations import Operations, run
from pkjax.pruning.shrinking.ties import Axis, Ties
from pkjax.trees import ApplyFn, leaf_names

__all__ = ["LeafShapes", "ShrinkResult", "shrink"]


@dataclass(frozen=True)
class LeafShapes:
    """The shape of one leaf before and after ``shrink``.

    Examples:
        >>> print(LeafShapes("Dense_0/kernel", (784, 100), (784, 60)))
        Dense_0/kernel: 784×100 → 784×60
    """

    name: str
    """The leaf's key path."""
    before: tuple[int, ...]
    """Its shape."""
    after: tuple[int, ...]
    """Its shape without the units that were removed."""

    def __str__(self) -> str:
        """One line of text."""
        return f"{self.name}: {_times(self.before)} → {_times(self.after)}"


@dataclass(frozen=True, eq=False)
class ShrinkResult:
    """A smaller network, and what it saves.

    Returned by ``shrink``. Prints as a short text and, in a notebook, as a table of its leaves.

    Examples:
        >>> import jax.numpy as jnp
        >>> weights = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[2.0], [3.0]])}
        >>> shrink(lambda w, x: jnp.maximum(x @ w["a"], 0.0) @ w["b"], weights, jnp.ones((1, 1)))
        ShrinkResult: 4 → 2 parameters, 8 → 4 floating-point operations per example
          a: 1×2 → 1×1
          b: 2×1 → 1×1
    """

    apply_fn: ApplyFn
    """Maps (params, inputs (N, *input)) to what the network that was shrunk returns."""
    params: PyTree
    """The parameters that are left, in the tree of those that were given; masked ones are 0."""
    masks: PyTree | None
    """The masks of ``params``; None where none were given."""
    kept: PyTree
    """For each leaf of ``params`` the indices that are kept, along each axis: a tree of tuples of arrays, by which any
    tree like the old parameters is cut down, ``leaf[numpy.ix_(*indices)]``."""
    leaves: tuple[LeafShapes, ...]
    """The shapes of all leaves before and after, in flattening order: units are the lengths of their axes."""
    flops: tuple[int, int]
    """Floating-point operations of dense layers and convolutions for one example, before and after."""

    @property
    def parameters(self) -> tuple[int, int]:
        """The numbers of parameters before and after, those that are masked included."""
        return sum(prod(leaf.before) for leaf in self.leaves), sum(prod(leaf.after) for leaf in self.leaves)

    def __repr__(self) -> str:
        """A line about the whole, and one for each leaf that became smaller."""
        changed = [str(leaf) for leaf in self.leaves if leaf.before != leaf.after]
        return "\n  ".join([f"ShrinkResult: {self._saved()}", *changed])

    def _saved(self) -> str:
        (old, new), (slow, fast) = self.parameters, self.flops
        return f"{old:,} → {new:,} parameters, {slow:,} → {fast:,} floating-point operations per example"

    def _repr_html_(self) -> str:
        rows = [[leaf.name, _times(leaf.before), _times(leaf.after)] for leaf in self.leaves]
        return tables.html(["leaf", "before", "after"], rows, caption=self._saved(), left=3)


def shrink(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
           masks: PyTree | None = None) -> ShrinkResult:
    """Remove the units through which nothing flows: a smaller dense network with the same outputs.

    A unit, a neuron or a channel, goes where no path of weights other than 0 leads from it to an output, or where none
    leads to it from the input and its constant value is exactly 0 (a bias or a shift of BatchNorm that is not 0, or
    that ReLU does not cut off, makes it a constant, which stays). Weights that are 0 count as absent, masked or not.
    Zeros and ones decide, never a tolerance. Units that residual sums tie together go together, where all of them are
    such, or stay. Of a layer of which nothing is left one unit stays.

    Takes networks of dense layers, convolutions, biases, frozen BatchNorm, pooling, activations and residual sums,
    from a plain function or any library, with and without paths (tanh, say). Its input and output keep their shapes.
    What is removed is what does nothing for these weights: trained further, a unit without inputs whose bias is 0, say,
    might have come to do something. Runs outside of ``jit``.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, *out).
        params: its parameters.
        x: an input (N, *input), of which the shape alone matters.
        masks: booleans like ``params``; None takes the weights as they are.

    Returns:
        The smaller network, its parameters and masks, which indices of each leaf are left, and what that saves.

    Raises:
        ValueError: the network has an operation of which ``shrink`` does not know which units go together, such as a
            scan or a lookup (the message names it and its place), or its input is not one array; masks have another
            structure.
        TypeError: the masks are not booleans.

    Examples:
        >>> import jax, pkjax as pk
        >>> x = jnp.ones((1, 784), jnp.float32)
        >>> module = pk.models.fc(100, depth=2)
        >>> apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), x))
        >>> masks = pk.prune(lambda p: pk.synflow(apply_fn, p, x), params, compression=3, steps=10).masks
        >>> smaller = pk.shrink(apply_fn, params, x, masks=masks)
        >>> smaller.parameters[1] < smaller.parameters[0]
        True
    """
    network = read(apply_fn, params, x, masks=masks)
    if network.raw is not None:
        raise ValueError("shrink takes networks whose input is one array of numbers, but x is a tree of arrays: pass a "
                         "function of one of them")
    operations = Operations.of(network.fn)
    start = jnp.zeros(network.example.shape, network.example.dtype)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(network.params)]
    kept = _kept(operations, [*leaves, start])
    used = {i for op in operations.each for i in op.inputs}

    def indices(value: int) -> tuple[np.ndarray, ...]:
        shape = operations.shapes[value].shape
        return tuple(kept[value, axis] if value in used else np.arange(n) for axis, n in enumerate(shape))

    def cut(value: int, array: Any) -> Array:
        # An index array for each axis takes out the entries of all; an array without axes stays.
        return jnp.asarray(np.asarray(array)[np.ix_(*indices(value))]) if np.ndim(array) else jnp.asarray(array)

    numbers = operations.arguments[:-1]
    constants = {i: cut(i, value) for i, value in operations.constants.items()}
    shapes = tuple(jax.ShapeDtypeStruct(tuple(map(len, indices(i))) if i in used else s.shape, s.dtype)
                   for i, s in enumerate(operations.shapes))
    smaller = replace(operations, shapes=shapes, constants=constants,
                      each=tuple(op.resized(shapes[op.output].shape) for op in operations.each))
    structure = jax.tree.structure(params)
    left = [cut(i, leaf) for i, leaf in zip(numbers, leaves, strict=True)]
    named = zip(leaf_names(params), leaves, left, strict=True)
    return ShrinkResult(
        apply_fn=_function(smaller, structure, network.outputs), params=jax.tree.unflatten(structure, left),
        masks=None if masks is None else jax.tree.unflatten(
            structure, [cut(i, mask) for i, mask in zip(numbers, jax.tree.leaves(masks), strict=True)]),
        kept=jax.tree.unflatten(structure, [indices(i) for i in numbers]),
        leaves=tuple(LeafShapes(name, old.shape, new.shape) for name, old, new in named),
        flops=(operations.flops(), smaller.flops()))


def _function(operations: Operations, structure: Any, outputs: tuple[int, ...]) -> ApplyFn:
    """The network as a function of parameters and a batch."""
    def apply_fn(params: PyTree, x: Array) -> Array:
        leaves = structure.flatten_up_to(params)

        def one(example: Array) -> Array:
            return run(operations, operations.constants, [*leaves, example[None]])[operations.result][0]

        return jax.vmap(one)(jnp.asarray(x)).reshape(-1, *outputs)

    return apply_fn


def _kept(operations: Operations, arguments: list[Any]) -> dict[Axis, np.ndarray]:
    """The indices that stay along each axis of each value: the most that can go, go."""
    ties = Ties(operations)
    axes = [(i, axis) for i, shape in enumerate(operations.shapes) for axis in range(len(shape.shape))]
    removed = {root: np.full(operations.shapes[root[0]].shape[root[1]], root not in ties.whole)
               for root in {ties.root(axis) for axis in axes}}

    @compiled_for_few_calls()
    def truths(arguments: list[Any]) -> Any:
        return driven_and_values(operations, arguments)[1]

    @compiled_for_few_calls()
    def idle_units(present: Any, gone: Any) -> dict[Axis, Array]:
        idle = idle_entries(operations, present, gone)
        return {(i, axis): idle[i].all(tuple(a for a in range(idle[i].ndim) if a != axis)) for i, axis in axes
                if i in idle}

    present = truths(arguments)
    gone: Mapping[int, Any] = {i: ~entries for i, entries in present.items()}
    while True:
        before = {root: each.copy() for root, each in removed.items()}
        for axis, idle in jax.device_get(idle_units(present, gone)).items():
            removed[ties.root(axis)] &= idle
        _settle(ties, operations, removed)
        # Whatever is removed asks for nothing; what is 0 and stays does, to stay 0.
        gone = {i: jnp.asarray(_any_axis([removed[ties.root((i, axis))] for axis in range(len(shape.shape))]))
                for i, shape in enumerate(operations.shapes)}
        if all(np.array_equal(before[root], removed[root]) for root in removed):
            return {axis: np.flatnonzero(~removed[ties.root(axis)]) for axis in axes}


def _settle(ties: Ties, operations: Operations, removed: dict[Axis, np.ndarray]) -> None:
    """Keep more until axes that are joined to one agree with it, and one unit of each axis stays."""
    while True:
        before = sum(int(each.sum()) for each in removed.values())
        for each in removed.values():
            if each.size and each.all():
                each[0] = False
        for joined, parts in ties.products:
            whole, units = removed[ties.root(joined)], [removed[ties.root(part)] for part in parts]
            whole &= _any_axis(units).ravel()
            blocks = whole.reshape([len(each) for each in units])
            for axis, each in enumerate(units):
                each &= blocks.all(tuple(a for a in range(blocks.ndim) if a != axis))
        if sum(int(each.sum()) for each in removed.values()) == before:
            return


def _any_axis(units: list[np.ndarray]) -> np.ndarray:
    """Entries of which the unit along any axis is marked."""
    out = np.zeros([len(each) for each in units], bool)
    for axis, each in enumerate(units):
        out |= each.reshape([-1 if a == axis else 1 for a in range(len(units))])
    return out


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
