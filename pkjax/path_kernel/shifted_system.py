"""``G − λI`` of a fully connected network as a symmetric system on its nodes, the parameters eliminated.

Every parameter whose d differs from λ is eliminated by dividing by d − λ. A parameter whose d nearly equals λ stays an
unknown of the system ("near"), so that λ may lie on d itself.
"""

from dataclasses import dataclass

import numpy as np

from pkjax.path_kernel.dense_gram import EdgeChain

__all__ = ["NEAR", "ShiftedSystem", "nearness", "shifted_system"]

NEAR = 1e-7
"""Relative distance of d from λ below which a parameter is near."""

_MOST_NEAR = 1500


@dataclass(frozen=True, eq=False)
class ShiftedSystem:
    """``G − λI`` on the near unknowns and on two variables, μ and b, for each node of the hidden layers."""

    widths: tuple[int, ...]        # nodes of the hidden layers
    offsets: tuple[int, ...]       # where a hidden layer's variables (μ, then b) start
    diagonal: np.ndarray           # (node variables,)
    links: tuple[np.ndarray, ...]  # (n_h, n_h+1) coupling of b with the next layer's μ
    near: np.ndarray               # (e,) d − λ of the near unknowns
    near_columns: np.ndarray       # (e, 2) the node variables that each couples to; the second has the later layer
    near_couplings: np.ndarray     # (e, 2)
    near_layer: np.ndarray         # (e,) the hidden layer of the second
    negative: int                  # number of negative d − λ among the eliminated parameters

    def near_of(self, h: int) -> np.ndarray:
        """Return the indices of the near unknowns whose later layer is h."""
        return np.flatnonzero(self.near_layer == h)

    def add_near(self, block: np.ndarray, h: int) -> None:
        """Add the near unknowns of layer h to its block on (near unknowns, μ), in variables where only μ meets b."""
        mine = self.near_of(h)
        e, n, start = len(mine), self.widths[h], self.offsets[h]
        near, local, couplings = np.arange(e), self.near_columns[mine, 1] - start, self.near_couplings[mine, 1]
        block[near, near] += self.near[mine]
        to_mu, to_b = local < n, local >= n
        block[near[to_mu], e + local[to_mu]] += couplings[to_mu]
        block[e + local[to_mu], near[to_mu]] += couplings[to_mu]
        if to_b.any():
            f = np.zeros((n, e))
            f[local[to_b] - n, near[to_b]] = -couplings[to_b]
            mixed = block[:e, e:] @ f
            across = f.T @ block[e:, e:]
            block[:e, :e] += across @ f - mixed - mixed.T
            block[:e, e:] -= across
            block[e:, :e] = block[:e, e:].T

    def ahead(self, h: int) -> np.ndarray:
        """Return the coupling of layer h's b with the next block's near unknowns and μ: (n, e + n_next)."""
        n, first = self.widths[h], self.offsets[h] + self.widths[h]
        if h + 1 == len(self.widths):
            return np.zeros((n, 0))
        mine = self.near_of(h + 1)
        extra = np.zeros((n, len(mine)))
        tail = self.near_columns[mine, 0] - first
        here = (tail >= 0) & (tail < n)
        extra[tail[here], np.flatnonzero(here)] = self.near_couplings[mine[here], 0]
        return np.concatenate([extra, self.links[h]], axis=1)

    def matrix(self) -> np.ndarray:
        """Return the whole system as one dense matrix: near unknowns, then the node variables."""
        e = len(self.near)
        whole = np.diag(np.concatenate([self.near, self.diagonal]))
        rows = np.arange(e)
        for side in range(2):
            columns = e + self.near_columns[:, side]
            whole[rows, columns] += self.near_couplings[:, side]
            whole[columns, rows] += self.near_couplings[:, side]
        for h, n in enumerate(self.widths):
            mu, b = e + self.offsets[h] + np.arange(n), e + self.offsets[h] + n + np.arange(n)
            whole[mu, b] = whole[b, mu] = -1
            if h + 1 < len(self.widths):
                following = e + self.offsets[h + 1] + np.arange(self.widths[h + 1])
                whole[np.ix_(b, following)] = self.links[h]
                whole[np.ix_(following, b)] = self.links[h].T
        return whole


def nearness(chain: EdgeChain, shift: float) -> float:
    """Return the distance from the shift below which a parameter is near, so that few enough are."""
    width = NEAR * shift
    every_d = [chain.single_d, *(layer.d for layer in chain.inner)]
    if sum(int(np.count_nonzero(np.abs(d - shift) < width)) for d in every_d) <= _MOST_NEAR:
        return width
    return float(np.partition(np.abs(chain.d - shift), _MOST_NEAR)[_MOST_NEAR])


def shifted_system(chain: EdgeChain, shift: float, width: float) -> ShiftedSystem:
    """Eliminate every parameter whose d is at least ``width`` away from the shift."""
    column, norm = chain.bundles.column[chain.single], chain.bundles.norm[chain.single]
    d = chain.single_d - shift
    near = np.abs(d) < width
    far = ~near
    diagonal = np.bincount(column[far], -(norm[far] ** 2) / d[far], minlength=chain.offsets[-1]).astype(np.float64)
    negative = int((d[far] < 0).sum())
    layer = np.searchsorted(np.asarray(chain.offsets), column[near], "right") - 1
    kept = [(d[near], np.stack([column[near]] * 2, 1), np.stack([0 * norm[near], norm[near]], 1), layer)]
    links = []
    for h, inner in enumerate(chain.inner):
        d = inner.d - shift
        near = np.abs(d) < width
        near &= inner.trained
        with np.errstate(divide="ignore"):
            inverse = np.divide(1.0, d, out=d)
        whole = bool(inner.trained.all()) and not near.any()
        if not whole:
            fixed = ~inner.trained | near
            i, j = np.nonzero(near)
            distances = inner.d[i, j] - shift
            inverse[fixed] = 0.0
        negative += int(np.count_nonzero(inverse < 0))
        inverse *= inner.energy
        b, mu = chain.offsets[h] + chain.widths[h], chain.offsets[h + 1]
        tails, heads = inner.squares(inverse)
        diagonal[b : b + len(tails)] -= tails
        diagonal[mu : mu + len(heads)] -= heads
        link = np.multiply(inverse, -shift, out=inverse)
        if not whole:
            link[fixed] = inner.energy[fixed]
            kept.append((distances, np.stack([b + i, mu + j], 1), np.stack(inner.couplings(i, j), 1),
                         np.full(len(i), h + 1)))
        links.append(link)
    values, columns, couplings, layers = (np.concatenate(part) for part in zip(*kept, strict=True))
    return ShiftedSystem(chain.widths, chain.offsets, diagonal, tuple(links), values, columns, couplings, layers,
                         negative)
