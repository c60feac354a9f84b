"""The analyzer: one network's NTK, path kernel and data factor side by side."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree, Shaped

from pkjax import path_kernel
from pkjax.analysis.exactness import Analysis, Check, exactness
from pkjax.analysis.frozen_kernel import frozen_kernel, split_gates
from pkjax.analysis.report import Report
from pkjax.analysis.spectra import DataSpectrum, data_spectrum, tangent_spectrum
from pkjax.analysis.stopwatch import Stopwatch
from pkjax.analysis.theorem1 import evaluate_claims
from pkjax.linalg.memory import default_memory_limit
from pkjax.network import Network
from pkjax.path_kernel.estimates import effective_rank_by
from pkjax.path_kernel.gram import (
    check_start,
    floating_leaves,
    read_paths,
    trained_positions,
    widened,
    with_floating,
)
from pkjax.path_kernel.solvers import is_direct, search_products
from pkjax.path_kernel.traces import check_range, check_size, gated_measured
from pkjax.paths.frozen import LONE_REFERENCE, is_frozen
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.connectivity import connectivity
from pkjax.tables import Progress
from pkjax.trees import ApplyFn, Choice, is_floating

__all__ = ["analyze", "ones_of"]

VECTOR_BYTES = 10**9
"""Memory that the eigenvectors of Π may take by default where the spectrum is exact, less where it is short."""
TOLERANCE = 1e-5
"""Residual of an iterative solver's pairs, in units of the largest π."""
ITERATIVE_PAIRS = 16
"""Eigenpairs of Π that an iterative solver finds by default,"""
ITERATIVE_ENTRIES = 2**23
"""in vectors of at most this many entries altogether, but always one."""


@automatic_axes
def analyze(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[ArrayLike, "N ..."]], *,
            masks: PyTree | None = None, trainable: Choice = None, k: int | None = None, x: PyTree | None = None,
            key: Key[Array, ""] | None = None, progress: Progress = False, quick: bool = False,
            gates: str | None = None, reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Report:
    """Compare a network's NTK spectrum with its path kernel's and its data factor's, and test Theorem 1 on them.

        Θ = J_v^f Π J_v^fᵀ,   A = J_v^f J_v^fᵀ

    Both are computed exactly on the batch, the spectrum of Π without data. Of matrices with more than 4096 rows, block
    Lanczos finds the 256 largest eigenvalues; a Θ that does not fit half of the memory is never formed.

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        X: (N, *input), the batch, or a tree of arrays with one N.
        masks: booleans like ``params``; masked weights are absent.
        trainable: which parameters Θ and Π differentiate; all floating-point leaves by default.
        k: how many eigenpairs of Π to find. By default as many as there are λ (or all, if there are fewer) where the
            spectrum is exact, within 1 GB (less where memory is short); 16 where it comes from an iteration (large
            networks that are not fully connected), fewer above half a million parameters, 1 above four million.
        x: (1, *input), the input of the path kernel; all ones by default. Integers (tokens, bytes) have no default.
        key: a typed random key for the estimate of the effective rank.
        progress: True prints the name of each part as it begins; a function is called with it.
        quick: for use inside loops, find λ, the traces and the k largest π with their bounds alone, one by default. The
            report's other fields are empty.
        gates: "frozen" takes networks that are not piecewise linear too, whose coefficients depend on θ and x
            (``pkjax.paths.frozen``). Paths make one part of such a Θ, Θ_frozen = J_v^f Π J_v^fᵀ, the tangent kernel
            with gates held. Claims, overlaps and the gated trace are of that part; ``Report.frozen`` says what it lacks
            of Θ, leaf by leaf.
        reference: with "frozen", the examples (M, *input) whose coefficients at their largest magnitude belong to Π; X
            by default. J_v^f counts in them. With one example Π is that of ``pkjax.path_kernel`` for this reference.

    Returns:
        A ``Report``. Claims that are false in general are reported as they turn out.

    Raises:
        ValueError: shapes, masks or k that do not fit; masks that keep nothing; numbers that are not finite; gates
            that are neither None nor "frozen"; a reference at which a coefficient of X is 0, or without frozen gates.
        FloatingPointError: the network has more paths than float64 counts; Tr Π, Tr Θ or numbers on the way to them are
            outside of the range of the parameters' type.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), section 3.1, theorem 1 and equations 11 to 13.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.], [0.5, 1.]]), "b": jnp.array([[3.], [5.]])}
        >>> report = analyze(net, w, jnp.array([[1., 2.], [2., -1.]]))
        >>> report.claims["total"].holds, all(check.passed for check in report.checks.values())
        (True, True)
    """
    params, X, reference = widened(apply_fn, (params, *jax.tree.map(jnp.asarray, (X, reference))))
    with jax.default_matmul_precision("highest"):
        network, signals = read_paths(apply_fn, params, X, masks, trainable)
    x = ones_of(X) if x is None else widened(apply_fn, x)
    z = network.batch(x, "x")
    check_start(z, x)
    m = len(trained_positions(network))
    options = {"masks": masks, "trainable": trainable}
    key = jax.random.key(0) if key is None else key
    watch = Stopwatch(progress)
    part = watch.part
    # Π is that of ``kernel``, which with frozen gates has its coefficients open.
    kernel, kernel_fn, start, split, units = network, apply_fn, x, None, {}
    if is_frozen(gates):
        split = part("frozen gates", lambda: split_gates(
            apply_fn, params, X if reference is None else reference, x, network, **options))
        kernel_fn, start, units, _ = split
        kernel = read_paths(kernel_fn, params, start, masks, trainable, "x")[0] if units else network
    elif reference is not None:
        raise ValueError(LONE_REFERENCE)
    whole, (gated, gated_trace) = part("traces", lambda: (
        check_size(kernel, z), gated_measured(network, signals, frozen=bool(units))))
    check_range(gated, gated.mantissa.dtype, "the gated path trace")
    tangent = part("tangent kernel", lambda: tangent_spectrum(network, signals, **options))
    lam = tangent.values
    direct = is_direct(kernel, z)
    count = k if k is not None else 1 if quick else _default_k(m, len(lam), direct)
    if not 1 <= count <= m:
        raise ValueError(f"k must be between 1 and the {m} parameters that train, but is {count}")
    data = None if quick else part("data factor", lambda: data_spectrum(
        apply_fn, params, X, masks=masks, frozen=bool(units), units=units))
    find = path_kernel.bounded_eigenvalues if quick else path_kernel.eigenpairs
    pairs = part("path kernel", lambda: find(kernel_fn, params, start, k=count, tolerance=TOLERANCE, **options))
    pi, pi_bounds = np.maximum(np.asarray(pairs.values, np.float64), 0.0), np.asarray(pairs.bounds, np.float64)
    trace_pi = float(whole.value)
    checks = {"eigenvalues of Π": Check(
        bool(np.isfinite(pi_bounds).all()) and getattr(pairs, "converged", True),
        float(np.max(pi_bounds) / max(pi[0], np.finfo(np.float64).tiny)), 1e-6 if direct else 1e-3,
        "each π lies within its error bound of the eigenvalue of its rank")}
    shared: dict[str, Any] = {
        "lam": lam, "pi": pi, "pi_bounds": pi_bounds, "trace_ntk": tangent.trace, "trace_pi": trace_pi,
        "gated_trace": float(gated_trace), "samples": len(signals), "outputs": network.size, "parameters": m,
        "seconds": watch.seconds, "compile_seconds": watch.compile_seconds, "checks": checks}
    if data is None:
        return Report(**shared)
    held, on_paths, frozen = network, tangent, None      # what has the gradients J_v^f J_θ^v, and their kernel
    if split is not None:
        held = split.held
        if held is not network:
            on_paths = part("frozen tangent kernel", lambda: tangent_spectrum(held, signals, **options))
        frozen = part("frozen part", lambda: frozen_kernel(network, held, signals, tangent, on_paths))
    energy, overlaps, carried = part("overlaps", lambda: _overlaps(held, signals, pairs.vectors, data, pi))
    carried = carried / (on_paths.trace or 1.0)
    rank = part("effective rank", lambda: effective_rank_by(
        search_products(kernel_fn, params, start, **options), m, trace_pi, key))
    links = part("paths", lambda: connectivity(kernel.fn, kernel.params, z, masks=masks))
    analysis = Analysis(network=network, signals=signals, options=options, tangent=tangent, data=data, pi=pi,
                        trace_pi=trace_pi, energy=energy, complete=count == m, held=held, on_paths=on_paths,
                        frozen=frozen)
    shared["checks"] = {**part("checks", lambda: exactness(analysis)), **checks}
    claims = evaluate_claims(on_paths.values, data.values, pi, rest=(on_paths.rest, data.rest))
    if split is not None:
        claims = {name: claim._replace(text=f"{claim.text}, λ of Θ_frozen") for name, claim in claims.items()}
    return Report(
        **shared, nu=data.values, effective_rank=rank, log10_paths=links.log10_paths,
        log10_effective_paths=links.log10_effective_paths, connected=links.connected, overlaps=overlaps,
        carried=carried, captured=float(carried.sum()),
        claims=claims, layers=links.layers, frozen=frozen)


def _default_k(parameters: int, eigenvalues: int, direct: bool) -> int:
    """How many eigenpairs of Π to find, of a network with so many parameters and λ."""
    if direct:
        return min(parameters, eigenvalues, max(1, min(VECTOR_BYTES, default_memory_limit() // 4) // (8 * parameters)))
    return min(parameters, ITERATIVE_PAIRS, max(1, ITERATIVE_ENTRIES // parameters))


def ones_of(X: PyTree) -> PyTree:
    """Return one example of ones; ValueError where inputs are integers."""
    if not all(map(is_floating, jax.tree.leaves(X))):
        raise ValueError("x must be given where X holds integers (tokens, bytes): one example, (1, *input), with which "
                         "the path kernel's paths start; ones are its default for floating-point inputs alone")
    return jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape[1:]), leaf.dtype), X)


def _overlaps(network: Network, signals: Array, vectors: PyTree, data: DataSpectrum, pi: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """√(ν_i π_j) O_ij = V_iᵀ (∇f) z_j; O_ij; ‖∇f z_j‖²."""
    projected = _projected(network, signals, vectors)
    energy = data.vectors.T @ projected
    scale = np.sqrt(np.outer(data.values, pi))
    overlaps = np.where(scale > 1e-6 * scale.max(initial=0.0), energy / np.maximum(scale, 1e-300), 0.0)
    return energy, overlaps, (projected**2).sum(0)


def _projected(network: Network, signals: Array, vectors: PyTree) -> np.ndarray:
    """Multiply the Jacobian with the eigenvectors of G: (NK, k), one directional derivative each."""
    rows = [np.asarray(v, leaf.dtype) for v, leaf in
            zip(jax.tree.leaves(vectors), jax.tree.leaves(network.params), strict=True) if is_floating(leaf)]
    return np.stack([np.asarray(_project(network, signals, [v[j] for v in rows]), np.float64)
                     for j in range(len(rows[0]))], axis=1)


@jax.jit
def _project(network: Network, signals: Array, z: list[Array]) -> Array:
    def outputs(p: list[Array]) -> Array:
        return network.over(with_floating(network, p).params, signals).ravel()

    return jax.jvp(outputs, (floating_leaves(network),), (z,))[1]
