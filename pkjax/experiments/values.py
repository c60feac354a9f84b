"""The values that settings take: their types, and the names of models, data sets and pruners."""

import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.experiments.methods import check_name
from pkjax.experiments.user_code import is_own, name_of, versioned

__all__ = ["NAMES", "Name", "checked_name", "fitting"]

NAMES = ("model", "data", "pruner")
"""Settings that are names."""
# A setting takes a function too, and holds its name, a text.
if TYPE_CHECKING:
    Name = Any
else:
    Name = str | Callable[..., Any]


def checked_name(name: str, what: str) -> str:
    """Complete and check the name of a model, data set or pruner; a full name may be one of former files."""
    if is_own(name):
        full = versioned(name, what)
        if full == name:
            return name
        name = full
    check_name(name, what)
    return name


def fitting(name: str, value: Any, annotation: Any) -> Any:
    """Make an integer a number, a list a tuple and NumPy's scalars Python's; refuse other types."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    allowed = {typing.get_origin(part) or part for part in parts}
    if isinstance(value, np.generic):
        value = value.item()
    if name in NAMES and callable(value):
        return name_of(value, name)
    if value is None and types.NoneType in allowed:
        return None
    if Sequence in allowed and isinstance(value, list | tuple) and all(type(part) is int for part in value):
        return tuple(value)
    if float in allowed and type(value) is int:
        return float(value) if abs(value) < 2**1000 else math.inf if value > 0 else -math.inf
    wanted = "a list of int" if Sequence in allowed else next(kind.__name__ for kind in (float, int, str)
                                                              if kind in allowed)
    if type(value).__name__ != wanted:
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    return value + 0.0 if isinstance(value, float) else value      # -0.0 is 0.0
