"""What a comparison measures of one network: traces, spectra and bounds, in memory that is at hand."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax import path_kernel
from pkjax.analysis.analyze import ones_of
from pkjax.analysis.comparison import Row
from pkjax.analysis.frozen_kernel import split_gates
from pkjax.analysis.spectra import LARGEST, WHOLE, data_spectrum
from pkjax.linalg.block_lanczos import block_lanczos
from pkjax.linalg.memory import default_memory_limit
from pkjax.network import Network, read
from pkjax.path_kernel.gram import check_start, read_paths, widened
from pkjax.path_kernel.solvers import is_direct
from pkjax.path_kernel.traces import Number, gated_measured, measured
from pkjax.programs.checks import HOLDS, check_result
from pkjax.programs.program import BoundProgram
from pkjax.pruning.connectivity import connectivity
from pkjax.pruning.result import DisconnectedWarning
from pkjax.tangent_kernel.arguments import check_kernel
from pkjax.tangent_kernel.compilation import is_curved
from pkjax.tangent_kernel.kernel import ntk
from pkjax.tangent_kernel.products import ntk_matvec, ntk_trace
from pkjax.tangent_kernel.spectrum import ntk_effective_rank
from pkjax.trees import ApplyFn, Choice, trainable_leaves

__all__ = ["Case", "Key"]

Key = tuple[str, float | None, int | str | None]
"""Name, compression and seed of a network."""
T = TypeVar("T")

TOLERANCE = 1e-5
"""Residual of an iterative solver's π, in units of the largest."""
ITERATIVE = 8
"""π that an iterative solver finds by default,"""
ITERATIVE_ENTRIES = 2**23
"""in vectors of at most this many entries altogether, but always one."""
DECADES = 1e-4
"""λ / λ_1 down to which the decay is fitted."""


@dataclass(frozen=True, eq=False)
class Case:
    """One network of a comparison."""

    apply_fn: ApplyFn
    params: PyTree
    X: PyTree
    x: PyTree | None
    masks: PyTree
    trainable: Choice
    reference: PyTree | None
    """Where gates are frozen; None where they are not."""

    @property
    def trained(self) -> PyTree:
        """What trains if it is not masked: booleans that broadcast against the parameters."""
        return jax.tree.map(np.asarray, trainable_leaves(self.params, self.trainable))

    def measure(self, key: Key, k: int | None) -> tuple[Row, np.ndarray]:
        """Find the row and the spectrum."""
        m = sum(int(np.count_nonzero(np.logical_and(a, b)))
                for a, b in zip(jax.tree.leaves(self.masks), jax.tree.leaves(self.trained), strict=True))
        if m == 0:
            name, compression, seed = key
            return Row(name, compression, seed, 0, False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf,
                       0.0, "nothing that trains is left", None if self.reference is None else 0.0), np.zeros(0)
        with jax.default_matmul_precision("highest"):
            network, signals = read_paths(self.apply_fn, self.params, self.X, self.masks, self.trainable)
        x = ones_of(self.X) if self.x is None else widened(self.apply_fn, self.x)
        z = network.batch(x, "x")
        check_start(z, x)
        paths = self._paths(network, x)
        notes: list[str] = []
        size = len(signals) * network.size
        count = min(m, k if k is not None else size if is_direct(paths.kernel, z) else max(
            1, min(ITERATIVE, ITERATIVE_ENTRIES // m)))
        trace, log10_trace = _number(measured(paths.kernel, z)[0], "Tr Π", notes)
        gated, log10_gated = _number(gated_measured(network, signals, frozen=self.reference is not None)[0],
                                     "the gated trace", notes)
        lam, total, rank, error = _attempt(notes, (np.zeros(0), math.nan, math.nan, math.nan),
                                           lambda: self._spectrum(network, signals, notes))
        bounds = (math.nan, math.nan) if not count or math.isnan(trace) else _attempt(
            notes, (math.nan, math.nan), lambda: self._energy(paths, count, count == m, trace, notes))
        largest = float(lam[0]) if len(lam) else 0.0 * total      # NaN where Θ is
        on_paths = None if self.reference is None else _attempt(
            notes, math.nan, lambda: float(_trace(paths.held.fn, *self._kernel_arguments(signals))))
        return Row(*key, m, self._connected(paths.kernel, z), trace, gated, total, *bounds, largest, rank, _decay(lam),
                   log10_trace, log10_gated, error, "; ".join(notes), on_paths), lam

    def _paths(self, network: Network, x: PyTree) -> "_Paths":
        """What Π and A are of."""
        if self.reference is None:
            return _Paths(self.apply_fn, x, network, network, {})
        split = split_gates(self.apply_fn, self.params, self.reference, x, network, masks=self.masks,
                            trainable=self.trainable)
        kernel = read_paths(split.opened, self.params, split.start, self.masks, self.trainable, "x")[0]
        return _Paths(split.opened, split.start, kernel, split.held, {"frozen": True, "units": split.units})

    def _kernel_arguments(self, signals: Array) -> tuple[Any, ...]:
        """Parameters, masks, what trains, and signals."""
        return self.params, self.masks, self.trained if self.trainable is not None else None, signals

    def _connected(self, network: Network, z: Array) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DisconnectedWarning)      # the row says so
            return connectivity(network.fn, network.params, z, masks=self.masks).connected

    def _spectrum(self, network: Network, signals: Array, notes: list[str]) -> tuple[np.ndarray, float, float, float]:
        """λ above their error, Tr Θ, the effective rank and the error."""
        arguments = (network.fn, *self._kernel_arguments(signals))
        size = len(signals) * network.size
        eps = float(jnp.finfo(network.fn.out.dtype).eps)
        if size <= WHOLE and 3 * size**2 * network.fn.out.dtype.itemsize <= default_memory_limit():
            theta = np.asarray(_theta(*arguments), np.float64)
            self._check(network, signals, theta)
            dense = theta.transpose(0, 2, 1, 3).reshape(size, size)
            lam = np.linalg.eigvalsh((dense + dense.T) / 2)[::-1]
            total, error = float(np.trace(dense)), size * eps * float(lam[0])
            rank = 1 / float(((dense / total)**2).sum()) if total else 0.0      # the square of Θ may be out of range
            return lam[lam > error], total, rank, error
        total = float(_trace(*arguments))
        self._check(network, signals, np.asarray(total))

        def multiply(rows: np.ndarray) -> np.ndarray:
            vectors = rows.reshape(-1, len(signals), network.size).astype(network.fn.out.dtype)
            return np.stack([np.asarray(_product(*arguments, v), np.float64).ravel() for v in vectors])

        pairs = block_lanczos(multiply, size, min(size, LARGEST), tolerance=100 * eps)
        error = float(np.linalg.norm(pairs.residuals)) if pairs.converged else math.inf
        notes.append(f"the {len(pairs.values)} largest of {size} eigenvalues; the effective rank of Θ is an estimate")
        rank = float(_effective_rank(*arguments).value)
        return pairs.values[pairs.values > size * eps * pairs.values[0]], total, rank, error

    def _check(self, network: Network, signals: Array, values: np.ndarray) -> None:
        """Raise FloatingPointError where Θ overflows, or vanishes though all of the network trains."""
        if self.trainable is None:
            check_kernel(network, signals, values, "Θ")
        else:
            check_result(values, "Θ", HOLDS)

    def _energy(self, paths: "_Paths", count: int, complete: bool, trace: float, notes: list[str]
                ) -> tuple[float, float]:
        """Bounds on Σ ν_i π_i from the π that were found and the trace of all."""
        data = data_spectrum(self.apply_fn, self.params, self.X, masks=self.masks, **paths.gates)
        pi, bounds = path_kernel.bounded_eigenvalues(paths.apply_fn, self.params, paths.start, k=count,
                                                     tolerance=TOLERANCE, masks=self.masks, trainable=self.trainable)
        nu = data.values[:count]
        known = len(nu)
        found = float(nu @ pi[:known])
        if not np.isfinite(bounds).all():
            notes.append("the search for π did not converge: Σ ν_i π_i has no upper bound")
            return found, math.inf
        upper = float(nu @ (pi + bounds)[:known])
        if complete or (len(data.values) <= count and not data.rest):
            return found, upper
        # What follows is at most π_k each, and at most what is left of Tr Π altogether.
        rest, left = float(data.values[count:].sum()) + data.rest, max(trace - float(pi.sum()) + float(bounds.sum()), 0)
        following = float(data.values[count]) if len(data.values) > count else float(data.values[-1])
        upper += min((pi[-1] + bounds[-1]) * rest, left * following)
        notes.append(f"Σ ν_i π_i over the {count} largest π, a lower bound")
        return found, upper


class _Paths(NamedTuple):
    """What Π and A are of: the network, or with frozen gates the one whose coefficients are open."""

    apply_fn: ApplyFn
    start: PyTree
    kernel: Network
    held: Network
    """What has the gradients J_v^f J_θ^v."""
    gates: dict[str, Any]
    """Arguments of the data factor."""


def _attempt(notes: list[str], otherwise: T, run: Callable[[], T]) -> T:
    """Run a part; note where numbers leave the range of their type."""
    try:
        return run()
    except FloatingPointError as error:
        notes.append(str(error))
        return otherwise


def _number(number: Number, what: str, notes: list[str]) -> tuple[float, float]:
    """A number in float64 and its logarithm to base 10."""
    check_result(number.mantissa, what, HOLDS)
    mantissa, exponent = float(number.mantissa), int(number.exponent)
    if not mantissa:
        return 0.0, -math.inf
    logarithm = math.log10(mantissa) + exponent * math.log10(2)
    try:
        return math.ldexp(mantissa, exponent), logarithm
    except OverflowError:
        notes.append(f"{what} is beyond float64; its logarithm is known")
        return math.nan, logarithm


def _decay(lam: np.ndarray) -> float:
    """α of λ_i ~ i^−α; NaN of fewer than two eigenvalues."""
    lam = lam[lam > DECADES * lam[0]] if len(lam) else lam
    if len(lam) < 2:
        return math.nan
    index = np.log(np.arange(1, len(lam) + 1))
    return round(float(-np.polyfit(index, np.log(lam), 1)[0]), 9) + 0.0     # equal eigenvalues: no decay at all


# Masks are arguments: a program serves every masking, also one that empties a layer.

def _compiled(measure: Callable[..., Array]) -> Callable[..., Array]:
    """Compile for all masks at once; of a curved network Θ compiles programs of its own, safe from XLA's fault."""
    jitted = jax.jit(measure)

    def call(fn: BoundProgram, params: PyTree, masks: PyTree, trainable: PyTree, X: Array) -> Array:
        curved = is_curved(read(fn, params, X))
        return (measure if curved else jitted)(fn, params, masks, trainable, X)
    return call


@_compiled
def _theta(fn: BoundProgram, params: PyTree, masks: PyTree, trainable: PyTree, X: Array) -> Array:
    return ntk(fn, params, X, masks=masks, trainable=trainable)


@_compiled
def _trace(fn: BoundProgram, params: PyTree, masks: PyTree, trainable: PyTree, X: Array) -> Array:
    return ntk_trace(fn, params, X, masks=masks, trainable=trainable)


@jax.jit
def _product(fn: BoundProgram, params: PyTree, masks: PyTree, trainable: PyTree, X: Array, v: Array) -> Array:
    return ntk_matvec(fn, params, X, masks=masks, trainable=trainable)(v)


@jax.jit
def _effective_rank(fn: BoundProgram, params: PyTree, masks: PyTree, trainable: PyTree, X: Array) -> Any:
    return ntk_effective_rank(fn, params, X, masks=masks, trainable=trainable, key=jax.random.key(0))
