"""Where the examples of a batch lie in a value: along one axis, whose size is ``outer`` · N · ``inner``, or nowhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["EXAMPLES", "Free", "Joined", "Rows", "Rule", "Uncertain", "Value", "moved", "shape", "uniform"]

EXAMPLES = 2
"""N of the program that is followed: a prime, which no reshape can split over two axes."""


@dataclass(frozen=True)
class Rows:
    """The examples lie along ``axis``, with ``outer`` entries around and ``inner`` entries within each."""

    axis: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Free:
    """No example has a part in the value, which is the same all along the axes ``uniform``."""

    uniform: frozenset[int] = frozenset()


class Joined(Exception):
    """An operation joins examples; ``args`` are the calls around it and, last, the operation."""


class Uncertain(Exception):
    """No rule says where an operation leaves the examples; ``args`` are the operation."""


Value = Rows | Free
Rule = Callable[[Any, Sequence[Value]], Sequence[Value]]


def shape(variable: Any) -> tuple[int, ...]:
    """The shape of an operand or a result."""
    return tuple(variable.aval.shape)


def uniform(value: Value, variable: Any = None) -> frozenset[int]:
    """The axes along which a value that no example has a part in is the same; those of size 1, too, of a variable."""
    single = () if variable is None else (d for d, n in enumerate(shape(variable)) if n == 1)
    return value.uniform.union(single) if isinstance(value, Free) else frozenset()


def moved(place: Rows, axis: int) -> Rows:
    """The same place on another axis."""
    return Rows(int(axis), place.outer, place.inner)
