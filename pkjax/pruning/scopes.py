"""Which weights compete with which for a place in the pruned network, and how many places each group has.

A scope is a function (key path, leaf) → label. Prunable leaves with equal labels form one group, and every
group keeps ``round(density · size of the group)`` weights. A scope with an attribute ``densities`` sets the
density of every group itself (see ``DensityScope``); ``apportion`` then turns densities into counts.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Densities", "DensityScope", "Scope", "apportion", "erk_densities", "erk_scope", "global_scope",
           "layer_scope"]

Scope = Callable[[tuple[Any, ...], Any], Hashable]
"""Maps (key path, leaf) to the label of the group in which the leaf's weights compete."""

Densities = Callable[[Sequence[tuple[int, ...]], float], list[float]]
"""Maps (shapes of the prunable leaves in flattening order, density of the whole) to a density for each group.

The groups stand in the order in which their first leaves do.
"""


def global_scope(path: tuple[Any, ...], leaf: Any) -> Hashable:
    """All prunable weights compete with each other: one threshold for the whole network.

    Source: Gebhart, Saxena and Schrater (2021), appendix A.4.1: "globally across the network".

    Examples:
        >>> global_scope((), 0.0) == global_scope((1,), 1.0)
        True
    """
    return "all"


def layer_scope(path: tuple[Any, ...], leaf: Any) -> Hashable:
    """Each prunable leaf keeps the same fraction of its own weights: one threshold per layer.

    The literature on sparse training calls these densities "uniform".

    Source: Evci et al. 2020 (RigL), section 3, item 1.

    Examples:
        >>> from jax.tree_util import DictKey
        >>> layer_scope((DictKey("first"),), 0.0) == layer_scope((DictKey("last"),), 0.0)
        False
    """
    return path


@dataclass(frozen=True)
class DensityScope:
    """A scope that also sets how dense each of its groups becomes.

    Examples:
        >>> halves = DensityScope(lambda path, leaf: path[0].key, lambda shapes, density: [density] * len(shapes))
        >>> halves.densities([(3, 2), (2, 4)], 0.5)
        [0.5, 0.5]
    """

    label: Scope
    """The scope."""
    densities: Densities
    """The densities of its groups; weighted by the groups' sizes they must average to the density asked."""

    def __call__(self, path: tuple[Any, ...], leaf: Any) -> Hashable:
        """Label of the group in which the leaf's weights compete."""
        return self.label(path, leaf)


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float | int) -> list[float]:
    """Erdős–Rényi–Kernel densities: a layer is the sparser, the more weights it has for its axes' lengths.

        d_l = min(1, ε · Σ shape_l / Π shape_l),   ε such that Σ_l d_l n_l = density · Σ_l n_l,   n_l = Π shape_l

    For a dense layer that is the Erdős–Rényi density ε (n_in + n_out) / (n_in n_out); for a convolution the kernel's
    height and width join the sum and the product. ε is found in closed form: layers reach density 1 in the order of
    n_l / Σ shape_l, and where the next one would not, ε is what remains of the weights over what remains of
    the sums. A leaf without axes counts as one of shape (1,), and one without entries has density 1.

    Raises ValueError where density is outside (0, 1].

    Source: Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL), section 3, item 1.

    Examples:
        >>> erk_densities([(10, 10), (10, 30)], 0.25)
        [0.3333333333333333, 0.2222222222222222]
        >>> erk_densities([(10, 10), (10, 1)], 0.5)
        [0.45, 1.0]
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], but got {density}")
    sizes = [math.prod(shape) for shape in shapes]
    sums = [max(sum(shape), 1) for shape in shapes]
    order = sorted(range(len(shapes)), key=lambda i: sizes[i] / sums[i])
    weights, spread = density * sum(sizes), sum(sums)
    densities = [1.0] * len(shapes)
    for place, i in enumerate(order):
        if weights * sums[i] < sizes[i] * spread:
            for j in order[place:]:
                densities[j] = min(1.0, weights * sums[j] / (spread * sizes[j]))
            break
        weights, spread = weights - sizes[i], spread - sums[i]
    return densities


erk_scope = DensityScope(layer_scope, erk_densities)
"""Each prunable leaf keeps its own share of its weights, larger in small layers: see ``erk_densities``."""


def apportion(
    densities: Sequence[float | int],
    sizes: Sequence[int],
    total: int,
    *,
    at_least: Sequence[int] | None = None,
) -> list[int]:
    """Share out places among groups by the largest remainder: whole numbers that add up to ``total`` exactly.

        count_g = ⌊d_g n_g⌋ or ⌈d_g n_g⌉, between 0 and n_g; of equal remainders the first is rounded up

    With ``at_least`` no count falls below its bound: pruning in steps passes there the counts of the step after,
    counting back from the last, so that no group has to grow from step to step.

    Raises ValueError where a density is outside [0, 1], where Σ d_g n_g is 1 or more away from the total, and
    where the bounds are outside of 0 … n_g or add up to more than the total.

    Examples:
        >>> apportion([0.5, 0.5, 0.5], [3, 3, 4], 5)
        [2, 1, 2]
    """
    lower = [0] * len(sizes) if at_least is None else list(at_least)
    for d, n, low in zip(densities, sizes, lower, strict=True):
        if not 0.0 <= d <= 1.0:
            raise ValueError(f"densities must lie in [0, 1], but one is {d}")
        if not 0 <= low <= n:
            raise ValueError(f"at_least must lie between 0 and the group's size {n}, but one bound is {low}")
    quotas = [d * n for d, n in zip(densities, sizes, strict=True)]
    if not abs(math.fsum(quotas) - total) < 1.0:
        raise ValueError(f"the densities keep {math.fsum(quotas)} of {sum(sizes)} weights, not {total}")
    if sum(lower) > total:
        raise ValueError(f"at_least adds up to {sum(lower)}, more than the total of {total}")
    counts = [max(math.ceil(q), low) for q, low in zip(quotas, lower, strict=True)]
    while surplus := sum(counts) - total:
        # Rounded up, the counts are too many: those furthest above their quota give one back, the last first.
        above = [i for i, low in enumerate(lower) if counts[i] > low]
        above.sort(key=lambda i: (counts[i] - quotas[i], i), reverse=True)
        for i in above[:surplus]:
            counts[i] -= 1
    return counts
