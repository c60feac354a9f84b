"""The route by which each leaf of the parameters enters the tangent kernel, and its cost: from shapes alone.

The structured engine takes the route that this module chooses for each leaf, and `ntk_plan` reports it.
"""

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import PyTree

from pkjax.linalg.memory import budget
from pkjax.paths.sites import Site
from pkjax.paths.taps import network_sites
from pkjax.programs.program import Program
from pkjax.trees import shapes

__all__ = ["Costs", "Route", "Use", "Uses", "bands", "blocks", "cheapest_route", "masked_columns", "over_places", "use",
           "uses"]

ENTRIES = 2**26
"""Largest number of entries of an intermediate array: 256 MB in float32, less where memory is short."""
BALANCE = 32
"""Floating-point operations that take as long as writing a number and reading it again."""
BAND = 512
"""Rows NK from which a symmetric kernel is computed in bands."""

Route = Literal["Gram", "Gram over places", "masked Gram", "Jacobian of the layer", "Jacobian of the leaf",
                "unused"]


class Use(NamedTuple):
    """One use of a parameter leaf by an operation, on a batch of one."""

    leaf: int
    output: int
    """Entries of the operation's result."""
    operand: int
    """Entries of its other operand; 0 for a bias."""
    cotangents: int
    """Entries of its cotangent for an output; 0 for a bias, which has that of the operation before it."""
    matrix: tuple[int, int, int] | None
    """Places p, rows I and columns J if the operation is a product (p, I) by (I, J), else None."""


class Costs(NamedTuple):
    """The route of one leaf and the cost of its contraction, without the backward passes that all leaves share."""

    route: Route
    operations: int
    """Floating-point operations."""
    numbers: int
    """Numbers written and read."""
    held: int
    """Numbers held at a time, besides the operands, their cotangents and the result."""


def use(site: Site, leaf: Any) -> Use:
    """Return the sizes of one use of a leaf."""
    output, operand = prod(site.shape), 0 if site.operand is None else prod(site.operand)
    cotangents = 0 if site.kind == "elementwise" and site.operand is None else output
    if site.matrices is None:
        return Use(site.leaf, output, operand, cotangents, None)
    i, j = jax.eval_shape(site.matrices.entries, leaf).shape
    return Use(site.leaf, output, operand, cotangents, (output // j, i, j))


class Uses(NamedTuple):
    """What a network does with its parameters."""

    each: tuple[Use, ...]
    curved: bool
    """Whether signals meet or go through a function that is curved, or a parameter meets itself."""


def uses(program: Program, params: PyTree, x: Any) -> Uses:
    """Find where a network uses its parameters.

    Of `params` and of `x`, one example as a batch, shapes suffice.
    """
    leaves, treedef = jax.tree.flatten(shapes((params, x)))
    return _uses(program, tuple(leaves), treedef)


@lru_cache(maxsize=256)
def _uses(program: Program, like: tuple[jax.ShapeDtypeStruct, ...], treedef: Any) -> Uses:
    params, x = jax.tree.unflatten(treedef, like)
    found, _, curved = network_sites(program.shapes, params, x)
    leaves = jax.tree.leaves(params)
    return Uses(tuple(use(site, leaves[site.leaf]) for site in found), curved)


def over_places(met: int, pairs: int, examples: int, k: int, p: int, i: int, j: int) -> bool:
    """Return whether inner products over places cost less than Jacobians, in operations and in numbers moved."""
    gram = met * (p * p * (i + k * j) + p * k * k * j) + BALANCE * met * (p * p + p * k * j)
    jacobian = pairs * k * k * i * j + examples * p * k * i * j + BALANCE * examples * k * i * j
    return gram < jacobian


def cheapest_route(n: int, m: int | None, k: int, size: int, used: list[Use], masked: bool) -> Costs:
    """Return the cheapest route of a leaf, and what it costs.

    Args:
        n: number of examples of the rows.
        m: number of examples of the columns; None if they are those of the rows.
        k: number of outputs.
        size: number of entries of the leaf.
        used: the leaf's uses.
        masked: whether only part of its entries trains.
    """
    if not used:
        return Costs("unused", 0, 0, 0)
    columns, examples = (n, n) if m is None else (m, n + m)
    result = n * columns * k * k
    pairs = n * columns if m is not None else sum((r.stop - r.start) * (c.stop - c.start) for r, c in bands(n, k))
    matrix = used[0].matrix if len(used) == 1 else None
    if matrix is None:
        block = examples * min(k, blocks(max(n, columns), size)) * size
        alone = len(used) == 1 and used[0].output == size and not used[0].operand
        route: Route = "Jacobian of the leaf" if alone else "Jacobian of the layer"
        return Costs(route, 2 * pairs * k * k * size + 2 * examples * k * size,
                     (result // k + examples * k) * size // k, 2 * block + result)
    p, i, j = matrix
    if p == 1 and not masked:
        return Costs("Gram", 2 * pairs * (i + k * k * j + k * k), 3 * result + examples * (i + k * j), 3 * result)
    if p == 1:
        block = masked_columns(n, columns, k, i, j)
        return Costs("masked Gram", 2 * j * pairs * (i + k * k + k // 2), j * (n * i + pairs * (1 + k)) + 3 * result,
                     block * (n * i + pairs * (1 + k)) + 2 * result)
    moved = examples * p * (i + k * j)       # rows and columns in the order that the products want
    met = n * (n // 2 + 1) if m is None else pairs     # each with the half that follows it cyclically
    if not masked and over_places(met, pairs, examples, k, p, i, j):
        return Costs("Gram over places", 2 * met * (p * p * (i + k * j) + p * k * k * j),
                     met * (p * p + p * k * j) + moved + result,
                     met // n * (p * p + p * k * j) + 2 * moved + result)
    block = examples * min(k, blocks(max(n, columns), i * j)) * i * j
    return Costs("Jacobian of the layer", 2 * pairs * k * k * i * j + 2 * examples * p * k * i * j,
                 (result // k + examples * k) * i * j + moved, 2 * block + moved + result)


def masked_columns(n: int, m: int, k: int, i: int, j: int) -> int:
    """Return how many columns of a mask are contracted at a time."""
    return max(1, min(j, budget(ENTRIES) // max(1, n * max(i, m * k))))


def bands(n: int, k: int) -> list[tuple[slice, slice]]:
    """Return the rows and columns of a symmetric kernel to compute: three bands from the diagonal on, 2/3 of the whole.

    A small kernel is one band: copying its long rows would take longer than multiplying them.
    """
    if n * k < BAND:
        return [(slice(0, n), slice(0, n))]
    edges = [0, n // 3, 2 * n // 3, n]
    return [(slice(a, b), slice(a, n)) for a, b in pairwise(edges) if a < b]


def blocks(examples: int, size: int) -> int:
    """Return for how many outputs the Jacobian of a leaf of that size is formed at a time."""
    return max(1, budget(ENTRIES) // max(1, examples * size))
