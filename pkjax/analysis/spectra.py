"""Spectra of Θ and A on one batch: whole where the matrices are small, their largest eigenvalues where they are not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pkjax.linalg.block_lanczos import block_lanczos
from pkjax.linalg.memory import default_memory_limit
from pkjax.network import Network, own_types
from pkjax.tangent_kernel.data_factor import data_blocks
from pkjax.tangent_kernel.kernel import ntk
from pkjax.tangent_kernel.products import ntk_matvec, ntk_trace
from pkjax.trees import ApplyFn, Choice, is_floating

__all__ = ["DataSpectrum", "Spectrum", "TangentSpectrum", "data_spectrum", "tangent_spectrum"]

WHOLE = 4096
"""Rows of a matrix up to which all its eigenvalues are found."""
LARGEST = 256
"""How many eigenvalues are found of larger ones."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest eigenvalues of a Gram matrix."""

    rows: int
    """NK."""
    values: Float[np.ndarray, "l"]
    """Descending; all of them where NK is at most ``WHOLE``."""
    trace: float
    """Of the whole matrix."""
    converged: bool
    """Whether an iteration vouches for the list; True where there was none."""

    @property
    def rest(self) -> float:
        """The sum of the eigenvalues that are not listed."""
        return 0.0 if len(self.values) == self.rows else max(self.trace - float(self.values.sum()), 0.0)


@dataclass(frozen=True, eq=False)
class TangentSpectrum(Spectrum):
    """λ, the largest eigenvalues of Θ, with products by Θ."""

    multiply: Callable[[np.ndarray], np.ndarray]
    """Maps rows (r, NK) in the order (example, output) to their products with Θ."""


@dataclass(frozen=True, eq=False)
class DataSpectrum(Spectrum):
    """ν, the largest eigenvalues of A, with their eigenvectors."""

    vectors: Float[np.ndarray, "NK l"]
    """V, with rows (example, output); A is zero between different outputs."""


def tangent_spectrum(network: Network, signals: Array, *, masks: PyTree | None, trainable: Choice
                     ) -> TangentSpectrum:
    """Find λ from Θ itself where three matrices of its size fit half of the memory, else from products over batches."""
    arguments, options = (network.fn, network.params, signals), {"masks": masks, "trainable": trainable}
    n, outputs = len(signals), network.size
    size = n * outputs
    width = jnp.finfo(jnp.result_type(*filter(is_floating, jax.tree.leaves(network.params))))
    if 3 * size**2 * width.bits // 8 <= default_memory_limit():
        theta = np.asarray(ntk(*arguments, **options)).transpose(0, 2, 1, 3).reshape(size, size)
        if size <= WHOLE:
            dense = theta.astype(np.float64)
            dense = (dense + dense.T) / 2
            lam = np.maximum(np.linalg.eigvalsh(dense)[::-1], 0.0)
            return TangentSpectrum(size, lam, float(np.trace(dense)), True, partial(_times, dense))
        trace = float(np.trace(theta, dtype=np.float64))

        def multiply(rows: np.ndarray) -> np.ndarray:
            return _times(theta, rows)
    else:
        product = ntk_matvec(*arguments, **options)
        trace = float(ntk_trace(*arguments, **options))

        def multiply(rows: np.ndarray) -> np.ndarray:
            vectors = rows.reshape(-1, n, outputs)     # one at a time: one program, whatever the number of rows
            return np.stack([np.asarray(product(jnp.asarray(v, width.dtype)), np.float64).ravel() for v in vectors])
    pairs = block_lanczos(multiply, size, min(size, LARGEST), tolerance=100 * float(width.eps))
    return TangentSpectrum(size, np.maximum(pairs.values, 0.0), trace, pairs.converged, multiply)


def data_spectrum(apply_fn: ApplyFn, params: PyTree, X: PyTree, *, masks: PyTree | None, **gates: Any) -> DataSpectrum:
    """Find ν and V from the blocks of A.

    Sums over paths are taken in float64: convolutional networks have more paths than float32 counts. ``gates`` are
    the arguments of ``data_blocks`` that say what they are.

    Raises:
        FloatingPointError: the network has more paths than float64 counts.
    """
    n = len(jax.tree.leaves(X)[0])
    with own_types((params, X)), jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        blocks = np.asarray(data_blocks(apply_fn, params, X, masks, jnp.float64, **gates)).reshape(-1, n, n)
    if not np.isfinite(blocks).all():
        raise FloatingPointError("the number of paths of this network is beyond what float64 holds")
    outputs = len(blocks)
    most = n * outputs if n * outputs <= WHOLE else LARGEST
    converged, values, columns, sources = True, np.zeros(0), np.zeros((0, n)), np.zeros(0, int)
    for k, block in enumerate(blocks):
        if n <= WHOLE:
            ascending, vectors = np.linalg.eigh(block)
            found, rows = ascending[::-1][:most], vectors.T[::-1][:most]
        else:
            pairs = block_lanczos(partial(_times, block), n, min(n, most))
            converged &= pairs.converged
            found, rows = pairs.values, pairs.vectors
        values = np.concatenate([values, found])
        # What is not among the largest so far will not be later: its vector is not kept.
        kept = values >= (np.partition(values, -most)[-most] if len(values) > most else -np.inf)
        columns = np.concatenate([columns[kept[:len(columns)]], rows[kept[len(columns):]]])
        values, sources = values[kept], np.append(sources, np.full(len(found), k))[kept]
    order = np.argsort(values, kind="stable")[::-1][:most]
    full = np.zeros((n, outputs, len(order)))
    for place, i in enumerate(order):
        full[:, sources[i], place] = columns[i]
    trace = float(np.trace(blocks, axis1=1, axis2=2).sum())
    return DataSpectrum(n * outputs, np.maximum(values[order], 0.0), trace, converged,
                        full.reshape(n * outputs, -1))


def _times(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Products of a symmetric matrix with rows, taken in its own type."""
    return (rows.astype(matrix.dtype) @ matrix).astype(np.float64)
