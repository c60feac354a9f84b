"""The models and pruners that names stand for."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import pkjax as pk
from pkjax.data.dataset import Dataset
from pkjax.trees import ApplyFn

__all__ = ["MODELS", "PRUNERS", "model", "pruned", "score", "steps_of", "weights"]

MODELS = ("vgg11", "vgg16", "resnet20", "wide_resnet20", "resnet18", "wide_resnet18")
PRUNERS = ("random", "magnitude", "snip", "grasp", "synflow", "synflow-l2", "synflow-dist", "synflow-l2-dist",
           "path-exclusion", "ntk-trace")
GRASP_TEMPERATURE = 200.0


@lru_cache(maxsize=32)
def model(name: str, classes: int) -> Any:
    """Build the Linen module that a name stands for; ``-plain`` leaves BatchNorm out.

    Raises ValueError for an unknown name.

    >>> model("fc-100x2", 10).depth, model("resnet20-plain", 10).plain
    (2, True)
    """
    if found := re.fullmatch(r"fc-([1-9]\d{0,5})(?:x([1-9]\d?))?", name):
        return pk.models.fc(int(found[1]), int(found[2] or 6), classes)
    base = name.removesuffix("-plain")
    if base in MODELS:
        return getattr(pk.models, base)(classes, plain=base != name)
    raise ValueError(f"no model {name!r}; there are fc-WIDTH and fc-WIDTHxDEPTH (as in fc-100x6), {', '.join(MODELS)}, "
                     "and these with -plain, without BatchNorm")


def steps_of(pruner: str, steps: int | None) -> int:
    """Count the pruning steps: what was asked for, else 100 for the SynFlow family and PX, and 1 for the others.

    Source: for SynFlow Tanaka et al. (2020); for PX the launch scripts of its authors (iurada/px-ntk-pruning).
    """
    return steps if steps is not None else 100 if pruner.startswith(("synflow", "path-exclusion")) else 1


def weights(params: PyTree) -> int:
    """Count the weights that can be pruned.

    >>> weights({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    6
    """
    return sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if pk.kernels(path, leaf))


def pruned(score_fn: Callable[..., PyTree], params: PyTree, *, compression: float | int, steps: int) -> pk.PruneResult:
    """Prune as ``pk.prune`` does, but not to nothing.

    Raises ValueError, before anything is computed, for a compression that keeps no weight at all; else what
    ``pk.prune`` does.

    >>> pruned(pk.magnitude, {"kernel": jnp.eye(4)}, compression=2, steps=1)
    Traceback (most recent call last):
    ...
    ValueError: a compression of 2 keeps none of the 16 weights; below 1.50 it keeps some
    """
    total = weights(params)
    if round(total * 10**-compression) == 0:
        most = np.floor(100 * np.log10(2 * total)) / 100
        raise ValueError(f"a compression of {compression:g} keeps none of the {total:,} weights; "
                         f"below {most:.2f} it keeps some")
    return pk.prune(score_fn, params, compression=compression, steps=steps)


def score(pruner: str, apply_fn: ApplyFn, examples: Dataset, *, seed: int, mean: np.ndarray | None = None
          ) -> Callable[..., PyTree]:
    """Build the score function of a pruner.

    Args:
        pruner: one of ``PRUNERS``.
        apply_fn: the network.
        examples: labelled images for SNIP and GraSP; PX and the tangent kernel's trace take the images alone.
        seed: for random scores.
        mean: (1, H, W, C), the mean raw image for -dist; None takes that of ``examples``.
    """
    if pruner not in PRUNERS:
        raise ValueError(f"no pruner {pruner!r}; there are {', '.join(PRUNERS)}")

    def loss(params: PyTree, temperature: float = 1.0) -> Array:
        logits = jax.nn.log_softmax(apply_fn(params, jnp.asarray(examples.images)) / temperature)
        return -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(examples.labels)[:, None], axis=1))

    if pruner.startswith("synflow"):
        saliency = pk.synflow_l2 if "-l2" in pruner else pk.synflow
        if pruner.endswith("-dist"):
            z = pk.mean_input(examples.raw) if mean is None else jnp.asarray(mean)
        else:
            z = pk.ones_input(examples.images.shape[1:])
        return lambda params: saliency(apply_fn, params, z)

    # These two tell an absent weight from one that is merely 0.
    def path_exclusion(params: PyTree, masks: PyTree) -> PyTree:
        return pk.path_exclusion(apply_fn, params, jnp.asarray(examples.images), masks=masks)

    def ntk_trace(params: PyTree, masks: PyTree) -> PyTree:
        return pk.ntk_trace_saliency(apply_fn, params, jnp.asarray(examples.images), masks=masks)

    scores: dict[str, Callable[..., PyTree]] = {
        "random": lambda params: pk.random(params, key=jax.random.key(seed)),
        "magnitude": pk.magnitude,
        "snip": lambda params: pk.snip(loss, params),
        "grasp": lambda params: pk.grasp(lambda p: loss(p, GRASP_TEMPERATURE), params),
        "path-exclusion": path_exclusion,
        "ntk-trace": ntk_trace,
    }
    return scores[pruner]
