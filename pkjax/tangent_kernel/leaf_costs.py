"""How each leaf of the parameters enters the tangent kernel, and what that costs: from shapes alone.

The structured engine takes for every leaf the route that this module names, and ``ntk_plan`` tells it.
"""

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import PyTree

from pkjax import paths
from pkjax.trees import ApplyFn, shapes

__all__ = ["Costs", "Name", "Use", "bands", "blocks", "masked_columns", "over_places", "route", "use", "uses"]

ENTRIES = 2**26
"""How many numbers one intermediate array may hold: 256 MB in float32."""
BALANCE = 32
"""Operations that take as long as a number written and read again, on machines of today."""
BAND = 512
"""Rows NK of a symmetric kernel from which on it is computed in bands."""

Name = Literal["Gram", "Gram over places", "masked Gram", "Jacobian of the layer", "Jacobian of the leaf"]


class Use(NamedTuple):
    """One use of a parameter leaf by an operation, on a batch of one."""

    leaf: int
    output: int
    """Numbers that the operation gives."""
    operand: int
    """Numbers that it takes beside the leaf; 0 for a bias."""
    matrix: tuple[int, int, int] | None
    """Places p, rows I and columns J, where the operation is a product (p, I) by (I, J)."""


class Costs(NamedTuple):
    """The route of one leaf and what its contraction costs, beside the backward passes that all leaves share."""

    name: Name
    operations: int
    """In floating point."""
    numbers: int
    """Written and read."""
    held: int
    """At one time, beside the operands, their cotangents and the result."""


def use(site: paths.Site, leaf: Any) -> Use:
    """Sizes of one use of a leaf."""
    output, operand = prod(site.shape), 0 if site.operand is None else prod(site.operand)
    if site.matrices is None:
        return Use(site.leaf, output, operand, None)
    i, j = jax.eval_shape(site.matrices.entries, leaf).shape
    return Use(site.leaf, output, operand, (output // j, i, j))


def uses(apply_fn: ApplyFn, params: PyTree, x: Any) -> tuple[tuple[Use, ...], frozenset[int]] | None:
    """Where a network uses its parameters, and which leaves are used there alone; None where it has no paths.

    The network must be hashable: it is walked once for the shapes of ``params`` and of ``x``, a batch of one.
    """
    leaves, treedef = jax.tree.flatten(shapes((params, x)))
    return _uses(apply_fn, tuple(leaves), treedef)


@lru_cache(maxsize=64)
def _uses(apply_fn: ApplyFn, like: tuple[jax.ShapeDtypeStruct, ...], treedef: Any
          ) -> tuple[tuple[Use, ...], frozenset[int]] | None:
    params, x = jax.tree.unflatten(treedef, like)
    try:
        found, by_leaf = paths.sites(apply_fn, params, x)
    except paths.NotPathNetworkError:
        return None
    leaves = jax.tree.leaves(params)
    return tuple(use(site, leaves[site.leaf]) for site in found), frozenset(by_leaf)


def over_places(met: int, pairs: int, examples: int, k: int, p: int, i: int, j: int) -> bool:
    """Whether inner products over places cost less than Jacobians, in operations and in numbers written and read."""
    gram = met * (p * p * (i + k * j) + p * k * k * j) + BALANCE * met * (p * p + p * k * j)
    jacobian = pairs * k * k * i * j + examples * p * k * i * j + BALANCE * examples * k * i * j
    return gram < jacobian


def route(n: int, m: int | None, k: int, size: int, used: list[Use], masked: bool) -> Costs:
    """The cheapest route for a leaf of ``size`` entries: n examples against m others, or against themselves (None).

    ``used`` are the leaf's uses, none where it enters in a way that taps do not reach; ``masked`` says that only
    some of its entries train.
    """
    columns, examples = (n, n) if m is None else (m, n + m)
    result = n * columns * k * k
    pairs = n * columns if m is not None else sum((r.stop - r.start) * (c.stop - c.start) for r, c in bands(n, k))
    matrix = used[0].matrix if len(used) == 1 else None
    if matrix is None:
        block = examples * min(k, blocks(max(n, columns), size)) * size
        name: Name = "Jacobian of the layer" if used else "Jacobian of the leaf"
        return Costs(name, 2 * pairs * k * k * size + 2 * examples * k * size, (result // k + examples * k) * size // k,
                     2 * block + result)
    p, i, j = matrix
    if p == 1 and not masked:
        return Costs("Gram", 2 * pairs * (i + k * k * j + k * k), 3 * result + examples * (i + k * j), 3 * result)
    if p == 1:
        block = masked_columns(n, columns, k, i, j)
        return Costs("masked Gram", 2 * j * pairs * (i + k * k + k // 2), j * (n * i + pairs * (1 + k)) + 3 * result,
                     block * (n * i + pairs * (1 + k)) + 2 * result)
    moved = examples * p * (i + k * j)       # rows and columns in the order that the products want
    met = n * (n // 2 + 1) if m is None else pairs     # in a circle, each with the half that follows it
    if not masked and over_places(met, pairs, examples, k, p, i, j):
        return Costs("Gram over places", 2 * met * (p * p * (i + k * j) + p * k * k * j),
                     met * (p * p + p * k * j) + moved + result,
                     met // n * (p * p + p * k * j) + 2 * moved + result)
    block = examples * min(k, blocks(max(n, columns), i * j)) * i * j
    return Costs("Jacobian of the layer", 2 * pairs * k * k * i * j + 2 * examples * p * k * i * j,
                 (result // k + examples * k) * i * j + moved, 2 * block + moved + result)


def masked_columns(n: int, m: int, k: int, i: int, j: int) -> int:
    """How many columns of a mask are taken at once."""
    return max(1, min(j, ENTRIES // max(1, n * max(i, m * k))))


def bands(n: int, k: int) -> list[tuple[slice, slice]]:
    """Rows and columns of a symmetric kernel to compute: three bands from the diagonal on, two thirds of the whole.

    A small kernel is one band: its long rows take longer to copy than to multiply.
    """
    if n * k < BAND:
        return [(slice(0, n), slice(0, n))]
    edges = [0, n // 3, 2 * n // 3, n]
    return [(slice(a, b), slice(a, n)) for a, b in pairwise(edges) if a < b]


def blocks(examples: int, size: int) -> int:
    """How many outputs' Jacobians of a leaf of that size are taken at once."""
    return max(1, ENTRIES // max(1, examples * size))
