"""Training of many networks of one module at once, as one program over a batch of networks."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax import tables
from pkjax.data.dataset import Dataset
from pkjax.training.epochs import scale_of, training_step
from pkjax.training.loops import networks_at_once, one_by_one
from pkjax.training.recipes import Recipe
from pkjax.training.result import Fit
from pkjax.training.trainer import Member, Trainer, join

__all__ = ["fit_together"]

CACHE = 2**20
"""Bytes of the networks that a core trains as one program: larger steps fill it, and leave its cache, one by one."""


def fit_together(module: Any, train: Dataset | Sequence[Dataset], test: Dataset | Sequence[Dataset], *, recipe: Recipe,
                 seeds: Sequence[int], variables: Sequence[PyTree] | None = None,
                 masks: Sequence[PyTree] | None = None, measure: Callable[..., Mapping[str, Any]] | None = None,
                 about: Sequence[PyTree] | None = None, checkpoint: Sequence[Path | str] | None = None,
                 save_seconds: float = 30.0, save_last: bool = True, epochs: int | None = None,
                 progress: tables.Progress = False,
                 on_epoch: Callable[[int, Mapping[str, Any]], None] | None = None) -> tuple[Fit, ...]:
    """Train networks that differ in seed, beginning, masks or examples, as one program over a batch of networks.

    Every network trains as by `fit`, with its own random numbers, and ends where `fit` leads it but for the rounding
    of its sums. On an accelerator all networks train together. On a CPU each core trains a batch of as many small
    networks as its cache holds. Larger ones fill it alone, and a convolution whose kernels differ from network to
    network is slow there: such networks train singly in the same call, one on each core, with the numbers of `fit` to
    the last bit. They also train singly where JAX's random numbers depend on the batch (keys other than threefry). No
    more networks train at a time than memory holds.

    If the loss of a network becomes infinite or NaN, it alone stops, and its result says so in `error`.

    Args:
        module: a Linen or NNX module.
        train: training images, of all networks or a data set for each; sets have one size and normalisation.
        test: test images, likewise.
        recipe: how to train.
        seeds: a seed for each network.
        variables: for each network a Linen module's variables to start from; None initialises them by the seeds.
        masks: for each network booleans like its parameters; None trains all weights.
        measure: (params, state) → numbers to keep in the history, a function that can be traced; with `about`, it
            gets what is there for the network as a third argument. A function under `jax.jit` is compiled once for
            all calls.
        about: for each network a tree of arrays, all of one shape.
        checkpoint: a folder for each network, as that of `fit`, which can continue it, and the other way round.
        save_seconds: seconds between checkpoints; more where they would take over a tenth of the time.
        save_last: whether the last epoch writes checkpoints.
        epochs: stop after this epoch; None runs all epochs of the recipe.
        progress: where to report the test accuracies after each epoch.
        on_epoch: a function that is given the place of a network and a new row of its history, as that of `fit`; on a
            CPU from several threads, but for one network from one.

    Returns:
        the result of each network, in order.

    Raises:
        ValueError: there are no seeds, another argument does not have one value per seed, the data sets do not go
            together, or as in `fit`.
        CheckpointError: as in `fit`.
        OSError: as in `fit`.
        TypeError: `module` is not a Flax module.

    Examples:
        >>> import pkjax as pk
        >>> digits = pk.data.load("digits", samples=64)
        >>> few = Recipe(learning_rate=0.01, epochs=2, batch_size=32)
        >>> both = fit_together(pk.models.fc(4, 1), digits, digits, recipe=few, seeds=(0, 1))
        >>> [len(result.history) for result in both], both[0].error
        ([3, 3], '')
    """
    n = len(seeds)
    if not n:
        raise ValueError("seeds must hold a seed for each network, got none")
    members = [Member(*values) for values in zip(
        _each("train", train, n, Dataset), _each("test", test, n, Dataset), seeds, _each("variables", variables, n),
        _each("masks", masks, n), _each("checkpoint", checkpoint, n), _each("about", about, n),
        [None if on_epoch is None else partial(on_epoch, i) for i in range(n)], strict=True)]
    _check_data(members)
    trainer = Trainer(module, recipe, _batched(measure, about is not None), epochs, save_seconds, save_last,
                      tables.reporter(progress))
    most = _at_once(trainer, members)
    threads = min(n, _cores()) if jax.default_backend() == "cpu" else 1
    parts = min(n, threads * -(-n // (threads * most)))
    batches = [members[n * i // parts:n * (i + 1) // parts] for i in range(parts)]
    if threads == 1:
        return tuple(result for batch in batches for result in trainer.train(batch, one_by_one))
    with ThreadPoolExecutor(threads) as pool:
        try:
            return tuple(result for batch in pool.map(lambda batch: trainer.train(batch, one_by_one), batches)
                         for result in batch)
        except BaseException:
            trainer.stop.set()      # nobody waits for the others
            raise


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _each(name: str, values: Any, n: int, kind: type | None = None) -> list[Any]:
    """Spread a value over the networks, or check that there is one for each."""
    if values is None or (kind is not None and isinstance(values, kind)):
        return [values] * n
    if isinstance(values, Mapping | str | Path) or len(values) != n:
        raise ValueError(f"{name} must be a sequence with a value for each of the {n} seeds, got "
                         + (type(values).__name__ if isinstance(values, Mapping | str | Path) else str(len(values))))
    return list(values)


def _check_data(members: Sequence[Member]) -> None:
    """Refuse data sets that do not fit into one array."""
    for split in ("train", "test"):
        kinds = {(data.pixels.shape, data.classes, scale_of(data)) for data in (getattr(m, split) for m in members)}
        if len(kinds) > 1:
            raise ValueError(f"the {split} sets of networks that train together have one size, number of classes and "
                             f"normalisation, got {' and '.join(sorted(str(kind) for kind in kinds))}")


def _at_once(trainer: Trainer, members: Sequence[Member]) -> int:
    """Return how many networks to train at a time."""
    first = members[0]
    (begun,) = trainer.begin([first._replace(checkpoint=None)])
    if len(members) == 1 or one_by_one(begun.now["params"]) or (
            str(jax.random.key_impl(jax.random.key(0))) != "threefry2x32"):
        return 1
    steps, size = trainer.steps(first.train), min(trainer.recipe.batch_size, len(first.train))
    step = training_step(begun.net.forward, trainer.recipe, steps, scale_of(first.train))
    cached = len(members)
    if jax.default_backend() == "cpu":
        cached = max(1, CACHE // sum(leaf.nbytes for leaf in jax.tree.leaves((begun.now, begun.masks))))
    own = [begun.now, begun.masks, first.about]
    own += [data.pixels for data, other in zip(first[:2], members[-1][:2], strict=True) if data is not other]
    batch = jnp.zeros(size, int), jax.random.key(0)
    with jax.numpy_dtype_promotion("standard"):
        return networks_at_once(step, begun.now, batch, begun.masks, first.train.pixels[:1],
                                np.asarray(first.train.labels[:1], np.int32), own=own, most=min(cached, len(members)))


def _batched(measure: Callable[..., Mapping[str, Any]] | None, with_about: bool
             ) -> Callable[[Sequence[Member], Mapping[str, PyTree]], list[dict[str, Any]]]:
    """Measure all networks of a batch in one program."""
    if measure is None:
        return lambda members, now: [{} for _ in members]
    compiled = measure if hasattr(measure, "lower") else jax.jit(measure)
    joined: dict[tuple[int, ...], PyTree] = {}      # by networks that train together

    def measured(members: Sequence[Member], now: Mapping[str, PyTree]) -> list[dict[str, Any]]:
        many = len(members) > 1
        given = [now["params"], now["state"]]
        if with_about:
            key = tuple(id(m.about) for m in members)
            if many and key not in joined:
                joined[key] = join([m.about for m in members])
            given.append(joined[key] if many else members[0].about)
        values = jax.device_get((jax.vmap(compiled) if many else compiled)(*given))
        return [{name: (value[i] if many else np.asarray(value)).item() for name, value in values.items()}
                for i in range(len(members))]

    return measured
