"""The settings of one run, and grids of runs from a TOML file."""

import hashlib
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pkjax as pk
from pkjax.experiments.methods import PRUNERS, model
from pkjax.training.recipes import Recipe, recipe

__all__ = ["Settings", "grid", "read_grid"]


@dataclass(frozen=True)
class Settings:
    """One run: initialise, prune, measure the kernels, train.

    Raises:
        ValueError: the settings describe no possible run; raised before anything is computed.

    Source: Gebhart, Saxena and Schrater (2021), section 5 and appendix A.4.

    Examples:
        >>> Settings(model="fc-100", data="mnist", pruner="synflow", compression=1.0).recipe.epochs
        50
    """

    model: str = "fc-100"
    """Name of a network on the command line."""
    data: str = "digits"
    """One of `pk.data.names`."""
    pruner: str = "none"
    """A pruner, or "none" for the dense network."""
    compression: float = 0.0
    """ρ: keep the fraction 10^-ρ of the weights."""
    seed: int = 0
    """Seed of the initialisation, the choice of images and the order of training."""
    prune_steps: int | None = None
    """Pruning steps; None takes the default of the pruner."""
    epochs: int | None = None
    """Passes over the training images; None, here and below, as the paper trains this model on this data set."""
    batch_size: int | None = None
    """Images per step."""
    learning_rate: float | None = None
    """η of the first epoch."""
    weight_decay: float | None = None
    """w: the gradient is that of the loss and w θ."""
    drops: tuple[int, ...] | None = None
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

    def __post_init__(self) -> None:
        """Refuse settings that describe no possible run."""
        model(self.model, 10)
        if self.data not in pk.data.names:
            raise ValueError(f"unknown data set {self.data!r}; choose from {', '.join(pk.data.names)}")
        if self.pruner not in (*PRUNERS, "none"):
            raise ValueError(f"unknown pruner {self.pruner!r}; choose from none, {', '.join(PRUNERS)}")
        if not 0 <= self.compression < float("inf"):
            raise ValueError(f"compression must be a number of at least 0, got {self.compression}")
        for name in ("prune_steps", "train_samples", "test_samples", "output_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "traces", "spectra"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        _ = self.recipe
        if self.pruner == "none" or self.compression == 0:    # one name for the dense network
            for name, value in (("pruner", "none"), ("compression", 0.0), ("prune_steps", None)):
                object.__setattr__(self, name, value)

    @property
    def recipe(self) -> Recipe:
        """How to train: the paper's recipe for the model and data, with the values set here."""
        own = {name: getattr(self, name) for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "drops")}
        return replace(recipe(self.model, self.data), **{k: v for k, v in own.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return every value, ready for JSON, including the defaults, which a later version might change."""
        chosen = asdict(self.recipe)
        return {**asdict(self), **{name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items()}}

    @property
    def key(self) -> str:
        """Fingerprint of the run: equal for equal runs, in any process and on any machine.

        Examples:
            >>> Settings().key == Settings(pruner="none", epochs=50).key, Settings().key == Settings(seed=1).key
            (True, False)
        """
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def grid(table: Mapping[str, Any]) -> list[Settings]:
    """Build the runs of a table of settings, where a list of values is an axis of the grid.

    The last axis varies fastest.

    Raises:
        ValueError: a setting is unknown, a list is empty, or a run is impossible.
        TypeError: a value has the wrong type.

    Examples:
        >>> [(s.pruner, s.seed) for s in grid({"pruner": ["snip", "grasp"], "seed": [0, 1], "compression": 1})]
        [('snip', 0), ('snip', 1), ('grasp', 0), ('grasp', 1)]
    """
    known = {field.name: field.type for field in fields(Settings)}
    for name in table:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; choose from {', '.join(known)}")
    axes = {name: value if isinstance(value, list) and name != "drops" else [value] for name, value in table.items()}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"the list of {name} is empty")
    return [Settings(**{name: _fitting(name, value, known[name]) for name, value in zip(axes, values, strict=True)})
            for values in itertools.product(*axes.values())]


def read_grid(path: Path) -> list[Settings]:
    """Read the runs of a sweep from a TOML file: tables `[[grid]]` over `[defaults]`, each run once.

        [defaults]
        data = "mnist"
        seed = [0, 1, 2]

        [[grid]]
        model = ["fc-100", "fc-500"]
        pruner = ["synflow", "synflow-l2"]
        compression = [1.0, 2.0]

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a TOML file or describes no sweep; the message names what does not fit.
        TypeError: a value has the wrong type.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    unknown = set(content) - {"defaults", "grid"}
    if unknown:
        raise ValueError(f"{path} holds {sorted(unknown)[0]!r}; a sweep has a table [defaults] and tables [[grid]]")
    tables = content.get("grid", [{}])
    defaults = content.get("defaults", {})
    if not isinstance(tables, list) or not isinstance(defaults, dict):
        raise ValueError(f"{path}: write [defaults] and [[grid]] (in two brackets)")
    try:
        runs = [settings for table in tables for settings in grid({**defaults, **table})]
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
    return list({settings.key: settings for settings in runs}.values())


def _types(annotation: Any) -> tuple[type, ...]:
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return tuple(typing.get_origin(part) or part for part in parts)


def _fitting(name: str, value: Any, annotation: Any) -> Any:
    """Accept an integer as a number and a list as a tuple, as TOML writes them; refuse other types."""
    allowed = _types(annotation)
    if float in allowed and type(value) is int:
        value = float(value)
    if tuple in allowed and isinstance(value, list) and all(type(part) is int for part in value):
        value = tuple(value)
    if type(value) not in allowed:
        wanted = " or ".join(kind.__name__ for kind in allowed if kind is not types.NoneType)
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    return value
