"""Pruning: score, keep the best, score what is left, and again. One shot is one step."""

import math
import operator
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, SupportsFloat, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.masks import apply_masks
from pkjax.prune_result import EmptiedLayerWarning, PruneResult, layer_report
from pkjax.schedules import Schedule, exponential
from pkjax.scopes import Scope, global_scope
from pkjax.selection import count_dtype, keep_largest, order_keys
from pkjax.trees import Predicate, check_finite, check_like, is_floating, kernels, leaf_names, select

__all__ = ["ScoreFn", "prune"]

ScoreFn = Callable[[PyTree], PyTree]
"""Maps parameters to scores of the same tree; a higher score is kept."""


def prune(
    score_fn: ScoreFn,
    params: PyTree,
    *,
    compression: SupportsFloat | None = None,
    density: SupportsFloat | None = None,
    steps: SupportsInt = 1,
    schedule: Schedule = exponential,
    scope: Scope = global_scope,
    prunable: Predicate = kernels,
    progress: bool = False,
) -> PruneResult:
    """Choose the weights to keep, in one step or many, by the highest scores.

        kept after step k = round(schedule(k, steps, density) · size)   in every group of ``scope``

    At every step ``score_fn`` sees the parameters with the pruned ones at 0. What is pruned never comes
    back, however low the others score. Equal scores are decided by position: the first in flattening order
    stay. All steps run inside one ``jit``, so ``score_fn`` must be traceable; it is traced once. With
    ``progress`` the steps run one by one, through the same step under ``jit``, with a progress bar.

    Args:
        score_fn: parameters → scores, e.g. ``lambda p: pk.synflow(apply_fn, p, pk.ones_input(shape))``.
        params: the parameters at initialisation.
        compression: ρ ≥ 0, keeps the fraction 10^−ρ. Give this or ``density``.
        density: the fraction to keep, in (0, 1].
        steps: how often to score and prune; 100 for the SynFlow family, 1 for SNIP and GraSP.
        schedule: density after each step, see ``pkjax.schedules``.
        scope: which leaves compete, see ``pkjax.scopes``.
        prunable: which leaves to prune, see ``pkjax.kernels``; masks of the others are all True.
        progress: show a progress bar (needs rich).

    Raises, before anything is computed: ValueError for both or neither of compression and density, for
    values out of range, for a schedule that rises or does not end at the density, where no leaf is
    prunable, where the scores are no tree like the parameters, and for NaN or infinity in the parameters;
    TypeError for what is no number, for traced parameters, and for leaves or scores that are not floating.
    Raises FloatingPointError, naming step and leaf, where scores of weights that are still there are NaN or
    infinite. Warns with ``EmptiedLayerWarning`` where a layer has lost all its weights.

    Source: Tanaka et al. 2020, algorithm 1; Gebhart et al. 2021, appendix.

    >>> import jax.numpy as jnp
    >>> from pkjax.saliency import magnitude
    >>> result = prune(magnitude, {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}, density=0.5)
    >>> result.masks["kernel"].tolist(), result.kept, result.total
    ([[True, False], [False, True]], 2, 4)
    """
    target = _density(compression, density)
    steps = _steps(steps)
    names, chosen = leaf_names(params), _prunable_leaves(params, prunable)
    sizes = [int(np.size(leaf)) for leaf, c in zip(jax.tree.leaves(params), chosen, strict=True) if c]
    groups = _groups(params, chosen, scope)
    counts = _counts(schedule, steps, target, [sum(sizes[i] for i in group) for group in groups])
    step = partial(_step, score_fn, chosen, groups)

    alive = [jnp.ones(jnp.shape(leaf), bool) for leaf, c in zip(jax.tree.leaves(params), chosen, strict=True) if c]
    if progress:
        alive, kept, flags = _run_with_progress(step, params, alive, counts)
    else:
        run = jax.jit(lambda params, alive, counts: jax.lax.scan(partial(step, params), alive, counts))
        alive, reports = run(params, alive, counts)
        kept, flags = jax.device_get(reports)
    names_pruned = [name for name, c in zip(names, chosen, strict=True) if c]
    _raise_bad_scores(flags, names_pruned)

    masks = jax.tree.unflatten(jax.tree.structure(params), _fill(params, chosen, alive))
    layers = tuple(
        layer_report(name, mask.shape, int(k)) for name, mask, k in zip(names_pruned, alive, kept[-1], strict=True)
    )
    emptied = [layer.name for layer in layers if layer.emptied]
    if emptied:
        warnings.warn(
            f"pruning to a density of {target:.3g} left no weight in {len(emptied)} of {len(layers)} layers: "
            f"{', '.join(emptied)}. Prune less, in more steps, or with scope=layer_scope",
            EmptiedLayerWarning,
            stacklevel=2,
        )
    history = tuple(int(k) for k in kept.sum(axis=1))
    return PruneResult(masks=masks, kept=history[-1], total=sum(sizes), layers=layers, history=history)


def _step(
    score_fn: ScoreFn,
    chosen: list[bool],
    groups: list[list[int]],
    params: PyTree,
    alive: list[Array],
    counts: Array,
) -> tuple[list[Array], tuple[Array, Array]]:
    """One round: the masks after it, the weights kept per leaf, and where live scores are NaN or infinite."""
    everything = jax.tree.unflatten(jax.tree.structure(params), _fill(params, chosen, alive))
    scores = score_fn(apply_masks(params, everything))
    check_like(scores, params, "scores")
    leaves = [jnp.asarray(s) for s, c in zip(jax.tree.leaves(scores), chosen, strict=True) if c]
    for leaf in leaves:
        if not is_floating(leaf):
            raise TypeError(f"scores must be floating-point numbers, but score_fn returned {leaf.dtype}")
    nan = jnp.stack([(live & jnp.isnan(s)).any() for live, s in zip(alive, leaves, strict=True)])
    infinite = jnp.stack([(live & jnp.isinf(s)).any() for live, s in zip(alive, leaves, strict=True)])

    keys, kept = order_keys(leaves, alive), list(alive)
    for group, count in zip(groups, counts, strict=True):
        for i, mask in zip(group, keep_largest([keys[i] for i in group], count), strict=True):
            kept[i] = mask
    number = jnp.stack([mask.sum(dtype=count_dtype()) for mask in kept])
    return kept, (number, jnp.stack([nan, infinite]))


def _run_with_progress(
    step: Callable[..., Any], params: PyTree, alive: list[Array], counts: np.ndarray
) -> tuple[list[Array], np.ndarray, np.ndarray]:
    """Take the steps one at a time, showing how far it is; stop at the first bad score."""
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError("prune(progress=True) needs rich: pip install 'pkjax[cli]'") from error
    jitted, kept, flags = jax.jit(step), [], []
    with Progress() as display:
        for row in display.track(counts, description="pruning"):
            alive, (number, bad) = jitted(params, alive, row)
            kept.append(jax.device_get(number))
            flags.append(jax.device_get(bad))
            if flags[-1].any():
                break
    return alive, np.stack(kept), np.stack(flags)


def _density(compression: SupportsFloat | None, density: SupportsFloat | None) -> float:
    """Find the fraction to keep from whichever of the two is given."""
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


def _steps(steps: SupportsInt) -> int:
    try:
        number = operator.index(steps)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"steps must be an integer, but got {steps!r}") from error
    if number < 1:
        raise ValueError(f"steps must be at least 1, but got {number}")
    return number


def _prunable_leaves(params: PyTree, prunable: Predicate) -> list[bool]:
    """Which leaves to prune, once the parameters have been found fit for it."""
    chosen = jax.tree.leaves(select(prunable, params))
    names, leaves = leaf_names(params), jax.tree.leaves(params)
    for name, leaf, c in zip(names, leaves, chosen, strict=True):
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(f"params leaf {name!r} is traced: prune compiles its own loop, call it outside")
        if c and not is_floating(leaf):
            raise TypeError(
                f"prunable selects the leaf {name!r}, which holds no floating-point numbers but {jnp.result_type(leaf)}"
            )
    total = sum(int(np.size(leaf)) for leaf, c in zip(leaves, chosen, strict=True) if c)
    if total == 0:
        raise ValueError(
            f"prunable selects no weight of params (leaves: {', '.join(names) or 'none'}): pass a "
            "function of (key path, leaf) that is True for the leaves to prune"
        )
    if total > np.iinfo(count_dtype()).max:
        raise ValueError(f"{total} prunable weights are more than {count_dtype()} counts: enable jax_enable_x64")
    check_finite(params, "params")
    return chosen


def _groups(params: PyTree, chosen: list[bool], scope: Scope) -> list[list[int]]:
    """Positions, among the prunable leaves, of those that share a label of ``scope``."""
    with_paths = jax.tree_util.tree_leaves_with_path(params)
    groups: dict[Hashable, list[int]] = {}
    for i, (path, leaf) in enumerate(pair for pair, c in zip(with_paths, chosen, strict=True) if c):
        groups.setdefault(scope(path, leaf), []).append(i)
    return list(groups.values())


def _counts(schedule: Schedule, steps: int, density: float, sizes: list[int]) -> np.ndarray:
    """Weights to keep after each step in each group: (steps, groups)."""
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
    return np.array([[round(d * size) for size in sizes] for d in densities], count_dtype())


def _fill(params: PyTree, chosen: list[bool], alive: Any) -> list[Array]:
    """Masks of all leaves: those of the prunable leaves as given, True for the others."""
    given = iter(alive)
    return [
        next(given) if c else jnp.ones(jnp.shape(leaf), bool)
        for leaf, c in zip(jax.tree.leaves(params), chosen, strict=True)
    ]


def _raise_bad_scores(flags: np.ndarray, names: list[str]) -> None:
    """Raise for the first step with NaN or infinite scores; flags: (steps, 2, leaves)."""
    bad_steps = np.flatnonzero(flags.any(axis=(1, 2)))
    if bad_steps.size == 0:
        return
    step = int(bad_steps[0])
    nan, infinite = flags[step]
    where = ", ".join(repr(name) for name, bad in zip(names, nan | infinite, strict=True) if bad)
    if nan.any():
        raise FloatingPointError(
            f"scores are NaN at step {step + 1} in {where}: score_fn divides by zero or overflows there; "
            "look at score_fn(params), and pass float64 parameters (jax_enable_x64) if it overflows"
        )
    raise FloatingPointError(
        f"scores are infinite at step {step + 1} in {where}: they overflow their type. Pass float64 "
        "parameters (jax_enable_x64), scale score_fn down, or choose a score that grows less with depth"
    )
