"""The kinds of value that a network's operations meet.

- a ``Const`` depends on neither the parameters nor the input and is evaluated as it stands;
- a ``PathSum`` depends on them multilinearly: it is a sum over paths, at most one of whose factors is an input entry;
- a ``Gate`` is piecewise constant in them: a comparison, a sign, a one-hot;
- a ``Coefficient`` depends on them in another way, and multiplies paths: only where gates are frozen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pkjax.paths.errors import NotPathNetworkError

__all__ = ["Coefficient", "Const", "Gate", "Made", "PathSum", "Value", "joined", "moves", "passed_on"]


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
    made: "Made | None" = None
    """How it is made of the entries of another value, where gates are frozen."""


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
    made: "Made | None" = None
    """How it is made of the entries of another value, where gates are frozen."""


class Made(NamedTuple):
    """How a value is made entry by entry (``pkjax.paths.elementwise``)."""

    apply: Callable[..., Any]
    """The operation."""
    operands: "tuple[Value, ...]"
    roots: "tuple[PathSum | Coefficient, ...]"
    """The values of each of which alone, and of constants, it is a function, the nearest first."""
    shaped: bool
    """Whether the operation takes arrays of one shape only, as calls do."""


@dataclass(frozen=True, eq=False)
class Coefficient:
    """A value that multiplies paths; ``value`` is None where the algebra does not know the network's true values."""

    value: Any
    shape: tuple[int, ...]
    dtype: Any
    through: frozenset[int]
    """The coefficients that it is computed from, itself among them."""
    reason: NotPathNetworkError
    """Why it is no path sum."""
    settled: bool = True
    """Whether a function that is not linear has been applied, so that it can only be a factor: a product of signals,
    and what is linear in one, might as well be meant as a signal, and does not start paths with a parameter."""
    made: Made | None = None
    """How it is made of the entries of a value that can be a path sum."""
    signal: Callable[[], PathSum] | None = None
    """Reads it as a path sum, where that can be and it is not made entry by entry."""
    signals: list[PathSum] = field(default_factory=list)
    """It as a path sum, once it has been read so."""
    weights: Callable[[], PathSum] | None = None
    """Reads a product of a parameter and a coefficient as a parameter on paths, with the coefficient as its factor."""

    @property
    def readable(self) -> bool:
        """Whether it can be a path sum."""
        return self.made is not None or self.signal is not None


Value = Const | Gate | PathSum | Coefficient


def moves(value: Any) -> bool:
    """Whether a value is a signal, and not a path sum of parameters alone."""
    return isinstance(value, PathSum) and (value.on_input or value.of_input)


def joined(values: Sequence[Any]) -> frozenset[int]:
    """The coefficients that values came through."""
    return frozenset().union(*(v.through for v in values if isinstance(v, PathSum | Coefficient)))


def passed_on(out: PathSum, operands: Sequence[PathSum]) -> PathSum:
    """Note through which coefficients the paths of a result lead."""
    through = joined(operands)
    return replace(out, through=through) if through != out.through else out
