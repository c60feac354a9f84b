"""Networks, scores and data sets of the user's own, checked and brought into the form of pkjax's."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pkjax.data.dataset import Dataset
from pkjax.experiments.user_code import accepted, find

__all__ = ["check_user", "score_arguments", "user_data", "user_model", "user_steps"]

_MODEL = "(classes) or (classes, rngs)"
_SCORE = "params and, as it needs them, apply_fn, images, labels, loss, masks, key, gates and reference"
_DATA = "no arguments"
_IN_SCORE = ("params", "apply_fn", "images", "labels", "loss", "masks", "key", "gates", "reference")


def check_user(name: str, what: str) -> None:
    """Import a model, pruner or data set by its full name, and check its arguments.

    Raises:
        ValueError: it cannot be found.
        TypeError: it takes other arguments than it is given; or the steps that a score declares are no steps.
    """
    function = find(name, what)
    if what == "model":
        accepted(function, what, name, _MODEL, ("classes", "rngs"), ("classes",))
    elif what == "pruner":
        score_arguments(name)
        user_steps(name)
    else:
        accepted(function, what, name, _DATA, ())


def score_arguments(name: str) -> list[str]:
    """Name the arguments that a score takes."""
    return accepted(find(name, "pruner"), "pruner", name, _SCORE, _IN_SCORE, ("params",))


def user_steps(name: str) -> int:
    """Return the pruning steps that a score declares by its attribute `steps`; 1 where it declares none.

    Raises:
        TypeError: the attribute is not a whole number of at least 1.
    """
    steps = getattr(find(name, "pruner"), "steps", 1)
    if type(steps) is not int or steps < 1:
        raise TypeError(f"the attribute steps of pruner {name!r} must be a whole number of at least 1, got {steps!r}")
    return steps


def user_model(name: str, classes: int) -> Any:
    """Build a network of the user's own as a Linen module.

    Raises:
        ValueError: as in `find`.
        TypeError: the function returns something else than a Linen module, an NNX module or a pair (init, apply), or a
            Linen module with a field that has no hash.
    """
    from flax import linen, nnx

    from pkjax.experiments.user_networks import Functions, Nnx

    function = find(name, "model")
    takes = accepted(function, "model", name, _MODEL, ("classes", "rngs"), ("classes",))

    def make(rngs: Any) -> Any:
        return function(classes=classes, **({"rngs": rngs} if "rngs" in takes else {}))

    network = make(nnx.Rngs(0))
    if isinstance(network, nnx.Module):
        if "rngs" not in takes:
            raise TypeError(f"model {name!r} returns an NNX module, so it must take (classes, rngs): the seed of a run "
                            "reaches the initialisation by rngs")
        return Nnx(make, type(network))
    if isinstance(network, linen.Module):
        lists = {key: _tuples(value) for key, value in vars(network).items() if isinstance(value, list | tuple)}
        network = network.clone(**lists) if lists else network      # nn.Sequential([…]) has no hash
        if listed := [f.name for f in dataclasses.fields(network)
                      if f.name != "parent" and f.init and not _hashable(getattr(network, f.name))]:
            raise TypeError(f"model {name!r} returns {type(network).__name__}, which has no hash because of its fields "
                            f"({', '.join(listed)}): use numbers, texts, tuples, or flax.core.FrozenDict for a "
                            "dictionary")
        return network
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        _check_apply(network[1], name)
        return Functions(*network)
    raise TypeError(f"model {name!r} must return a Linen module, an NNX module or a pair of functions (init, apply), "
                    f"but returned {network!r:.80}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if type(value) in (list, tuple) else value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _check_apply(apply: Any, name: str) -> None:
    """Refuse the function of a network that takes more than parameters and a batch, as Haiku's do before wrapping."""
    try:
        parameters = list(inspect.signature(apply).parameters.values())[1:]
    except (ValueError, TypeError):      # as of a compiled function
        return
    for argument, wrapped in (("state", "without_state"), ("rng", "without_apply_rng")):
        if any(p.name == argument and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
            raise TypeError(f"model {name!r} returns a pair whose apply takes {argument!r}, where it is called "
                            f"apply(params, x): wrap it, with Haiku as hk.{wrapped}(…)")


@lru_cache(maxsize=2)
def user_data(name: str) -> tuple[Dataset, Dataset]:
    """Load a data set of the user's own: training and test images.

    Raises:
        ValueError: as in `find`; shapes, labels or numbers do not fit.
        TypeError: the function returns something else than two data sets or pairs of arrays.
    """
    splits = find(name, "data")()
    if not isinstance(splits, Sequence) or len(splits) != 2:
        raise TypeError(f"data {name!r} must return (train, test), each a pair (images, labels) or a "
                        f"pk.data.Dataset, but returned {_kind(splits)}")
    train = _dataset(splits[0], name, "training", None)
    test = _dataset(splits[1], name, "test", train)
    if (test.pixels.shape[1:], test.pixels.dtype) != (train.pixels.shape[1:], train.pixels.dtype) or (
            test.labels.max() >= train.classes):
        raise ValueError(f"the test images of {name!r} must be like the training images, {_images(train)} in "
                         f"{train.classes} classes, got {_images(test)} with labels up to {test.labels.max()}")
    return train, test


def _images(data: Dataset) -> str:
    return f"{data.pixels.dtype} of shape (N, {', '.join(map(str, data.pixels.shape[1:]))})"


def _kind(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, Sequence | Mapping) else ""
    return f"{type(value).__name__}{length}"


def _dataset(part: Any, name: str, split: str, train: Dataset | None) -> Dataset:
    """Make a data set of arrays, normalised as the training images are."""
    where = f"the {split} images of {name!r}"
    if isinstance(part, Dataset):
        return Dataset(part.pixels, part.labels, part.mean, part.std, part.classes, name, part.levels)
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise TypeError(f"{where} must be a pair (images, labels) or a pk.data.Dataset, got {_kind(part)}")
    images, labels = np.asarray(part[0]), np.asarray(part[1])
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"{where} must be bytes (uint8) or floating-point numbers, got {images.dtype}")
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise ValueError(f"{where} hold NaN or infinity")
    if images.ndim < 2 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(f"{where} must have the shape (N, …) and labels the shape (N,), got {images.shape} and "
                         f"{labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"the labels of {where} must be whole numbers from 0, got {labels.dtype} {labels[:5]!s:.60}")
    if train is not None:
        mean, std, levels = train.mean, train.std, train.levels
    elif images.dtype == np.uint8:
        over = tuple(range(images.ndim - 1))
        mean, std, levels = images.mean(over) / 255, np.maximum(images.std(over), 1) / 255, 255
    else:
        mean, std, levels = np.zeros(images.shape[-1]), np.ones(images.shape[-1]), 1
    return Dataset(images, labels.astype(np.int64), np.asarray(mean, np.float32), np.asarray(std, np.float32),
                   int(labels.max()) + 1 if train is None else train.classes, name, levels)
