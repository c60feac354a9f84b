"""A fully connected network as its chain of layers of edges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float64, Integer, PyTree, Shaped

from pkjax import tables
from pkjax.network import Network, read
from pkjax.paths.errors import NotFullyConnectedError
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, Choice

__all__ = ["DenseLayer", "dense_layers"]


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One layer of edges of a fully connected network, between ``n_in`` nodes and ``n_out`` nodes.

    An edge carries the factor ``value = c · θ``: a fixed constant times a parameter, or the constant alone. A bias is
    an edge from a constant node of flow 1. Diagonal layers (a frozen BatchNorm scale) are square matrices whose
    off-diagonal entries are not edges. Returned by ``dense_layers``.

    Examples:
        >>> (layer,) = dense_layers(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> layer.value.shape, layer.bias_index.tolist()
        ((3, 2), [-1, -1])
    """

    value: Float64[np.ndarray, "n_in n_out"]
    """``c · θ``, signed; 0 where there is no edge."""
    constant: Float64[np.ndarray, "n_in n_out"]
    """``c``; 0 where there is no edge."""
    index: Integer[np.ndarray, "n_in n_out"]
    """The position of θ among the flattened parameters; -1 where nothing trains (a fixed edge, or no edge)."""
    bias_value: Float64[np.ndarray, "n_out"]
    """``value`` of the edge from the constant node."""
    bias_constant: Float64[np.ndarray, "n_out"]
    """``constant`` of the edge from the constant node."""
    bias_index: Integer[np.ndarray, "n_out"]
    """``index`` of the edge from the constant node."""
    source: Float64[np.ndarray, "n_out"]
    """At least 0: energy that joins the forward flow from elsewhere, such as the square of a frozen
    BatchNorm's mean."""

    __repr__ = tables.brief


@dataclass(frozen=True, eq=False)
class Entries:
    """A constant or parameter array: a position in a table of c·θ for each entry."""

    position: np.ndarray
    index: np.ndarray
    constant: np.ndarray
    value: np.ndarray

    def at(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look up (index, constant, value)."""
        return self.index[position], self.constant[position], self.value[position]


@dataclass(frozen=True, eq=False)
class Signal:
    """A value that depends on the input: the layers so far, and for each entry its node in the last layer."""

    position: np.ndarray
    nodes: int
    layers: tuple[DenseLayer, ...]


REARRANGEMENTS = ("reshape", "transpose", "broadcast_in_dim", "slice", "rev", "squeeze", "expand_dims", "split",
                  "gather", "dynamic_slice", "concatenate")
IDENTITIES = ("convert_element_type", "copy", "copy_p", "reduce_precision", "neg")


class LayerAlgebra:
    """The algebra that reads a network as a chain of fully connected layers."""

    signed = False
    known = False
    natural_max = False

    def lift(self, constant: Any) -> Entries:
        """Tabulate a constant: nothing trains."""
        value = np.asarray(constant, dtype=np.float64).ravel()
        return Entries(np.arange(value.size).reshape(np.shape(constant)), np.full(value.size, -1), value, value)

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
            return self._rearranged(op, fn, held)
        if op in ("add", "sub", "add_any") and len(held) == 2 and isinstance(held[0], Signal) != isinstance(
                held[1], Signal):
            signal, bias = held if isinstance(held[0], Signal) else held[::-1]
            return _with_bias(signal, bias)
        if op == "add" and len(held) == 1:
            return held[0]
        raise NotFullyConnectedError(f"the operation '{op}' on operands of shapes {[s.shape for s in operands]} joins "
                                     "signals of different layers, or parameters of different paths")

    def _rearranged(self, op: str, fn: Callable[..., Any], held: list[Any]) -> Any:
        first = held[0]
        same = all(type(h) is type(first) and (h.layers is first.layers if isinstance(h, Signal) else h is first)
                   for h in held)
        if not same:
            raise NotFullyConnectedError(f"the operation '{op}' joins values of different layers")
        position = np.asarray(fn(*(jnp.asarray(h.position, dtype=jnp.int32) for h in held)))
        return replace(first, position=position)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Scale a signal, multiply it by a matrix, or scale parameters by constants."""
        x, w = (a.value, b.value) if isinstance(a.value, Signal) else (b.value, a.value)
        if isinstance(x, Entries):
            return _product(op, x, w)
        if op == "mul":
            nodes, entries = np.broadcast_arrays(x.position, w.position)
            edges = (nodes.ravel(), np.arange(nodes.size), entries.ravel())
            return _layer(x, w, edges, nodes.shape)
        if op == "dot_general":
            (contract_a, contract_b), batch = fn.keywords["dimension_numbers"]  # type: ignore[attr-defined]
            of_x, of_w = (contract_a, contract_b) if x is a.value else (contract_b, contract_a)
            free = [n for d, n in enumerate(x.position.shape) if d not in of_x]
            if all(len(axes) == 0 for axes in batch) and all(n == 1 for n in free):
                nodes = np.moveaxis(x.position, of_x, range(len(of_x))).ravel()
                matrix = np.moveaxis(w.position, of_w, range(len(of_w)))
                tail = matrix.shape[len(of_w):]
                matrix = matrix.reshape(nodes.size, -1)
                to = np.broadcast_to(np.arange(matrix.shape[1]), matrix.shape)
                start = np.broadcast_to(nodes[:, None], matrix.shape)
                shape = (*free, *tail) if x is a.value else (*tail, *free)
                return _layer(x, w, (start.ravel(), to.ravel(), matrix.ravel()), shape)
        raise NotFullyConnectedError(f"the operation '{op}' on operands of shapes {a.shape} and {b.shape} shares "
                                     "parameters between positions")


def _product(op: str, a: Entries, b: Entries) -> Entries:
    if op != "mul":
        raise NotFullyConnectedError(f"the operation '{op}' multiplies parameters before they meet a signal")
    at_a, at_b = (p.ravel() for p in np.broadcast_arrays(a.position, b.position))
    (index_a, constant_a, value_a), (index_b, constant_b, value_b) = a.at(at_a), b.at(at_b)
    if ((index_a >= 0) & (index_b >= 0)).any():
        raise NotFullyConnectedError("two parameters are multiplied before they meet a signal")
    shape = np.broadcast_shapes(a.position.shape, b.position.shape)
    return Entries(np.arange(at_a.size).reshape(shape), np.maximum(index_a, index_b), constant_a * constant_b,
                   value_a * value_b)


def _layer(x: Signal, w: Entries, edges: tuple[np.ndarray, np.ndarray, np.ndarray], shape: tuple[int, ...]) -> Signal:
    """Append a layer with these edges, each (from node, to node, entry of w)."""
    start, to, entry = edges
    index, constant, value = w.at(entry)
    present = constant != 0
    n_out = int(np.prod(shape))
    start, to = start[present], to[present]
    if not _distinct(start * n_out + to):
        raise NotFullyConnectedError("two edges join the same pair of nodes")

    def matrix(entries: np.ndarray, absent: int | float) -> np.ndarray:
        out = np.full((x.nodes, n_out), absent, entries.dtype)
        out[start, to] = entries[present]
        return out
    none = np.zeros(n_out)
    layer = DenseLayer(matrix(value, 0), matrix(constant, 0), matrix(index, -1), none, none, np.full(n_out, -1), none)
    return Signal(np.arange(n_out).reshape(shape), n_out, (*x.layers, layer))


def _distinct(positions: np.ndarray) -> bool:
    """Whether no position occurs twice."""
    seen = np.zeros(int(positions.max(initial=-1)) + 1, bool)
    seen[positions] = True
    return int(seen.sum()) == positions.size


def _with_bias(x: Signal, bias: Entries) -> Signal:
    """Add edges from the constant node to the last layer, or to a new one where some nodes have theirs already."""
    nodes, entries = (p.ravel() for p in np.broadcast_arrays(x.position, bias.position))
    shape = np.broadcast_shapes(x.position.shape, bias.position.shape)
    index, constant, value = bias.at(entries)
    trains = index >= 0
    aligned = nodes.size == x.nodes and _distinct(nodes)
    if not (aligned and x.layers and not (trains & (x.layers[-1].bias_constant[nodes] != 0)).any()):
        one = Entries(np.zeros((), int), np.array([-1]), np.ones(1), np.ones(1))
        x = _layer(x, one, (nodes, np.arange(nodes.size), np.zeros(nodes.size, int)), shape)
        nodes = np.arange(nodes.size)
    last = x.layers[-1]
    at, own = nodes[trains], {}
    for name, new in (("bias_value", value), ("bias_constant", constant), ("bias_index", index)):
        own[name] = getattr(last, name).copy()
        own[name][at] = new[trains]
    source = last.source.copy()
    source[nodes[~trains]] += value[~trains] ** 2
    return Signal(nodes.reshape(shape), x.nodes, (*x.layers[:-1], replace(last, source=source, **own)))


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
    return network_layers(network, x)


def network_layers(network: Network, x: Array) -> tuple[DenseLayer, ...]:
    """Read the layers of a network that has been read, for one example."""
    params, masks = network.params, network.masks
    leaves = jax.tree.leaves(params)
    trains = [np.broadcast_to(False if e is None else np.asarray(e), np.shape(leaf))
              for e, leaf in zip(network.entries, leaves, strict=True)]
    alive = [True] * len(trains) if masks is None else jax.tree.leaves(masks)
    sizes = [int(np.size(leaf)) for leaf in jax.tree.leaves(params)]
    offsets = np.cumsum([0, *sizes])

    def source(i: int, leaf: Any) -> Entries:
        present = np.broadcast_to(np.asarray(alive[i]), np.shape(leaf)).ravel().astype(np.float64)
        value = np.asarray(leaf, dtype=np.float64).ravel() * present
        learns = np.asarray(trains[i]).ravel()
        index = np.where(learns, offsets[i] + np.arange(sizes[i]), -1)
        # A parameter that does not train is a constant: its edge carries its value.
        return Entries(np.arange(sizes[i]).reshape(np.shape(leaf)), index, np.where(learns, present, value), value)

    out = interpret(LayerAlgebra(), network.fn, params, x, source,
                    lambda z: Signal(np.arange(z.size).reshape(z.shape), z.size, ())).value
    if not isinstance(out, Signal):
        raise NotFullyConnectedError("the output does not depend on the input")
    nodes = out.position.ravel()
    if not out.layers or nodes.size != out.nodes or not _distinct(nodes):
        one = Entries(np.zeros((), int), np.array([-1]), np.ones(1), np.ones(1))
        out = _layer(out, one, (nodes, np.arange(nodes.size), np.zeros(nodes.size, int)), out.position.shape)
    used = np.concatenate([i[i >= 0] for layer in out.layers for i in (layer.index, layer.bias_index)])
    if not _distinct(used):
        raise NotFullyConnectedError("a parameter lies on more than one edge: its edges are tied")
    return out.layers
