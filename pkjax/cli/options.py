"""Options of the command line, and the networks and images that they choose."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jaxtyping import PyTree
from tyro.conf import arg

import pkjax as pk
from pkjax.data.dataset import Dataset
from pkjax.experiments.methods import PRUNERS, model
from pkjax.trees import ApplyFn

__all__ = ["COMMANDS", "Analyze", "Figures", "Network", "Options", "Prune", "Sweep", "Train", "check", "network"]


def _value(metavar: str, parse: Callable[[str], Any], wanted: str) -> Any:
    """Say how an option reads its one value, so that help and errors name INT and a whole number, not types."""
    def read(words: list[str]) -> Any:
        try:
            return parse(words[0])
        except ValueError:
            raise ValueError(f"expected {wanted}, got {words[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=read, is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)])


def _unset(default: str) -> Any:
    """Say in help what an option left out amounts to."""
    return arg(help_behavior_hint=f"(default: {default})")


INT, FLOAT = _value("INT", int, "a whole number"), _value("FLOAT", float, "a number")
INTS = _value("INT,INT,…", lambda text: tuple(int(part) for part in text.split(",")),
              "whole numbers with commas between them")
STR, PATH = _value("STR", str, "a word"), _value("PATH", Path, "a path")
STEPS = _unset("100 for the synflow family and path-exclusion, 1 for the others")
RECIPE = _unset("as in the paper's tables")


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    model: str = "fc-100"
    """Network: fc-WIDTH (six hidden layers), fc-WIDTHxDEPTH, vgg11, vgg16, resnet18, resnet20, wide_resnet18 or
    wide_resnet20; with -plain, without BatchNorm."""
    data: str = "digits"
    """Data set: digits (ships with scikit-learn), mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet."""
    pruner: str = "synflow-l2"
    """Score: random, magnitude, snip, grasp, synflow, synflow-l2, synflow-dist, synflow-l2-dist, path-exclusion or
    ntk-trace."""
    compression: Annotated[float, FLOAT] = 1.0
    """ρ: keep the fraction 10^-ρ of the weights."""
    steps: Annotated[int | None, INT, STEPS] = None
    """Pruning steps."""
    samples: Annotated[int, INT] = 32
    """Images to use, chosen by the seed."""
    seed: Annotated[int, INT] = 0
    """Seed of the initialisation, of the choice of images and of random scores."""


@dataclass(frozen=True)
class Analyze(Common):
    """Compare tangent kernel, path kernel and data factor, dense and pruned.

    Writes report.html, report.json, pictures and masks into a folder.
    """

    masks: Annotated[Path | None, PATH, _unset("prune")] = None
    """Take the masks of this file instead of pruning."""
    k: Annotated[int | None, INT, _unset("as many as images times outputs")] = None
    """Eigenpairs of the path kernel."""
    output: Path = Path("pkjax-report")
    """Folder to write."""


@dataclass(frozen=True)
class Prune(Common):
    """Prune a network at initialisation; write its masks, show its layers."""

    output: Path = Path("masks.npz")
    """File to write: bit-packed npz, to be read by pkjax.load_masks."""


@dataclass(frozen=True)
class Train:
    """Train a network, dense or pruned at initialisation, as the paper does.

    Writes record.json, masks.npz, training.png and a checkpoint into a folder.

    After an interruption the same command goes on.
    """

    model: str = "fc-100"
    """Network: fc-WIDTH (six hidden layers), fc-WIDTHxDEPTH, vgg11, vgg16, resnet18, resnet20, wide_resnet18 or
    wide_resnet20; with -plain, without BatchNorm."""
    data: str = "digits"
    """Data set: digits (ships with scikit-learn), mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet."""
    pruner: str = "none"
    """Score: none (train all weights), random, magnitude, snip, grasp, synflow, synflow-l2, synflow-dist,
    synflow-l2-dist, path-exclusion, ntk-trace."""
    compression: Annotated[float | None, FLOAT, _unset("1.0, with a pruner")] = None
    """ρ: keep the fraction 10^-ρ of the weights."""
    steps: Annotated[int | None, INT, STEPS] = None
    """Pruning steps."""
    epochs: Annotated[int | None, INT, RECIPE] = None
    """Epochs."""
    learning_rate: Annotated[float | None, FLOAT, RECIPE] = None
    """Learning rate of Adam at the beginning."""
    batch_size: Annotated[int | None, INT, RECIPE] = None
    """Images in a batch."""
    weight_decay: Annotated[float | None, FLOAT, RECIPE] = None
    """Weight of the ℓ2 term in the gradient."""
    drops: Annotated[tuple[int, ...] | None, INTS, RECIPE] = None
    """Epochs after which the learning rate falls to a tenth, as in 60,120."""
    train_samples: Annotated[int | None, INT, _unset("all")] = None
    """Training images, chosen by the seed."""
    seed: Annotated[int, INT] = 0
    """Seed of everything random."""
    output: Path = Path("pkjax-run")
    """Folder to write."""


@dataclass(frozen=True)
class Sweep:
    """Run a grid of experiments from a TOML file.

    Writes a folder with a record of every run, and table.parquet of them all.

    After an interruption of any kind the same command goes on.
    """

    config: Annotated[Path, arg(metavar="CONFIG")]
    """TOML file with [defaults] and tables [[grid]]; a list of values is an axis of the grid."""
    output: Annotated[Path | None, PATH, _unset("the name of CONFIG without .toml")] = None
    """Folder of results."""
    workers: Annotated[int, INT] = 1
    """Local processes; one is right where there is an accelerator."""
    ray: Annotated[str | None, STR, _unset("run on this machine")] = None
    """Address of a Ray cluster to run on, auto for the running one."""
    gpus: Annotated[float, FLOAT] = 0.0
    """GPUs that one run takes of the cluster."""
    retry: bool = False
    """Run again what failed before."""


@dataclass(frozen=True)
class Figures:
    """Draw a figure of the paper, or one that it lacks, from a sweep.

    - 1: training against Tr Π, with the forecast
    - 2: training against Tr Π at initialisation
    - 3: accuracy against compression
    - predictors: traces and bounds side by side
    - captured: the share of Tr Θ in the top path eigenvectors
    - claims: what the paper claims and what came out, as a table on the screen
    """

    figure: Annotated[str, arg(metavar="FIGURE")]
    """One of 1, 2, 3, predictors, captured, claims."""
    results: Annotated[Path, arg(metavar="RESULTS")]
    """Folder that pkjax sweep has written, or the table.parquet in it."""
    output: Annotated[Path | None, PATH, _unset("figure-FIGURE.png there")] = None
    """Picture to write."""


Options = Analyze | Prune | Train | Sweep | Figures
COMMANDS = {kind.__name__.lower(): kind for kind in (Analyze, Prune, Train, Sweep, Figures)}
"""Name → options."""


def check(options: Common) -> None:
    """Raise ValueError for options that no run could satisfy, before anything is computed."""
    if options.pruner not in PRUNERS:
        raise ValueError(f"no pruner {options.pruner!r}; there are {', '.join(PRUNERS)}")
    if options.data not in pk.data.names:
        raise ValueError(f"no data set {options.data!r}; there are {', '.join(pk.data.names)}")
    model(options.model, 10)
    for name in ("samples", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
    if not 0 <= options.compression < float("inf"):
        raise ValueError(f"--compression must be a number of at least 0, got {options.compression}")


@dataclass(frozen=True)
class Network:
    """A network at initialisation with the images it is looked at on."""

    apply_fn: ApplyFn
    params: PyTree
    dataset: Dataset


def network(options: Common) -> Network:
    """Load the images that the options choose and initialise the network they name."""
    dataset = pk.data.load(options.data, samples=options.samples, seed=options.seed)
    module = model(options.model, dataset.classes)
    variables = jax.jit(module.init)(jax.random.key(options.seed), dataset.images[:1])
    apply_fn, params = pk.from_linen(module, variables)
    return Network(apply_fn, params, dataset)
