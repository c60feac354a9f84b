"""The settings of one run, and grids of runs from a TOML file."""

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pkjax.experiments.gates import check_gates
from pkjax.experiments.methods import steps_of
from pkjax.experiments.named_models import SIGNAL_MODELS
from pkjax.experiments.user_code import import_beside, is_own
from pkjax.experiments.values import NAMES, Name, checked_name, fitting
from pkjax.training.recipes import Recipe, recipe

__all__ = ["MOST", "Settings", "grid", "read_file", "read_grid", "recorded_settings", "unique"]

@dataclass(frozen=True)
class Settings:
    """One run: initialise, prune, measure the kernels, train.

    Whole numbers stand for floating-point ones, and lists for tuples. A model, a data set and a pruner may be the
    user's own: a function of an importable module, or its name `"module:function"`. The setting then becomes
    `"module:function@version"`, where the version is the `__version__` or `VERSION` that the module declares, else a
    hash of its file and of the files that it imports from the same folder. What is passed to a function goes by name:

    - `make(classes)` returns a Linen module or a pair of functions (init, apply); `make(classes, rngs)` an NNX module.
    - `score(params, …)` returns scores like the parameters. It may also take `apply_fn`, `images` and `labels` (ten
      images a class), `loss` (parameters → mean cross entropy of these images), `masks`, `key`, `gates` and `reference`
      (None, or "frozen" and an array). It is traced, as by `jax.jit`; its attribute `steps` is the default of
      `prune_steps`, else 1.
    - `load()` returns (train, test), each a pair of images (N, …), as bytes or floating-point numbers, and labels (N,)
      from 0, or a `pk.data.Dataset`. Bytes are normalised by the training images' mean and standard deviation of each
      channel, numbers are taken as they are.

    Raises:
        ValueError: the settings describe no possible run; raised before anything is computed. Or a function of the
            user's own is not found, cannot be imported by other processes (a lambda, a function in a function or in
            `__main__`), or belongs to another version than the one that is named.
        TypeError: a value has the wrong type, or a function of the user's own takes other arguments.

    Source: Gebhart, Saxena and Schrater (2021), section 5 and appendix A.4.

    Examples:
        >>> Settings(model="fc-100", data="mnist", pruner="synflow", compression=1.0).recipe.epochs
        50
    """

    model: Name = "fc-100"
    """Name of a network on the command line, or one of the user's own."""
    data: Name = "digits"
    """One of `pk.data.names`, or a data set of the user's own."""
    pruner: Name = "none"
    """A pruner, or "none" for the dense network, or a score of the user's own."""
    compression: float | int = 0.0
    """ρ: keep the fraction 10^-ρ of the weights."""
    seed: int = 0
    """Seed of the initialisation, the choice of images and the order of training."""
    prune_steps: int | None = None
    """Pruning steps, of "imp" and "magnitude-after-training" rounds of training; None takes the pruner's default."""
    epochs: int | None = None
    """Passes over the training images; None, here and below, as the paper trains this model on this data set. A model
    of the user's own trains as ResNet-20 (100 epochs at 0.001, a tenth after 60); data of the user's own is not
    augmented, and else treated as CIFAR-10."""
    batch_size: int | None = None
    """Images per step."""
    learning_rate: float | int | None = None
    """η of the first epoch."""
    weight_decay: float | int | None = None
    """w: the gradient is that of the loss and w θ."""
    drops: Sequence[int] | None = None
    """Epochs after which the learning rate drops."""
    train_samples: int | None = None
    """Training images, None for all."""
    test_samples: int | None = None
    """Test images, None for all."""
    output_samples: int = 1000
    """Training images on which ‖f_t‖ is measured."""
    traces: int = 16
    """Images for Tr Θ and the gated path trace; 0 omits both."""
    spectra: int = 0
    """Images for Σ ν_i π_i and the share of Tr Θ in the top path eigenvectors; 0 omits both."""
    gates: str | None = None
    """"frozen" for networks that are not piecewise linear: pruners and traces of paths take gates as coefficients."""
    reference: str | None = None
    """With frozen gates, where coefficients are taken: at an input of "ones" (the default), or at 16 training "images",
    chosen by the seed, on average."""

    def __post_init__(self) -> None:
        """Refuse settings that describe no possible run, and give equal runs equal values."""
        for field in fields(self):
            object.__setattr__(self, field.name, fitting(field.name, getattr(self, field.name), field.type))
        for what in NAMES:
            object.__setattr__(self, what, checked_name(getattr(self, what), what))
        object.__setattr__(self, "reference", check_gates(self.gates, self.reference))
        if self.gates is None and self.model.split("-")[0] in SIGNAL_MODELS:
            raise ValueError(f"{self.model} is not a sum over paths, which runs measure: set gates to frozen (--gates "
                             "frozen on the command line)")
        if not 0 <= self.compression < float("inf"):
            raise ValueError(f"compression must be a number of at least 0, got {self.compression}")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                wanted = "must not be negative" if value < least == 0 else f"must be at least {least}" if (
                    value < least) else f"must be at most {most}"
                raise ValueError(f"{name} {wanted}, got {value}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and value > _FLOAT32:
                raise ValueError(f"{name} must be at most {_FLOAT32:.3g}, the largest float32, got {value}")
        if self.drops is not None:
            object.__setattr__(self, "drops", tuple(sorted(self.drops)))
        chosen = self._chosen
        if self.drops and (len(set(self.drops)) < len(self.drops) or self.drops[-1] > chosen.epochs):
            raise ValueError(f"drops must be different epochs, none beyond the last ({chosen.epochs}), got "
                             f"{self.drops}")
        if self.pruner == "none" or self.compression == 0:    # one name for the dense network
            for name, value in (("pruner", "none"), ("compression", 0.0), ("prune_steps", None)):
                object.__setattr__(self, name, value)
        elif is_own(self.pruner):       # a record of it can be read without it
            object.__setattr__(self, "prune_steps", steps_of(self.pruner, self.prune_steps))

    @property
    def _chosen(self) -> Recipe:
        own = {name: getattr(self, name) for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "drops")}
        nearest = recipe("" if is_own(self.model) else self.model, "" if is_own(self.data) else self.data)
        if is_own(self.data):
            nearest = replace(nearest, augment=False)
        return replace(nearest, **{k: v for k, v in own.items() if v is not None})

    @property
    def recipe(self) -> Recipe:
        """How to train: the paper's recipe for the model and data, with the values set here.

        Drops that come with the last epoch or after it have no effect and are left out.
        """
        chosen = self._chosen
        return replace(chosen, drops=tuple(drop for drop in chosen.drops if drop < chosen.epochs))

    def to_dict(self) -> dict[str, Any]:
        """Return every value, ready for JSON, including the defaults, which a later version might change."""
        steps = None if self.pruner == "none" else steps_of(self.pruner, self.prune_steps)
        values = {**asdict(self), **asdict(self.recipe), "prune_steps": steps}
        if self.gates is None:      # as before there were any
            values = {name: value for name, value in values.items() if name not in _LATER}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def key(self) -> str:
        """Fingerprint of the run: equal for equal runs, in any process and on any machine.

        Examples:
            >>> Settings().key == Settings(pruner="none", epochs=50).key, Settings().key == Settings(seed=1).key
            (True, False)
        """
        return hashlib.sha256(self._text({}).encode()).hexdigest()[:16]

    @property
    def program(self) -> str:
        """Everything that decides which program trains the network: equal for runs that can train together.

        Those differ in seed, pruner, compression and pruning steps at most.

        Examples:
            >>> Settings().program == Settings(pruner="snip", compression=1.0, seed=1).program
            True
            >>> Settings().program == Settings(epochs=3).program
            False
        """
        return self._text(dict.fromkeys(("seed", "pruner", "compression", "prune_steps")))

    def _text(self, instead: Mapping[str, Any]) -> str:
        """Write every value, but for those that others stand in place of."""
        # fc-100x6 is another name of fc-100.
        values = {**self.to_dict(), "model": re.sub(r"^(fc-\d+)x6$", r"\1", self.model), **instead}
        return json.dumps(values, sort_keys=True)


_RANGES = (("seed", 0, 2**32 - 1), *((name, 0, 2**31 - 1) for name in ("traces", "spectra")), *(
    (name, 1, 2**31 - 1) for name in ("prune_steps", "epochs", "batch_size", "train_samples", "test_samples",
                                      "output_samples")))
"""Settings that are whole numbers, with their least and largest values; JAX takes 2³² for the seed 0."""
_LATER = ("gates", "reference")
"""Settings that records hold only where gates are frozen, so that those without are the runs they were before."""
_FLOAT32 = float(np.finfo(np.float32).max)
MOST = 100_000
"""Runs of one sweep at most."""


def recorded_settings(values: Mapping[str, Any]) -> Settings:
    """Build the settings whose `to_dict` a record holds.

    Raises:
        ValueError: a setting is missing, foreign or impossible; the message names it.

    Examples:
        >>> recorded_settings(Settings(seed=3).to_dict()).key == Settings(seed=3).key
        True
    """
    names = [field.name for field in fields(Settings)]
    missing = [name for name in names if name not in (*values, *_LATER)]
    if missing:
        raise ValueError(f"its settings lack {', '.join(missing)}")
    try:
        chosen = Settings(**{name: values[name] for name in names if name in values})
    except TypeError as error:
        raise ValueError(str(error)) from error
    expected = chosen.to_dict()
    foreign = [name for name in {**values, **expected} if values.get(name, ...) != expected.get(name, ...)]
    if foreign:
        raise ValueError(f"its settings hold {', '.join(f'{name} {values.get(name)!r}' for name in foreign)}, "
                         "which no run of this version has")
    return chosen


def unique(runs: Iterable[Settings]) -> list[Settings]:
    """Keep the first of the runs that are equal.

    Examples:
        >>> [run.seed for run in unique([Settings(seed=1), Settings(seed=0), Settings(seed=1, epochs=50)])]
        [1, 0]
    """
    kept: dict[str, Settings] = {}
    for run in runs:
        kept.setdefault(run.key, run)
    return list(kept.values())


def grid(table: Mapping[str, Any]) -> list[Settings]:
    """Build the runs of a table of settings, where a list of values is an axis of the grid.

    The last axis varies fastest. Equal runs come once.

    Raises:
        ValueError: a setting is unknown, a list is empty, a run is impossible, or there are more than 100,000.
        TypeError: a value has the wrong type.

    Examples:
        >>> [(s.pruner, s.seed) for s in grid({"pruner": ["snip", "grasp"], "seed": [0, 1], "compression": 1})]
        [('snip', 0), ('snip', 1), ('grasp', 0), ('grasp', 1)]
    """
    axes = _axes(table)
    _count([axes])
    kinds = {field.name: field.type for field in fields(Settings)}
    return unique(Settings(**{name: fitting(name, value, kinds[name]) for name, value in zip(axes, run, strict=True)})
                  for run in itertools.product(*axes.values()))


def _axes(table: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Make every setting of a table a list of values."""
    known = [field.name for field in fields(Settings)]
    for name in table:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; choose from {', '.join(known)}")
    axes = {name: value if isinstance(value, list) and name != "drops" else [value] for name, value in table.items()}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"the list of {name} is empty")
        if name in NAMES:      # each once, not for every run
            axes[name] = [checked_name(fitting(name, value, str), name) for value in values]
    return axes


def _count(grids: Sequence[Mapping[str, list[Any]]]) -> None:
    """Refuse grids of too many runs before one of them is built."""
    total = sum(math.prod(map(len, axes.values())) for axes in grids)
    if total > MOST:
        raise ValueError(f"a sweep of {total:,} runs is too large: at most {MOST:,} go into one; shorten its lists, or "
                         "split it into several sweeps")


def read_file(path: Path) -> dict[str, Any]:
    """Read the TOML file of a sweep.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a TOML file, or holds what no sweep has.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    unknown = set(content) - {"defaults", "grid", "logger"}
    if unknown:
        raise ValueError(f"{path} holds {sorted(unknown)[0]!r}; a sweep has a table [defaults] and tables [[grid]]")
    return content


def read_grid(path: Path) -> list[Settings]:
    """Read the runs of a sweep from a TOML file: tables `[[grid]]` over `[defaults]`, each run once.

        [defaults]
        data = "mnist"
        seed = [0, 1, 2]

        [[grid]]
        model = ["fc-100", "fc-500"]
        pruner = ["synflow", "synflow-l2"]
        compression = [1.0, 2.0]

    Functions of the user's own, as in `model = "my_module:make"`, are imported from the folder of the file first, which
    is put at the front of `sys.path`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a TOML file or describes no sweep; the message names what does not fit.
        TypeError: a value has the wrong type.
    """
    content = read_file(path)
    tables = content.get("grid", [{}])
    defaults = content.get("defaults", {})
    if not isinstance(tables, list) or not isinstance(defaults, dict):
        raise ValueError(f"{path}: write [defaults] and [[grid]] (in two brackets)")
    try:
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError("write [defaults] and [[grid]] (in two brackets)")
        whole = [{**defaults, **table} for table in tables]
        if any(is_own(str(table.get(what))) for table in whole for what in NAMES):
            import_beside(path)
        _count([_axes(table) for table in whole])
        return unique(settings for table in whole for settings in grid(table))
    except (ValueError, TypeError) as error:
        raise (ValueError if isinstance(error, ValueError) else TypeError)(f"{path}: {error}") from error
