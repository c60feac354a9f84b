"""Runs of experiments: initialise, prune, measure the kernels, train, and record everything."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import pkjax as pk
from pkjax.adapters import linen_init
from pkjax.data.dataset import Dataset
from pkjax.experiments.environment import environment
from pkjax.experiments.gates import check_paths, left_out, prunable_with, reference_input
from pkjax.experiments.measurements import choose, initial_traces, measurements, spectra
from pkjax.experiments.methods import (
    MaskFn,
    ScoreFn,
    check_compression,
    compiled,
    images_of,
    model,
    pruned,
    pruner_of,
    score,
    steps_of,
    weights,
)
from pkjax.experiments.records import FORMAT
from pkjax.experiments.settings import Settings
from pkjax.experiments.trained_masks import TRAINED, train_masks
from pkjax.tables import Progress, reporter
from pkjax.training.result import Fit
from pkjax.training.together import fit_together
from pkjax.trees import Choice

__all__ = ["Loader", "Result", "run", "run_together"]

THREADS = 3
"""Pruners whose programs are compiled at a time."""
Loader = Callable[[str, str], Dataset]
"""Maps (name, split) to all images of that split."""
Result = tuple[dict[str, Any], PyTree]
"""The record of a run, and its masks."""


def run(settings: Settings, *, load: Loader | None = None, checkpoint: Path | None = None,
        progress: Progress = False, on_epoch: Callable[[Mapping[str, Any]], None] | None = None
        ) -> tuple[dict[str, Any], PyTree]:
    """Run an experiment and return its record, ready for JSON, and its masks.

    The record holds the settings and their key, the environment, what every layer keeps, and the traces at
    initialisation (Tr Π; on `settings.traces` images Tr Θ and the gated path trace). On `settings.spectra` images it
    holds Σ ν_i π_i, the shares of Tr Θ that the top 1, 2, … path eigenvectors carry, and the claims of Theorem 1. Each
    epoch has a row with accuracies, ln Tr Π, ‖ω_t‖, ‖f_t‖ and ‖f_t − f_0‖, the last two on `settings.output_samples`
    images.

    SNIP, GraSP, Fisher, PX and ntk-trace see ten training images per class, chosen by the seed; -dist takes the mean of
    all raw training images. The pruners that train, imp and magnitude-after-training, do so by the run's own recipe
    before the run trains by the whole recipe, from the weights that they go back to or keep; an interrupted run begins
    them anew.

    Args:
        settings: what to do.
        load: where the images come from; `pk.data.load` and functions of the user's own by default.
        checkpoint: a folder for the last state of the training, to resume from.
        progress: where to report what is running.
        on_epoch: a function that is given every new row of the history, as in `pk.training.fit`.

    Returns:
        the record, and the masks: booleans like the parameters.

    Raises:
        ValueError: more images are wanted than the split holds, or as in `pk.data.load`, `pk.prune` and
            `pk.training.fit`.
        FloatingPointError: the training diverges.

    Source: Gebhart et al. (2021), section 5 and appendix A.4.

    Examples:
        >>> small = Settings(model="fc-4x1", epochs=1, train_samples=64, test_samples=64, traces=2, output_samples=2)
        >>> record, masks = run(small)
        >>> record["history"][1]["epoch"], record["pruning"]["density"]
        (1, 1.0)
    """
    result, = run_together([settings], load=load, checkpoints=None if checkpoint is None else [checkpoint],
                           save_last=True, progress=progress,
                           on_epoch=None if on_epoch is None else lambda _, row: on_epoch(row))
    if isinstance(result, BaseException):
        raise result
    return result


class _Prepared(NamedTuple):
    """A run as it stands before training."""

    settings: Settings
    train: Dataset
    test: Dataset
    variables: PyTree
    masks: PyTree
    pruning: dict[str, Any]
    initial: dict[str, float]
    spectra: dict[str, Any] | None
    about: PyTree
    seconds: float


def run_together(runs: Sequence[Settings], *, load: Loader | None = None, checkpoints: Sequence[Path] | None = None,
                 save_last: bool = False, progress: Progress = False,
                 on_epoch: Callable[[int, Mapping[str, Any]], None] | None = None
                 ) -> list[Result | Exception | SystemExit]:
    """Run experiments of one training program, and train their networks together.

    Each is initialised, pruned and measured on its own. A run that fails, before or in its training, leaves its
    exception in place of its result, and the others go on.

    Args:
        runs: what to do, with one `Settings.program`.
        load: where the images come from; `pk.data.load` and functions of the user's own by default.
        checkpoints: a folder for each run, for the last state of its training.
        save_last: whether the last state is written too.
        progress: where to report what is running.
        on_epoch: a function that is given the place of a run and a new row of its history, as in
            `pk.training.fit_together`.

    Returns:
        for each run record and masks, or what it raised.

    Raises:
        ValueError: the runs have different training programs.
        CheckpointError: a checkpoint cannot be continued.
        OSError: a checkpoint cannot be written.

    Examples:
        >>> from pkjax.experiments.settings import grid
        >>> small = {"model": "fc-4x1", "epochs": 1, "train_samples": 64, "test_samples": 64, "traces": 0}
        >>> both = run_together(grid({**small, "output_samples": 2, "seed": [0, 1]}))
        >>> [record["settings"]["seed"] for record, masks in both]
        [0, 1]
    """
    if len({settings.program for settings in runs}) > 1:
        raise ValueError("runs that train together differ in seed, pruner, compression and prune_steps alone; "
                         "got others: use run for each, or sweep")
    tell, load = reporter(progress), load or images_of
    chosen = lru_cache(maxsize=None)(lambda split, samples, seed: choose(load(runs[0].data, split), samples, seed))
    results: dict[int, Any] = {}
    ready: dict[int, _Prepared] = {}

    def images(settings: Settings) -> list[Dataset]:
        wanted = ("train", settings.train_samples), ("test", settings.test_samples)
        return [chosen(split, samples, 0 if samples is None else settings.seed) for split, samples in wanted]

    def prepare(places: Sequence[int]) -> None:
        for i in places:
            try:
                ready[i] = _prepare(runs[i], load, images, tell)
            except (Exception, SystemExit) as error:  # whatever a run raises is its result
                results[i] = error

    alike: dict[str, list[int]] = {}
    for i, settings in enumerate(runs):
        alike.setdefault(settings.pruner, []).append(i)
    if len(alike) > 1:
        with ThreadPoolExecutor(THREADS) as pool:       # while one thread reads images or traces, others compile
            with contextlib.suppress(Exception, SystemExit):
                test = chosen("test", runs[0].test_samples, 0 if runs[0].test_samples is None else runs[0].seed)
                compiling = pool.submit(_compile, runs[0], test)
                for settings in runs:                   # one thread reads them for all
                    images(settings)
                compiling.result()
            list(pool.map(prepare, alike.values()))
    else:
        prepare(range(len(runs)))
    if ready:
        ready = dict(sorted(ready.items()))
        began, all_of = time.monotonic(), list(ready.values())
        module = model(runs[0].model, all_of[0].train.classes, all_of[0].train.pixels.shape[1:])
        trained = fit_together(
            module, [each.train for each in all_of], [each.test for each in all_of], recipe=runs[0].recipe,
            seeds=[each.settings.seed for each in all_of], variables=[each.variables for each in all_of],
            masks=[each.masks for each in all_of], measure=measurements(module, runs[0].gates),
            about=[each.about for each in all_of],
            checkpoint=None if checkpoints is None else [checkpoints[i] for i in ready], save_last=save_last,
            progress=tell, on_epoch=None if on_epoch is None else lambda place, row: on_epoch(list(ready)[place], row))
        share = (time.monotonic() - began) / len(ready)
        results |= {i: _result(each, done, share) for (i, each), done in zip(ready.items(), trained, strict=True)}
    return [results[i] for i in range(len(runs))]


def _compile(settings: Settings, images: Dataset) -> None:
    """Compile what every run uses before its training, on images of the right shape."""
    module = model(settings.model, images.classes, images.pixels.shape[1:])
    one = jnp.asarray(images.images[:1])
    variables = _init(module)(jax.random.key(settings.seed), one)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    masks = pruned(compiled(pk.magnitude, params), params, compression=0, steps=1, jit=False).masks
    if settings.traces:
        initial_traces(module, settings.gates)(params, state, masks, jnp.repeat(one, settings.traces, axis=0))


def _prepare(settings: Settings, load: Loader, images: Callable[[Settings], list[Dataset]],
             tell: Callable[[str], None]) -> _Prepared:
    """Initialise and prune a network, and measure it."""
    began = time.monotonic()
    tell("loading images")
    seed = settings.seed
    train, test = images(settings)
    module = model(settings.model, train.classes, train.pixels.shape[1:])
    one = jnp.asarray(train.images[:1])
    variables = _init(module)(jax.random.key(seed), one)
    if (got := jax.eval_shape(_outputs(module), variables, one).shape) != (1, train.classes):
        raise ValueError(f"{settings.model} gives outputs of shape {got} for one image, where {settings.data} with its "
                         f"{train.classes} classes needs (1, {train.classes})")
    apply_fn, params = pk.from_linen(module, variables)
    check_paths(settings.model, apply_fn, params, one.shape[1:], settings.gates,
                'set gates to "frozen" (--gates frozen on the command line)')
    prunable = prunable_with(settings.gates, apply_fn, params, one.shape[1:])
    tell(f"pruning by {settings.pruner}")
    if settings.pruner in TRAINED:
        check_compression(params, settings.compression, prunable)
        variables, masks, pruning = train_masks(
            settings.pruner, module, variables, train, test, recipe=settings.recipe, compression=settings.compression,
            rounds=steps_of(settings.pruner, settings.prune_steps), seed=seed, prunable=prunable, progress=tell)
    else:
        masks, pruning = _prune(settings, params, load, prunable)
    if settings.gates is not None:
        pruning["left_out"] = left_out(params, prunable)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    tell("traces")
    few, many = (jnp.asarray(choose(train, min(n, len(train)), seed).images)
                 for n in (settings.traces, settings.output_samples))
    initial = initial_traces(module, settings.gates)(params, state, masks, few) if len(few) else {}
    reference = reference_input(settings.reference, train, seed)
    frozen = {} if settings.gates is None else {"gates": settings.gates, "reference": reference}
    analyzed = spectra(module, variables, masks, choose(train, min(settings.spectra, len(train)), seed).images,
                       tell, **frozen) if settings.spectra else None
    start = jax.tree.map(jnp.copy, (pk.apply_masks(params, masks), state))
    return _Prepared(settings, train, test, variables, masks, pruning, {k: float(v) for k, v in initial.items()},
                     analyzed, (masks, start, many, reference), time.monotonic() - began)


def _result(ready: _Prepared, trained: Fit, seconds: float) -> Result | FloatingPointError:
    """Make the record of a run."""
    if trained.error:
        return FloatingPointError(trained.error)
    settings, examples = ready.settings, len(ready.train)
    return {"format": FORMAT, "key": settings.key, "status": "done", "settings": settings.to_dict(),
            "environment": environment(), "pruning": ready.pruning, "initial": ready.initial,
            "spectra": ready.spectra,
            "steps": settings.recipe.epochs * (examples // min(settings.recipe.batch_size, examples)),
            "history": [dict(row) for row in trained.history], "seconds": ready.seconds + seconds}, ready.masks


_init = lru_cache(maxsize=8)(linen_init)


def _outputs(module: Any) -> Callable[..., Any]:
    def outputs(variables: PyTree, images: Any) -> Any:
        apply_fn, params = pk.from_linen(module, variables)
        return apply_fn(params, images)

    return outputs


def _prune(settings: Settings, params: PyTree, load: Loader, prunable: Choice) -> tuple[PyTree, dict[str, Any]]:
    if settings.pruner == "none":
        masks = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)
        total = weights(params, prunable)
        return masks, {"kept": total, "total": total, "density": 1.0, "compression": 0.0, "history": [], "layers": []}
    # A score that does not depend on the seed is one function for every seed, and traced once.
    seeded = pruner_of(settings.pruner).seeded or settings.train_samples or settings.reference == "images"
    scores = _score(load, settings.model, settings.data, settings.train_samples, settings.pruner,
                    settings.seed if seeded else 0, settings.gates, settings.reference)
    result = pruned(scores, params, compression=settings.compression,
                    steps=steps_of(settings.pruner, settings.prune_steps), jit=False, prunable=prunable)
    return result.masks, result.to_dict()


@lru_cache(maxsize=8)
def _score(load: Loader, name: str, data: str, samples: int | None, pruner: str, seed: int, gates: str | None,
           reference: str | None) -> ScoreFn | MaskFn:
    train = choose(load(data, "train"), samples, seed)
    few = choose(train, min(len(train), 10 * train.classes), seed)
    mean = train.raw.mean(axis=0, keepdims=True) if pruner.endswith("-dist") else None
    module = model(name, train.classes, train.pixels.shape[1:])
    apply_fn, params = pk.from_linen(module, _init(module)(jax.random.key(seed), jnp.asarray(few.images[:1])))
    return compiled(score(pruner, apply_fn, few, seed=seed, mean=mean, gates=gates,
                          reference=reference_input(reference, train, seed)), params)
