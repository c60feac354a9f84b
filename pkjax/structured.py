"""The tangent kernel layer by layer: small Gram matrices in the place of Jacobians of all the parameters.

A weight acts through the operation that uses it. With a tap (an additive zero) at that operation's output y,
δ_k = ∂f_k/∂y is one backward pass for all layers at once, and the gradient of f_k in the weight follows from δ_k and
the operation's other operand h. For a dense layer it is h δ_kᵀ, whose inner products factorise:

    Θ[(x,k),(x',l)] += (h·h') (δ_k·δ'_l)                        every weight trains
    Θ[(x,k),(x',l)] += Σ_j (Σ_i M_ij h_i h'_i) δ_kj δ'_lj       only the entries of the mask M train

An operation at p places, a convolution for one, is a product of the rows h (p, I) that it meets and the matrix (I, J)
of the entries of the leaf; its gradient is hᵀ δ_k. Either the inner products are taken over places,

    Θ[(x,k),(x',l)] += Σ_pj δ_kpj Σ_q (h h'ᵀ)_pq δ'_lqj         every weight trains

or the Jacobians hᵀ δ_k of that leaf alone are contracted, whichever costs less. Floating-point operations for a pair of
examples and K outputs, beside the backward passes that give all δ:

    over places       2 p² (I + K J) + 2 p K² J                 with p = 1: 2 (I + K² J + K²), a dense layer
    masked, p = 1     2 J (I + K² + K/2)
    Jacobian          2 K² I J, and 2 p K I J for each example

Leaves used several times, other operations, and leaves that the taps do not reach go through the Jacobian of that leaf
alone, too, in blocks of outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from pkjax import paths
from pkjax.trees import ApplyFn

__all__ = ["accumulator", "theta"]

ENTRIES = 2**26
"""How many numbers one intermediate array may hold: 256 MB in float32."""
BALANCE = 32
"""Operations that take as long as a number written and read again, on machines of today."""


def accumulator(dtype: Any) -> Any:
    """Return the dtype that products are summed in: the given one, or float32 where that is narrower."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


LeafJacobian = Callable[[int, int], Array]
"""Outputs (first, last) → Jacobian (N, last - first, entries of the leaf)."""


def theta(apply_fn: ApplyFn, params: PyTree, entries: list[Array | None], whole: tuple[bool, ...],
          X: Array, X2: Array | None) -> Float[Array, "N M K K"]:
    """Contract Θ over the parameters leaf by leaf, by the cheapest route that each allows.

    ``entries`` gives for each leaf of ``params`` the booleans that say which of its entries train, None for a leaf
    of which none does; ``whole`` says which leaves train whole.
    """
    leaves, treedef = jax.tree.flatten(params)
    sites, by_leaf = paths.sites(apply_fn, params, X[:1])
    out = jax.eval_shape(apply_fn, params, X[:1])
    wide = accumulator(out.dtype)
    n_out = out.shape[1]

    def one(x: Array) -> tuple[Any, Any]:
        def tapped(taps: tuple[Array, ...]) -> tuple[Array, Any]:
            return paths.tapped(apply_fn, params, x[None], taps)

        zeros = tuple(jnp.zeros(site.shape, site.dtype) for site in sites)
        _, pullback, operands = jax.vjp(tapped, zeros, has_aux=True)
        return operands, jax.vmap(lambda e: pullback(e)[0])(jnp.eye(n_out, dtype=out.dtype)[:, None])

    def leaf_alone(index: int, batch: Array) -> LeafJacobian:
        def jacobian(first: int, last: int) -> Array:
            def one_leaf(x: Array) -> Array:
                def f(leaf: Array) -> Array:
                    changed = [*leaves[:index], leaf, *leaves[index + 1:]]
                    return apply_fn(jax.tree.unflatten(treedef, changed), x[None])[0]

                _, pullback = jax.vjp(f, leaves[index])
                return jax.vmap(lambda e: pullback(e)[0])(jnp.eye(n_out, dtype=out.dtype)[first:last])

            return _flat(jax.vmap(one_leaf)(batch))

        return jacobian

    def through_sites(index: int, operands: Any, deltas: Any) -> LeafJacobian:
        def jacobian(first: int, last: int) -> Array:
            def one_site(s: int) -> Array:
                over_outputs = jax.vmap(sites[s].pullback, (None, 0))
                return jax.vmap(over_outputs)(operands[s], deltas[s][:, first:last])

            return _flat(sum(map(one_site, by_leaf[index][1:]), start=one_site(by_leaf[index][0])))

        return jacobian

    operands, deltas = jax.vmap(one)(X)
    operands2, deltas2 = (operands, deltas) if X2 is None else jax.vmap(one)(X2)
    rows, columns = X.shape[0], X.shape[0] if X2 is None else X2.shape[0]
    total = jnp.zeros((rows, columns, n_out, n_out), wide)
    for index, mask in enumerate(entries):
        if mask is None:
            continue
        used = by_leaf.get(index, ())
        matrices = sites[used[0]].matrices if len(used) == 1 else None
        train = None if whole[index] else mask
        if matrices is not None:
            h, h2 = (jax.vmap(matrices.rows)(o[used[0]]).astype(wide) for o in (operands, operands2))
            d, d2 = (jax.vmap(jax.vmap(matrices.columns))(t[used[0]]).astype(wide) for t in (deltas, deltas2))
            total += _product(h, d, h2, d2, None if train is None else matrices.entries(train), X2 is None)
            continue
        if used:
            left, right = through_sites(index, operands, deltas), through_sites(index, operands2, deltas2)
        else:
            left, right = leaf_alone(index, X), leaf_alone(index, X if X2 is None else X2)
        total += _contract(left, None if X2 is None else right, None if train is None else train.reshape(-1), n_out,
                           max(1, ENTRIES // max(1, max(rows, columns) * mask.size)), wide)
    return total


def _flat(jacobian: Array) -> Array:
    return jacobian.reshape(*jacobian.shape[:2], -1)


def over_places(pairs: int, examples: int, k: int, p: int, i: int, j: int) -> bool:
    """Whether inner products over places cost less than Jacobians, in operations and in numbers written and read."""
    gram = pairs * (p * p * (i + k * j) + p * k * k * j) + BALANCE * pairs * (p * p + p * k * j)
    jacobian = pairs * k * k * i * j + examples * p * k * i * j + BALANCE * examples * k * i * j
    return gram < jacobian


def _product(h: Float[Array, "N P I"], d: Float[Array, "N K P J"], h2: Float[Array, "M P I"],
             d2: Float[Array, "M K P J"], mask: Bool[Array, "I J"] | None, symmetric: bool) -> Float[Array, "N M K K"]:
    """Inner products of the gradients hᵀ d of a product of matrices."""
    (n, p, i), (k, _, j), m = h.shape, d.shape[1:], h2.shape[0]
    if p == 1:
        h, d, h2, d2 = h[:, 0], d[:, :, 0], h2[:, 0], d2[:, :, 0]
        return _gram(h, d, h2, d2) if mask is None else _masked_gram(h, d, h2, d2, mask)
    if mask is None and over_places(n * m, n if symmetric else n + m, k, p, i, j):
        return _gram_over_places(h, d, h2, d2)

    def jacobian(h: Array, d: Array, first: int, last: int) -> Array:
        by_place = d[:, first:last].transpose(0, 2, 1, 3)  # one product for all outputs of an example
        return jnp.einsum("npi,npkj->nkij", h, by_place).reshape(h.shape[0], last - first, i * j)

    return _contract(partial(jacobian, h, d), None if symmetric else partial(jacobian, h2, d2),
                     None if mask is None else mask.reshape(-1), k, max(1, ENTRIES // (max(n, m) * i * j)), h.dtype)


def _gram(h: Float[Array, "N I"], d: Float[Array, "N K J"], h2: Float[Array, "M I"], d2: Float[Array, "M K J"],
          ) -> Float[Array, "N M K K"]:
    """Inner products of the gradients h dᵀ of a dense layer, as the product of two Gram matrices."""
    return (h @ h2.T)[:, :, None, None] * jnp.einsum("nkj,mlj->nmkl", d, d2)


def _gram_over_places(h: Float[Array, "N P I"], d: Float[Array, "N K P J"], h2: Float[Array, "M P I"],
                      d2: Float[Array, "M K P J"]) -> Float[Array, "N M K K"]:
    """Inner products of the gradients hᵀ d without them, for one row of examples after the other."""
    m, k, p, j = d2.shape
    flat = d2.transpose(0, 2, 1, 3).reshape(m, p, k * j)

    def row(one: tuple[Array, Array]) -> Array:
        rows, cotangents = one
        met = jnp.einsum("pi,mqi->mpq", rows, h2)
        return jnp.einsum("kpj,mplj->mkl", cotangents, (met @ flat).reshape(m, p, k, j))

    return jax.lax.map(row, (h, d))


def _masked_gram(h: Float[Array, "N I"], d: Float[Array, "N K J"], h2: Float[Array, "M I"],
                 d2: Float[Array, "M K J"], mask: Bool[Array, "I J"]) -> Float[Array, "N M K K"]:
    """Inner products of the gradients h dᵀ over the entries of a mask: one Gram matrix for each of its columns."""
    (n, i), (k, j), m = h.shape, d.shape[1:], h2.shape[0]
    block = max(1, min(j, ENTRIES // max(1, n * max(i, m * k))))
    steps = -(-j // block)

    def in_blocks(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, steps * block - j)])
        return jnp.moveaxis(a.reshape(*a.shape[:-1], steps, block), -2, 0)

    def step(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        columns, left, right = inputs
        grams = jnp.einsum("bni,mi->bnm", h * columns.T[:, None, :], h2)
        return total + jnp.einsum("mnkb,mlb->nmkl", jnp.einsum("bnm,nkb->mnkb", grams, left), right), None

    start = jnp.zeros((n, m, k, k), h.dtype)
    total, _ = jax.lax.scan(step, start, (in_blocks(mask.astype(h.dtype)), in_blocks(d), in_blocks(d2)))
    return total


def _inner(jacobian: Float[Array, "N K P"]) -> Float[Array, "N N K K"]:
    """Inner products of the rows of a Jacobian with each other, most of one half of them taken from the other."""
    n, k, p = jacobian.shape

    def gram(rows: Array) -> Array:
        half = rows.shape[0] // 2
        if half < 64:
            return rows @ rows.T
        across = rows[:half] @ rows[half:].T
        return jnp.block([[gram(rows[:half]), across], [across.T, gram(rows[half:])]])

    return gram(jacobian.reshape(n * k, p)).reshape(n, k, n, k).transpose(0, 2, 1, 3)


def _contract(left: LeafJacobian, right: LeafJacobian | None, mask: Array | None, n_out: int, block: int,
              dtype: Any) -> Float[Array, "N M K K"]:
    """Contract two Jacobians of a leaf over its entries, ``block`` outputs at a time; None mirrors the left one."""
    edges = [(first, min(first + block, n_out)) for first in range(0, n_out, block)]
    grid: list[list[Array]] = []
    for r, row in enumerate(edges):
        whole = left(*row).astype(dtype)
        a = whole if mask is None else whole * mask.astype(dtype)
        line = []
        for c, column in enumerate(edges):
            if right is None and c < r:
                line.append(jnp.transpose(grid[c][r], (1, 0, 3, 2)))
                continue
            # The mask is 0 or 1: applied on one side, it acts on the product.
            b = whole if right is None and c == r else (right or left)(*column).astype(dtype)
            line.append(_inner(a) if mask is None and b is a else jnp.einsum("nkp,mlp->nmkl", a, b))
        grid.append(line)
    return jnp.concatenate([jnp.concatenate(line, axis=3) for line in grid], axis=2)
