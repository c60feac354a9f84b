"""Options of the command line, and the networks and images that they choose."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import PyTree

import pkjax as pk
from pkjax.data import Dataset
from pkjax.experiments.methods import PRUNERS, model
from pkjax.trees import ApplyFn

__all__ = ["Analyze", "Figures", "Network", "Prune", "Sweep", "Train", "check", "network"]

@dataclass(frozen=True)
class Common:
    """What every command takes."""

    model: str = "fc-100"
    """Network: fc-WIDTH (six hidden layers), fc-WIDTHxDEPTH, vgg11, vgg16, resnet20, wide_resnet20, resnet18,
    wide_resnet18; with -plain, without BatchNorm."""
    data: str = "digits"
    """Data set: digits (ships with scikit-learn), mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet."""
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


@dataclass(frozen=True)
class Train:
    """Train a network, dense or pruned at initialisation, as the paper does.

    Writes record.json, masks.npz, training.png and a checkpoint into a folder.

    After an interruption the same command goes on.
    """

    model: str = "fc-100"
    """Network: fc-WIDTH (six hidden layers), fc-WIDTHxDEPTH, vgg11, vgg16, resnet20, wide_resnet20, resnet18,
    wide_resnet18; with -plain, without BatchNorm."""
    data: str = "digits"
    """Data set: digits (ships with scikit-learn), mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet."""
    pruner: str = "none"
    """Score: none (train all weights), random, magnitude, snip, grasp, synflow, synflow-l2, synflow-dist,
    synflow-l2-dist."""
    compression: float = 1.0
    """ρ: keep the fraction 10^-ρ of the weights."""
    steps: int | None = None
    """Pruning steps; by default 100 for the synflow family and 1 for the others."""
    epochs: int | None = None
    """Epochs; by default, here and below, what the paper's tables say for the network and the data."""
    learning_rate: float | None = None
    """Learning rate of Adam at the beginning."""
    batch_size: int | None = None
    """Images in a batch."""
    weight_decay: float | None = None
    """Weight of the ℓ2 term in the gradient."""
    drops: tuple[int, ...] | None = None
    """Epochs after which the learning rate falls to a tenth."""
    train_samples: int | None = None
    """Training images, chosen by the seed; by default all."""
    seed: int = 0
    """Seed of everything random."""
    output: Path = Path("pkjax-run")
    """Folder to write."""


@dataclass(frozen=True)
class Sweep:
    """Run a grid of experiments from a TOML file.

    Writes a folder with a record of every run, and table.parquet of them all.

    After an interruption of any kind the same command goes on.
    """

    config: Path
    """TOML file with [defaults] and tables [[grid]]; a list of values is an axis of the grid."""
    output: Path | None = None
    """Folder of results; by default the name of the file without .toml."""
    workers: int = 1
    """Local processes; one is right where there is an accelerator."""
    ray: str | None = None
    """Address of a Ray cluster to run on, auto for the running one."""
    gpus: float = 0.0
    """GPUs that one run takes of the cluster."""
    retry: bool = False
    """Run again what failed before."""


@dataclass(frozen=True)
class Figures:
    """Draw a figure of the paper, or one that it lacks, from a sweep."""

    figure: str
    """1 (training against Tr Π, with the forecast), 2 (against Tr Π at initialisation), 3 (accuracy against
    compression), predictors (traces and bounds side by side), captured (Tr Θ in the top path eigenvectors), claims (a
    table on the screen)."""
    results: Path
    """Folder of results of pkjax sweep, or the table.parquet in it."""
    output: Path | None = None
    """Picture to write; by default figure-NAME.png in the folder of results, or beside the table."""


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
