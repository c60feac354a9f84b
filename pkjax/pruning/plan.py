"""What pruning is asked for, checked before anything is computed: which leaves, in which groups, how many each step."""

import math
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsFloat, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.programs.checks import check_some_kept
from pkjax.pruning.prunable import prunable_leaves
from pkjax.pruning.schedules import Schedule
from pkjax.pruning.scopes import NMScope, Scope, apportion
from pkjax.pruning.top_k import count_dtype
from pkjax.trees import Choice, check_finite, check_masks, leaf_names

__all__ = ["Layout", "Plan", "density_asked", "plan_pruning", "whole"]


class Layout(NamedTuple):
    """What the compiled loop depends on; leaves are counted among the prunable ones, in flattening order."""

    chosen: tuple[bool, ...]             # of all leaves, which are prunable
    groups: tuple[tuple[int, ...], ...]  # leaves that compete with each other
    floor: int                           # weights that every leaf keeps at least
    blocks: tuple[int, int] | None       # length and axis of the blocks that compete, where not whole groups do

    def prunable(self, tree: PyTree) -> list[Any]:
        """Take the prunable leaves out of a tree like the parameters."""
        return [leaf for leaf, c in zip(jax.tree.leaves(tree), self.chosen, strict=True) if c]


@dataclass(frozen=True)
class Plan:
    """What one pruning is to do."""

    layout: Layout
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    density: float
    counts: Any                          # (steps, groups) weights to keep, of every block where there are
                                         # blocks; traced where masks are

    @property
    def sizes(self) -> list[int]:
        """Weights of every leaf."""
        return [math.prod(shape) for shape in self.shapes]

def plan_pruning(params: PyTree, compression: SupportsFloat | None, density: SupportsFloat | None, steps: SupportsInt,
                 schedule: Schedule, scope: Scope, prunable: Choice, min_per_layer: SupportsInt,
                 masks: PyTree | None) -> Plan:
    """Check the arguments of ``prune`` and work out what they ask for."""
    check_masks(masks, params)
    check_some_kept(masks, params)
    target, number = density_asked(compression, density), whole("steps", steps, 1)
    floor = whole("min_per_layer", min_per_layer, 0)
    chosen = _checked_leaves(params, prunable)
    pairs = [pair for pair, c in zip(jax.tree_util.tree_leaves_with_path(params), chosen, strict=True) if c]
    shapes = tuple(tuple(np.shape(leaf)) for _, leaf in pairs)
    groups: dict[Hashable, list[int]] = {}
    for i, (path, leaf) in enumerate(pairs):
        groups.setdefault(scope(path, leaf), []).append(i)
    members = tuple(map(tuple, groups.values()))
    names = tuple(name for name, c in zip(leaf_names(params), chosen, strict=True) if c)
    blocks = (scope.m, scope.axis) if isinstance(scope, NMScope) else None
    layout = Layout(tuple(chosen), members, floor, blocks)
    densities = _densities(schedule, number, target)
    if isinstance(scope, NMScope):
        if floor:
            raise ValueError(f"min_per_layer={floor} is not for n_m_scope, which says what every block "
                             "keeps: leave it 0")
        each = np.array(scope.block_counts(densities, shapes, names), count_dtype())
        return Plan(layout, names, shapes, target, np.repeat(each[:, None], len(members), 1))
    asked = _counts(densities, shapes, members, scope)
    present = _present(layout, masks, shapes)
    _check_masks_keep(asked[-1], present, names, members)
    _check_floor(floor, asked[-1], present, members)
    counts: Any = np.array(asked, count_dtype())
    if masks is not None:
        limits = [sum(present[i] for i in group) for group in members]
        numbers = jnp if any(isinstance(n, jax.core.Tracer) for n in present) else np
        counts = numbers.minimum(counts, numbers.stack(limits))
    return Plan(layout, names, shapes, target, counts)


def _present(layout: Layout, masks: PyTree | None, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Weights of every leaf from which pruning goes on."""
    if masks is None:
        return [math.prod(shape) for shape in shapes]
    return [mask.sum(dtype=count_dtype()) if isinstance(mask, jax.core.Tracer) else int(np.asarray(mask).sum())
            for mask in layout.prunable(masks)]


def _check_masks_keep(counts: Sequence[int], present: Sequence[Any], names: Sequence[str],
                      groups: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where masks keep fewer weights than are asked for (traced masks pass)."""
    for group, count in zip(groups, counts, strict=True):
        held = [present[i] for i in group]
        if not any(isinstance(n, jax.core.Tracer) for n in held) and sum(held) < count:
            raise ValueError(f"masks keep {sum(held)} weights of {', '.join(names[i] for i in group)}, fewer than the "
                             f"{count} asked for: what is pruned never comes back. Ask for a lower density (it means "
                             "the fraction of all prunable weights)")


def density_asked(compression: SupportsFloat | None, density: SupportsFloat | None) -> float:
    """Find the fraction to keep from whichever of the two is given.

    Examples:
        >>> density_asked(2, None), density_asked(None, 0.25)
        (0.01, 0.25)
    """
    if (compression is None) == (density is None):
        raise ValueError(
            "give exactly one of compression (keeps 10^-compression) and density (the fraction kept), "
            f"but got compression={compression!r} and density={density!r}"
        )
    name, value = ("density", density) if compression is None else ("compression", compression)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, but got {value!r}") from error
    if name == "density":
        if not 0.0 < number <= 1.0:
            raise ValueError(f"density must lie in (0, 1], but got {number}")
        return number
    if not 0.0 <= number <= 300.0:
        raise ValueError(
            f"compression must be at least 0 (and at most 300), but got {number}: it is the exponent "
            "ρ of the density 10^-ρ that is kept"
        )
    return 10.0**-number


def whole(name: str, value: SupportsInt, least: int) -> int:
    """Read a whole number that must be ``least`` or more.

    Examples:
        >>> whole("steps", 0, 1)
        Traceback (most recent call last):
        ...
        ValueError: steps must be at least 1, but got 0
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, but got {value!r}") from error
    if number < least:
        raise ValueError(f"{name} must be at least {least}, but got {number}")
    return number


def _checked_leaves(params: PyTree, prunable: Choice) -> list[bool]:
    """Say which leaves to prune, once the parameters are checked."""
    chosen = prunable_leaves(params, prunable)
    total = sum(int(np.size(leaf)) for leaf, c in zip(jax.tree.leaves(params), chosen, strict=True) if c)
    if total > np.iinfo(count_dtype()).max:
        raise ValueError(f"{total} prunable weights are more than {count_dtype()} counts: enable jax_enable_x64")
    check_finite(params, "params")
    return chosen


def _densities(schedule: Schedule, steps: int, density: float) -> list[float]:
    """Density after each step."""
    densities = [float(schedule(step, steps, density)) for step in range(1, steps + 1)]
    if not math.isclose(densities[-1], density, rel_tol=1e-9):
        raise ValueError(f"the schedule must end at the density {density}, but ends at {densities[-1]}")
    densities[-1] = density
    for step, (before, after) in enumerate(zip([1.0, *densities], densities, strict=False), start=1):
        if not 0.0 < after <= before:
            raise ValueError(
                f"the schedule must not rise and stay in (0, 1], but goes from {before} to {after} at "
                f"step {step} of {steps}"
            )
    return densities


def _counts(densities: Sequence[float], shapes: Sequence[tuple[int, ...]], groups: Sequence[Sequence[int]],
            scope: Scope) -> tuple[tuple[int, ...], ...]:
    """Weights to keep after each step in each group."""
    sizes = [math.prod(shape) for shape in shapes]
    together = [sum(sizes[i] for i in group) for group in groups]
    allot = getattr(scope, "densities", None)
    if allot is None:
        return tuple(tuple(round(d * size) for size in together) for d in densities)
    counts: list[list[int]] = []
    for density in reversed(densities):
        # Backwards, lest rounding take a weight away from a group and give it back at the next step.
        later = counts[-1] if counts else None
        counts.append(apportion(allot(shapes, density), together, round(density * sum(sizes)), at_least=later))
    return tuple(map(tuple, reversed(counts)))


def _check_floor(floor: int, counts: Sequence[int], present: Sequence[Any], groups: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where min_per_layer asks for more weights than are kept (traced masks pass)."""
    if any(isinstance(n, jax.core.Tracer) for n in present):
        return
    for group, count in zip(groups, counts, strict=True):
        least = sum(min(floor, present[i]) for i in group)
        if least > count:
            raise ValueError(
                f"min_per_layer={floor} keeps at least {least} weights in a group of {len(group)} layers of which "
                f"the density leaves {count}: prune less, or ask for fewer per layer"
            )
