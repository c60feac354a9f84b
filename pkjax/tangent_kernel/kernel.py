"""The empirical neural tangent kernel Θ: exact, unaveraged, entry by entry of outputs and examples."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.tables import Progress
from pkjax.tangent_kernel import layerwise, neural_tangents
from pkjax.tangent_kernel.arguments import chosen, prepare, restrict
from pkjax.tangent_kernel.plan import NtkPlan, plan_kernel
from pkjax.tangent_kernel.tiles import fill
from pkjax.trees import ApplyFn, Trainable, accumulator, check_finite, check_network, hashable

__all__ = ["ntk", "ntk_plan"]

Engine = Literal["auto", "structured", "neural-tangents", "jacobian"]


def ntk(apply_fn: ApplyFn, params: PyTree, X: Shaped[Array | np.ndarray, "N ..."],
        X2: Shaped[Array | np.ndarray, "M ..."] | None = None, *, engine: str = "auto", masks: PyTree | None = None,
        trainable: Trainable = None, tile: int | None = None, memory_limit: int | None = None,
        mesh: Mesh | None = None, progress: Progress = False) -> Float[Array, "N M K K"]:
    """Return the neural tangent kernel of a network, never averaged over outputs.

        Θ[x, x', k, l] = Σ_j ∂f_k(x)/∂θ_j · ∂f_l(x')/∂θ_j        over the parameters θ_j that train

    All products are taken at JAX's highest precision. Differentiation is JAX's: ``relu`` has slope 0 at 0.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters, a pytree.
        X: inputs, one example for each row.
        X2: other inputs for the columns; None means ``X``.
        engine: "structured" contracts layer by layer, "jacobian" takes the full Jacobian,
            "neural-tangents" asks that package (the extra ``pkjax[ntk]``); "auto" is "structured", or "jacobian"
            where the network is no sum over paths (tanh, say).
        masks: booleans shaped like ``params``: False means that the weight is absent (0, and does not train).
        trainable: which parameters Θ differentiates, a predicate or a tree of booleans; None means all floating.
        tile: take this many examples of rows and of columns at a time (each tile repeats its backward passes);
            with X2 None, only tiles on one side of the diagonal are computed. None means as many as fit.
        memory_limit: bytes that one device may hold at a time, by the estimate of ``ntk_plan``; None means half of
            its memory.
        mesh: devices that compute tiles side by side, in one program, those of other processes included (every
            process calls with the same arguments, and gets the whole kernel). None means the default device.
        progress: where to report finished tiles, a line of text each: a function that takes the line, True for the
            standard error stream, False for nowhere.

    Returns:
        Θ of shape (N, M, K, K). A matrix of NK rows is ``Θ.transpose(0, 2, 1, 3).reshape(N*K, M*K)``.

    Raises:
        ValueError: for inputs whose shapes differ, outputs that are not (N, K), an unknown engine, ``tile`` or
            ``memory_limit`` below 1, a kernel that does not fit (with what would), a mesh under ``jit``, masks or
            trainable of another structure, NaN or infinity in params or inputs.
        NotPathNetworkError: engine "structured" reads networks that are sums over paths; "jacobian" and
            "neural-tangents" take any differentiable network.
        ImportError: where engine "neural-tangents" is asked for and cannot be loaded.

    Source: equation 2 of Jacot et al. 2018; Gebhart et al. 2021, equations 3 and 11 (Θ = J_v^f Π J_v^fᵀ).

    >>> import jax.numpy as jnp
    >>> w = jnp.asarray([[1., 2.], [3., 4.]])
    >>> x = jnp.asarray([[1., 0.], [1., 1.]])
    >>> ntk(lambda w, x: x @ w, w, x, engine="jacobian")[0, 1]     # (x·x') I for a linear layer
    Array([[1., 0.],
           [0., 1.]], ...)
    """
    rows, columns = _check(X, X2, engine, tile, memory_limit)
    params, entries, whole = prepare(apply_fn, params, rows, masks, trainable)
    if columns is not None:
        check_finite(columns, "X2")
    one = jax.ShapeDtypeStruct((1, *rows.shape[1:]), rows.dtype)
    sizes = (len(rows), None if columns is None else len(columns))
    plan = plan_kernel(hashable(apply_fn), params, entries, whole, one, sizes, engine, tile=tile,
                     memory_limit=memory_limit, devices=1 if mesh is None else mesh.size)
    block = _Block(hashable(apply_fn), whole, plan.engine)
    return fill(block, (params, entries), rows, columns, plan.tile, mesh, progress)


def ntk_plan(apply_fn: ApplyFn, params: PyTree, X: Any, X2: Any = None, *, engine: str = "auto",
             masks: PyTree | None = None, trainable: Trainable = None, tile: int | None = None,
             memory_limit: int | None = None, devices: int = 1) -> NtkPlan:
    """Say how ``ntk`` would compute a kernel, and what that costs, without computing any of it.

    Arguments are those of ``ntk``; of ``params``, ``X`` and ``X2`` shapes and types suffice
    (``jax.ShapeDtypeStruct``), and ``devices`` is how many the mesh would have.

    Returns:
        The engine, the route of each leaf, tiles, floating-point operations, bytes moved, and the bytes that one
        device holds at a time. Operations are counted; the two figures of bytes are estimates.

    Raises:
        ValueError: as ``ntk``, for a kernel that does not fit included.

    Source: definition; operations of matrix products counted as 2 for a multiplication and an addition.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((100, 30))
    >>> plan = ntk_plan(lambda w, x: x @ w, jnp.ones((30, 2)), x, tile=50)
    >>> plan.engine, plan.leaves[0].route, plan.tiles
    ('structured', 'Gram', 3)
    """
    X, X2 = _check(X, X2, engine, tile, memory_limit)
    check_network(apply_fn, params, X)
    entries, whole = chosen(params, masks, trainable)
    return plan_kernel(hashable(apply_fn), params, entries, whole, jax.ShapeDtypeStruct((1, *X.shape[1:]), X.dtype),
                     (X.shape[0], None if X2 is None else X2.shape[0]), engine, tile=tile, memory_limit=memory_limit,
                     devices=devices)


def _check(X: Any, X2: Any, engine: str, tile: int | None, memory_limit: int | None) -> tuple[Any, Any]:
    """Return the inputs as arrays (or their shapes, where shapes were given), or raise ValueError."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    for name, value, unit in (("tile", tile, "examples"), ("memory_limit", memory_limit, "bytes")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name} must be a whole number of {unit}, 1 or more, or None, got {value!r}")
    X, X2 = (a if a is None or isinstance(a, jax.ShapeDtypeStruct) else jnp.asarray(a) for a in (X, X2))
    if X2 is not None and (X2.ndim == 0 or X2.shape[1:] != X.shape[1:] or X2.dtype != X.dtype or X2.shape[0] == 0):
        raise ValueError(f"X2 must hold one or more inputs like those of X, which have shape {X.shape[1:]} and "
                         f"dtype {X.dtype}, got X2 of shape {X2.shape} and dtype {X2.dtype}")
    return X, X2


@dataclass(frozen=True)
class _Block:
    """Computes a tile of Θ."""

    apply_fn: ApplyFn
    whole: tuple[bool, ...]
    engine: str

    def __call__(self, params: PyTree, entries: list[Any], X: Array, X2: Array | None) -> Array:
        with jax.default_matmul_precision("highest"):
            if self.engine == "structured":
                return layerwise.theta(self.apply_fn, params, entries, self.whole, X, X2)
            f, theta = restrict(self.apply_fn, params, entries)
            wide = accumulator(jax.eval_shape(self.apply_fn, params, X).dtype)
            if self.engine == "neural-tangents":
                return neural_tangents.ntk_fn(f)(X, X2, theta).astype(wide)

            def jacobian(batch: Array) -> list[Array]:
                leaves = jax.vmap(lambda x: jax.jacrev(lambda t: f(t, x[None])[0])(theta))(batch)
                return [leaf.reshape(*leaf.shape[:2], -1).astype(wide) for leaf in leaves]

            left = jacobian(X)
            right = left if X2 is None else jacobian(X2)
            terms = [jnp.einsum("nkp,mlp->nmkl", a, b) for a, b in zip(left, right, strict=True)]
            return sum(terms[1:], start=terms[0])
