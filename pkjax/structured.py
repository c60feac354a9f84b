"""The tangent kernel layer by layer: small Gram matrices in the place of Jacobians of all the parameters.

A weight acts through the operation that uses it. With a tap (an additive zero) at that operation's output y,
δ_k = ∂f_k/∂y is one backward pass for all layers at once, and the gradient of f_k in the weight follows from δ_k and
the operation's other operand h. For a dense layer it is h δ_kᵀ, whose inner products factorise:

    Θ[(x,k),(x',l)] += (h·h') (δ_k·δ'_l)                        every weight trains
    Θ[(x,k),(x',l)] += Σ_j (Σ_i M_ij h_i h'_i) δ_kj δ'_lj       only the entries of the mask M train

Floating-point operations for N × N' examples, K outputs and a layer n_in → n_out, beside the (N + N') K backward
passes that give all δ (each 4 operations per weight of a dense network):

    whole layer      2 N N' (n_in + K² n_out + K²)
    masked layer     2 N N' n_out (n_in + K² + K/2)
    Jacobian of it   2 N N' K² n_in n_out + (N + N') K n_in n_out

so both Gram routes cost less wherever n_in > 1, and a whole layer costs n_in n_out / (n_in/K² + n_out) times less.
Other operations (convolutions), leaves used several times and leaves that the taps do not reach go through the
Jacobian of that leaf alone, in blocks of outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from pkjax import paths
from pkjax.trees import ApplyFn

__all__ = ["accumulator", "theta"]

ENTRIES = 2**26
"""How many numbers one intermediate array may hold: 256 MB in float32."""


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
        if len(used) == 1 and sites[used[0]].kind == "dense" and len(sites[used[0]].shape) == 2:
            h, d, h2, d2 = (a.astype(wide) for a in (operands[used[0]][:, 0], deltas[used[0]][:, :, 0],
                                                     operands2[used[0]][:, 0], deltas2[used[0]][:, :, 0]))
            total += _gram(h, d, h2, d2) if whole[index] else _masked_gram(h, d, h2, d2, mask)
            continue
        if used:
            left, right = through_sites(index, operands, deltas), through_sites(index, operands2, deltas2)
        else:
            left, right = leaf_alone(index, X), leaf_alone(index, X if X2 is None else X2)
        total += _contract(left, None if X2 is None else right, None if whole[index] else mask.reshape(-1), n_out,
                           max(1, ENTRIES // max(1, max(rows, columns) * mask.size)), wide)
    return total


def _flat(jacobian: Array) -> Array:
    return jacobian.reshape(*jacobian.shape[:2], -1)


def _gram(h: Float[Array, "N I"], d: Float[Array, "N K J"], h2: Float[Array, "M I"], d2: Float[Array, "M K J"],
          ) -> Float[Array, "N M K K"]:
    """Inner products of the gradients h dᵀ of a dense layer, as the product of two Gram matrices."""
    return (h @ h2.T)[:, :, None, None] * jnp.einsum("nkj,mlj->nmkl", d, d2)


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
            line.append(jnp.einsum("nkp,mlp->nmkl", a, b))
        grid.append(line)
    return jnp.concatenate([jnp.concatenate(line, axis=3) for line in grid], axis=2)
