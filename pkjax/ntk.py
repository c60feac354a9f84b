"""The empirical neural tangent kernel Θ: exact, unaveraged, entry by entry of outputs and examples."""

import contextlib
import sys
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax import nt_loader, structured
from pkjax.paths import NotPathNetworkError, sites
from pkjax.trees import ApplyFn, Trainable, check_finite, check_masks, check_network, trainable_masks

__all__ = ["ntk", "ntk_matvec", "ntk_trace"]

Engine = Literal["auto", "structured", "neural-tangents", "jacobian"]


def ntk(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."],
        X2: Shaped[Array | np.ndarray, "M ..."] | None = None, *, engine: str = "auto", masks: PyTree | None = None,
        trainable: Trainable = None, tile: int | None = None, progress: bool = False) -> Float[Array, "N M K K"]:
    """Return the neural tangent kernel of a network, never averaged over outputs.

        Θ[x, x', k, l] = Σ_j ∂f_k(x)/∂θ_j · ∂f_l(x')/∂θ_j        over the parameters θ_j that train

    All products are taken at JAX's highest precision. Differentiation is JAX's: ``relu`` has slope 0 at 0.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters, a pytree.
        X: inputs, one example for each row.
        X2: other inputs for the columns; None means ``X``.
        engine: "structured" contracts layer by layer (``pkjax.structured``), "jacobian" takes the full Jacobian,
            "neural-tangents" asks that package (the extra ``pkjax[ntk]``); "auto" is "structured", or "jacobian"
            where the network is no sum over paths (tanh, say).
        masks: booleans shaped like ``params``: False means that the weight is absent (0, and does not train).
        trainable: which parameters Θ differentiates, a predicate or a tree of booleans; None means all floating.
        tile: take this many examples of rows and of columns at a time, which bounds memory (each tile repeats its
            backward passes); with X2 None, only tiles on one side of the diagonal are computed.
        progress: report finished tiles on the standard error stream.

    Returns:
        Θ of shape (N, M, K, K). A matrix of NK rows is ``Θ.transpose(0, 2, 1, 3).reshape(N*K, M*K)``.

    Raises:
        ValueError: for inputs whose shapes differ, outputs that are not (N, K), an unknown engine, ``tile`` below
            1, masks or trainable of another structure, NaN or infinity in params or inputs.
        NotPathNetworkError: engine "structured" reads networks that are sums over paths; "jacobian" and
            "neural-tangents" take any differentiable network.
        ImportError: where engine "neural-tangents" is asked for and cannot be loaded.

    Source: equation 2 of Jacot et al. 2018; Gebhart et al. 2021, section 2 and equation 9 (Θ = J_v^f Π J_v^fᵀ).

    >>> import jax.numpy as jnp
    >>> w = jnp.asarray([[1., 2.], [3., 4.]])
    >>> x = jnp.asarray([[1., 0.], [1., 1.]])
    >>> ntk(lambda w, x: x @ w, w, x, engine="jacobian")[0, 1]     # (x·x') I for a linear layer
    Array([[1., 0.],
           [0., 1.]], ...)
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int | np.integer) or tile < 1):
        raise ValueError(f"tile must be a whole number of examples, 1 or more, or None, got {tile!r}")
    X = jnp.asarray(X)
    params, entries, whole = _prepare(apply_fn, params, X, masks, trainable)
    if X2 is not None:
        X2 = jnp.asarray(X2)
        if X2.ndim == 0 or X2.shape[1:] != X.shape[1:] or X2.dtype != X.dtype or X2.shape[0] == 0:
            raise ValueError(f"X2 must hold one or more inputs like those of X, which have shape {X.shape[1:]} and "
                             f"dtype {X.dtype}, got X2 of shape {X2.shape} and dtype {X2.dtype}")
        check_finite(X2, "X2")
    if engine == "auto":
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), (params, X[:1]))
        engine = "structured" if _has_paths(_hashable(apply_fn), *_static(like)) else "jacobian"
    block = partial(_block, _hashable(apply_fn), params, entries, whole=whole, engine=engine)
    n, m = X.shape[0], (X if X2 is None else X2).shape[0]
    if tile is None or tile >= max(n, m):
        return block(X, X2)
    return _tiled(block, X, X2, int(tile), progress)


def ntk_trace(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."], *, masks: PyTree | None = None,
              trainable: Trainable = None) -> Float[Array, ""]:
    """Return the trace of the tangent kernel without forming it.

        Tr Θ = Σ_x Σ_k ‖∇_θ f_k(x)‖²

    exact, K backward passes for each example. Arguments and errors are those of ``ntk``.

    >>> import jax.numpy as jnp
    >>> x = jnp.asarray([[1., 0.], [1., 1.]])
    >>> ntk_trace(lambda w, x: x @ w, jnp.ones((2, 3)), x)         # K Σ_x ‖x‖² for a linear layer
    Array(9., ...)
    """
    X = jnp.asarray(X)
    params, entries, _ = _prepare(apply_fn, params, X, masks, trainable)
    return _trace(_hashable(apply_fn), params, entries, X)


def ntk_matvec(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."], *,
               masks: PyTree | None = None, trainable: Trainable = None
               ) -> Callable[[Float[Array, "N K"]], Float[Array, "N K"]]:
    """Return the map v → Θ v of arrays (N, K), one backward and one forward derivative for each product.

        (Θ v)[x, k] = Σ_{x', l} Θ[x, x', k, l] v[x', l] = J_θ^f (J_θ^fᵀ v)

    Arguments and errors are those of ``ntk``; the map raises ValueError for v of another shape than (N, K).

    >>> import jax.numpy as jnp
    >>> x = jnp.asarray([[1., 0.], [1., 1.]])
    >>> ntk_matvec(lambda w, x: x @ w, jnp.ones((2, 1)), x)(jnp.ones((2, 1)))
    Array([[2.],
           [3.]], ...)
    """
    X = jnp.asarray(X)
    params, entries, _ = _prepare(apply_fn, params, X, masks, trainable)
    shape = jax.eval_shape(apply_fn, params, X)

    def matvec(v: Float[Array, "..."]) -> Float[Array, "..."]:
        v = jnp.asarray(v)
        if v.shape != shape.shape:
            raise ValueError(f"v must have the shape {shape.shape} of the network's outputs, got {v.shape}")
        return _product(_hashable(apply_fn), params, entries, X, v.astype(shape.dtype))

    return matvec


def _prepare(apply_fn: ApplyFn, params: PyTree, X: Array, masks: PyTree | None, trainable: Trainable,
             ) -> tuple[PyTree, list[Array | None], tuple[bool, ...]]:
    """Check the input; return masked parameters, and which entries of each leaf train (None: none; whole: all)."""
    check_masks(masks, params)
    check_network(apply_fn, params, X)
    check_finite(params, "params")
    check_finite(X, "X")
    given = [leaf for leaf in jax.tree.leaves((masks, trainable)) if not callable(leaf)]
    # Booleans known while tracing stay known, so that whole layers keep their cheaper route under jit.
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in given)
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        chosen = jax.tree.leaves(trainable_masks(params, trainable, masks))
    flags = [(bool(np.asarray(c).any()), bool(np.asarray(c).all())) if known else (True, False) for c in chosen]
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(params)]
    entries = [c if some and f else None for c, (some, _), f in zip(chosen, flags, floating, strict=True)]
    if masks is not None:
        params = jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, masks)
    return params, entries, tuple(all_ for _, all_ in flags)


def _static(tree: PyTree) -> tuple[tuple[Any, ...], Any]:
    leaves, treedef = jax.tree.flatten(tree)
    return tuple(leaves), treedef


@lru_cache(maxsize=64)
def _has_paths(apply_fn: ApplyFn, leaves: tuple[Any, ...], treedef: Any) -> bool:
    """Whether the network is a sum over paths, which takes a walk through its operations to say."""
    try:
        sites(apply_fn, *jax.tree.unflatten(treedef, leaves))
    except NotPathNetworkError:
        return False
    return True


def _hashable(apply_fn: ApplyFn) -> ApplyFn:
    """Let a callable that cannot be hashed be a key of the compilation cache, by identity."""
    if isinstance(apply_fn, Hashable):
        with contextlib.suppress(TypeError):
            hash(apply_fn)
            return apply_fn
    return lambda params, x: apply_fn(params, x)


def _restrict(apply_fn: ApplyFn, params: PyTree, entries: list[Array | None]) -> tuple[ApplyFn, list[Array]]:
    """Make the network a function of the leaves that train; entries that do not train are held fixed."""
    leaves, treedef = jax.tree.flatten(params)
    moving = {i: mask for i, mask in enumerate(entries) if mask is not None}

    def restricted(theta: list[Array], x: Array) -> Array:
        full = list(leaves)
        for (i, mask), value in zip(moving.items(), theta, strict=True):
            full[i] = jnp.where(mask, value, leaves[i])
        return apply_fn(jax.tree.unflatten(treedef, full), x)

    return restricted, [leaves[i] for i in moving]


@partial(jax.jit, static_argnames=("apply_fn", "whole", "engine"))
def _block(apply_fn: ApplyFn, params: PyTree, entries: list[Array | None], X: Array, X2: Array | None, *,
           whole: tuple[bool, ...], engine: str) -> Array:
    with jax.default_matmul_precision("highest"):
        if engine == "structured":
            return structured.theta(apply_fn, params, entries, whole, X, X2)
        f, theta = _restrict(apply_fn, params, entries)
        wide = structured.accumulator(jax.eval_shape(apply_fn, params, X).dtype)
        if engine == "neural-tangents":
            return nt_loader.ntk_fn(f)(X, X2, theta).astype(wide)

        def jacobian(batch: Array) -> list[Array]:
            leaves = jax.vmap(lambda x: jax.jacrev(lambda t: f(t, x[None])[0])(theta))(batch)
            return [leaf.reshape(*leaf.shape[:2], -1).astype(wide) for leaf in leaves]

        left = jacobian(X)
        right = left if X2 is None else jacobian(X2)
        terms = [jnp.einsum("nkp,mlp->nmkl", a, b) for a, b in zip(left, right, strict=True)]
        return sum(terms[1:], start=terms[0])


def _tiled(block: Callable[[Array, Array | None], Array], X: Array, X2: Array | None, tile: int,
           progress: bool) -> Array:
    """Fill Θ tile by tile; the last tile of each side is filled up with its last example, so one shape compiles."""
    def starts(count: int) -> list[int]:
        return list(range(0, count, tile))

    def part(batch: Array, start: int) -> Array:
        return batch[np.minimum(np.arange(start, start + tile), batch.shape[0] - 1)]

    Y = X if X2 is None else X2
    n, m = X.shape[0], Y.shape[0]
    pairs = [(r, c) for r in starts(n) for c in starts(m) if X2 is not None or c >= r]
    tiles: dict[tuple[int, int], Any] = {}
    for done, (r, c) in enumerate(pairs, start=1):
        values = block(part(X, r), None if X2 is None and r == c else part(Y, c))[:n - r, :m - c]
        # Finished tiles wait on the host: the accelerator holds one at a time.
        tiles[r, c] = values if isinstance(values, jax.core.Tracer) else np.asarray(values)
        if X2 is None and r != c:
            tiles[c, r] = tiles[r, c].transpose(1, 0, 3, 2)
        if progress:
            sys.stderr.write(f"\rntk: tile {done} of {len(pairs)}" + ("\n" if done == len(pairs) else ""))
            sys.stderr.flush()
    lines = [[tiles[r, c] for c in starts(m)] for r in starts(n)]
    if any(isinstance(t, jax.core.Tracer) for line in lines for t in line):
        return jnp.concatenate([jnp.concatenate(line, axis=1) for line in lines])
    return jnp.asarray(np.concatenate([np.concatenate(line, axis=1) for line in lines]))


@partial(jax.jit, static_argnames=("apply_fn",))
def _trace(apply_fn: ApplyFn, params: PyTree, entries: list[Array | None], X: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        f, theta = _restrict(apply_fn, params, entries)
        out = jax.eval_shape(apply_fn, params, X)
        wide = structured.accumulator(out.dtype)

        def energy(x: Array) -> Array:
            _, pullback = jax.vjp(lambda t: f(t, x[None])[0], theta)
            gradients = jax.vmap(lambda e: pullback(e)[0])(jnp.eye(out.shape[1], dtype=out.dtype))
            return sum((jnp.sum(g.astype(wide)**2) for g in gradients), start=jnp.zeros((), wide))

        size = out.shape[1] * sum(leaf.size for leaf in theta)
        batch = max(1, min(X.shape[0], structured.ENTRIES // max(1, size)))
        return jnp.sum(jax.lax.map(energy, X, batch_size=batch))


@partial(jax.jit, static_argnames=("apply_fn",))
def _product(apply_fn: ApplyFn, params: PyTree, entries: list[Array | None], X: Array, v: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        f, theta = _restrict(apply_fn, params, entries)
        _, pullback = jax.vjp(lambda t: f(t, X), theta)
        return jax.jvp(lambda t: f(t, X), (theta,), pullback(v))[1]
