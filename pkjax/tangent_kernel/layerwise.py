"""The tangent kernel layer by layer: small Gram matrices instead of Jacobians of all parameters.

A weight acts through the operation that uses it. With a tap (an additive zero) at that operation's output y,
δ_k = ∂f_k/∂y takes one backward pass for all layers at once, and the gradient of f_k in the weight follows from δ_k and
the operation's other operand h. For a dense layer it is h δ_kᵀ, whose inner products factorise:

    Θ[(x,k),(x',l)] += (h·h') (δ_k·δ'_l)                        every weight trains
    Θ[(x,k),(x',l)] += Σ_j (Σ_i M_ij h_i h'_i) δ_kj δ'_lj       only the entries of the mask M train

An operation at p places, such as a convolution, is a product of the rows h (p, I) that it reads and the matrix (I, J)
of the entries of the leaf; its gradient is hᵀ δ_k. Either the inner products are taken over places,

    Θ[(x,k),(x',l)] += Σ_pj δ_kpj Σ_q (h h'ᵀ)_pq δ'_lqj         every weight trains

or the Jacobians hᵀ δ_k of that leaf alone are contracted, whichever costs less. Floating-point operations for a pair of
examples and K outputs, in addition to the backward passes that give all δ:

    over places       2 p² (I + K J) + 2 p K² J                 with p = 1: 2 (I + K² J + K²), a dense layer
    masked, p = 1     2 J (I + K² + K/2)
    Jacobian          2 K² I J, and 2 p K I J for each example

Leaves used several times and other operations are contracted by the Jacobian of that leaf as well, in blocks of
outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from pkjax.paths.sites import Matrices
from pkjax.programs.program import BoundProgram
from pkjax.tangent_kernel.backward import LeafJacobian, TappedNetwork
from pkjax.tangent_kernel.leaf_costs import Route, bands, blocks, cheapest_route, masked_columns, use
from pkjax.trees import accumulator

__all__ = ["energy", "theta"]


def theta(fn: BoundProgram, params: PyTree, entries: list[Any], whole: tuple[bool, ...],
          X: Array, X2: Array | None) -> Float[Array, "N M K K"]:
    """Contract Θ over the parameters leaf by leaf, each by its cheapest route.

    Args:
        fn: the program of the network for one example.
        params: its parameters, masked.
        entries: for each leaf the booleans that say which of its entries train; None where none of them does.
        whole: for each leaf whether all of its entries train.
        X: inputs of the rows.
        X2: inputs of the columns; None for those of the rows.
    """
    net = TappedNetwork.of(fn, params, X[:1])
    wide, k = accumulator(net.dtype), net.n_out
    # Attention has many operations: a CPU holds the cotangents of one at a time where no loop keeps XLA from it.
    sparing = jax.default_backend() == "cpu" and net.curved
    operands, deltas = jax.vmap(net.operands_and_cotangents)(X)
    operands2, deltas2 = (operands, deltas) if X2 is None else jax.vmap(net.operands_and_cotangents)(X2)
    columns = None if X2 is None else X2.shape[0]
    parts = bands(X.shape[0], k) if X2 is None else [(slice(None), slice(None))]
    total: list[Any] = [0] * len(parts)
    moving = [(i, mask) for i, mask in enumerate(entries) if mask is not None and net.by_leaf[i]]
    if not moving:
        return jnp.zeros((len(X), len(X if X2 is None else X2), k, k), wide)
    for index, mask in moving:
        used = net.by_leaf[index]
        train = None if whole[index] else mask
        size = jnp.size(net.leaves[index])
        route = cheapest_route(X.shape[0], columns, k, size, [use(net.sites[s], net.leaves[index]) for s in used],
                               train is not None).route
        matrices = net.sites[used[0]].matrices if len(used) == 1 else None
        if matrices is not None:
            h, h2 = operands[used[0]], operands2[used[0]]
            assert h is not None
            assert h2 is not None
            terms = _product(route, matrices, (h, deltas[used[0]]), (h2, deltas2[used[0]]),
                             None if train is None else matrices.entries(train), parts, X2 is None, wide, sparing)
        else:
            left, right = net.through_sites(index, operands, deltas), net.through_sites(index, operands2, deltas2)
            terms = _contract(left, None if X2 is None else right, None if train is None else train.reshape(-1), k,
                              blocks(max(X.shape[0], columns or 0), size), wide, parts)
        total = [a + b for a, b in zip(total, terms, strict=True)]
    return total[0].transpose(0, 2, 1, 3) if len(parts) == 1 else _mirror(total, parts)


def _mirror(upper: list[Float[Array, "rows K columns K"]], parts: list[tuple[slice, slice]]) -> Float[Array, "N N K K"]:
    """Build a symmetric kernel from bands of its rows, each from its block on the diagonal to the last column."""
    n = upper[0].shape[2]
    half = jnp.concatenate([jnp.pad(rows, [(0, 0), (0, 0), (n - rows.shape[2], 0), (0, 0)]) for rows in upper])
    half = half.transpose(0, 2, 1, 3)
    band = np.repeat(np.arange(len(parts)), [rows.shape[0] for rows in upper])
    return jnp.where((band[:, None] <= band)[:, :, None, None], half, half.transpose(1, 0, 3, 2))


def energy(fn: BoundProgram, params: PyTree, entries: list[Any], whole: tuple[bool, ...],
           x: Shaped[Array, "..."]) -> Float[Array, ""]:
    """Return one example's share of Tr Θ, `Σ_k ‖∇f_k(x)‖²`, from the norms of each leaf's gradients.

    For a matrix product at one place it is `‖h‖² Σ_k ‖δ_k‖²`; at several places it is
    `Σ_pq (h hᵀ)_pq Σ_k (δ_k δ_kᵀ)_pq` or `Σ_k ‖hᵀ δ_k‖²`, whichever takes fewer operations. Arguments are those of
    `theta`.
    """
    net = TappedNetwork.of(fn, params, x[None])
    wide = accumulator(net.dtype)
    operands, deltas = net.operands_and_cotangents(x)
    total = jnp.zeros((), wide)
    for index, mask in enumerate(entries):
        if mask is None or not net.by_leaf[index]:
            continue
        used = net.by_leaf[index]
        matrices = net.sites[used[0]].matrices if len(used) == 1 else None
        if matrices is None:
            batch = jax.tree.map(lambda a: a[None], (operands, deltas))
            gradients = net.through_sites(index, *batch)(0, net.n_out).astype(wide)
            total += jnp.sum((gradients if whole[index] else jnp.where(mask.reshape(-1), gradients, 0)) ** 2)
            continue
        h = matrices.rows(operands[used[0]]).astype(wide)
        d = jax.vmap(matrices.columns)(deltas[used[0]]).astype(wide)
        (p, i), (k, _, j) = h.shape, d.shape
        if whole[index] and p * (i + k * j) < k * i * j:
            met = d.transpose(1, 0, 2).reshape(p, k * j)
            total += jnp.sum((h @ h.T) * (met @ met.T))
            continue
        trains = matrices.entries(jnp.broadcast_to(mask, jnp.shape(net.leaves[index])))
        if p == 1:
            total += jnp.sum((trains.astype(wide).T @ h[0] ** 2) * jnp.sum(d[:, 0] ** 2, 0))
        else:
            total += jnp.sum(jnp.where(trains, jnp.einsum("pi,kpj->kij", h, d), 0) ** 2)
    return total


def _product(route: Route, matrices: Matrices, left: tuple[Array, Array], right: tuple[Array, Array],
             mask: Bool[Array, "I J"] | None, parts: list[tuple[slice, slice]], symmetric: bool, dtype: Any,
             sparing: bool) -> list[Float[Array, "rows K columns K"]]:
    """Return inner products of the gradients hᵀ δ of a matrix product, from its operands and cotangents."""
    k = left[1].shape[1]
    if route == "Jacobian of the layer":
        def jacobian(side: tuple[Array, Array], first: int, last: int) -> Array:
            def one(h: Array, delta: Array) -> Array:
                rows = matrices.rows(h).astype(dtype)
                columns = jax.vmap(matrices.columns, out_axes=1)(delta).astype(dtype).reshape(rows.shape[0], -1)
                return (columns.T @ rows).reshape(last - first, -1)

            # A CPU works within its cache one example after the other, an accelerator on all at once.
            if jax.default_backend() == "cpu" and not sparing:
                return lax.map(lambda hd: one(*hd), (side[0], side[1][:, first:last]))
            return jax.vmap(one)(side[0], side[1][:, first:last])

        size = jax.eval_shape(partial(jacobian, left, 0, 1)).size // len(left[0])
        return _contract(partial(jacobian, left), None if symmetric else partial(jacobian, right),
                         None if mask is None else mask.T.reshape(-1), k,
                         blocks(max(len(left[0]), len(right[0])), size), dtype, parts)
    h, h2 = (jax.vmap(matrices.rows)(operand).astype(dtype) for operand, _ in (left, right))
    d, d2 = (jax.vmap(jax.vmap(matrices.columns))(delta).astype(dtype) for _, delta in (left, right))
    if route == "Gram over places":
        out = (_gram_of_pairs if sparing else _gram_over_places)(h, d, h2, d2, symmetric)
        return [out[r, :, c] for r, c in parts]
    h, d, h2, d2 = h[:, 0], d[:, :, 0], h2[:, 0], d2[:, :, 0]     # before bands: so this is the bias's product
    if mask is not None:
        return [_masked_gram(h[r], d[r], h2[c], d2[c], mask) for r, c in parts]
    return [(h[r] @ h2[c].T)[:, None, :, None] * _inner(d[r], d2[c]) for r, c in parts]


def _gram_over_places(h: Float[Array, "N P I"], d: Float[Array, "N K P J"], h2: Float[Array, "M P I"],
                      d2: Float[Array, "M K P J"], symmetric: bool) -> Float[Array, "N K M K"]:
    """Return inner products of the gradients hᵀ d without forming these, one row of examples after the other.

    In a symmetric kernel each row is paired with itself and with the half of the others that follows it cyclically.
    """
    n, (m, k, p, j) = len(h), d2.shape
    count = n // 2 + 1 if symmetric else m
    if symmetric:
        h2, d2 = (jnp.concatenate([a, a[:count - 1]]) for a in (h, d))
    after_all = d2.transpose(0, 2, 3, 1).reshape(len(d2), p, j * k)

    def row(one: tuple[Array, Array, Array]) -> Array:
        rows, cotangents, first = one
        others, after = (lax.dynamic_slice_in_dim(a, first, count) if symmetric else a for a in (h2, after_all))
        met = jnp.einsum("pi,mqi->mpq", rows, others)
        # One product per column example, for which the cotangents are repeated: cheaper than another order of met.
        mine = jnp.broadcast_to(cotangents.reshape(k, p * j), (count, k, p * j))
        return (mine @ (met @ after).reshape(count, p * j, k)).transpose(1, 0, 2)

    out = lax.map(row, (h, d, jnp.arange(n)))
    if not symmetric:
        return out
    ahead = (np.arange(n) - np.arange(n)[:, None]) % n     # by how many places the column's example follows the row's
    mine = out[np.arange(n)[:, None], :, np.minimum(ahead, count - 1)]
    theirs = out[np.arange(n), :, np.minimum(-ahead % n, count - 1)].transpose(0, 1, 3, 2)
    return jnp.where((ahead < count)[:, :, None, None], mine, theirs).transpose(0, 2, 1, 3)


def _gram_of_pairs(h: Float[Array, "N P I"], d: Float[Array, "N K P J"], h2: Float[Array, "M P I"],
                   d2: Float[Array, "M K P J"], symmetric: bool) -> Float[Array, "N K M K"]:
    """Return the same as `_gram_over_places`, one pair of examples after the other, in half the memory."""
    n, m = len(h), len(h2)
    rows, columns = np.triu_indices(n) if symmetric else np.indices((n, m)).reshape(2, -1)

    def pair(place: tuple[Array, Array]) -> Array:
        r, c = place
        return jnp.einsum("kpj,plj->kl", d[r], jnp.einsum("pq,lqj->plj", h[r] @ h2[c].T, d2[c]))

    out = lax.map(pair, (jnp.asarray(rows), jnp.asarray(columns)))
    number = np.zeros((n, m), np.int32)
    if symmetric:
        number[columns, rows] = np.arange(len(rows))
    number[rows, columns] = np.arange(len(rows))
    whole = out[number]
    below = np.arange(n)[:, None] > np.arange(m) if symmetric else np.zeros((n, m), bool)
    return jnp.where(below[:, :, None, None], whole.transpose(0, 1, 3, 2), whole).transpose(0, 2, 1, 3)


def _masked_gram(h: Float[Array, "N I"], d: Float[Array, "N K J"], h2: Float[Array, "M I"],
                 d2: Float[Array, "M K J"], mask: Bool[Array, "I J"]) -> Float[Array, "N K M K"]:
    """Return inner products of the gradients h dᵀ over the entries of a mask: one Gram matrix per column of it."""
    (n, i), (k, j), m = h.shape, d.shape[1:], h2.shape[0]
    block = masked_columns(n, m, k, i, j)
    steps = -(-j // block)

    def in_blocks(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, steps * block - j)])
        return jnp.moveaxis(a.reshape(*a.shape[:-1], steps, block), -2, 0)

    def step(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        columns, left, right = inputs
        grams = jnp.einsum("bni,mi->bnm", h * columns.T[:, None, :], h2)
        return total + jnp.einsum("mnkb,mlb->nkml", jnp.einsum("bnm,nkb->mnkb", grams, left), right), None

    start = jnp.zeros((n, k, m, k), h.dtype)
    total, _ = lax.scan(step, start, (in_blocks(mask.astype(h.dtype)), in_blocks(d), in_blocks(d2)))
    return total


def _inner(left: Float[Array, "N K P"], right: Float[Array, "M L P"]) -> Float[Array, "N K M L"]:
    """Return inner products of the rows of two Jacobians, as one matrix product."""
    rows, columns = (a.reshape(-1, a.shape[-1]) for a in (left, right))
    return (rows @ columns.T).reshape(*left.shape[:2], *right.shape[:2])


def _contract(left: LeafJacobian, right: LeafJacobian | None, mask: Array | None, n_out: int, block: int,
              dtype: Any, parts: list[tuple[slice, slice]]) -> list[Float[Array, "rows K columns K"]]:
    """Contract two Jacobians of a leaf over its entries, `block` outputs at a time; None mirrors the left one."""
    edges = [(first, min(first + block, n_out)) for first in range(0, n_out, block)]
    grid: list[list[Array]] = []
    for r, row in enumerate(edges):
        whole = left(*row).astype(dtype)
        a = whole if mask is None else whole * mask.astype(dtype)
        line = []
        for c, column in enumerate(edges):
            if right is None and c < r:
                line.append(grid[c][r].transpose(2, 3, 0, 1))
                continue
            # The mask is 0 or 1: applied on one side, it acts on the product.
            b = whole if right is None and c == r else (right or left)(*column).astype(dtype)
            if len(edges) == 1:
                return [_inner(a[rows], b[columns]) for rows, columns in parts]
            line.append(_inner(a, b))
        grid.append(line)
    out = jnp.concatenate([jnp.concatenate(line, axis=3) for line in grid], axis=1)
    return [out[rows, :, columns] for rows, columns in parts]
