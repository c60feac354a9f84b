"""A network as a chain of dense and convolution layers, whose weights join the units of one layer to those of the next.

A unit is an output of a dense layer or a channel of a convolution. Activations, pooling, biases and BatchNorm keep the
units apart, so that they change nothing; a sum of two layers' outputs (a skip connection) is no chain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from pkjax.network import read
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.trees import ApplyFn, kernels, leaf_names

__all__ = ["ChainLayer", "weight_chain"]


@dataclass(frozen=True, eq=False)
class ChainLayer:
    """The weights between two layers of units."""

    leaf: int
    """The leaf that holds them."""
    entries: np.ndarray
    """(rows, units, window): for each weight its position in the leaf, flattened."""
    tails: np.ndarray
    """For each row its unit in the layer before, or -1 where it meets none; in the first layer rows are the units."""
    meets: np.ndarray
    """For each place of the window, whether it ever meets the image and not only its padding."""


@dataclass(frozen=True, eq=False)
class _Signal:
    """A value that depends on the input: the layers so far, and for each entry its unit of the last one, or -1."""

    units: np.ndarray
    layers: tuple[ChainLayer, ...]


@dataclass(frozen=True, eq=False)
class _Weights:
    """A leaf of the parameters, rearranged."""

    leaf: int
    position: np.ndarray


def _refused(reason: str) -> ValueError:
    return ValueError(f"the network is not a chain of dense and convolution layers: {reason}")


_SAME = ("convert_element_type", "copy", "copy_p", "reduce_precision", "neg")
_MOVED = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "slice")


class _ChainAlgebra:
    """The algebra that reads a network as a chain of units."""

    signed = False
    known = False
    natural_max = False

    def lift(self, constant: Any) -> Any:
        return None

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        return operand.value

    def true_value(self, operand: PathSum) -> Any:
        return None

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Follow units through an operation that adds or rearranges entries, as long as it adds those of one unit."""
        held = [s.value for s in operands]
        if op in _SAME:
            return held[0]
        signals = [h for h in held if isinstance(h, _Signal)]
        if not signals:
            moves = op in _MOVED and len(held) == 1 and isinstance(held[0], _Weights)
            return _Weights(held[0].leaf, np.asarray(fn(held[0].position))) if moves else None
        if any(s.layers is not signals[0].layers for s in signals):
            raise _refused(f"the operation '{op}' joins the outputs of different layers (a skip connection)")

        def moment(power: int) -> np.ndarray:
            terms = [np.where(h.units < 0, 0, (h.units + 1.0) ** power) if isinstance(h, _Signal) else np.zeros(s.shape)
                     for h, s in zip(held, operands, strict=True)]
            return np.asarray(fn(*map(jnp.asarray, terms)))

        # Entries of one unit have mean² = mean of squares, exactly: whole numbers of moderate size.
        count, first, second = map(moment, range(3))
        if (first * first != count * second).any():
            raise _refused(f"the operation '{op}' joins different units of one layer")
        return _Signal(np.where(count > 0, first / np.maximum(count, 1) - 1, -1).astype(np.int64), signals[0].layers)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Scale a signal, or add a layer."""
        first = isinstance(a.value, _Signal)
        x, w = (a, b) if first else (b, a)
        if not isinstance(x.value, _Signal):
            return None
        if op == "mul":
            return _Signal(np.broadcast_to(x.value.units, np.broadcast_shapes(x.shape, w.shape)), x.value.layers)
        if not isinstance(w.value, _Weights):
            raise _refused(f"the operation '{op}' multiplies a signal by what is computed from parameters or constants")
        params: dict[str, Any] = fn.keywords     # type: ignore[attr-defined]
        if op == "conv_general_dilated" and first:
            return _convolution(x, w.value, params)
        if op == "dot_general" and not any(params["dimension_numbers"][1]):
            of_x, of_w = params["dimension_numbers"][0][:: 1 if first else -1]
            weights = np.moveaxis(w.value.position, of_w, range(len(of_w)))
            tail, spread = weights.shape[len(of_w):], [n for d, n in enumerate(x.shape) if d not in of_x]
            entries = weights.reshape(-1, int(np.prod(tail)), 1)
            layer = ChainLayer(w.value.leaf, entries, _tails(x.value, of_x), np.ones(1, bool))
            units = np.arange(entries.shape[1]).reshape(tail)
            units = np.broadcast_to(units, (*spread, *tail))
            order = [*range(len(spread), units.ndim), *range(len(spread))]
            return _Signal(units if first else units.transpose(order), (*x.value.layers, layer))
        raise _refused(f"the operation '{op}' on operands of shapes {a.shape} and {b.shape} is no dense layer")


def _convolution(x: PathSum, w: _Weights, params: dict[str, Any]) -> _Signal:
    """Add a layer of channels."""
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise _refused("a convolution has groups")
    lhs, rhs, out = params["dimension_numbers"]
    weights = w.position.transpose(rhs[1], rhs[0], *rhs[2:])
    entries = weights.reshape(*weights.shape[:2], -1)
    options = {name: params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}

    def touched(window: Array) -> Array:
        image = jnp.ones((1, 1, *(x.shape[d] for d in lhs[2:])))
        return lax.conv_general_dilated(image, window, **options)

    places, back = jax.vjp(touched, jnp.ones((1, 1, *weights.shape[2:])))
    meets = np.asarray(back(jnp.ones_like(places))[0]).ravel() > 0
    layer = ChainLayer(w.leaf, entries, _tails(x.value, (lhs[1],)), meets)
    shape = [0] * len(out)
    for axis, size in zip((out[0], out[1], *out[2:]), (x.shape[lhs[0]], entries.shape[1], *places.shape[2:]),
                          strict=True):
        shape[axis] = size
    channels = np.arange(entries.shape[1]).reshape([-1 if d == out[1] else 1 for d in range(len(out))])
    return _Signal(np.broadcast_to(channels, shape), (*x.value.layers, layer))


def _tails(x: _Signal, axes: Sequence[int]) -> np.ndarray:
    """Find the unit that each row of a layer's weights meets."""
    rows = np.moveaxis(x.units, axes, range(len(axes)))
    rows = rows.reshape(int(np.prod(rows.shape[:len(axes)])), -1)
    if not x.layers:
        return np.arange(len(rows))
    units = rows.max(axis=1)
    if ((rows != units[:, None]) & (rows >= 0)).any():
        raise _refused("one row of weights meets several units of the layer before (parameters are shared)")
    return units


def weight_chain(apply_fn: ApplyFn, params: PyTree, x: Any) -> tuple[ChainLayer, ...]:
    """Read a network as a chain of dense and convolution layers.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: its parameters.
        x: an input (1, *input), for its shape.

    Raises:
        ValueError: the network is not such a chain, a kernel has no place in it or several, or a unit leads nowhere.
        NotPathNetworkError: an operation has no paths.

    Examples:
        >>> net = lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"]
        >>> chain = weight_chain(net, {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
        >>> [layer.entries.shape for layer in chain], chain[1].tails.tolist()
        ([(3, 4, 1), (4, 2, 1)], [0, 1, 2, 3])
    """
    network = read(apply_fn, params, x, paths=True)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        out = interpret(_ChainAlgebra(), network.fn, network.params, network.batch(x, "x")[:1],
                        lambda i, leaf: _Weights(i, np.arange(np.size(leaf)).reshape(np.shape(leaf))),
                        lambda z: _Signal(np.zeros(np.shape(z), np.int64), ())).value
    if not isinstance(out, _Signal) or not out.layers:
        raise _refused("no layer of weights leads to its output")
    names, used = leaf_names(params), [layer.leaf for layer in out.layers]
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        if used.count(i) > 1:
            raise _refused(f"the kernel {names[i]!r} is used {used.count(i)} times")
        if kernels(path, leaf) and i not in used:
            raise _refused(f"the kernel {names[i]!r} has no place in it")
    for layer, after in zip(out.layers, [*(layer.tails for layer in out.layers[1:]), out.units.ravel()], strict=True):
        if lost := sorted({*range(layer.entries.shape[1])} - set(after.tolist())):
            raise _refused(f"unit {lost[0]} of the layer {names[layer.leaf]!r} leads nowhere")
    return out.layers
