"""Which weights compete with which for a place in the pruned network, and how many places each group has.

A scope is a function (key path, leaf) → label. Prunable leaves with equal labels form one group, and every
group keeps ``round(density · size of the group)`` weights. A scope with an attribute ``densities`` sets the
density of every group itself (see ``DensityScope``); ``apportion`` then turns densities into counts. ``n_m_scope``
makes the weights of each block of a leaf compete.
"""

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsInt

__all__ = ["Densities", "DensityScope", "NMScope", "Scope", "apportion", "erk_densities", "erk_scope", "global_scope",
           "layer_scope", "n_m_scope"]

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


@dataclass(frozen=True)
class NMScope:
    """The scope of an N:M pattern, built by ``n_m_scope``."""

    n: int
    """Weights that every block keeps."""
    m: int
    """Weights of a block."""
    axis: int = -2
    """The axis along which blocks lie."""

    def __call__(self, path: tuple[Any, ...], leaf: Any) -> Hashable:
        """Label a leaf by its key path: blocks of different leaves never meet."""
        return path

    def block_counts(self, densities: Sequence[float], shapes: Sequence[tuple[int, ...]],
                     names: Sequence[str]) -> list[int]:
        """How many weights every block keeps after each step.

            max(n, round(d_k m))   for the densities d_k after each step, the last of which is n / m

        Raises ValueError where the last density is not n / m, and where the axis of a leaf does not consist of blocks.
        """
        if not math.isclose(densities[-1], self.n / self.m, rel_tol=1e-9):
            raise ValueError(f"n_m_scope({self.n}, {self.m}) keeps a density of {self.n / self.m:.10g}, but the "
                             f"density asked for is {densities[-1]:.10g}: pass density={self.n} / {self.m}")
        for name, shape in zip(names, shapes, strict=True):
            if not -len(shape) <= self.axis < len(shape):
                raise ValueError(f"n_m_scope has axis={self.axis}, which leaf {name!r} of shape {shape} lacks: choose "
                                 "another axis, or leave the leaf out by prunable")
            if shape[self.axis] % self.m:
                raise ValueError(f"axis {self.axis} of leaf {name!r} has length {shape[self.axis]} (its shape is "
                                 f"{shape}), which is not a multiple of {self.m}: leave the leaf out by prunable")
        return [max(self.n, round(density * self.m)) for density in densities]


def n_m_scope(n: SupportsInt, m: SupportsInt, *, axis: SupportsInt = -2) -> NMScope:
    """Keep n of every m consecutive weights along an axis, as sparse tensor cores read them (2:4).

    The m weights of a block compete with each other alone; of equal scores the first along the axis stays. ``prune``
    must be asked for a density of n / m. With steps, a block keeps max(n, round(d_k m)) weights after step k. A block
    of which ``masks`` leave fewer keeps those.

    Args:
        n: weights to keep in each block.
        m: weights of a block.
        axis: the axis along which blocks lie; −2, the default, is the input axis of kernels (…, in, out), as those of
            Flax and Haiku, dense or convolution; for weights (out, in) it is −1.

    Raises:
        ValueError: not 1 ≤ n ≤ m. ``prune`` raises it where its density is not n / m, and where the length of a leaf's
            axis is not a multiple of m.
        TypeError: n, m or axis is not an integer.

    Source: Mishra et al. 2021 (2:4, arXiv 2104.08378); Zhou et al. 2021 (N:M, arXiv 2102.04010).

    Examples:
        >>> import jax.numpy as jnp
        >>> import pkjax as pk
        >>> params = {"kernel": jnp.array([[3.0], [-1.0], [0.5], [2.0]])}
        >>> pk.prune(pk.magnitude, params, density=0.5, scope=n_m_scope(1, 2)).masks["kernel"].ravel().tolist()
        [True, False, False, True]
    """
    numbers = {}
    for name, value in (("n", n), ("m", m), ("axis", axis)):
        try:
            numbers[name] = operator.index(value)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(f"{name} must be an integer, but got {value!r}") from error
    if not 1 <= numbers["n"] <= numbers["m"]:
        raise ValueError(f"n_m_scope needs 1 ≤ n ≤ m, but got n={n}, m={m}")
    return NMScope(**numbers)


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
