"""The empirical neural tangent kernel Θ: exact, unaveraged, entry by entry of outputs and examples."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import read
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram
from pkjax.tables import Progress
from pkjax.tangent_kernel import layerwise, neural_tangents
from pkjax.tangent_kernel.arguments import check_count, check_kernel, restrict
from pkjax.tangent_kernel.compilation import is_curved
from pkjax.tangent_kernel.plan import NtkPlan, plan_kernel
from pkjax.tangent_kernel.tiles import fill
from pkjax.trees import ApplyFn, Choice, accumulator

__all__ = ["ntk", "ntk_plan"]

Engine = Literal["auto", "structured", "neural-tangents", "jacobian"]


@automatic_axes
def ntk(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]],
        X2: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None, *, engine: str = "auto",
        masks: PyTree | None = None, trainable: Choice = None, tile: int | None = None,
        memory_limit: int | None = None, mesh: Mesh | None = None, progress: Progress = False
        ) -> Float[Array, "N M ..."]:
    """Return the neural tangent kernel of a network, never averaged over outputs.

        Θ[x, x', k, l] = Σ_j ∂f_k(x)/∂θ_j · ∂f_l(x')/∂θ_j        over the parameters θ_j that train

    All products are taken at JAX's highest precision. Differentiation is JAX's: `relu` has slope 0 at 0.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters, a pytree.
        X: (N, *input), the inputs of the rows.
        X2: (M, *input), the inputs of the columns; None means `X`.
        engine: "structured" contracts layer by layer, "jacobian" takes the full Jacobian, "neural-tangents" calls that
            package (the extra `pkjax[ntk]`); "auto" is "structured". All three take any differentiable network.
        masks: booleans like `params`; a masked weight is absent (it is 0 and does not train).
        trainable: which parameters Θ differentiates, a predicate or a tree of booleans; None means all floating-point
            leaves.
        tile: number of examples of rows and of columns taken at a time (each tile repeats its backward passes); if X2
            is None, only tiles on one side of the diagonal are computed. None means as many as fit.
        memory_limit: bytes that one device may hold at a time, by the estimate of `ntk_plan`; None means half of its
            memory.
        mesh: devices that compute tiles side by side, in one program, including those of other processes (every process
            calls with the same arguments and gets the whole kernel). None means the default device.
        progress: where to report finished tiles, a line of text each: a function that takes the line, True for the
            standard error stream, False for nowhere.

    Returns:
        Θ of shape (N, M, K, K). `Θ.transpose(0, 2, 1, 3).reshape(N*K, M*K)` is the matrix of NK rows.

    Raises:
        ValueError: inputs differ in shape, outputs are not (N, K), the engine is unknown, `tile` or `memory_limit` is
            below 1, the kernel does not fit (the message says what would), a mesh is used under `jit`, masks or
            trainable have another structure, or params or inputs hold NaN or infinity.
        FloatingPointError: Θ overflows or vanishes in the type of its numbers (not checked under `jit`).
        TypeError: masks are not booleans, or `mesh` is not a mesh.
        ImportError: the engine is "neural-tangents" and that package cannot be loaded.

    Source: Jacot, Gabriel and Hongler (2018), equation 2; Gebhart, Saxena and Schrater (2021), equations 3 and 11
    (Θ = J_v^f Π J_v^fᵀ).

    Examples:
        >>> import jax.numpy as jnp
        >>> w = jnp.asarray([[1., 2.], [3., 4.]])
        >>> x = jnp.asarray([[1., 0.], [1., 1.]])
        >>> ntk(lambda w, x: x @ w, w, x, engine="jacobian")[0, 1]     # (x·x') I for a linear layer
        Array([[1., 0.],
               [0., 1.]], ...)
    """
    _check(engine, tile, memory_limit)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, or None, got {type(mesh).__name__}")
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    rows, columns = network.batch(X), None if X2 is None else network.batch(X2, "X2")
    sizes = (len(rows), None if columns is None else len(columns))
    plan = plan_kernel(network, sizes, engine, tile=tile, memory_limit=memory_limit,
                       devices=1 if mesh is None else mesh.size)
    block = _Block(network.whole, plan.engine, is_curved(network))
    theta = fill(block, (network.fn, network.params, network.entries), rows, columns, plan.tile, mesh, progress)
    if columns is None:      # of other columns Θ may well be 0
        check_kernel(network, rows, theta, "Θ")
    return network.shaped(theta, 2, 3)


def ntk_plan(apply_fn: ApplyFn, params: PyTree, X: Any, X2: Any = None, *, engine: str = "auto",
             masks: PyTree | None = None, trainable: Choice = None, tile: int | None = None,
             memory_limit: int | None = None, devices: int = 1) -> NtkPlan:
    """Plan how `ntk` would compute a kernel, and at what cost, without computing any of it.

    Arguments are those of `ntk`; shapes and dtypes (`jax.ShapeDtypeStruct`) suffice for `params`, `X` and `X2`, and
    `devices` is the number of devices that the mesh would have.

    Returns:
        The engine, the route of each leaf, tiles, floating-point operations, bytes moved, and the bytes that one device
        holds at a time. Operations are counted, a multiplication and an addition as 2; the bytes are estimates.

    Raises:
        ValueError: `devices` is below 1; and as for `ntk`, including a kernel that does not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((100, 30))
        >>> plan = ntk_plan(lambda w, x: x @ w, jnp.ones((30, 2)), x, tile=50)
        >>> plan.engine, plan.leaves[0].route, plan.tiles
        ('structured', 'Gram', 3)
    """
    _check(engine, tile, memory_limit)
    check_count("devices", devices, "devices", none=False)
    X, X2 = jax.tree.map(lambda leaf: leaf, (X, X2))     # as `read` takes them: `Dataset.images` become one array
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    return plan_kernel(network, (network.count(X), None if X2 is None else network.count(X2, "X2")), engine, tile=tile,
                       memory_limit=memory_limit, devices=devices)


def _check(engine: str, tile: int | None, memory_limit: int | None) -> None:
    """Raise ValueError unless the options have values that they can have."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    for name, value, unit in (("tile", tile, "examples"), ("memory_limit", memory_limit, "bytes")):
        if value is not None:
            check_count(name, value, unit)


@dataclass(frozen=True)
class _Block:
    """Computes one tile of Θ."""

    whole: tuple[bool, ...]
    engine: str
    curved: bool = False
    """Whether signals meet or go through a function that is curved, or a parameter meets itself."""

    def __call__(self, fn: BoundProgram, params: PyTree, entries: list[Any], X: Array, X2: Array | None) -> Array:
        if all(mask is None for mask in entries):     # nothing trains: all is masked, or without entries
            shape = (len(X), len(X if X2 is None else X2), *2 * fn.out.shape[1:])
            return jnp.zeros(shape, accumulator(fn.out.dtype))
        with jax.default_matmul_precision("highest"):
            if self.engine == "structured":
                return layerwise.theta(fn, params, entries, self.whole, X, X2)
            f, theta = restrict(fn, params, entries)
            wide = accumulator(fn.out.dtype)
            if self.engine == "neural-tangents":
                over = jax.vmap(f, (None, 0))
                return neural_tangents.ntk_fn(lambda t, batch: over(t, batch))(X, X2, theta).astype(wide)

            def jacobian(batch: Array) -> list[Array]:
                leaves = jax.vmap(lambda x: jax.jacrev(lambda t: f(t, x))(theta))(batch)
                return [leaf.reshape(*leaf.shape[:2], -1).astype(wide) for leaf in leaves]

            left = jacobian(X)
            right = left if X2 is None else jacobian(X2)
            terms = [jnp.einsum("nkp,mlp->nmkl", a, b) for a, b in zip(left, right, strict=True)]
            return sum(terms[1:], start=terms[0])
