"""The kinds of value that a network's operations meet.

- a ``Const`` depends on neither the parameters nor the input and is evaluated as it stands;
- a ``PathSum`` depends on them multilinearly: it is a sum over paths, at most one of whose factors is an input entry;
- a ``Gate`` is piecewise constant in them: a comparison, a sign, a one-hot;
- a ``Coefficient`` depends on them in another way, and multiplies paths: only where gates are frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pkjax.paths.errors import NotPathNetworkError

__all__ = ["Coefficient", "Const", "Elementwise", "Gate", "PathSum", "Value"]


@dataclass(frozen=True, eq=False)
class Const:
    """A value that depends on neither parameters nor a floating-point input."""

    value: Any
    of_input: bool = False
    """Whether it depends on an integer input."""


@dataclass(frozen=True, eq=False)
class Gate:
    """A piecewise constant value; ``value`` is None wherever the algebra does not know the network's true values."""

    value: Any
    shape: tuple[int, ...]
    source: "Elementwise | None" = None
    """The function that it is of the entries of one path sum, where gates are frozen."""


@dataclass(frozen=True, eq=False)
class PathSum:
    """A sum over paths. ``parent`` is (p, c) where this value is the constant multiple c of the path sum p."""

    value: Any
    shape: tuple[int, ...]
    dtype: Any
    on_input: bool
    # How often one entry of each parameter (leaf, *scan slices) can lie on one path.
    degree: dict[tuple[int, ...], int] = field(default_factory=dict)
    parent: "tuple[PathSum, Any] | None" = None
    of_input: bool = False
    """Whether it is made of constants that depend on an integer input."""
    through: frozenset[int] = frozenset()
    """The coefficients that its paths lead through, where gates are frozen (``pkjax.paths.coefficients``)."""


class Elementwise(NamedTuple):
    """An elementwise function of one path sum."""

    root: PathSum
    fn: Callable[[Any], Any]
    constants: tuple[Any, ...]
    """The constants that it is made with."""


@dataclass(frozen=True, eq=False)
class Coefficient:
    """A value that multiplies paths; ``value`` is None where the algebra does not know the network's true values."""

    value: Any
    shape: tuple[int, ...]
    dtype: Any
    number: int
    """Which coefficient of the network it is."""
    reason: NotPathNetworkError
    """Why it is no path sum."""
    settled: bool
    """Whether a function that is not linear has been applied, so that it can only be a factor: a product of signals,
    and what is linear in one, might as well be meant as a signal, and does not start paths with a parameter."""
    source: Elementwise | None = None
    """The function that it is of the entries of one path sum."""
    signal: Callable[[], PathSum] | None = None
    """Reads it as a path sum, where that can be."""
    signals: list[PathSum] = field(default_factory=list)
    """It as a path sum, once it has been read so."""


Value = Const | Gate | PathSum | Coefficient
