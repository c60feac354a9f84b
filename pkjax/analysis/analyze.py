"""The analyzer: one network's NTK, path kernel and data factor side by side."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree, Shaped

from pkjax import path_kernel
from pkjax.analysis.exactness import Analysis, Check, exactness
from pkjax.analysis.report import Report
from pkjax.analysis.spectra import data_spectrum, tangent_spectrum
from pkjax.analysis.theorem1 import evaluate_claims
from pkjax.path_kernel.solvers import is_direct
from pkjax.pruning.connectivity import connectivity
from pkjax.pruning.masks import apply_masks
from pkjax.tables import Progress, reporter
from pkjax.trees import ApplyFn, Trainable, check_finite, check_masks, check_network, is_floating, trainable_masks

__all__ = ["analyze"]

VECTOR_BYTES = 10**9
"""Memory that the eigenvectors of Π may take by default where the spectrum is exact."""
ITERATIVE_PAIRS = 16
"""Eigenpairs of Π that an iterative solver finds by default,"""
ITERATIVE_ENTRIES = 2**23
"""in vectors of at most this many entries altogether, but always one."""


def analyze(apply_fn: ApplyFn, params: PyTree, X: Shaped[ArrayLike, "N *input"], *, masks: PyTree | None = None,
            trainable: Trainable = None, k: int | None = None, x: Shaped[ArrayLike, "..."] | None = None,
            key: Key[Array, ""] | None = None, progress: Progress = False) -> Report:
    """Compare a network's NTK spectrum with its path kernel's and its data factor's, and test Theorem 1 on them.

        Θ = J_v^f Π J_v^fᵀ,   A = J_v^f J_v^fᵀ

    Both are computed exactly on the batch, the spectrum of Π without data. Of matrices with more than 4096 rows, block
    Lanczos finds the 256 largest eigenvalues; a Θ that does not fit half of the memory is never formed.

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        X: (N, *input), the batch.
        masks: booleans like ``params``; masked weights are absent.
        trainable: which parameters Θ and Π differentiate; all floating-point leaves by default.
        k: how many eigenpairs of Π to find. By default as many as there are λ (or all, if there are fewer) where the
            spectrum is exact, within 1 GB; 16 where it comes from an iteration (large networks that are not fully
            connected), fewer above half a million parameters, 1 above four million.
        x: (1, *input), the input of the path kernel; all ones by default.
        key: a typed random key for the estimate of the effective rank.
        progress: True prints the name of each part as it begins; a function is called with it.

    Returns:
        A ``Report``. Claims that are false in general are reported as they turn out.

    Raises:
        ValueError: shapes, masks or k that do not fit; parameters or inputs that are not finite.
        FloatingPointError: the network has more paths than float64 counts.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), section 3.1, theorem 1 and equations 11 to 13.

    >>> import jax.numpy as jnp
    >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
    >>> w = {"a": jnp.array([[1., -2.], [0.5, 1.]]), "b": jnp.array([[3.], [5.]])}
    >>> report = analyze(net, w, jnp.array([[1., 2.], [2., -1.]]))
    >>> report.claims["total"].holds, all(check.passed for check in report.checks.values())
    (True, True)
    """
    X = jnp.asarray(X)
    if X.ndim < 2:
        raise ValueError(f"X must be a batch of shape (N, *input), but has shape {X.shape}")
    check_network(apply_fn, params, X)
    check_masks(masks, params)
    check_finite(params, "params")
    check_finite(X, "X")
    x = jnp.ones((1, *X.shape[1:]), X.dtype) if x is None else jnp.asarray(x)
    if x.shape != (1, *X.shape[1:]):
        raise ValueError(f"x must be a batch of one like X, of shape {(1, *X.shape[1:])}, but has shape {x.shape}")
    trains = trainable_masks(params, trainable, masks)
    alive = params if masks is None else apply_masks(params, masks)
    m = sum(int(t.sum()) for t in jax.tree.leaves(trains))
    options = {"masks": masks, "trainable": trainable}
    seconds: dict[str, float] = {}
    tell = reporter(progress)

    def part(name: str, run: Callable[[], Any]) -> Any:
        tell(name)
        began = time.perf_counter()
        out = jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - began
        return out

    outputs = jax.eval_shape(apply_fn, params, X).shape[1]
    tangent = part("tangent kernel", lambda: tangent_spectrum(apply_fn, params, X, len(X) * outputs, **options))
    lam = tangent.values
    direct = is_direct(apply_fn, params, x, **options)
    count = _default_k(m, len(lam), direct) if k is None else k
    if not 1 <= count <= m:
        raise ValueError(f"k must be between 1 and the {m} parameters that train, but is {count}")
    data = part("data factor", lambda: data_spectrum(apply_fn, params, X, masks=masks))
    nu = data.values
    pairs = part("path kernel", lambda: path_kernel.eigenpairs(apply_fn, params, x, k=count, tolerance=1e-4,
                                                               **options))
    pi = np.maximum(np.asarray(pairs.values, np.float64), 0.0)
    projected = part("overlaps", lambda: _projected(apply_fn, alive, X, pairs.vectors, trains))
    energy = data.vectors.T @ projected          # V_iᵀ (∇f) z_j = √(ν_i π_j) O_ij
    scale = np.sqrt(np.outer(nu, pi))
    overlaps = np.where(scale > 1e-6 * scale.max(initial=0.0), energy / np.maximum(scale, 1e-300), 0.0)
    carried = (projected**2).sum(0) / (tangent.trace or 1.0)
    key = jax.random.key(0) if key is None else key

    @jax.jit
    def scalars(theta: PyTree) -> tuple[Any, ...]:
        return (path_kernel.trace(apply_fn, theta, x, **options),
                path_kernel.gated_trace(apply_fn, theta, X, **options),
                path_kernel.effective_rank(apply_fn, theta, x, key=key, **options))
    trace_pi, gated, rank = map(float, part("traces", lambda: scalars(params)))
    links = part("paths", lambda: connectivity(apply_fn, params, x, masks=masks))
    analysis = Analysis(apply_fn=apply_fn, params=params, masks=masks, trainable=trainable, alive=alive, X=X,
                        tangent=tangent, data=data, pi=pi, trace_pi=trace_pi, energy=energy, complete=count == m)
    checks = part("checks", lambda: exactness(analysis))
    checks["eigenvalues of Π"] = Check(
        bool(pairs.converged), float(np.max(pairs.bounds) / max(pi[0], np.finfo(np.float64).tiny)),
        1e-6 if direct else 1e-3, "each π lies within its error bound of the eigenvalue of its rank")
    return Report(
        lam=lam, nu=nu, pi=pi, pi_bounds=np.asarray(pairs.bounds, np.float64), trace_ntk=tangent.trace,
        trace_pi=trace_pi, gated_trace=gated, effective_rank=rank, log10_paths=links.log10_paths,
        log10_effective_paths=links.log10_effective_paths, connected=links.connected, overlaps=overlaps,
        carried=carried, captured=float(carried.sum()),
        claims=evaluate_claims(lam, nu, pi, rest=(tangent.rest, data.rest)), checks=checks, layers=links.layers,
        samples=len(X), outputs=outputs, parameters=m, seconds=seconds)


def _default_k(parameters: int, eigenvalues: int, direct: bool) -> int:
    """How many eigenpairs of Π to find, of a network with so many parameters and λ."""
    if direct:
        return min(parameters, eigenvalues, max(1, VECTOR_BYTES // (8 * parameters)))
    return min(parameters, ITERATIVE_PAIRS, max(1, ITERATIVE_ENTRIES // parameters))


def _projected(apply_fn: ApplyFn, alive: PyTree, X: Array, vectors: PyTree, trains: PyTree) -> np.ndarray:
    """Multiply the Jacobian with the eigenvectors of G: (NK, k), one directional derivative each."""
    floating = jax.tree.map(is_floating, alive)

    @jax.jit
    def project(alive: PyTree, X: Array, z: PyTree) -> Array:
        def outputs(p: PyTree) -> Array:
            return apply_fn(jax.tree.map(lambda f, new, old: new if f else old, floating, p, alive), X).ravel()

        with jax.default_matmul_precision("highest"):
            tangent = jax.tree.map(lambda v, t, p: jnp.where(t, v.astype(p.dtype), jnp.zeros_like(p)), z, trains, alive)
            return jax.jvp(outputs, (alive,), (tangent,))[1]
    count = jax.tree.leaves(vectors)[0].shape[0]
    return np.stack([np.asarray(project(alive, X, jax.tree.map(lambda v, j=j: jnp.asarray(v[j]), vectors)), np.float64)
                     for j in range(count)], axis=1)
