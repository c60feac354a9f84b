"""Which axes of a program's values hold the same units: what is removed from one goes from all."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pkjax.pruning.shrinking.operations import ELEMENTWISE, Operation, Operations

__all__ = ["Axis", "Product", "Ties"]

Axis = tuple[int, int]
"""A value and one of its axes."""


class Product(NamedTuple):
    """One axis that holds the entries of several, in row-major order: a reshape that joins or splits axes."""

    joined: Axis
    parts: tuple[Axis, ...]


class Ties:
    """Classes of axes that hold the same units, and those that must stay whole.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax.network import read
        >>> w = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}
        >>> ties = Ties(Operations.of(read(lambda w, x: x @ w["a"] @ w["b"], w, jnp.ones((1, 3))).fn))
        >>> ties.root((0, 1)) == ties.root((1, 0)), ties.root((1, 1)) in ties.whole
        (True, True)
    """

    def __init__(self, operations: Operations):
        self._operations = operations
        self._parent: dict[Axis, Axis] = {}
        self.products: list[Product] = []
        pinned: list[Axis] = []
        self._pinned = pinned
        for op in operations.each:
            self._tie(op)
        for value in (operations.arguments[-1], operations.result):
            self.pin(value)
        self.whole = {self.root(axis) for axis in pinned}

    def root(self, axis: Axis) -> Axis:
        """The axis that stands for its class."""
        while (above := self._parent.get(axis, axis)) != axis:
            axis = above
        return axis

    def same(self, one: Axis, other: Axis) -> None:
        """Two axes hold the same units."""
        one, other = self.root(one), self.root(other)
        self._parent[max(one, other)] = min(one, other)

    def pin(self, value: int, axes: Sequence[int] | None = None) -> None:
        """Axes of a value, or all, must stay whole."""
        self._pinned += [(value, axis) for axis in (range(len(self._shape(value))) if axes is None else axes)]

    def _shape(self, value: int) -> tuple[int, ...]:
        return self._operations.shapes[value].shape

    def _tie(self, op: Operation) -> None:
        name = op.name
        if name in ELEMENTWISE:
            self._elementwise(op)
        elif name.startswith("reduce_window"):
            self._windows(op)
        elif name == "dot_general":
            self._product(op)
        elif name == "conv_general_dilated":
            self._convolution(op)
        elif name == "broadcast_in_dim":
            (x,) = op.inputs
            for axis, at in enumerate(op.params["broadcast_dimensions"]):
                if self._shape(x)[axis] == op.params["shape"][at]:
                    self.same((x, axis), (op.output, at))
        elif name == "reshape":
            self._reshape(op)
        elif name in ("reduce_sum", "reduce_max", "reduce_min", "squeeze"):
            (x,) = op.inputs
            gone = op.params["axes" if name.startswith("reduce") else "dimensions"]
            kept = [axis for axis in range(len(self._shape(x))) if axis not in gone]
            self._aligned(x, kept, op.output, range(len(kept)))
            if name != "reduce_sum":      # entries that are 0 count in a maximum
                self.pin(x, gone)
        elif name == "expand_dims":
            new = op.params["dimensions"]
            self._aligned(op.inputs[0], range(len(self._shape(op.inputs[0]))), op.output,
                          [axis for axis in range(len(self._shape(op.output))) if axis not in new])
        elif name == "transpose":
            self._aligned(op.inputs[0], op.params["permutation"], op.output, range(len(self._shape(op.output))))
        else:
            self._in_place(op)

    def _aligned(self, x: int, axes: Sequence[int], out: int, at: Sequence[int]) -> None:
        for axis, place in zip(axes, at, strict=True):
            self.same((x, axis), (out, place))

    def _elementwise(self, op: Operation) -> None:
        shape = self._shape(op.output)
        for x in op.inputs:
            for axis, size in enumerate(self._shape(x)):
                if size == shape[axis]:
                    self.same((x, axis), (op.output, axis))

    def _in_place(self, op: Operation) -> None:
        """Axes along which nothing is cut, joined, filled up or turned round."""
        if op.name == "concatenate":
            moved = {op.params["dimension"]}
        elif op.name == "pad":
            moved = {axis for axis, config in enumerate(op.params["padding_config"]) if tuple(config) != (0, 0, 0)}
        elif op.name == "rev":
            moved = set(op.params["dimensions"])
        else:      # slice
            moved = {axis for axis, (n, m) in enumerate(zip(self._shape(op.inputs[0]), self._shape(op.output),
                                                            strict=True)) if n != m}
        for x in op.inputs:
            for axis in range(len(self._shape(x))):      # the value that fills up has none
                if axis in moved:
                    self.pin(x, [axis])
                else:
                    self.same((x, axis), (op.output, axis))
        self.pin(op.output, list(moved))

    def _windows(self, op: Operation) -> None:
        (x,) = op.inputs
        for axis, (width, padding) in enumerate(zip(op.params["window_dimensions"], op.params["padding"], strict=True)):
            if width == 1 and tuple(padding) == (0, 0) and self._shape(x)[axis] == self._shape(op.output)[axis]:
                self.same((x, axis), (op.output, axis))
            else:
                self.pin(x, [axis])
                self.pin(op.output, [axis])

    def _product(self, op: Operation) -> None:
        (contracted, batch), (left, right) = op.params["dimension_numbers"], op.inputs
        for pairs in (contracted, batch):
            self._aligned(left, pairs[0], right, pairs[1])
        free = [[axis for axis in range(len(self._shape(x))) if axis not in (*contracted[side], *batch[side])]
                for side, x in enumerate((left, right))]
        first = len(batch[0])
        self._aligned(left, batch[0], op.output, range(first))
        self._aligned(left, free[0], op.output, range(first, first + len(free[0])))
        self._aligned(right, free[1], op.output, range(first + len(free[0]), len(self._shape(op.output))))

    def _convolution(self, op: Operation) -> None:
        (image, kernel), numbers = op.inputs, op.params["dimension_numbers"]
        (batch, features, *where), (outputs, inputs, *window) = numbers.lhs_spec, numbers.rhs_spec
        out_batch, out_features, *places = numbers.out_spec
        for value, axes in ((image, where), (kernel, window), (op.output, places)):
            self.pin(value, axes)
        if op.params["feature_group_count"] == op.params["batch_group_count"] == 1:
            self.same((image, features), (kernel, inputs))
            self.same((kernel, outputs), (op.output, out_features))
        else:
            self.pin(image, [features])
            self.pin(kernel, [inputs, outputs])
            self.pin(op.output, [out_features])
        self.same((image, batch), (op.output, out_batch))

    def _reshape(self, op: Operation) -> None:
        """Axes of length 1 come and go; of the others equal products hold the same entries."""
        (x,) = op.inputs
        old, new = ([axis for axis, n in enumerate(self._shape(v)) if n != 1] for v in (x, op.output))
        sizes, sizes_out = self._shape(x), self._shape(op.output)
        while old and new:
            left, right = [old.pop(0)], [new.pop(0)]
            while (a := np.prod([sizes[i] for i in left])) != (b := np.prod([sizes_out[i] for i in right])):
                if a < b:
                    left.append(old.pop(0))
                else:
                    right.append(new.pop(0))
            if len(left) == len(right) == 1:
                self.same((x, left[0]), (op.output, right[0]))
            elif len(right) == 1:
                self.products.append(Product((op.output, right[0]), tuple((x, i) for i in left)))
            elif len(left) == 1:
                self.products.append(Product((x, left[0]), tuple((op.output, i) for i in right)))
            else:
                self.pin(x, left)
                self.pin(op.output, right)
