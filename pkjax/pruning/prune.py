"""Pruning: score, keep the best, score what is left, and again. One shot is one step."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, SupportsFloat, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from pkjax.paths.frozen import noticed
from pkjax.paths.magnitudes import assumed, size_of
from pkjax.programs.checks import unfit_constants
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram, trace
from pkjax.pruning.plan import Layout, Plan, plan_pruning
from pkjax.pruning.result import EmptiedLayerWarning, PruneResult, layer_report
from pkjax.pruning.schedules import Schedule, exponential
from pkjax.pruning.scopes import Scope, global_scope
from pkjax.pruning.selection import Selection, select_best, select_in_blocks
from pkjax.pruning.top_k import count_dtype
from pkjax.pruning.zero_scores import LEAVE_OUT, pathless_parts, warn_of_parts, warn_of_zero_scores
from pkjax.tables import Progress, reporter
from pkjax.trees import Choice, apply_masks, check_like, is_floating, kernels

__all__ = ["ScoreFn", "prune"]

ScoreFn = Callable[..., PyTree]
"""Maps parameters to scores of the same tree; a higher score is kept. An argument named ``masks`` gets the masks."""


class Account(NamedTuple):
    """What is to be known of each step, leaf by leaf."""

    kept: Any         # (steps, leaves) weights
    flags: Any        # (steps, 2, leaves) whether live scores are NaN, or infinite
    zeros: Any        # (steps, leaves) live scores that are 0
    zeros_kept: Any   # (steps, leaves) weights kept with a score of 0


@automatic_axes
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
    masks: PyTree | None = None,
    min_per_layer: SupportsInt = 0,
    jit: bool = True,
    progress: Progress = False,
) -> PruneResult:
    """Choose the weights to keep, in one step or many, by the highest scores.

        kept after step k = min(round(schedule(k, steps, density) · size), kept before)   in every group of ``scope``

    At every step ``score_fn`` sees the parameters with the pruned ones at 0, and the masks if it takes an argument
    of that name. A pruned weight never comes back, however low the others score. Equal scores are decided by
    position: the first in flattening order stay. Thresholds are exact and found without sorting.

    A score with ``gates="frozen"`` freezes them anew at every step, at the weights that are left. Weights that only
    make coefficients, as of queries and keys, score 0 and go first: ``prunable=pk.on_paths(...)`` leaves them out.

    All steps run inside one ``jit``, so ``score_fn`` must be traceable. It is traced at each call, once; what is
    compiled is kept by the operations that the trace finds, so that pruning again by an equal score compiles nothing,
    whatever the weights and the arrays that ``score_fn`` closes over. With ``progress`` the steps run one by one; with
    ``jit=False``, too, and ``score_fn`` is called outside of ``jit``, as scores over a stream of batches must be.

    Works inside ``jit`` and ``vmap``, say for the masks of several seeds at once. There the counts of the result are
    arrays, and what needs numbers is left out: the checks for NaN and infinity, the check that ``masks`` keep enough
    (those that keep fewer stay as they are), the warnings about emptied layers and scores of 0, and ``progress``.

    Sharded parameters get masks of the same sharding, also on a mesh with explicit axes (outside of ``jit``); arrays
    of such a mesh that ``score_fn`` closes over must reach it through functions of this library.

    Args:
        score_fn: parameters → scores, e.g. ``lambda p: pk.synflow(apply_fn, p, pk.ones_input(shape))``.
        params: the parameters at initialisation.
        compression: ρ ≥ 0, keeps the fraction 10^−ρ. Give this or ``density``.
        density: the fraction of all prunable weights to keep, in (0, 1].
        steps: how often to score and prune; 100 for the SynFlow family, 1 for SNIP and GraSP.
        schedule: density after each step, see ``pkjax.pruning.schedules``.
        scope: which leaves compete, and for how much, see ``pkjax.pruning.scopes``.
        prunable: which leaves to prune: a predicate of (key path, leaf), a tree of booleans, or None for all
            floating-point leaves. A tree may be callable: what has booleans for leaves, and no other, is a tree.
        masks: booleans like ``params`` from which to go on pruning; weights that are False stay pruned. Densities and
            counts still refer to all prunable weights. Masks of leaves that are not prunable are returned as they are.
        min_per_layer: weights that every prunable leaf keeps at least (its best; all, where it has fewer).
        jit: compile ``score_fn``.
        progress: True for one line a step on the standard error stream, or a function that is given each line.

    Returns:
        The masks, how many weights are kept in the whole, in each leaf, and after each step, and how many scores are 0.

    Raises:
        ValueError: both or neither of compression and density are given; a value is out of range; the schedule rises or
            does not end at the density; no leaf is prunable; ``min_per_layer`` asks for more weights than are kept;
            ``masks`` keep fewer weights than are asked for, or have another structure; the scores are not a tree like
            the parameters; the parameters hold NaN or infinity.
        TypeError: an argument is not a number; leaves to prune or scores are not floating-point numbers; ``masks`` are
            not booleans.
        FloatingPointError: scores of weights that are still there are NaN or infinite; the message names step and leaf.

    Warns:
        EmptiedLayerWarning: a layer has lost all its weights.
        ZeroScoresWarning: scores of exactly 0 decide what is kept: a leaf of zeros stands behind them, or half of all
            scores or more are 0, and some of their weights are kept while others are pruned. Or ``score_fn`` freezes
            gates, and a large part of a leaf, which makes coefficients alone, is pruned (``pkjax.on_paths``).

    Source: Tanaka et al. 2020, algorithm 1; Gebhart et al. 2021, appendix A.4.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax.pruning.scores.data_free import magnitude
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
        >>> half = prune(magnitude, params, density=0.5)
        >>> half.masks["kernel"].tolist(), half.kept, half.total
        ([[True, False], [False, True]], 2, 4)
        >>> prune(magnitude, params, density=0.25, masks=half.masks).masks["kernel"].tolist()
        [[True, False], [False, False]]
    """
    plan = plan_pruning(params, compression, density, steps, schedule, scope, prunable, min_per_layer, masks)
    sizes = None if _traced((params, masks)) else tuple(size_of(leaf, 2) for leaf in jax.tree.leaves(params))
    with noticed() as coefficients:
        done = _run(score_fn, plan, params, masks, sizes, jit, progress)
    if not done.traced and sizes and isinstance(done.scores, BoundProgram) and done.account.flags[:, 0].any():
        # NaN may say that a score was not sure of the sizes of numbers on the way to it.
        done = _run(score_fn, plan, params, masks, None, jit, progress)
    scores, account, traced = done.scores, done.account, done.traced
    alive = [_placed(mask, leaf) for mask, leaf in zip(done.alive, plan.layout.prunable(params), strict=True)]
    if not traced:
        if account.flags.any() and isinstance(scores, BoundProgram) and (unfit := unfit_constants(scores)):
            raise ValueError(f"score_fn closes over {unfit[0]}, and scores are not finite")
        _raise_bad_scores(account.flags, plan.names)
    kept = account.kept
    number: Callable[[Any], Any] = jnp.asarray if traced else int
    layers = tuple(layer_report(name, shape, number(k)) for name, shape, k in zip(plan.names, plan.shapes, kept[-1],
                                                                                 strict=True))
    if not traced:
        by_default = coefficients and prunable is kernels       # elsewhere the leaves are the caller's choice
        pathless = pathless_parts(account.zeros, account.zeros_kept, kept, layers) if by_default else {}
        _warn_of_emptied(plan, [layer.name for layer in layers if layer.emptied], pathless)
        warn_of_parts(pathless, layers)
        first = partial(_first_zeros, score_fn, plan.layout, masks)
        warn_of_zero_scores(account.zeros, account.zeros_kept, sum(plan.sizes), params, first if jit else None)
    history = tuple(number(k) for k in kept.sum(axis=1))
    kept_masks = _fill(plan.layout, params, alive, done.fixed)
    return PruneResult(masks=kept_masks, kept=history[-1], total=sum(plan.sizes), layers=layers, history=history,
                       zero_scores=number(account.zeros[0].sum()))


class _Done(NamedTuple):
    """Masks of the prunable leaves and of the others, and how they came about."""

    alive: list[Array]
    fixed: list[Array]
    account: Account
    scores: Callable[..., list[Array]]
    traced: bool


def _run(score_fn: ScoreFn, plan: Plan, params: PyTree, masks: PyTree | None, sizes: Sequence[str] | None, jit: bool,
         progress: Progress) -> _Done:
    """Take all steps; of leaves that are traced for it, scores may know the sizes."""
    alive, fixed = _start(plan.layout, params, masks)
    scores: Callable[..., list[Array]] = partial(_scores, score_fn, plan.layout, sizes)
    traced = _traced((params, masks))
    if jit or traced:
        scores = BoundProgram(*trace(scores, params, _fill(plan.layout, params, alive, fixed), opaque=True))
        traced = traced or _traced(scores)
    if traced or (jit and progress is False):
        loop = _loop if traced else _compiled_loop
        alive, account = loop(scores, plan.layout, params, alive, fixed, plan.counts)
    else:
        alive, account = _one_by_one(scores, plan, params, alive, fixed, progress)
    return _Done(alive, fixed, account if traced else jax.device_get(account), scores, traced)


def _first_zeros(score_fn: ScoreFn, layout: Layout, masks: PyTree | None, params: PyTree) -> int:
    """How many live scores are 0 at the first step, of other parameters."""
    alive, fixed = _start(layout, params, masks)
    filled = _fill(layout, params, alive, fixed)
    scores = BoundProgram(*trace(partial(_scores, score_fn, layout, None), params, filled, opaque=True))
    return int(_count_zeros(scores, params, filled, alive))


@jax.jit
def _count_zeros(scores: Callable[..., list[Array]], params: PyTree, masks: PyTree, alive: list[Array]) -> Array:
    zeros = [((s == 0) & a).sum(dtype=count_dtype()) for s, a in zip(scores(params, masks), alive, strict=True)]
    return jnp.stack(zeros).sum()


def _traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _start(layout: Layout, params: PyTree, masks: PyTree | None) -> tuple[list[Array], list[Array]]:
    """Masks of the prunable leaves, which the loop writes over, and of the others."""
    if masks is None:
        every = [_placed(jnp.asarray(np.ones(jnp.shape(leaf), bool)), leaf) for leaf in jax.tree.leaves(params)]
    else:
        every = [jnp.array(mask) if c else jnp.asarray(mask)
                 for mask, c in zip(jax.tree.leaves(masks), layout.chosen, strict=True)]
    chosen = [mask for mask, c in zip(every, layout.chosen, strict=True) if c]
    return chosen, [mask for mask, c in zip(every, layout.chosen, strict=True) if not c]


def _placed(mask: Array, leaf: Any) -> Array:
    """Place a mask as its parameters are."""
    if any(isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) for x in (mask, leaf)):
        return mask
    return jax.device_put(mask, leaf.sharding) if isinstance(leaf.sharding, NamedSharding) else mask


def _fill(layout: Layout, params: PyTree, alive: Sequence[Array], fixed: Sequence[Array]) -> PyTree:
    """Masks of all leaves, from those of the prunable leaves and those of the others."""
    ours, others = iter(alive), iter(fixed)
    return jax.tree.unflatten(jax.tree.structure(params), [next(ours if c else others) for c in layout.chosen])


def _scores(score_fn: ScoreFn, layout: Layout, sizes: Sequence[str] | None, params: PyTree, masks: PyTree
            ) -> list[Array]:
    """Scores of the prunable leaves; raise where the score function returns anything else than scores."""
    extra = {"masks": masks} if "masks" in inspect.signature(score_fn).parameters else {}
    kept = apply_masks(params, masks)
    leaves = jax.tree.leaves(kept)
    with assumed(leaves, ["unknown"] * len(leaves) if sizes is None else sizes):
        scores = score_fn(kept, **extra)
    check_like(scores, params, "scores")
    leaves = [jnp.asarray(score) for score in layout.prunable(scores)]
    for leaf in leaves:
        if not is_floating(leaf):
            raise TypeError(f"scores must be floating-point numbers, but score_fn returned {leaf.dtype}")
    return leaves


def _loop(scores: Callable[..., list[Array]], layout: Layout, params: PyTree, alive: list[Array], fixed: list[Array],
          counts: Array | np.ndarray) -> tuple[list[Array], Account]:
    """All steps in one program, which writes over the masks."""
    def step(alive: list[Array], row: Array) -> tuple[list[Array], Account]:
        return _step(scores, layout, params, alive, fixed, row)

    return jax.lax.scan(step, alive, jnp.asarray(counts))


def _step(scores: Callable[..., list[Array]], layout: Layout, params: PyTree, alive: list[Array], fixed: list[Array],
          counts: Array | np.ndarray) -> tuple[list[Array], Account]:
    """Score and threshold: the masks after it, and what is to be known of the step."""
    return _best(layout, scores(params, _fill(layout, params, alive, fixed)), alive, counts)


def _work(scores: Any, layout: Layout, params: PyTree, alive: Any, fixed: Any, counts: Any) -> int:
    return len(counts) * sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


# Few steps of small networks take less than the optimisations of their program.
_compiled_loop = compiled_for_few_calls(static_argnames="layout", donate_argnames="alive", most=1 << 24,
                                        work=_work)(_loop)
_compiled_step = jax.jit(_step, static_argnames="layout", donate_argnames="alive")


def _one_by_one(scores: Callable[..., list[Array]], plan: Plan, params: PyTree, alive: list[Array], fixed: list[Array],
                progress: Progress) -> tuple[list[Array], Account]:
    """Take the steps one at a time and report each; stop at the first bad score."""
    step: Callable[..., Any] = _compiled_step if isinstance(scores, BoundProgram) else _step
    report, total = reporter(progress), sum(plan.sizes)
    accounts: list[Account] = []
    for number in range(1, len(plan.counts) + 1):
        alive, account = step(scores, plan.layout, params, alive, fixed, plan.counts[number - 1])
        accounts.append(jax.device_get(account))
        report(f"pruning: step {number} of {len(plan.counts)}, {accounts[-1].kept.sum():,} of {total:,} weights kept")
        if accounts[-1].flags.any():
            break
    return alive, Account(*map(np.stack, zip(*accounts, strict=True)))


@partial(jax.jit, static_argnames="layout", donate_argnames="alive")
def _best(layout: Layout, scores: list[Array], alive: list[Array],
          counts: Array | np.ndarray) -> tuple[list[Array], Account]:
    """Keep the best in every group."""
    def best(group: tuple[int, ...], count: Array) -> Selection:
        values, live = [scores[i] for i in group], [alive[i] for i in group]
        return (select_best(values, live, count, layout.floor) if layout.blocks is None
                else select_in_blocks(values, live, count, *layout.blocks))

    groups = [best(group, count) for group, count in zip(layout.groups, counts, strict=True)]
    order = np.argsort([i for group in layout.groups for i in group])
    marks = [mark for best in groups for mark in best.marks]

    def by_leaf(parts: Sequence[Array]) -> Array:
        return jnp.concatenate(parts, -1)[..., order]

    return [marks[i] for i in order], Account(*(by_leaf([getattr(best, name) for best in groups])
                                                for name in Account._fields))


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


def _warn_of_emptied(plan: Plan, emptied: Sequence[str], pathless: Mapping[str, int]) -> None:
    if emptied:
        hint = f". {LEAVE_OUT}" if any(name in pathless for name in emptied) else ""
        warnings.warn(
            f"pruning to a density of {plan.density:.3g} left no weight in {len(emptied)} of {len(plan.names)} layers: "
            f"{', '.join(emptied)}. Prune less, in more steps, with scope=layer_scope, or with min_per_layer=1{hint}",
            EmptiedLayerWarning,
            stacklevel=4,
        )
