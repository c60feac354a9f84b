"""One run of an experiment: initialise, prune, measure the kernels, train, and record everything."""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import pkjax as pk
from pkjax.data.dataset import Dataset
from pkjax.experiments.environment import environment
from pkjax.experiments.methods import PRUNERS, model, pruned, score, steps_of, weights
from pkjax.experiments.records import FORMAT
from pkjax.experiments.settings import Settings
from pkjax.tables import Progress, reporter
from pkjax.training.fit import fit

__all__ = ["Loader", "run"]

Loader = Callable[[str, str], Dataset]
"""Maps (name, split) to all images of that split."""


def run(settings: Settings, *, load: Loader | None = None, checkpoint: Path | None = None,
        progress: Progress = False) -> tuple[dict[str, Any], PyTree]:
    """Run an experiment and return its record, ready for JSON, and its masks.

    The record holds the settings and their key, the environment, what every layer keeps, and the traces at
    initialisation (Tr Π; on `settings.traces` images Tr Θ and the gated path trace). On `settings.spectra` images it
    holds Σ ν_i π_i, the shares of Tr Θ that the top 1, 2, … path eigenvectors carry, and the claims of Theorem 1. Each
    epoch has a row with accuracies, ln Tr Π, ‖ω_t‖, ‖f_t‖ and ‖f_t − f_0‖, the last two on `settings.output_samples`
    images.

    SNIP, GraSP, PX and ntk-trace see ten training images per class, chosen by the seed; -dist takes the mean of all raw
    training images.

    Args:
        settings: what to do.
        load: where the images come from; `pk.data.load` by default.
        checkpoint: a folder for the last state of the training, to resume from.
        progress: where to report what is running.

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
    tell = reporter(progress)
    began = time.monotonic()
    tell("loading images")
    load = load or _load
    train = _choose(load(settings.data, "train"), settings.train_samples, settings.seed)
    test = _choose(load(settings.data, "test"), settings.test_samples, settings.seed)
    module = model(settings.model, train.classes)
    variables = _init(module)(jax.random.key(settings.seed), jnp.asarray(train.images[:1]))
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    tell(f"pruning by {settings.pruner}")
    masks, pruning = _prune(settings, variables["params"], load)
    alive = pk.apply_masks(params, masks)
    tell("traces")
    few, many = (jnp.asarray(_choose(train, min(n, len(train)), settings.seed).images)
                  for n in (settings.traces, settings.output_samples))
    initial = {name: float(v) for name, v in _traces(module)(params, state, masks, few).items()} if len(few) else {}
    spectra = _spectra(settings, module, variables, masks, train, tell) if settings.spectra else None
    measurements = _measurements(module)
    start = jax.tree.map(jnp.copy, (alive, state))

    def measure(now: PyTree, state: PyTree) -> dict[str, float]:
        row = jax.device_get(measurements(now, state, masks, start, many))
        return {name: float(value) for name, value in row.items()}

    trained = fit(module, train, test, recipe=settings.recipe, variables=variables, masks=masks, seed=settings.seed,
                  measure=measure, checkpoint=checkpoint, progress=tell)
    return {"format": FORMAT, "key": settings.key, "status": "done", "settings": settings.to_dict(),
            "environment": environment(), "pruning": pruning, "initial": initial, "spectra": spectra,
            "steps": settings.recipe.epochs * (len(train) // min(settings.recipe.batch_size, len(train))),
            "history": [dict(row) for row in trained.history], "seconds": time.monotonic() - began}, masks


def _load(name: str, split: str) -> Dataset:
    return pk.data.load(name, split=split)


def _choose(dataset: Dataset, samples: int | None, seed: int) -> Dataset:
    """Choose examples by the seed; ValueError where there are fewer."""
    if samples is None:
        return dataset
    if samples > len(dataset):
        raise ValueError(f"{dataset.name} has {len(dataset)} examples in this split, fewer than the {samples} wanted")
    rows = np.random.default_rng(seed).permutation(len(dataset))[:samples]
    return Dataset(dataset.pixels[rows], dataset.labels[rows], dataset.mean, dataset.std, dataset.classes,
                   dataset.name, dataset.levels)


@lru_cache(maxsize=8)
def _init(module: Any) -> Callable[..., Any]:
    return jax.jit(module.init)


def _prune(settings: Settings, params: PyTree, load: Loader) -> tuple[PyTree, dict[str, Any]]:
    if settings.pruner == "none":
        masks = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)
        total = weights(params)
        return masks, {"kept": total, "total": total, "density": 1.0, "compression": 0.0, "history": [], "layers": []}
    # A score that does not depend on the seed is one function for every seed, so that the loop is compiled once.
    seed = settings.seed if PRUNERS[settings.pruner].seeded or settings.train_samples else 0
    scores = _score(load, settings.model, settings.data, settings.train_samples, settings.pruner, seed)
    result = pruned(scores, params, compression=settings.compression,
                    steps=steps_of(settings.pruner, settings.prune_steps))
    return result.masks, result.to_dict()


@lru_cache(maxsize=4)
def _score(load: Loader, name: str, data: str, samples: int | None, pruner: str, seed: int
           ) -> Callable[..., PyTree]:
    train = _choose(load(data, "train"), samples, seed)
    few = _choose(train, min(len(train), 10 * train.classes), seed)
    mean = train.raw.mean(axis=0, keepdims=True) if pruner.endswith("-dist") else None
    module = model(name, train.classes)
    apply_fn, _ = pk.from_linen(module, _init(module)(jax.random.key(seed), jnp.asarray(few.images[:1])))
    return score(pruner, apply_fn, few, seed=seed, mean=mean)


@lru_cache(maxsize=8)
def _traces(module: Any) -> Callable[..., dict[str, Array]]:
    """Compile (params, state, masks, images) → the traces at initialisation."""
    @jax.jit
    def traces(params: PyTree, state: PyTree, masks: PyTree, images: Array) -> dict[str, Array]:
        apply_fn, _ = pk.from_linen(module, {"params": params, **state})
        return {"trace_ntk": pk.ntk_trace(apply_fn, params, images, masks=masks),
                "gated_trace": pk.path_kernel.gated_trace(apply_fn, params, images, masks=masks)}

    return traces


@lru_cache(maxsize=8)
def _measurements(module: Any) -> Callable[..., dict[str, Array]]:
    """Compile (params, state, masks, (θ₀, state₀), images) → the row of an epoch."""
    @jax.jit
    def measurements(params: PyTree, state: PyTree, masks: PyTree, start: PyTree, images: Array) -> dict[str, Array]:
        before, state_before = start
        ones = pk.ones_input(images.shape[1:])

        def network(params: PyTree, state: PyTree) -> Any:
            return pk.from_linen(module, {"params": params, **state})[0]

        now = network(params, state)
        f, first = now(params, images), network(before, state_before)(before, images)
        moved = sum(jnp.sum(d**2) for d in jax.tree.leaves(jax.tree.map(jnp.subtract, params, before)))
        return {"ln_trace_pi": pk.path_kernel.trace(now, params, ones, masks=masks, log=True),
                "weight_change": jnp.sqrt(moved), "output_norm": jnp.linalg.norm(f),
                "output_change": jnp.linalg.norm(f - first)}

    return measurements


def _spectra(settings: Settings, module: Any, variables: PyTree, masks: PyTree, train: Dataset,
             tell: Callable[[str], None]) -> dict[str, Any]:
    """Analyze the spectra on a few images."""
    images = _choose(train, min(settings.spectra, len(train)), settings.seed).images
    apply_fn, params = pk.from_linen(module, variables)
    report = pk.analyze(apply_fn, params, images, masks=masks, progress=lambda part: tell(f"spectra: {part}"))
    count = min(len(report.nu), len(report.pi))
    return {"bound": float((report.nu[:count] * report.pi[:count]).sum()),
            "captured": np.cumsum(report.carried).tolist(),
            "lam": report.lam.tolist(), "nu": report.nu.tolist(), "pi": report.pi.tolist(),
            "trace_ntk": report.trace_ntk, "effective_rank": report.effective_rank,
            "claims": {name: [claim.holds, claim.slack] for name, claim in report.claims.items()},
            "checks": all(check.passed for check in report.checks.values())}
