"""Sites: where an operation uses a parameter, and how its gradient follows from the operation's cotangent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pkjax.paths.convolution import as_columns, as_matrix, patches

__all__ = ["Matrices", "Site", "View", "matrices_of", "pulled"]


@dataclass(frozen=True)
class Site:
    """One use of a parameter leaf by an operation of the network.

    Returned by ``sites``.

    Examples:
        >>> from pkjax.paths import sites
        >>> (site,), _ = sites(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> site.kind, site.shape, site.operand
        ('dense', (1, 2), (1, 3))
    """

    kind: str
    """What the tap is added to: the output of a "dense" operation (of a signal h and the leaf, contracted), of a
    "convolution", of an "elementwise" one (a bias or a scale), of a "lookup" at integers or of an "other" product; or
    the "operand" of any other operation; or the "leaf" itself, where it enters in a way that is not linear."""
    leaf: int
    """The parameter leaf, in flattening order."""
    shape: tuple[int, ...]
    """Shape of the tap for a batch of one."""
    dtype: Any
    """Type of the tap."""
    operand: tuple[int, ...] | None
    """Shape of the operation's other operand h for a batch of one; None where none is needed (a bias)."""
    pullback: Callable[[Array | None, Array], Array]
    """(operand h or None, cotangent δ of the tap) → cotangent of the leaf, for a batch of one."""
    matrices: "Matrices | None" = None
    """The operation as a product of matrices, where it is one."""


class Matrices(NamedTuple):
    """An operation on a batch of one as rows (places, I) times a matrix (I, J) of the leaf's entries."""

    rows: Callable[[Any], Array]
    """Operand h → (places, I); the places of several images one after the other."""
    columns: Callable[[Array], Array]
    """The output, or its cotangent δ → (places, J)."""
    entries: Callable[[Array], Array]
    """What is shaped like the leaf → (I, J)."""


class View(NamedTuple):
    """A value that is made of parameters alone, as an affine function of one leaf."""

    leaf: int
    fn: Callable[[Array], Array]
    whole: bool
    """Whether it holds each entry of the leaf once, and nothing else."""


def pulled(leaf: Any, use: Callable[[Any, Array], Array], h: Array | None, delta: Array) -> Array:
    """Pull the cotangent of ``use(h, leaf)``, which is affine in the leaf, back to the leaf."""
    # Not linear_transpose, which knows no scatter at indices that may coincide.
    _, pull = jax.vjp(partial(use, h), jnp.zeros(leaf.shape, leaf.dtype))
    (cotangent,) = pull(delta)
    return cotangent


def matrices_of(eqn: Any, shapes: Sequence[tuple[int, ...]], parameter: int, view: View) -> Matrices | None:
    """An operation of a signal and a whole leaf as a product of matrices; None where it is not of that form."""
    if not view.whole or any(0 in shape for shape in shapes):
        return None
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general" and not params["dimension_numbers"][1][0]:
        return _contraction(params["dimension_numbers"][0], shapes, parameter, view)
    if name == "conv_general_dilated" and parameter == 1 and (
            params["feature_group_count"] == params["batch_group_count"] == 1):
        return Matrices(partial(patches, params, shapes[1]), partial(as_columns, params),
                        lambda leaf: as_matrix(params, view.fn(leaf)))
    if name == "gather" and parameter == 0 and _looks_up_rows(params, shapes[0]):
        return _lookup(eqn, shapes[0], view)
    return None


def _contraction(contracted: Sequence[Sequence[int]], shapes: Sequence[tuple[int, ...]], parameter: int, view: View
                 ) -> Matrices:
    free = [[d for d in range(len(shape)) if d not in axes] for shape, axes in zip(shapes, contracted, strict=True)]
    signal = 1 - parameter
    wide = prod(shapes[parameter][d] for d in free[parameter])

    def rows(h: Any) -> Array:
        by_place = jnp.transpose(h, (*free[signal], *contracted[signal]))
        return by_place.reshape(-1, prod(shapes[signal][d] for d in contracted[signal]))

    def columns(out: Array) -> Array:
        return out.reshape(-1, wide) if parameter else out.reshape(wide, -1).T

    def entries(leaf: Array) -> Array:
        return jnp.transpose(view.fn(leaf), (*contracted[parameter], *free[parameter])).reshape(-1, wide)
    return Matrices(rows, columns, entries)


def _looks_up_rows(params: Any, table: tuple[int, ...]) -> bool:
    """Whether a gather takes rows of a table, as embeddings do."""
    numbers = params["dimension_numbers"]
    return len(table) == 2 and tuple(params["slice_sizes"]) == (1, table[1]) and (
        (tuple(numbers.collapsed_slice_dims), tuple(numbers.start_index_map)) == ((0,), (0,))) and (
            not numbers.operand_batching_dims)


def _lookup(eqn: Any, table: tuple[int, ...], view: View) -> Matrices:
    """A lookup as a product with one-hot rows: those that it takes of the identity, indices out of bounds included."""
    (axis,) = eqn.params["dimension_numbers"].offset_dims
    # What is filled in out of bounds (NaN by default) does not depend on the table.
    take = partial(eqn.primitive.bind, **eqn.params | {"slice_sizes": (1, table[0]), "fill_value": 0})

    def rows(indices: Any) -> Array:
        taken = take(jnp.eye(table[0], dtype=eqn.outvars[0].aval.dtype), indices)
        return jnp.moveaxis(taken, axis, -1).reshape(-1, table[0])
    return Matrices(rows, lambda out: jnp.moveaxis(out, axis, -1).reshape(-1, table[1]), view.fn)
