"""The path kernel's largest eigenpairs by one of three solvers: exact counting, dense, or block Lanczos."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, PyTree

from pkjax import tables
from pkjax.linalg.block_lanczos import BlockLanczos, NotConvergedWarning, block_lanczos
from pkjax.linalg.memory import budget, default_memory_limit
from pkjax.linalg.rows import DeviceRows, HostRows
from pkjax.network import Network
from pkjax.path_kernel.gram import (
    flat_product,
    floating_entries,
    floating_leaves,
    make_problem,
    read_start,
    trained_positions,
    with_wide_gates,
)
from pkjax.paths import NotFullyConnectedError
from pkjax.paths.dense_layers import network_layers
from pkjax.paths.scaled import widest
from pkjax.programs.equations import floating_types
from pkjax.trees import ApplyFn, Choice

__all__ = ["Eigenpairs", "is_direct", "largest_eigenpairs", "search_products"]

_DENSE_BELOW = 3000
_AT_ONCE = 2**24   # entries of the vectors that G multiplies at a time
_ROWS = 8          # vectors to a call
_NARROW_ABOVE = 2**19
"""Parameters above which products in float32 save more time than the compilation of another program costs."""
_SINGLE = 1e-6     # a residual, in units of the largest eigenvalue, that products in float32 reach

Multiply = Callable[[Any], Any]
"""Maps rows over the parameters that train to the products of G with them: arrays of NumPy or JAX."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """The largest eigenpairs of the dual Gram matrix, and so the largest eigenvalues of Π.

    Returned by ``path_kernel.eigenpairs``. Prints as a short text and, in a notebook, as a table.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax import path_kernel
        >>> path_kernel.eigenpairs(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((1, 2)), k=2)
        Eigenpairs(
            values=float64[2] 1 … 1,
            vectors=float64[2,2,1],
            ...
            converged=True
        )
    """

    values: Float64[np.ndarray, "k"]
    """π, descending."""
    vectors: PyTree
    """z: like the parameters with a leading axis k; orthonormal. None where they were not requested."""
    residuals: Float64[np.ndarray, "k"]
    """``‖G z − π z‖``."""
    bounds: Float64[np.ndarray, "k"]
    """How far each value may be from the eigenvalue of its rank."""
    converged: bool
    """Whether the bounds hold for all; ``NotConvergedWarning`` was issued if not."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        return tables.pairs({"eigenvalue": self.values, "error at most": self.bounds}, "largest eigenvalues of Π")


def is_direct(network: Network, z: Array) -> bool:
    """Whether "auto" is a direct method, counting or dense, for which a long list costs little more than a short one.

    Examples:
        >>> import jax.numpy as jnp
        >>> is_direct(*read_start(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((1, 2)), None, None))
        True
    """
    if len(trained_positions(network)) <= _DENSE_BELOW:
        return True
    try:
        network_layers(network, z)
    except NotFullyConnectedError:
        return False
    return True


def largest_eigenpairs(apply_fn: ApplyFn, params: PyTree, x: PyTree, k: int, masks: PyTree | None,
                       trainable: Choice, method: str, tolerance: float, gates: str | None = None,
                       reference: PyTree | None = None, *, vectors: bool) -> Eigenpairs:
    """Find the k largest eigenpairs by the named method; "auto" takes the first that fits."""
    if method not in ("auto", "dense", "counting", "lanczos"):
        raise ValueError(f'method must be "auto", "dense", "counting" or "lanczos", but is {method!r}')
    apply_fn = with_wide_gates(apply_fn, params, x, gates, reference, masks)
    network, z = read_start(apply_fn, params, x, masks, trainable)
    trained, size = trained_positions(network), sum(map(np.size, jax.tree.leaves(params)))
    if not 1 <= k <= len(trained):
        raise ValueError(f"k must be between 1 and the number of parameters that train, {len(trained)}, got {k}")
    if method in ("auto", "counting"):
        try:
            layers = network_layers(network, z)
        except NotFullyConnectedError:
            if method == "counting":
                raise
            method = "dense" if len(trained) <= _DENSE_BELOW else "lanczos"
        else:
            from pkjax.path_kernel.spectrum_slicing import top_spectrum

            top = top_spectrum(layers, k, inputs=np.asarray(z, np.float64).ravel(), vectors=vectors, size=size,
                               trained=trained)
            missing = int((~np.isfinite(top.residuals)).sum())
            if missing:
                warnings.warn(f"the eigenvectors of {missing} of {k} eigenvalues did not converge and are zero; the "
                              "values and their bounds hold", NotConvergedWarning, stacklevel=3)
            return Eigenpairs(top.values, _unflatten(top.vectors, params), top.residuals, top.bounds, not missing)

    start = apply_fn, params, x, masks, trainable
    multiply, eps = _double(*start, _ROWS if method == "dense" else _at_once())
    values, rows, residuals, bounds, converged = (
        _dense_pairs(multiply, len(trained), k, eps) if method == "dense"
        else _lanczos_pairs(network, z, multiply, len(trained), k, tolerance, eps))
    if not vectors:
        return Eigenpairs(values, None, residuals, bounds, converged)
    full = np.zeros((k, size))
    full[:, trained] = rows
    return Eigenpairs(values, _unflatten(full, params), residuals, bounds, converged)


def search_products(apply_fn: ApplyFn, params: PyTree, x: PyTree, masks: PyTree | None, trainable: Choice
                    ) -> Multiply:
    """Products of G with single rows, by the program that an iterative search has compiled."""
    network, z = read_start(apply_fn, params, x, masks, trainable)
    size = len(trained_positions(network))
    if _DENSE_BELOW < size <= _NARROW_ABOVE and not is_direct(network, z):
        return _double(apply_fn, params, x, masks, trainable, 1)[0]
    return _products(network, z, 1)


def _double(apply_fn: ApplyFn, params: PyTree, x: PyTree, masks: PyTree | None, trainable: Choice, most: int
            ) -> tuple[Multiply, float]:
    """Products in float64, for which a function is read once more, and their rounding: it may have narrower parts."""
    with widest(apply_fn, (params, x)) as (theta, start), jax.default_matmul_precision("highest"):
        network, z = read_start(apply_fn, theta, start, masks, trainable)
        types = floating_types(network.fn.program.jaxpr) | {z.dtype}
        return _products(network, z, most), max(float(jnp.finfo(dtype).eps) for dtype in types)


def _at_once() -> int:
    """Rows that a search multiplies at a time: several gain a processor nothing, and are another program."""
    return 1 if jax.default_backend() == "cpu" else _ROWS


def _products(network: Network, z: Array, most: int = _ROWS) -> Multiply:
    """Products of G with rows over the parameters that train, in the network's type, so many at a time.

    Rows of NumPy come back as such, in the wider of both types; those of JAX stay on its device.
    """
    train = np.concatenate([np.broadcast_to(np.asarray(t), leaf.shape).ravel() for t, leaf in
                            zip(floating_entries(network), floating_leaves(network), strict=True)])
    # Masked entries are left out, and filled in outside of the program, which so serves any mask. Where everything
    # trains there is nothing to do: picking millions of entries one by one takes as long as a product.
    places = None if train.all() else np.flatnonzero(train)
    dtype = jnp.result_type(z)
    wide = dtype == np.float64
    most = max(1, min(most, budget(_AT_ONCE, 8) // train.size))

    def multiply(rows: Any) -> Any:
        count = 1 if len(rows) < most else most     # two shapes, so two programs at most
        out: Any = np.empty(rows.shape, np.result_type(rows, dtype)) if isinstance(rows, np.ndarray) else []
        with jax.enable_x64(wide):
            for start in range(0, len(rows), count):
                part = rows[start:start + count].astype(dtype)
                if len(part) < count:
                    part = np.concatenate([part, np.zeros((count - len(part), part.shape[1]), dtype)])
                image = _picked(_times(network, z, _filled(part, places, train.size)), places)[:len(rows) - start]
                if isinstance(rows, np.ndarray):
                    out[start:start + count] = np.asarray(image)
                else:
                    out.append(image)
            return out if isinstance(rows, np.ndarray) else jnp.concatenate([jnp.asarray(each) for each in out])

    return multiply


def _filled(rows: Any, places: np.ndarray | None, size: int) -> Any:
    if places is None:
        return rows
    if not isinstance(rows, np.ndarray):
        return jnp.zeros((len(rows), size), rows.dtype).at[:, places].set(rows)
    full = np.zeros((len(rows), size), rows.dtype)
    full[:, places] = rows
    return full


def _picked(rows: Array, places: np.ndarray | None) -> Any:
    if places is None:
        return rows
    return rows[:, places] if jax.default_backend() != "cpu" else np.asarray(rows)[:, places]


@jax.jit
def _times(network: Network, z: Array, rows: Array) -> Array:
    multiply, *_ = flat_product(make_problem(network, z))
    return jax.vmap(multiply)(rows)


_Solution = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]

def _dense_pairs(multiply: Multiply, size: int, k: int, eps: float) -> _Solution:
    gram = _finite(multiply)(np.eye(size))
    values, s = np.linalg.eigh((gram + gram.T) / 2)
    values, s = values[::-1][:k], s[:, ::-1][:, :k]
    residuals = np.linalg.norm(gram @ s - s * values, axis=0)
    # Weyl: rounding of the matrix moves no eigenvalue by more than its own size.
    bounds = np.full(k, 8 * eps * np.sqrt(size) * values[0] + np.abs(gram - gram.T).max() * size)
    return np.maximum(values, 0), s.T, residuals, np.maximum(bounds, residuals), True


def _lanczos_pairs(network: Network, z: Array, double: Multiply, size: int, k: int, tolerance: float,
                   eps: float) -> _Solution:
    """Search with products in the network's own type, and judge what is found with k products in float64.

    Of a small network, compiling products in two types takes longer than they do: it is searched in float64.
    """
    if tolerance >= _SINGLE and size > _NARROW_ABOVE:
        space = HostRows if jax.default_backend() == "cpu" else DeviceRows
        with warnings.catch_warnings(), contextlib.suppress(FloatingPointError):
            warnings.simplefilter("ignore", NotConvergedWarning)
            block, basis = _sizes(size, k, 4)
            pairs = block_lanczos(_products(network, z, _at_once()), size, k, block=1, most_rows=block, capacity=basis,
                                  tolerance=tolerance, rows=space(size, np.float32), judge=double)
            if pairs.converged:
                return _bounded(pairs, size, eps)
    block, basis = _sizes(size, k, 8)
    return _bounded(block_lanczos(_finite(double), size, k, block=1, most_rows=block, capacity=basis,
                                  tolerance=tolerance), size, eps)


def _finite(multiply: Multiply) -> Multiply:
    def checked(rows: np.ndarray) -> np.ndarray:
        out = multiply(rows)
        if not np.isfinite(out).all():
            raise FloatingPointError("products with the path kernel overflow float64: scale the network's weights or "
                                     "its inputs down")
        return out

    return checked


def _bounded(pairs: BlockLanczos, size: int, eps: float) -> _Solution:
    # Kahan: k eigenvalues lie within the residual block's norm of these values, one each.
    bound = max(float(np.linalg.norm(pairs.residuals)), pairs.slack) if pairs.converged else np.inf
    if eps > np.finfo(float).eps:      # products in a narrower type have judged themselves
        bound += 8 * eps * np.sqrt(size) * float(pairs.values[0])
    return np.maximum(pairs.values, 0), pairs.vectors, pairs.residuals, np.full(len(pairs.values), bound), (
        pairs.converged)


class _Sizes(NamedTuple):
    block: int
    """Rows to a block of Lanczos, after copies were found."""
    basis: int
    """Rows that a search keeps."""


def _sizes(size: int, k: int, itemsize: int) -> _Sizes:
    """Choose a block and a basis, smaller where the vectors would not fit half of the memory."""
    limit, row = default_memory_limit(), itemsize * size
    left = limit // row - 24 // itemsize * k     # rows beside locked pairs and their products in float64
    block = min(8, left // 8)
    if block < 1:
        raise ValueError(f"{k} eigenpairs of {size} parameters take {8 * size * (3 * k + 8):.3g} bytes by Lanczos, and "
                         f"half of the memory is {limit:.3g}: at most {max(0, (limit // (8 * size) - 8) // 3)} fit")
    return _Sizes(block, min(max(8 * k, 64), left - 2 * block))


def _unflatten(rows: np.ndarray | None, params: PyTree) -> PyTree:
    if rows is None:
        return None
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    parts = np.split(rows, ends[:-1], axis=1)
    return jax.tree.unflatten(structure, [p.reshape(len(rows), *np.shape(leaf))
                                          for p, leaf in zip(parts, leaves, strict=True)])
