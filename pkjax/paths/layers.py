"""Layers of edges between the nodes of a fully connected network."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer, Shaped

from pkjax import tables

__all__ = ["DenseLayer", "DiagonalLayer", "Layer"]


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One layer of edges of a fully connected network, between ``n_in`` nodes and ``n_out`` nodes.

    An edge carries the factor ``value = c · θ``: a fixed constant times a parameter, or the constant alone. A bias is
    an edge from a constant node of flow 1. Diagonal layers (a frozen BatchNorm scale) are square matrices whose
    off-diagonal entries are not edges. Returned by ``dense_layers``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax.paths import dense_layers
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


    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of nodes (n_in, n_out)."""
        return self.value.shape

    @property
    def fixed(self) -> bool:
        """Whether nothing trains."""
        return not ((self.index >= 0).any() or (self.bias_index >= 0).any())

    def forward(self, energy: Shaped[np.ndarray, " n_in"]) -> Shaped[np.ndarray, " n_out"]:
        """Energies of the nodes behind the layer, from those of the nodes before it."""
        return energy @ self.value**2 + self.bias_value**2 + self.source

    def backward(self, energy: Shaped[np.ndarray, " n_out"]) -> Shaped[np.ndarray, " n_in"]:
        """Energies of the nodes before the layer, from those of the nodes behind it."""
        return self.value**2 @ energy

    def at_tails(self, nodes: Shaped[np.ndarray, " n_in"]) -> Shaped[np.ndarray, "..."]:
        """What the nodes before the layer hold, at each edge."""
        return nodes[:, None]

    def at_heads(self, nodes: Shaped[np.ndarray, " n_out"]) -> Shaped[np.ndarray, "..."]:
        """What the nodes behind the layer hold, at each edge."""
        return nodes

    def matrices(self) -> "DenseLayer":
        """The layer with an entry for every pair of nodes."""
        return self


@dataclass(frozen=True, eq=False)
class DiagonalLayer:
    """A layer of one edge to each of its ``n_out`` nodes: an elementwise operation, which needs no matrix.

    Fields are those of ``DenseLayer``, of the edge to each node.
    """

    start: np.ndarray
    """The node that the edge comes from."""
    nodes: int
    """n_in."""
    value: np.ndarray
    constant: np.ndarray
    index: np.ndarray
    bias_value: np.ndarray
    bias_constant: np.ndarray
    bias_index: np.ndarray
    source: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of nodes (n_in, n_out)."""
        return self.nodes, len(self.start)

    @property
    def fixed(self) -> bool:
        """Whether nothing trains."""
        return not ((self.index >= 0).any() or (self.bias_index >= 0).any())

    def forward(self, energy: Shaped[np.ndarray, " n_in"]) -> Shaped[np.ndarray, " n_out"]:
        """Energies of the nodes behind the layer, from those of the nodes before it."""
        return energy[self.start] * self.value**2 + self.bias_value**2 + self.source

    def backward(self, energy: Shaped[np.ndarray, " n_out"]) -> Shaped[np.ndarray, " n_in"]:
        """Energies of the nodes before the layer, from those of the nodes behind it."""
        return np.bincount(self.start, self.value**2 * energy, self.nodes)

    def at_tails(self, nodes: Shaped[np.ndarray, " n_in"]) -> Shaped[np.ndarray, "..."]:
        """What the nodes before the layer hold, at each edge."""
        return nodes[self.start]

    def at_heads(self, nodes: Shaped[np.ndarray, " n_out"]) -> Shaped[np.ndarray, "..."]:
        """What the nodes behind the layer hold, at each edge."""
        return nodes

    def matrices(self) -> DenseLayer:
        """The layer with an entry for every pair of nodes."""
        def matrix(entries: np.ndarray, absent: int | float) -> np.ndarray:
            out = np.full(self.shape, absent, entries.dtype)
            out[self.start, np.arange(len(self.start))] = entries
            return out

        return DenseLayer(matrix(self.value, 0), matrix(self.constant, 0), matrix(self.index, -1), self.bias_value,
                          self.bias_constant, self.bias_index, self.source)


Layer = DenseLayer | DiagonalLayer
