"""Parameters and constants on their way to a signal: which edges they will be, read only when they are."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pkjax.paths.errors import NotFullyConnectedError

__all__ = ["Constant", "Entries", "Leaf", "Product", "Read"]


class Read(NamedTuple):
    """Edges as arrays of one shape: an edge carries value = constant · θ for the parameter θ of that index, or -1."""

    parameter: np.ndarray
    constant: np.ndarray
    value: np.ndarray


@runtime_checkable
class Table(Protocol):
    """An array of entries that are not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    def read(self, position: np.ndarray) -> Read:
        """Read the entries at these positions among all, in flattening order."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a table, rearranged."""

    table: Table
    moved: np.ndarray | None = None
    """For each entry its position in the table; None where they stand as they do there."""

    @property
    def position(self) -> np.ndarray:
        """For each entry its position in the table."""
        if self.moved is not None:
            return self.moved
        return np.arange(int(np.prod(self.table.shape))).reshape(self.table.shape)


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant: nothing trains."""

    held: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the constant."""
        return np.shape(self.held)

    def read(self, position: np.ndarray) -> Read:
        """Read the entries at these positions."""
        value = np.asarray(self.held).ravel()[position].astype(np.float64)
        return Read(np.full(position.shape, -1), value, value)


@dataclass(frozen=True, eq=False)
class Leaf:
    """A leaf of the parameters. Entries that do not train are constants: their edges carry their values."""

    held: Any
    trains: Any
    """Booleans that broadcast against the leaf."""
    alive: Any
    """The leaf's mask."""
    offset: int
    """The number of parameters that precede the leaf."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return np.shape(self.held)

    def read(self, position: np.ndarray) -> Read:
        """Read the entries at these positions."""
        def at(booleans: Any) -> np.ndarray:
            return np.broadcast_to(np.asarray(booleans), self.shape).ravel()[position]

        present, learns = at(self.alive), at(self.trains)
        value = np.where(present, np.asarray(self.held).ravel()[position].astype(np.float64), 0.0)
        return Read(np.where(learns, self.offset + position, -1), np.where(learns, present, value), value)


@dataclass(frozen=True, eq=False)
class Product:
    """Parameters times constants, entry by entry."""

    a: Entries
    b: Entries

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        return np.broadcast_shapes(self.a.position.shape, self.b.position.shape)

    def read(self, position: np.ndarray) -> Read:
        """Read the entries at these positions.

        Raises:
            NotFullyConnectedError: two parameters are multiplied.
        """
        both = np.broadcast_arrays(self.a.position, self.b.position)
        a, b = (side.table.read(at.ravel()[position]) for side, at in zip((self.a, self.b), both, strict=True))
        if ((a.parameter >= 0) & (b.parameter >= 0)).any():
            raise NotFullyConnectedError("two parameters are multiplied before they meet a signal")
        return Read(np.maximum(a.parameter, b.parameter), a.constant * b.constant, a.value * b.value)
