"""PHEW: masks from random walks along paths, biased by the sizes of weights."""

from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree, Shaped

from pkjax.pruning.plan import density_asked
from pkjax.pruning.result import PruneResult, layer_report
from pkjax.pruning.weight_chains import ChainLayer, weight_chain
from pkjax.trees import ApplyFn, check_finite, leaf_names

__all__ = ["phew"]

PATIENCE = 1000
"""Walks in a row that may be too long for the weights that remain."""
HOPELESS = 10**6
"""Walks in a row that may add nothing."""
TINY = float(np.finfo(np.float64).tiny)
AT_ONCE = 2**14
"""Pairs of walks that are drawn at a time."""


def phew(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *, key: Key[Array, ""],
         compression: SupportsFloat | None = None, density: SupportsFloat | None = None) -> PruneResult:
    """Keep the weights on random walks from input to output, biased towards large weights (PHEW).

        P(unit u → weight j) = |θ_j| / Σ |θ_i| over the weights i that leave u   (forward walks)
        P(unit u ← weight j) = |θ_j| / Σ |θ_i| over the weights i that enter u   (backward walks)

    Forward walks begin at an input unit, backward walks at an output unit, each drawn uniformly; the two kinds take
    turns until the weights on walks are as many as asked for. Units are the outputs of dense layers and the channels of
    convolutions, where a walk takes one weight of a kernel; of a dense layer behind a convolution all weights of the
    channel's places leave the channel. The input units are those of the first layer: entries, or channels.

    The count is exact wherever walks are found for it: a walk that would add too many weights is dropped, and after
    1,000 of these in a row fewer weights are kept, by less than the length of a path. Every weight kept lies on a walk
    whose weights are all kept. Walks of convolutions pass channels, not places: in images of a few pixels their weights
    may lead out of the image. Runs outside of ``jit``; the same key gives the same masks.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: the parameters at initialisation. All kernels (``pkjax.kernels``) are pruned, other leaves stay.
        x: an input ``(1, *input)``, for its shape.
        key: a typed key, ``jax.random.key(seed)``.
        compression: ρ ≥ 0, keeps the fraction 10^−ρ. Give this or ``density``.
        density: the fraction of all kernels' weights to keep, in (0, 1].

    Returns:
        The masks, and how many weights are kept in the whole and in each leaf.

    Raises:
        ValueError: the network is not a chain of dense and convolution layers (skip connections and groups are not);
            the density keeps fewer weights than a path has, or more than walks find; all weights at a unit are 0.
        NotPathNetworkError: an operation has no paths.
        TypeError: ``key`` is not a typed key.

    Source: Patil and Dovrolis 2021, section 5. The authors' code takes the units where walks begin in turn, and draws
    the place behind a convolution uniformly.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> net = lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"]
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> result = phew(net, params, jnp.ones((1, 3)), key=jax.random.key(0), density=0.5)
        >>> result.kept, bool((result.masks["a"].any(axis=0) == result.masks["b"].any(axis=1)).all())
        (20, True)
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(f"phew needs a typed key, jax.random.key(seed), but got {key!r}")
    share = density_asked(compression, density)
    check_finite(params, "params")
    chain = weight_chain(apply_fn, params, x)
    names, leaves = leaf_names(params), [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    total = sum(layer.entries.size for layer in chain)
    target = round(share * total)
    if target < len(chain):
        raise ValueError(f"a density of {share:.3g} keeps {target} of {total} weights, fewer than the {len(chain)} of "
                         "one path: prune less")
    walks = _Walks(chain, leaves, names, np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()))
    if target > walks.reachable:
        raise ValueError(f"a density of {share:.3g} keeps {target} of {total} weights, but walks reach only the "
                         f"{walks.reachable} that are not 0 and meet more than padding: prune more")
    kept = _kept(walks, total, target)
    masks = [np.ones(leaf.shape, bool) for leaf in leaves]
    reports, start = {}, 0
    for layer in chain:
        part = kept[start:start + layer.entries.size]
        flat = np.zeros(leaves[layer.leaf].size, bool)
        flat[layer.entries.ravel()[part]] = True
        masks[layer.leaf] = flat.reshape(leaves[layer.leaf].shape)
        reports[layer.leaf] = layer_report(names[layer.leaf], leaves[layer.leaf].shape, int(part.sum()))
        start += layer.entries.size
    count = int(kept.sum())
    return PruneResult(masks=jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(m) for m in masks]),
                       kept=count, total=total, layers=tuple(reports[i] for i in sorted(reports)), history=(count,))


def _kept(walks: "_Walks", total: int, target: int) -> np.ndarray:
    """Say of every weight of the chain whether it lies on a walk, for as many as asked."""
    kept, count, too_long, known = np.zeros(total, bool), 0, 0, 0
    while count < target and too_long < PATIENCE:
        before, pairs = count, int(np.clip((target - count) // (2 * walks.length), 128, AT_ONCE))
        drawn = walks.draw(pairs)
        _, places = np.unique(drawn, return_index=True)         # where each weight first comes
        new = np.zeros(drawn.size, bool)
        new[places] = ~kept[drawn.ravel()[places]]
        reached = count + np.cumsum(new.reshape(drawn.shape).sum(axis=1))
        fit = int(np.searchsorted(reached, target, side="right"))
        if fit:
            kept[drawn[:fit]] = True
            count = int(reached[fit - 1])
        for walk in drawn[fit:]:
            more = int((~kept[walk]).sum())
            if count == target or too_long == PATIENCE:
                break
            if more > target - count:
                too_long += 1
            elif more:
                kept[walk], count, too_long = True, count + more, 0
        known = known + len(drawn) if count == before else 0
        if known > HOPELESS and too_long:
            break
        if known > HOPELESS:
            raise ValueError(f"{known:,} walks in a row met no weight that was not kept already, with {count} of "
                             f"{target} kept: prune more, walks hardly ever take the smallest weights")
    return kept


class _Walks:
    """Random walks along a chain, whose weights are numbered layer by layer."""

    def __init__(self, chain: tuple[ChainLayer, ...], leaves: list[np.ndarray], names: list[str],
                 rng: np.random.Generator) -> None:
        self.length, self.rng = len(chain), rng
        self.steps: list[tuple[_Choices, _Choices, np.ndarray, tuple[int, int, int]]] = []
        self.offsets = np.cumsum([0, *(layer.entries.size for layer in chain)])
        self.reachable = 0
        for layer in chain:
            sizes = np.abs(leaves[layer.leaf].astype(np.float64)).ravel()[layer.entries]
            sizes = np.where((layer.tails >= 0)[:, None, None] & layer.meets, sizes, 0.0)
            self.reachable += int((sizes > 0).sum())
            number = np.arange(sizes.size).reshape(sizes.shape)
            order = np.argsort(layer.tails, kind="stable")
            order = order[layer.tails[order] >= 0]
            lengths = np.bincount(layer.tails[order]) * int(np.prod(sizes.shape[1:]))
            leaving = _Choices(sizes[order].ravel(), number[order].ravel(), lengths)
            entering = _Choices(sizes.swapaxes(0, 1).ravel(), number.swapaxes(0, 1).ravel(),
                                np.full(sizes.shape[1], sizes.shape[0] * sizes.shape[2]))
            for choices, what in ((leaving, "leave"), (entering, "enter")):
                if (empty := np.flatnonzero(choices.sums <= 0)).size:
                    raise ValueError(f"all weights of {names[layer.leaf]!r} that {what} unit {empty[0]} are 0: no walk "
                                     "goes on there; walk along the weights of an initialisation without zeros")
            self.steps.append((leaving, entering, layer.tails, sizes.shape))

    def draw(self, pairs: int) -> np.ndarray:
        """Draw forward and backward walks in turn, (2 · pairs, length) numbers of weights."""
        walks = np.empty((pairs, 2, self.length), np.int64)
        units = self.rng.integers(len(self.steps[0][0].sums), size=pairs)
        for place, (leaving, _, _, shape) in enumerate(self.steps):
            weight = leaving.draw(units, self.rng)
            units = weight // shape[2] % shape[1]
            walks[:, 0, place] = self.offsets[place] + weight
        units = self.rng.integers(self.steps[-1][3][1], size=pairs)
        for place, (_, entering, tails, shape) in reversed([*enumerate(self.steps)]):
            weight = entering.draw(units, self.rng)
            units = tails[weight // (shape[1] * shape[2])]
            walks[:, 1, place] = self.offsets[place] + weight
        return walks.reshape(2 * pairs, self.length)


class _Choices:
    """Weights to choose from at each unit, in proportion to their sizes; those of one unit follow each other."""

    def __init__(self, sizes: np.ndarray, number: np.ndarray, lengths: np.ndarray) -> None:
        self.number = number
        self.sums = np.add.reduceat(sizes, np.cumsum(lengths) - lengths)
        # Every unit has the same share of the whole, however small its weights are.
        self.whole = np.concatenate([[0.0], np.cumsum(sizes / np.repeat(np.maximum(self.sums, TINY), lengths))])
        self.ends = self.whole[np.cumsum(lengths)]
        self.begins = np.concatenate([[0.0], self.ends[:-1]])

    def draw(self, units: Any, rng: np.random.Generator) -> np.ndarray:
        """Draw a weight at each of the units."""
        begin, end = self.begins[units], self.ends[units]
        at = np.minimum(begin + rng.random(len(units)) * (end - begin), np.nextafter(end, 0.0))
        return self.number[np.searchsorted(self.whole, at, side="right") - 1]
