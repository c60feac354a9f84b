"""Options of the command line, and the network and images that they choose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jaxtyping import PyTree
from tyro.conf import arg

import pkjax as pk
from pkjax.adapters import linen_init
from pkjax.data.dataset import Dataset
from pkjax.experiments.gates import (
    check_gates,
    check_paths,
    left_out,
    prunable_with,
    reference_input,
    warn_of_left_out,
)
from pkjax.experiments.measurements import choose
from pkjax.experiments.methods import PRUNERS, check_name, images_of, model, pruner_of, steps_of
from pkjax.experiments.named_models import MODELS, SIGNAL_MODELS
from pkjax.experiments.trained_masks import TRAINED
from pkjax.experiments.user_code import is_own
from pkjax.trees import ApplyFn, Choice

__all__ = ["COMMANDS", "FIGURES", "Analyze", "Common", "Compare", "Figures", "Network", "Options", "Prune", "Sweep",
           "Train", "check", "images", "initialised", "network"]


def _value(metavar: str, parse: Callable[[str], Any], wanted: str) -> Any:
    """Read an option of one value, with INT in help and "a whole number" in errors in place of type names."""
    def read(words: list[str]) -> Any:
        try:
            return parse(words[0])
        except ValueError:
            raise ValueError(f"expected {wanted}, got {words[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=read, is_instance=lambda value: True,
        str_from_instance=lambda value: [",".join(map(str, value)) if isinstance(value, tuple) else str(value)])


def _unset(default: str) -> Any:
    """Describe in help what happens without the option."""
    return arg(help_behavior_hint=f"(default: {default})")


def _or(names: Sequence[str]) -> str:
    """Join names for help.

    Examples:
        >>> _or(("snip", "grasp", "synflow"))
        'snip, grasp or synflow'
    """
    return f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]


INT, FLOAT = _value("INT", int, "a whole number"), _value("FLOAT", float, "a number")
INTS = _value("INT,INT,…", lambda text: tuple(int(part) for part in text.split(",")),
              "whole numbers with commas between them")
FLOATS = _value("FLOAT,FLOAT,…", lambda text: tuple(float(part) for part in text.split(",")),
                "numbers with commas between them")
NAMES = _value("STR,STR,…", lambda text: tuple(text.split(",")), "words with commas between them")
STR, PATH = _value("STR", str, "a word"), _value("PATH", Path, "a path")
MODEL = arg(help=f"Network: fc-WIDTH (six hidden layers), fc-WIDTHxDEPTH, {_or(MODELS)}. -plain at the end of a name "
                 f"leaves out BatchNorm. With --gates frozen also {_or(SIGNAL_MODELS)}, the first two of any size too: "
                 "vit_tiny-WIDTHxDEPTH. Or a function of your own, module:function, imported from this folder.")
DATA = arg(help=f"Data set: {_or(pk.data.names)}. All but digits are downloaded or read from a folder. "
                "Or module:function.")
STEPS = _unset(", ".join(f"{steps} for {_or(names)}" for steps in (100, 20, 10) if (names := [
    name for name in (*PRUNERS, *TRAINED) if steps_of(name, None) == steps])) + ", else 1")
RECIPE = _unset("as in the paper's tables")
GATES = arg(help="frozen for networks with attention, LayerNorm, GELU or gated units: what is not linear in the signal "
                 "becomes coefficients of paths, and leaves on no path are not pruned.",
            help_behavior_hint="(default: those of a piecewise linear network)")
REFERENCE = arg(help="Where these coefficients are taken: at an input of ones, or at the images.",
                help_behavior_hint="(default: ones)")
FIGURES = {
    "1": "training against Tr Π, with the forecast",
    "2": "training against Tr Π at initialisation",
    "3": "accuracy against compression",
    "predictors": "which number at initialisation predicts training best",
    "captured": "the share of Tr Θ in the top path eigenvectors",
    "claims": "the paper's claims and whether they held, as a table on the screen",
}
"""What `pkjax figures` draws → what it shows."""


@dataclass(frozen=True)
class Common:
    """Options of the commands that prune one network."""

    model: Annotated[str, MODEL] = "fc-100"
    data: Annotated[str, DATA] = "digits"
    pruner: Annotated[str, arg(help=f"Score to prune by: {_or(tuple(PRUNERS))}; or module:function.")] = "synflow-l2"
    compression: Annotated[float, FLOAT] = 1.0
    """Compression ρ: keep the fraction 10^-ρ of the weights."""
    steps: Annotated[int | None, INT, STEPS] = None
    """Number of pruning steps."""
    samples: Annotated[int, INT] = 32
    """Number of images, chosen by the seed."""
    seed: Annotated[int, INT] = 0
    """Seed of the initialisation, the choice of images and random scores."""
    gates: Annotated[str | None, STR, GATES] = None
    reference: Annotated[str | None, STR, REFERENCE] = None


@dataclass(frozen=True)
class Analyze(Common):
    """Compare tangent kernel, path kernel and data factor, dense and pruned.

    Writes a folder with report.html, report.json, pictures and masks.
    """

    masks: Annotated[Path | None, PATH, _unset("prune by --pruner")] = None
    """File of masks to use instead of pruning."""
    k: Annotated[int | None, INT, _unset("images times outputs, fewer for large networks")] = None
    """Number of eigenpairs of the path kernel."""
    output: Path = Path("pkjax-report")
    """Folder to write to."""


@dataclass(frozen=True)
class Compare:
    """Compare traces with spectra over pruners, compressions and seeds.

    Prints a table of Tr Π, the tangent kernel and their rank correlations.

    The dense network comes first.
    """

    model: Annotated[str, MODEL] = "fc-100"
    data: Annotated[str, DATA] = "digits"
    pruners: Annotated[tuple[str, ...], NAMES, arg(
        help=f"Scores to prune by, with commas between them: {_or(tuple(PRUNERS))}; or module:function.")] = (
            "magnitude", "snip", "synflow", "synflow-l2")
    compressions: Annotated[tuple[float, ...], FLOATS] = (0.5, 1.0, 1.5)
    """Compressions ρ: keep the fraction 10^-ρ of the weights."""
    seeds: Annotated[tuple[int, ...], INTS] = (0, 1, 2)
    """Seeds of the initialisation and of random scores; the images are the same for all."""
    steps: Annotated[int | None, INT, STEPS] = None
    """Number of pruning steps."""
    samples: Annotated[int, INT] = 16
    """Number of images."""
    gates: Annotated[str | None, STR, GATES] = None
    reference: Annotated[str | None, STR, REFERENCE] = None
    k: Annotated[int | None, INT, _unset("images times outputs, fewer for large networks")] = None
    """Number of eigenvalues of the path kernel for Σ ν_i π_i; 0 leaves that sum out."""
    json: Annotated[Path | None, PATH, _unset("none")] = None
    """File of results to write."""
    png: Annotated[Path | None, PATH, _unset("none")] = None
    """Picture to write; the end of its name says in which format."""


@dataclass(frozen=True)
class Prune(Common):
    """Prune a network at initialisation, write its masks and print its layers."""

    output: Path = Path("masks.npz")
    """File of masks to write, which pkjax.load_masks reads."""


@dataclass(frozen=True)
class Train:
    """Train a network, dense or pruned at initialisation, as in the paper.

    Writes a folder with record.json, masks.npz, training.png and a checkpoint.

    The same command resumes an interrupted training.
    """

    model: Annotated[str, MODEL] = "fc-100"
    data: Annotated[str, DATA] = "digits"
    pruner: Annotated[str, arg(help=f"Score to prune by: none, {_or((*PRUNERS, *TRAINED))}; or module:function.")
                      ] = "none"
    compression: Annotated[float | None, FLOAT, _unset("1.0 with a pruner")] = None
    """Compression ρ: keep the fraction 10^-ρ of the weights."""
    steps: Annotated[int | None, INT, STEPS] = None
    """Number of pruning steps."""
    epochs: Annotated[int | None, INT, RECIPE] = None
    """Number of epochs."""
    learning_rate: Annotated[float | None, FLOAT, RECIPE] = None
    """Learning rate of Adam in the first epoch."""
    batch_size: Annotated[int | None, INT, RECIPE] = None
    """Images in a batch."""
    weight_decay: Annotated[float | None, FLOAT, RECIPE] = None
    """Factor of the ℓ2 term in the gradient."""
    drops: Annotated[tuple[int, ...] | None, INTS, RECIPE] = None
    """Epochs after which the learning rate drops to a tenth, such as 60,120."""
    train_samples: Annotated[int | None, INT, _unset("all")] = None
    """Number of training images, chosen by the seed."""
    seed: Annotated[int, INT] = 0
    """Seed of everything that is random."""
    gates: Annotated[str | None, STR, GATES] = None
    reference: Annotated[str | None, STR, REFERENCE] = None
    output: Path = Path("pkjax-run")
    """Folder to write to."""


@dataclass(frozen=True)
class Sweep:
    """Run a grid of experiments from a TOML file.

    Writes a folder with a record of every run, and all of them in table.parquet.

    The same command resumes a sweep that was interrupted or killed.
    """

    config: Annotated[Path, arg(metavar="CONFIG")]
    """TOML file with a table [defaults] and tables [[grid]]; a list of values is an axis of the grid."""
    output: Annotated[Path | None, PATH, _unset("CONFIG without .toml, or CONFIG-results")] = None
    """Folder of results to write to."""
    workers: Annotated[int, INT] = 1
    """Number of local processes; keep 1 where there is an accelerator."""
    together: Annotated[int, INT] = 1
    """Runs that a process trains as one program; they differ in seed, pruner, compression and pruning steps alone."""
    ray: Annotated[str | None, STR, _unset("run in local processes")] = None
    """Address of a Ray cluster to run on; auto for the running one."""
    gpus: Annotated[float, FLOAT] = 0.0
    """GPUs of the cluster that one run occupies."""
    retry: bool = False
    """Repeat the runs that failed before."""
    logger: Annotated[str | None, STR, _unset("as the file says, else none")] = None
    """Logger of your own, module:Log, which hears of every run and epoch."""


@dataclass(frozen=True)
class Figures:
    """Draw a figure from the results of a sweep."""

    figure: Annotated[str, arg(metavar="FIGURE", help=f"Which figure: {_or(tuple(FIGURES))}.")]
    results: Annotated[Path, arg(metavar="RESULTS")]
    """Folder that pkjax sweep wrote, or the table.parquet in it."""
    output: Annotated[Path | None, PATH, _unset("figure-FIGURE.png in that folder")] = None
    """Picture to write."""


Figures.__doc__ = f"{Figures.__doc__}\n\nFIGURE is one of:\n" + "\n".join(
    f"- {name}: {text}" for name, text in FIGURES.items())


Options = Analyze | Compare | Prune | Train | Sweep | Figures
COMMANDS = {kind.__name__.lower(): kind for kind in (Analyze, Compare, Prune, Train, Sweep, Figures)}
"""Command → its options."""


def check(options: Common | Compare) -> None:
    """Refuse options that no run could satisfy, before anything is computed.

    Raises:
        ValueError: an option does not fit; the message names it.
    """
    if isinstance(options, Compare):
        pruners, compressions, seeds, name = options.pruners, options.compressions, options.seeds, "{}s"
    else:
        pruners, compressions, seeds, name = (options.pruner,), (options.compression,), (options.seed,), "{}"
    for pruner in pruners:
        if pruner in TRAINED:
            raise ValueError(f"the pruner {pruner} finds its masks by training: use pkjax train or pkjax sweep")
        pruner_of(pruner)
        check_name(pruner, "pruner")
    check_name(options.model, "model")
    check_name(options.data, "data")
    check_gates(options.gates, options.reference, "--")
    for option, least in (("samples", 1), ("steps", 1), *([("k", 0)] if isinstance(options, Compare) else [])):
        value = getattr(options, option)
        if value is not None and value < least:
            raise ValueError(f"--{option} must be at least {least}, got {value}")
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"--{name.format('seed')} must not be negative, got {seed}")
        if seed >= 2**32:
            raise ValueError(f"--{name.format('seed')} must be at most {2**32 - 1}, got {seed}")
    for compression in compressions:
        if not 0 <= compression < float("inf"):
            raise ValueError(f"--{name.format('compression')} must be a number of at least 0, got {compression}")
    for option, values in (("pruners", pruners), ("compressions", compressions), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"--{option} names a value twice: {','.join(map(str, values))}")


@dataclass(frozen=True, eq=False)
class Network:
    """A network at initialisation, and images."""

    apply_fn: ApplyFn
    params: PyTree
    dataset: Dataset
    gates: str | None
    reference: Any
    """The input whose coefficients are taken, where gates are frozen."""
    prunable: Choice
    """Which leaves are pruned."""

    @property
    def frozen(self) -> dict[str, Any]:
        """The arguments that freeze gates; none by default."""
        return {} if self.gates is None else {"gates": self.gates, "reference": self.reference}


def network(options: Common, *, paths: bool = False) -> Network:
    """Load the images that the options choose, and initialise the network that they name.

    Raises:
        NotPathNetworkError: paths are asked for, and the network has none.
    """
    return initialised(options, images(options.data, options.samples, options.seed), options.seed, paths=paths)


def images(name: str, samples: int, seed: int) -> Dataset:
    """Load some training images of a data set, chosen by the seed."""
    if is_own(name):
        return choose(images_of(name, "train"), samples, seed)
    return pk.data.load(name, samples=samples, seed=seed)


def initialised(options: Common | Compare, dataset: Dataset, seed: int, *, paths: bool = False) -> Network:
    """Initialise a network for images."""
    shape = dataset.pixels.shape[1:]
    module = model(options.model, dataset.classes, shape)
    variables = linen_init(module)(jax.random.key(seed), dataset.images[:1])
    apply_fn, params = pk.from_linen(module, variables)
    if paths:
        check_paths(options.model, apply_fn, params, shape, options.gates, "pass --gates frozen")
    prunable = prunable_with(options.gates, apply_fn, params, shape)
    warn_of_left_out(left_out(params, prunable))
    reference = reference_input(check_gates(options.gates, options.reference), dataset)
    return Network(apply_fn, params, dataset, options.gates, reference, prunable)
