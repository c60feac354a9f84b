"""Pruning: score, keep the best, score what is left, and again. One shot is one step."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, SupportsFloat, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.pruning.masks import apply_masks
from pkjax.pruning.plan import Layout, Plan, plan_pruning
from pkjax.pruning.result import EmptiedLayerWarning, PruneResult, layer_report
from pkjax.pruning.schedules import Schedule, exponential
from pkjax.pruning.scopes import Scope, global_scope
from pkjax.pruning.top_k import count_dtype, keep_largest, not_finite, order_keys, reserve
from pkjax.tables import Progress, reporter
from pkjax.trees import Choice, check_like, is_floating, kernels

__all__ = ["ScoreFn", "prune"]

ScoreFn = Callable[..., PyTree]
"""Maps parameters to scores of the same tree; a higher score is kept. An argument named ``masks`` gets the masks."""


def prune(
    score_fn: ScoreFn,
    params: PyTree,
    *,
    compression: SupportsFloat | None = None,
    density: SupportsFloat | None = None,
    steps: SupportsInt = 1,
    schedule: Schedule = exponential,
    scope: Scope = global_scope,
    prunable: Choice = kernels,
    min_per_layer: SupportsInt = 0,
    jit: bool = True,
    progress: Progress = False,
) -> PruneResult:
    """Choose the weights to keep, in one step or many, by the highest scores.

        kept after step k = round(schedule(k, steps, density) · size)   in every group of ``scope``

    At every step ``score_fn`` sees the parameters with the pruned ones at 0, and the masks if it takes an argument
    of that name. What is pruned never comes back, however low the others score. Equal scores are decided by
    position: the first in flattening order stay. Thresholds are exact and found without sorting.

    All steps run inside one ``jit``, so ``score_fn`` must be traceable; it is traced once, and the compiled loop of
    the last few score functions is kept: pass the same function again to prune again without compiling (as with
    ``jax.jit``, what it closes over stays what it was when it was first traced). With ``progress`` the steps run one
    by one, with a progress bar; with ``jit=False``, too, and ``score_fn`` is called outside of ``jit``, as scores over
    a stream of batches must be.

    Args:
        score_fn: parameters → scores, e.g. ``lambda p: pk.synflow(apply_fn, p, pk.ones_input(shape))``.
        params: the parameters at initialisation.
        compression: ρ ≥ 0, keeps the fraction 10^−ρ. Give this or ``density``.
        density: the fraction to keep, in (0, 1].
        steps: how often to score and prune; 100 for the SynFlow family, 1 for SNIP and GraSP.
        schedule: density after each step, see ``pkjax.pruning.schedules``.
        scope: which leaves compete, and for how much, see ``pkjax.pruning.scopes``.
        prunable: which leaves to prune, see ``pkjax.kernels``; masks of the others are all True.
        min_per_layer: weights that every prunable leaf keeps at least (its best; all, where it has fewer).
        jit: compile ``score_fn``.
        progress: show a progress bar (needs rich).

    Raises, before anything is computed: ValueError for both or neither of compression and density, for
    values out of range, for a schedule that rises or does not end at the density, where no leaf is
    prunable, where ``min_per_layer`` asks for more than is kept, where the scores are no tree like the parameters,
    and for NaN or infinity in the parameters; TypeError for what is no number, for traced parameters, and for
    leaves or scores that are not floating. Raises FloatingPointError, naming step and leaf, where scores of weights
    that are still there are NaN or infinite. Warns with ``EmptiedLayerWarning`` where a layer has lost all its
    weights.

    Source: Tanaka et al. 2020, algorithm 1; Gebhart et al. 2021, appendix A.4.1.

    >>> import jax.numpy as jnp
    >>> from pkjax.pruning.scores.data_free import magnitude
    >>> result = prune(magnitude, {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}, density=0.5)
    >>> result.masks["kernel"].tolist(), result.kept, result.total
    ([[True, False], [False, True]], 2, 4)
    """
    plan = plan_pruning(params, compression, density, steps, schedule, scope, prunable, min_per_layer)
    alive = [jnp.ones(shape, bool) for shape in plan.shapes]
    counts = np.array(plan.counts, count_dtype())
    if jit and progress is False:
        alive, reports = _loop(_hashable(score_fn), plan.layout)(params, alive, counts)
        kept, flags = jax.device_get(reports)
    else:
        alive, kept, flags = _one_by_one(score_fn, plan, params, alive, counts, jit, progress)
    _raise_bad_scores(flags, plan.names)

    masks = jax.tree.unflatten(jax.tree.structure(params), _fill(plan.layout, params, alive))
    layers = tuple(layer_report(name, shape, int(k)) for name, shape, k in zip(plan.names, plan.shapes, kept[-1],
                                                                              strict=True))
    emptied = [layer.name for layer in layers if layer.emptied]
    if emptied:
        warnings.warn(
            f"pruning to a density of {plan.density:.3g} left no weight in {len(emptied)} of {len(layers)} layers: "
            f"{', '.join(emptied)}. Prune less, in more steps, with scope=layer_scope, or with min_per_layer=1",
            EmptiedLayerWarning,
            stacklevel=2,
        )
    history = tuple(int(k) for k in kept.sum(axis=1))
    return PruneResult(masks=masks, kept=history[-1], total=sum(plan.sizes), layers=layers, history=history)


def _hashable(score_fn: ScoreFn) -> ScoreFn:
    try:
        hash(score_fn)
    except TypeError:
        return partial(score_fn)
    return score_fn


@lru_cache(maxsize=8)  # few, as a score function may hold on to data
def _loop(score_fn: ScoreFn, layout: Layout) -> Callable[..., Any]:
    """All rounds in one program, which updates the masks in place."""
    def run(params: PyTree, alive: list[Array], counts: Array) -> Any:
        return jax.lax.scan(lambda alive, row: _round(score_fn, layout, params, alive, row), alive, counts)
    return jax.jit(run, donate_argnames="alive")


@lru_cache(maxsize=8)
def _step(score_fn: ScoreFn, layout: Layout) -> Callable[..., Any]:
    """One round in one program."""
    return jax.jit(partial(_round, score_fn, layout), donate_argnames="alive")


def _one_by_one(score_fn: ScoreFn, plan: Plan, params: PyTree, alive: list[Array], counts: np.ndarray, jit: bool,
                progress: Progress) -> tuple[list[Array], np.ndarray, np.ndarray]:
    """Take the rounds one at a time and report each; stop at the first bad score."""
    step = _step(_hashable(score_fn), plan.layout) if jit else partial(_round, score_fn, plan.layout)
    report, total = reporter(progress), sum(plan.sizes)
    kept, flags = [], []
    for number, row in enumerate(counts, start=1):
        alive, (held, bad) = step(params, alive, row)
        kept.append(jax.device_get(held))
        flags.append(jax.device_get(bad))
        report(f"pruning: step {number} of {len(counts)}, {kept[-1].sum():,} of {total:,} weights kept")
        if flags[-1].any():
            break
    return alive, np.stack(kept), np.stack(flags)


def _round(score_fn: ScoreFn, layout: Layout, params: PyTree, alive: list[Array],
           counts: Array | np.ndarray) -> tuple[list[Array], tuple[Array, Array]]:
    """Score and threshold: the masks after it, the weights kept per leaf, and where live scores are not finite."""
    masks = jax.tree.unflatten(jax.tree.structure(params), _fill(layout, params, alive))
    extra = {"masks": masks} if "masks" in inspect.signature(score_fn).parameters else {}
    scores = score_fn(apply_masks(params, masks), **extra)
    check_like(scores, params, "scores")
    leaves = [jnp.asarray(s) for s, c in zip(jax.tree.leaves(scores), layout.chosen, strict=True) if c]
    for leaf in leaves:
        if not is_floating(leaf):
            raise TypeError(f"scores must be floating-point numbers, but score_fn returned {leaf.dtype}")
    return _best(layout, leaves, alive, counts)


@partial(jax.jit, static_argnames="layout", donate_argnames="alive")
def _best(layout: Layout, scores: list[Array], alive: list[Array],
          counts: Array) -> tuple[list[Array], tuple[Array, Array]]:
    """Keep the best in every group."""
    keys = order_keys(scores, alive)
    flags = not_finite(keys)
    if layout.floor:
        keys = [reserve(key, layout.floor) for key in keys]
    kept: list[Any] = [None] * len(keys)
    numbers: list[Any] = [None] * len(keys)
    for group, count in zip(layout.groups, counts, strict=True):
        marks, held = keep_largest([keys[i] for i in group], count)
        for i, mark, number in zip(group, marks, held, strict=True):
            kept[i], numbers[i] = mark, number
    return kept, (jnp.stack(numbers), flags)


def _fill(layout: Layout, params: PyTree, alive: list[Array]) -> list[Array]:
    """Masks of all leaves: those of the prunable leaves as given, True for the others."""
    given = iter(alive)
    return [
        next(given) if c else jnp.ones(jnp.shape(leaf), bool)
        for leaf, c in zip(jax.tree.leaves(params), layout.chosen, strict=True)
    ]


def _raise_bad_scores(flags: np.ndarray, names: Sequence[str]) -> None:
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
