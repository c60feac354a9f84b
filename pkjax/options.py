"""Options of the command line, and the networks, data and pruners that their names stand for."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

import pkjax as pk
from pkjax.data import Dataset
from pkjax.trees import ApplyFn

__all__ = ["PRUNERS", "Analyze", "Network", "Prune", "check", "network", "score", "steps_of"]

MODELS = ("vgg11", "vgg16", "resnet20", "wide_resnet20", "resnet18", "wide_resnet18")
PRUNERS = ("random", "magnitude", "snip", "grasp", "synflow", "synflow-l2", "synflow-dist", "synflow-l2-dist")
GRASP_TEMPERATURE = 200.0


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    model: str = "fc-100"
    """Network: fc-WIDTH (six hidden layers), fc-WIDTHxDEPTH, vgg11, vgg16, resnet20, wide_resnet20, resnet18,
    wide_resnet18."""
    data: str = "digits"
    """Data set: digits (ships with scikit-learn), mnist, fashion_mnist, cifar10, cifar100."""
    pruner: str = "synflow-l2"
    """Score: random, magnitude, snip, grasp, synflow, synflow-l2, synflow-dist, synflow-l2-dist."""
    compression: float = 1.0
    """ρ: keep the fraction 10^-ρ of the weights."""
    steps: int | None = None
    """Pruning steps; by default 100 for the synflow family and 1 for the others."""
    samples: int = 32
    """Images to use, chosen by the seed."""
    seed: int = 0
    """Seed of the initialisation, of the choice of images and of random scores."""


@dataclass(frozen=True)
class Analyze(Common):
    """Compare tangent kernel, path kernel and data factor, dense and pruned.

    Writes report.html, report.json, pictures and masks into a folder.
    """

    masks: Path | None = None
    """Take the masks of this file instead of pruning."""
    k: int | None = None
    """Eigenpairs of the path kernel; by default as many as images times outputs."""
    output: Path = Path("pkjax-report")
    """Folder to write."""


@dataclass(frozen=True)
class Prune(Common):
    """Prune a network at initialisation; write its masks, show its layers."""

    output: Path = Path("masks.npz")
    """File to write: bit-packed npz, to be read by pkjax.load_masks."""


def check(options: Common) -> None:
    """Raise ValueError for options that no run could satisfy, before anything is computed."""
    if options.pruner not in PRUNERS:
        raise ValueError(f"no pruner {options.pruner!r}; there are {', '.join(PRUNERS)}")
    if options.data not in pk.data.names:
        raise ValueError(f"no data set {options.data!r}; there are {', '.join(pk.data.names)}")
    _builder(options.model)
    for name in ("samples", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
    if not 0 <= options.compression < float("inf"):
        raise ValueError(f"--compression must be a number of at least 0, got {options.compression}")


def _builder(name: str) -> Callable[[int], Any]:
    if found := re.fullmatch(r"fc-([1-9]\d{0,5})(?:x([1-9]\d?))?", name):
        width, depth = int(found[1]), int(found[2] or 6)
        return lambda classes: pk.models.fc(width, depth, classes)
    if name in MODELS:
        return lambda classes: getattr(pk.models, name)(classes)
    raise ValueError(f"no model {name!r}; there are fc-WIDTH and fc-WIDTHxDEPTH (as in fc-100x6), {', '.join(MODELS)}")


@dataclass(frozen=True)
class Network:
    """A network at initialisation with the images it is looked at on."""

    apply_fn: ApplyFn
    params: PyTree
    dataset: Dataset


def network(options: Common) -> Network:
    """Load the images that the options choose and initialise the network they name."""
    dataset = pk.data.load(options.data, samples=options.samples, seed=options.seed)
    module = _builder(options.model)(dataset.classes)
    variables = jax.jit(module.init)(jax.random.key(options.seed), dataset.images[:1])
    apply_fn, params = pk.from_linen(module, variables)
    return Network(apply_fn, params, dataset)


def steps_of(options: Common) -> int:
    """Count the pruning steps: what was asked for, else 100 for the SynFlow family and 1 for the others."""
    return options.steps if options.steps is not None else 100 if options.pruner.startswith("synflow") else 1


def score(options: Common, net: Network) -> Callable[[PyTree], PyTree]:
    """Build the score function that the options name; -dist takes the mean of the raw images as its input."""
    images, labels = jnp.asarray(net.dataset.images), jnp.asarray(net.dataset.labels)
    ones = pk.ones_input(images.shape[1:])

    def loss(params: PyTree, temperature: float = 1.0) -> Array:
        logits = jax.nn.log_softmax(net.apply_fn(params, images) / temperature)
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    def synflow(params: PyTree) -> PyTree:
        z = pk.mean_input(net.dataset.raw) if options.pruner.endswith("-dist") else ones
        saliency = pk.synflow_l2 if "-l2" in options.pruner else pk.synflow
        return saliency(net.apply_fn, params, z)

    return {
        "random": lambda params: pk.random(params, key=jax.random.key(options.seed)),
        "magnitude": pk.magnitude,
        "snip": lambda params: pk.snip(loss, params),
        "grasp": lambda params: pk.grasp(lambda p: loss(p, GRASP_TEMPERATURE), params),
    }.get(options.pruner, synflow)
