"""A fully connected network as its chain of layers of edges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.entries import Constant, Entries, Leaf, Product
from pkjax.paths.errors import NotFullyConnectedError
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.paths.layers import DenseLayer, DiagonalLayer, Layer
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, Choice

__all__ = ["DenseLayer", "Layer", "dense_layers", "network_layers"]


@dataclass(frozen=True, eq=False)
class Signal:
    """A value that depends on the input: the layers so far, and for each entry its node in the last layer."""

    position: np.ndarray
    nodes: int
    layers: tuple[Any, ...]


REARRANGEMENTS = ("reshape", "transpose", "broadcast_in_dim", "slice", "rev", "squeeze", "expand_dims", "split",
                  "gather", "dynamic_slice", "concatenate")
IDENTITIES = ("convert_element_type", "copy", "copy_p", "reduce_precision", "neg")


class LayerAlgebra:
    """The algebra that reads a network as a chain of fully connected layers."""

    signed = False
    known = False
    natural_max = False

    def lift(self, constant: Any) -> Any:
        """Hold a constant: nothing trains."""
        return Entries(Constant(constant))

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Open the gate."""
        return operand.value

    def true_value(self, operand: PathSum) -> Any:
        """Return None: gates are open."""
        return None

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Rearrange entries, or add a bias to a signal."""
        held = [s.value for s in operands]
        if op in IDENTITIES:
            return held[0]
        if op in REARRANGEMENTS:
            first = held[0]
            if not all(type(h) is type(first) and _origin(h) is _origin(first) for h in held):
                raise NotFullyConnectedError(f"the operation '{op}' joins values of different layers")
            return self.rearranged(first, fn, held)
        signals = [isinstance(h, Signal) for h in held]
        if op in ("add", "sub", "add_any") and len(held) == 2 and sum(signals) == 1:
            return self.biased(*(held if signals[0] else held[::-1]))
        if op == "add" and len(held) == 1:
            return held[0]
        raise NotFullyConnectedError(f"the operation '{op}' on operands of shapes {[s.shape for s in operands]} joins "
                                     "signals of different layers, or parameters of different paths")

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Scale a signal, multiply it by a matrix, or scale parameters by constants."""
        first = isinstance(a.value, Signal)
        (x, shape), w = ((a.value, a.shape), b.value) if first else ((b.value, b.shape), a.value)
        if not isinstance(x, Signal):
            if op != "mul":
                raise NotFullyConnectedError(f"the operation '{op}' multiplies parameters before they meet a signal")
            return self.product(x, w)
        if op == "mul":
            return self.scaled(x, w)
        if op == "dot_general":
            (contract_a, contract_b), batch = fn.keywords["dimension_numbers"]  # type: ignore[attr-defined]
            of_x, of_w = (contract_a, contract_b) if first else (contract_b, contract_a)
            free = [n for d, n in enumerate(shape) if d not in of_x]
            if all(len(axes) == 0 for axes in batch) and all(n == 1 for n in free):
                return self.multiplied(x, w, of_x, of_w, lambda tail: (*free, *tail) if first else (*tail, *free))
        raise NotFullyConnectedError(f"the operation '{op}' on operands of shapes {a.shape} and {b.shape} shares "
                                     "parameters between positions")

    def rearranged(self, first: Any, fn: Callable[..., Any], held: list[Any]) -> Any:
        """Move entries of one origin."""
        position = np.asarray(fn(*(jnp.asarray(h.position, dtype=jnp.int32) for h in held)))
        return replace(first, position=position) if isinstance(first, Signal) else Entries(first.table, position)

    def product(self, a: Any, b: Any) -> Any:
        """Scale parameters."""
        return Entries(Product(a, b))

    def scaled(self, x: Any, w: Any) -> Any:
        """Append a layer of one edge to each node."""
        start, entries = np.broadcast_arrays(x.position, w.position)
        index, constant, value = w.table.read(entries.ravel())
        none = np.zeros(start.size)
        layer = DiagonalLayer(start.ravel(), x.nodes, value, constant, np.where(constant != 0, index, -1), none, none,
                              np.full(start.size, -1), none)
        return Signal(np.arange(start.size).reshape(start.shape), start.size, (*x.layers, layer))

    def multiplied(self, x: Any, w: Any, of_x: Sequence[int], of_w: Sequence[int],
                   shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Any:
        """Append a layer of an edge for each entry of a matrix."""
        nodes = np.moveaxis(x.position, of_x, range(len(of_x))).ravel()
        moved = np.moveaxis(w.position, of_w, range(len(of_w)))
        entries = moved.reshape(nodes.size, -1)
        n_out = entries.shape[1]
        index, constant, value = w.table.read(entries)
        index = np.where(constant != 0, index, -1)
        if not (nodes.size == x.nodes and (nodes == np.arange(x.nodes)).all()):
            joined = np.zeros((x.nodes, n_out), np.int32)
            np.add.at(joined, nodes, constant != 0)
            if (joined > 1).any():
                raise NotFullyConnectedError("two edges join the same pair of nodes")
            tables = []
            for table, absent in ((index, -1), (constant, 0), (value, 0)):
                out = np.full((x.nodes, n_out), absent, table.dtype)
                np.maximum.at(out, nodes, table) if absent else np.add.at(out, nodes, table)
                tables.append(out)
            index, constant, value = tables
        none = np.zeros(n_out)
        layer = DenseLayer(value, constant, index, none, none, np.full(n_out, -1), none)
        return Signal(np.arange(n_out).reshape(shape(moved.shape[len(of_w):])), n_out, (*x.layers, layer))

    def biased(self, x: Any, bias: Any) -> Any:
        """Add edges from the constant node to the last layer, or to a new one where some nodes have theirs already."""
        nodes, entries = (p.ravel() for p in np.broadcast_arrays(x.position, bias.position))
        shape = np.broadcast_shapes(x.position.shape, bias.position.shape)
        index, constant, value = bias.table.read(entries)
        trains = index >= 0
        aligned = nodes.size == x.nodes and _distinct(nodes)
        if not (aligned and x.layers and not (trains & (x.layers[-1].bias_constant[nodes] != 0)).any()):
            x = _passed_on(x, nodes, shape)
            nodes = np.arange(nodes.size)
        last = x.layers[-1]
        at, own = nodes[trains], {}
        for name, new in (("bias_value", value), ("bias_constant", constant), ("bias_index", index)):
            own[name] = getattr(last, name).copy()
            own[name][at] = new[trains]
        source = last.source.copy()
        source[nodes[~trains]] += value[~trains] ** 2
        return Signal(nodes.reshape(shape), x.nodes, (*x.layers[:-1], replace(last, source=source, **own)))


class ShapeAlgebra(LayerAlgebra):
    """The same for shapes alone: refuses, before a number is read, whatever refuses itself by operations and shapes."""

    def lift(self, constant: Any) -> Any:
        """Hold nothing of a constant."""
        return _Unread()

    def rearranged(self, first: Any, fn: Callable[..., Any], held: list[Any]) -> Any:
        """Keep the origin."""
        return first

    def product(self, a: Any, b: Any) -> Any:
        """Make new entries."""
        return _Unread()

    def scaled(self, x: Any, w: Any) -> Any:
        """Make a new layer."""
        return _unread_signal()

    def multiplied(self, x: Any, w: Any, *axes: Any) -> Any:
        """Make a new layer."""
        return _unread_signal()

    def biased(self, x: Any, bias: Any) -> Any:
        """Make a new layer."""
        return _unread_signal()


class _Unread:
    """Entries of which nothing is read."""


def _unread_signal() -> Signal:
    return Signal(np.zeros(0, int), 0, tuple([object()]))     # layers of its own, to be told from any others


def _origin(held: Any) -> Any:
    """What rearranged values must share: a signal's layers, parameters' table."""
    if isinstance(held, Signal):
        return held.layers
    return held.table if isinstance(held, Entries) else held


def _passed_on(x: Signal, nodes: np.ndarray, shape: tuple[int, ...]) -> Signal:
    """Append a layer that hands on these nodes."""
    ones, none = np.ones(nodes.size), np.zeros(nodes.size)
    never = np.full(nodes.size, -1)
    layer = DiagonalLayer(nodes, x.nodes, ones, ones, never, none, none, never, none)
    return Signal(np.arange(nodes.size).reshape(shape), nodes.size, (*x.layers, layer))


def _distinct(positions: np.ndarray) -> bool:
    """Whether no position occurs twice."""
    seen = np.zeros(int(positions.max(initial=-1)) + 1, bool)
    seen[positions] = True
    return int(seen.sum()) == positions.size


@automatic_axes
def dense_layers(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *,
                 masks: PyTree | None = None, trainable: Choice = None) -> tuple[DenseLayer, ...]:
    """Read a network as a chain of fully connected layers: dense maps, biases, diagonal scales, frozen BatchNorm.

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        x: (1, *input), the input z of the path polynomial.
        masks: booleans like ``params``; masked edges are absent.
        trainable: which parameters Π differentiates; the others become fixed edges.

    Returns:
        The layers from the input to the output, in float64. Indices count the entries of all leaves in flattening
        order.

    Raises:
        NotFullyConnectedError: the network has a convolution, pooling, a skip connection or shared weights.
        NotPathNetworkError: an operation has no paths.
        ValueError: ``x`` is not a batch of one.

    Source: the layers θ_l of Gebhart, Saxena and Schrater (2021), equation 15.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> (layer,) = dense_layers(lambda w, x: jnp.maximum(x @ w["a"] + w["b"], 0.), w, jnp.ones((1, 3)))
        >>> layer.index.tolist(), layer.bias_index.tolist()
        ([[0, 1], [2, 3], [4, 5]], [6, 7])
    """
    network = read(apply_fn, params, x, masks=masks, trainable=trainable, paths=True)
    x = network.batch(x, "x")
    if x.shape[0] != 1:
        raise ValueError(f"x must be a batch of one, of shape (1, *input), but has shape {x.shape}")
    return tuple(layer.matrices() for layer in network_layers(network, x))


def network_layers(network: Network, x: Array) -> tuple[Layer, ...]:
    """Read the layers of a network that has been read, for one example; elementwise operations take no matrices.

    Raises:
        NotFullyConnectedError: the network is not a chain of layers; most often shapes alone say so.
    """
    params, masks = network.params, network.masks
    interpret(ShapeAlgebra(), network.fn, params, x, lambda i, leaf: _Unread(), lambda z: _unread_signal())
    alive = [True] * len(network.entries) if masks is None else jax.tree.leaves(masks)
    trains = [entry is not None and entry for entry in network.entries]
    offsets = np.cumsum([0, *(int(np.size(leaf)) for leaf in jax.tree.leaves(params))])
    out = interpret(LayerAlgebra(), network.fn, params, x,
                    lambda i, leaf: Entries(Leaf(leaf, trains[i], alive[i], int(offsets[i]))),
                    lambda z: Signal(np.arange(z.size).reshape(z.shape), z.size, ())).value
    if not isinstance(out, Signal):
        raise NotFullyConnectedError("the output does not depend on the input")
    nodes = out.position.ravel()
    if not out.layers or nodes.size != out.nodes or not _distinct(nodes):
        out = _passed_on(out, nodes, out.position.shape)
    seen, count = np.zeros(int(offsets[-1]), bool), 0
    for used in (i[i >= 0] for layer in out.layers for i in (layer.index, layer.bias_index)):
        seen[used], count = True, count + used.size
    if int(seen.sum()) != count:
        raise NotFullyConnectedError("a parameter lies on more than one edge: its edges are tied")
    return out.layers
