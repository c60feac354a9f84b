"""A fully connected network as its chain of layers of edges."""

from dataclasses import dataclass

import numpy as np

__all__ = ["DenseLayer"]


@dataclass(frozen=True)
class DenseLayer:
    """One layer of edges of a fully connected network, between ``n_in`` nodes and ``n_out`` nodes.

    An edge carries the factor ``value = c · θ``: a fixed constant times a parameter, or the constant alone. A bias is an
    edge from a constant node of flow 1. Diagonal layers (a frozen BatchNorm scale) are square matrices whose
    off-diagonal entries are no edges.
    """

    value: np.ndarray
    """(n_in, n_out) float64: ``c · θ``, signed; 0 where there is no edge."""
    constant: np.ndarray
    """(n_in, n_out) float64: ``c``; 0 where there is no edge."""
    index: np.ndarray
    """(n_in, n_out) integer: the position of θ among the flattened parameters; -1 where nothing trains (a fixed edge,
    or no edge)."""
    bias_value: np.ndarray
    """(n_out,) float64: ``value`` of the edge from the constant node."""
    bias_constant: np.ndarray
    """(n_out,) float64: ``constant`` of the edge from the constant node."""
    bias_index: np.ndarray
    """(n_out,) integer: ``index`` of the edge from the constant node."""
    source: np.ndarray
    """(n_out,) float64, at least 0: energy that joins the forward flow from elsewhere, such as the square of a frozen
    BatchNorm's mean."""
