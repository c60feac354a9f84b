"""The path kernel's dual Gram of a fully connected network as a sparse saddle-point system.

With ``a`` the forward flow of energy, ``β`` the backward flow and ``d_e = c² a β`` of an edge e from node i to node j,
``G = diag(d) − C K⁻¹ Cᵀ``: C has two entries a row, ``c v β_j`` for node i and ``c v a_i`` for node j (v the edge's
value), and K couples a node's two variables with each other (−1) and with those of the next layer (v²).

One-sided edges come out first: an edge of value zero is an eigenvector by itself, and n parallel edges with one common
d (all the weights of a first-layer unit; a last-layer unit's) are n − 1 trivial eigenvectors and one edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pkjax.paths.layers import Layer

__all__ = ["Bundles", "EdgeChain", "Inner", "build", "gather", "lift", "lift_isolated", "matmul", "scatter"]


@dataclass(frozen=True, eq=False)
class Bundles:
    """Groups of parallel edges: entries ``start[g]:start[g + 1]`` of ``index`` and ``coupling`` belong to group g."""

    index: np.ndarray     # (edges,) positions among the flattened parameters
    coupling: np.ndarray  # (edges,) couplings to the group's node
    start: np.ndarray     # (groups + 1,)
    d: np.ndarray         # (groups,)
    norm: np.ndarray      # (groups,) length of the group's coupling
    column: np.ndarray    # (groups,) the node variable that it couples to; -1 for none


@dataclass(frozen=True, eq=False)
class Inner:
    """The edges between two hidden layers, as (n_in, n_out) matrices, and the flows at their two ends."""

    d: np.ndarray                # c² a β
    value: np.ndarray            # v
    energy: np.ndarray           # v², in the gauge of the two ends
    constant: np.ndarray | None  # c; None where it is 1 for all
    trained: np.ndarray          # bool: the edge is an unknown of its own
    index: np.ndarray            # position among the flattened parameters
    a: np.ndarray                # (n_in,) the forward flow
    beta: np.ndarray             # (n_out,) the backward flow
    tail: np.ndarray             # (n_in,) gauge
    head: np.ndarray             # (n_out,) gauge

    def couplings(self, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the edges from i to j: to the tail's variable b, c v β, and to the head's variable μ, c v a."""
        v = self.value[i, j] if self.constant is None else self.value[i, j] * self.constant[i, j]
        return v * (self.beta[j] * self.tail[i]), v * (self.a[i] / self.head[j])

    def squares(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of weights × energy times squared couplings: over the edges of a tail, and over those of a head.

        The weights hold the energy already: (coupling to b)² is energy · c² β² · tail · head.
        """
        w = weights if self.constant is None else weights * self.constant**2
        return self.tail * (w @ (self.beta**2 * self.head)), (self.a**2 / self.tail) @ w / self.head


@dataclass(frozen=True, eq=False)
class EdgeChain:
    """A fully connected network's dual Gram without its trivial eigenvectors."""

    widths: tuple[int, ...]      # nodes of the hidden layers
    offsets: tuple[int, ...]     # where a hidden layer's variables (μ, then b) start
    bundles: Bundles             # all one-sided edges
    isolated: np.ndarray         # the trivial eigenvalues, in the order that ``lift_isolated`` counts in
    isolated_group: np.ndarray   # the group of each
    isolated_rank: np.ndarray    # which of the group's vectors it is
    single: np.ndarray           # groups that stay as one unknown each
    inner: tuple[Inner, ...]

    @property
    def single_d(self) -> np.ndarray:
        """The unknowns that are groups come first: ``d`` of those."""
        return self.bundles.d[self.single]

    @cached_property
    def size(self) -> int:
        """Number of unknowns left."""
        return len(self.single) + sum(int(layer.trained.sum()) for layer in self.inner)

    @cached_property
    def d(self) -> np.ndarray:
        """(unknowns,) d of every unknown."""
        return np.concatenate([self.single_d, *(layer.d[layer.trained] for layer in self.inner)])

    @cached_property
    def coupling(self) -> Any:
        """C, (unknowns, node variables), in scipy's CSR."""
        from scipy import sparse

        size = len(self.single)
        rows, columns = [np.arange(size)], [self.bundles.column[self.single]]
        entries = [self.bundles.norm[self.single]]
        for h, layer in enumerate(self.inner):
            i, j = np.nonzero(layer.trained)
            row = size + np.arange(len(i))
            size += len(i)
            rows += [row, row]
            columns += [self.offsets[h] + self.widths[h] + i, self.offsets[h + 1] + j]
            entries += layer.couplings(i, j)
        where = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_array((np.concatenate(entries), where), shape=(size, self.offsets[-1]))


def build(layers: Sequence[Layer], inputs: np.ndarray | None = None) -> EdgeChain:
    """Assemble the chain from the layers of a network.

    Raises:
        ValueError: the layers do not fit together, or hold numbers that are not finite.
    """
    layers, z, outward = _trim(layers, inputs)
    forward, backward = _flows(layers, z, outward)
    last = len(layers) - 1
    widths = tuple(len(a) for a in forward[1:-1])
    offsets = tuple(int(o) for o in 2 * np.cumsum((0, *widths)))
    # Scaling b_i by g and μ_i by 1/g is a congruence; this g makes both couplings of an edge alike.
    gauge = [np.sqrt(_positive(a) / _positive(b)) for a, b in zip(forward, backward, strict=True)]
    groups: list[tuple[np.ndarray, ...]] = []
    inner = []
    for l, layer in enumerate(layers):
        if 0 < l < last:
            layer = layer.matrices()
        a, beta = forward[l], backward[l + 1]
        trains = layer.index >= 0
        d = layer.constant**2 * layer.at_tails(a) * layer.at_heads(beta)
        column = np.full(trains.shape, -1)
        one_sided = trains & (layer.value == 0)
        if last == 0:
            one_sided, coupling = trains, np.zeros_like(d)
        elif l == 0:
            coupling = layer.constant * layer.value * layer.at_tails(a) / layer.at_heads(gauge[l + 1])
            one_sided = trains
            column += 1 + offsets[0] + layer.at_heads(np.arange(widths[0]))
        elif l == last:
            coupling = layer.constant * layer.value * layer.at_heads(beta) * layer.at_tails(gauge[l])
            one_sided = trains
            column += 1 + offsets[l - 1] + widths[l - 1] + layer.at_tails(np.arange(widths[l - 1]))
        else:
            coupling = np.zeros_like(d)
            energy = layer.value**2 * gauge[l][:, None] / gauge[l + 1]
            inner.append(Inner(d, layer.value, energy, None if (layer.constant == 1).all() else layer.constant,
                               trains & ~one_sided, layer.index, a, beta, gauge[l], gauge[l + 1]))
        groups.append(tuple(t[one_sided] for t in (layer.index, coupling, d, column)))
        b_trains = layer.bias_index >= 0
        b_coupling = layer.bias_constant * layer.bias_value / gauge[l + 1]
        b_column = np.full(len(b_trains), -1) if l == last else offsets[l] + np.arange(widths[l])
        b_coupling = np.zeros_like(b_coupling) if l == last else b_coupling
        b_d = layer.bias_constant**2 * beta
        groups.append(tuple(t[b_trains] for t in (layer.bias_index, b_coupling, b_d, b_column)))
    bundles = _bundle(*(np.concatenate(parts) for parts in zip(*groups, strict=True)))
    return _assemble(widths, offsets, bundles, tuple(inner))


def _trim(layers: Sequence[Layer], inputs: np.ndarray | None
          ) -> tuple[list[Layer], np.ndarray, np.ndarray]:
    """Fold leading and trailing layers in which nothing trains into the energies at the two ends."""
    if not layers:
        raise ValueError("layers is empty: a network has at least one layer")
    for l, layer in enumerate(layers):
        if l and layer.shape[0] != layers[l - 1].shape[1]:
            raise ValueError(f"layer {l} has {layer.shape[0]} inputs, but the layer before has "
                             f"{layers[l - 1].shape[1]} outputs")
        for name in ("value", "constant", "bias_value", "bias_constant", "source"):
            if not np.isfinite(getattr(layer, name)).all():
                raise ValueError(f"layer {l} holds NaN or infinity in its {name}")
    layers = list(layers)
    width = layers[0].shape[0]
    z = np.ones(width) if inputs is None else np.asarray(inputs, np.float64)
    if z.shape != (width,) or not (z >= 0).all() or not np.isfinite(z).all():
        raise ValueError(f"inputs must be {width} finite numbers >= 0, one for every input of the first layer")
    outward = np.ones(layers[-1].shape[1])
    while len(layers) > 1 and layers[0].fixed:
        z = layers.pop(0).forward(z)
    while len(layers) > 1 and layers[-1].fixed:
        outward = layers.pop().backward(outward)
    return layers, z, outward


def _flows(layers: Sequence[Layer], z: np.ndarray, outward: np.ndarray
           ) -> tuple[list[np.ndarray], list[np.ndarray]]:
    forward, backward = [z], [outward]
    for layer in layers:
        forward.append(layer.forward(forward[-1]))
    for layer in reversed(layers):
        backward.append(layer.backward(backward[-1]))
    return forward, backward[::-1]


def _positive(flow: np.ndarray) -> np.ndarray:
    live = flow[flow > 0]
    return np.where(flow > 0, flow, live.mean() if live.size else 1.0)


def _bundle(index: np.ndarray, coupling: np.ndarray, d: np.ndarray, column: np.ndarray) -> Bundles:
    # An edge without coupling is an eigenvector whatever its d: each stands alone.
    column = np.where(coupling == 0, -1, column)
    order = np.lexsort((d, column))
    index, coupling, d, column = index[order], coupling[order], d[order], column[order]
    new = np.ones(len(d), bool)
    new[1:] = (column[1:] != column[:-1]) | (d[1:] != d[:-1])
    start = np.append(np.flatnonzero(new), len(d)).astype(np.intp)
    norm = np.sqrt(np.add.reduceat(coupling**2, start[:-1])) if len(d) else np.zeros(0)
    return Bundles(index, coupling, start, d[start[:-1]], norm, column[start[:-1]])


def _assemble(widths: tuple[int, ...], offsets: tuple[int, ...], bundles: Bundles, inner: tuple[Inner, ...]
              ) -> EdgeChain:
    single = np.flatnonzero(bundles.norm > 0)
    alone = np.diff(bundles.start) - (bundles.norm > 0)
    group = np.repeat(np.arange(len(bundles.d)), alone)
    rank = np.arange(len(group)) - np.repeat(np.cumsum(alone) - alone, alone)
    return EdgeChain(widths, offsets, bundles, bundles.d[group], group, rank, single, inner)


def matmul(chain: EdgeChain, u: np.ndarray) -> np.ndarray:
    """Multiply the dual Gram without its trivial eigenvectors with the columns of u (unknowns, columns)."""
    flow = gather(chain, u)
    w = np.empty_like(flow)
    b: Any = None
    for h in range(len(chain.widths)):
        mu_rows, b_rows = _rows(chain, h)
        b = flow[mu_rows] + (chain.inner[h - 1].energy.T @ b if h else 0)
        w[b_rows] = b
    mu: Any = None
    for h in reversed(range(len(chain.widths))):
        mu_rows, b_rows = _rows(chain, h)
        mu = flow[b_rows] + (chain.inner[h].energy @ mu if h + 1 < len(chain.widths) else 0)
        w[mu_rows] = mu
    out = scatter(chain, w)
    for column, image in zip(u.T, out.T, strict=True):
        image += chain.d * column
    return out


def gather(chain: EdgeChain, u: np.ndarray) -> np.ndarray:
    """Cᵀ u for the columns of u, (node variables, columns): one at a time, for which scipy is several times faster."""
    out = np.empty((chain.offsets[-1], u.shape[1]), order="F")
    for column, flow in zip(u.T, out.T, strict=True):
        flow[:] = chain.coupling.T @ column
    return out


def scatter(chain: EdgeChain, w: np.ndarray) -> np.ndarray:
    """C w for the columns of w, (unknowns, columns) in the order of columns."""
    out = np.empty((chain.size, w.shape[1]), order="F")
    for column, image in zip(w.T, out.T, strict=True):
        image[:] = chain.coupling @ np.ascontiguousarray(column)
    return out


def _rows(chain: EdgeChain, h: int) -> tuple[slice, slice]:
    start, n = chain.offsets[h], chain.widths[h]
    return slice(start, start + n), slice(start + n, start + 2 * n)


def lift(chain: EdgeChain, u: np.ndarray, size: int) -> np.ndarray:
    """Turn columns of unknowns into rows over all ``size`` parameters: (columns, size)."""
    out = np.zeros((u.shape[1], size))
    bundles = chain.bundles
    unknown = np.full(len(bundles.d), -1)
    unknown[chain.single] = np.arange(len(chain.single))
    group = np.repeat(np.arange(len(bundles.d)), np.diff(bundles.start))
    inside = unknown[group] >= 0
    weight = bundles.coupling[inside] / bundles.norm[group[inside]]
    out[:, bundles.index[inside]] = (u[unknown[group[inside]]] * weight[:, None]).T
    done = len(chain.single)
    for layer in chain.inner:
        index = layer.index[layer.trained]
        out[:, index] = u[done : done + len(index)].T
        done += len(index)
    return out


def lift_isolated(chain: EdgeChain, which: np.ndarray, size: int) -> np.ndarray:
    """The eigenvectors of the eigenvalues ``isolated[which]``, over all ``size`` parameters: (len(which), size)."""
    out = np.zeros((len(which), size))
    bundles = chain.bundles
    for row, n in enumerate(which):
        g, rank = chain.isolated_group[n], chain.isolated_rank[n]
        members = slice(bundles.start[g], bundles.start[g + 1])
        index, w = bundles.index[members], bundles.coupling[members]
        if bundles.norm[g] == 0:
            out[row, index[rank]] = 1
            continue
        # The columns of a Householder reflection that takes w to its first axis, the first column left out.
        v = w / bundles.norm[g]
        v[0] += np.copysign(1.0, v[0])
        out[row, index] = -2 * v * v[rank + 1] / (v @ v)
        out[row, index[rank + 1]] += 1
    return out
