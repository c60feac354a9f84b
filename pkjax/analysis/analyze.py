"""The analyzer: one network's NTK, path kernel and data factor side by side."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from pkjax import path_kernel
from pkjax.analysis import report
from pkjax.analysis.exactness import Check, exactness
from pkjax.pruning.connectivity import connectivity
from pkjax.path_kernel.solvers import exact
from pkjax.analysis.spectra import data_spectrum, tangent_spectrum
from pkjax.pruning.result import LayerReport
from pkjax.analysis.theorem1 import Claim, claims
from pkjax.trees import ApplyFn, Trainable, check_finite, check_masks, check_network, trainable_masks

__all__ = ["Report", "analyze"]


FEW = 16
"""Eigenpairs of Π that are asked of an iterative solver by default,"""
ENTRIES = 2**23
"""in vectors of no more entries than this altogether: of large networks the largest alone."""
BYTES = 10**9
"""What the eigenvectors of Π may take by default."""


@dataclass(frozen=True)
class Report:
    """Spectra, traces, overlaps, claims and checks of one network on one batch.

    Returned by ``analyze``. Shows itself as text and, in a notebook, as tables; ``pk.plots.report`` draws it, and
    ``to_dict`` makes it JSON. All arrays are float64 on the host.

    >>> import jax.numpy as jnp
    >>> analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))
    Report on 2 examples of 1 outputs
      weights kept                     2 of 2
      parameters that train            2
      Tr Θ                             2
      Tr Π                             2
      ...
      claims that do not hold          none of 10
      exactness checks                 9 of 9 passed
    """

    lam: Float[np.ndarray, "l"]
    """λ: eigenvalues of Θ, descending: all NK of them up to NK = 4096, the 256 largest of more."""
    nu: Float[np.ndarray, "l"]
    """ν: eigenvalues of A = J_v^f J_v^fᵀ, descending, as many."""
    pi: Float[np.ndarray, "k"]
    """π: the largest eigenvalues of Π, descending, with multiplicities."""
    pi_bounds: Float[np.ndarray, "k"]
    """Bound on the error of each π; infinite where the solver cannot vouch for it."""
    trace_ntk: float
    """Tr Θ."""
    trace_pi: float
    """Tr Π."""
    gated_trace: float
    """The part of Tr Θ on the diagonal of Π."""
    effective_rank: float
    """Tr(Π)² / ‖Π‖_F², estimated."""
    log_paths: float
    """log10 of the number of live paths."""
    log_effective_paths: float | None
    """log10 of R_2² / R_4, the participation ratio of the squared path values; None where no path is left, or where
    the parameters' type does not hold the two."""
    connected: bool
    """Whether a path leads from any input entry to any output."""
    overlaps: Float[np.ndarray, "l k"]
    """O_ij: inner products of the eigenvectors of A with those of Π; 0 where ν_i or π_j is 0."""
    carried: Float[np.ndarray, "k"]
    """Share of Tr Θ that each of the listed eigenvectors of Π carries: ‖∇f z_j‖² / Tr Θ = Σ_i ν_i π_j O_ij² / Tr Θ."""
    captured: float
    """Share that they carry together."""
    claims: dict[str, Claim]
    """Every bound of theorem 1, and what became of it here."""
    checks: dict[str, Check]
    """The analyzer's own exactness checks."""
    layers: tuple[LayerReport, ...]
    """What a mask leaves of each kernel."""
    samples: int
    """N, examples of the batch."""
    outputs: int
    """K, outputs of the network."""
    parameters: int
    """Parameters that train."""
    seconds: dict[str, float]
    """Time spent on each part."""

    def __repr__(self) -> str:
        return report.text(self)

    def _repr_html_(self) -> str:
        one = {"": self}
        return "\n".join((report.summary_table(one), report.claims_table(one), report.checks_table(one)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings that JSON can hold."""
        plain = asdict(self)
        for name, value in plain.items():
            if isinstance(value, np.ndarray):
                plain[name] = value.tolist()
        plain["claims"] = {name: claim._asdict() for name, claim in self.claims.items()}
        plain["checks"] = {name: check._asdict() for name, check in self.checks.items()}
        plain["layers"] = [layer.to_dict() for layer in self.layers]
        plain["log_paths"] = self.log_paths if np.isfinite(self.log_paths) else None
        return plain


def analyze(apply_fn: ApplyFn, params: PyTree, X: Shaped[ArrayLike, "N *input"], *, masks: PyTree | None = None,
            trainable: Trainable = None, k: int | None = None, x: Shaped[ArrayLike, "..."] | None = None,
            key: Key[Array, ""] | None = None, progress: Callable[[str], None] | None = None) -> Report:
    """Compare a network's NTK spectrum with its path kernel's and its data factor's, and test Theorem 1 on them.

    Θ = J_v^f Π J_v^fᵀ and A = J_v^f J_v^fᵀ are computed exactly on the batch, Π's spectrum without data. Of matrices
    with more than 4096 rows the 256 largest eigenvalues are found, by block Lanczos; a Θ that does not fit half of the
    memory is never formed.

    Args:
      apply_fn: the network.
      params: its parameters θ, concrete.
      X: (N, *input), the batch.
      masks: booleans like ``params``; masked weights are absent.
      trainable: which parameters Θ and Π differentiate; all that float by default.
      k: how many eigenpairs of Π to find. By default as many as there are λ (or all, if there are fewer) where the
        spectrum is exact, within 1 GB; 16 where it comes from an iteration (large networks that are not fully
        connected), fewer above half a million parameters, 1 above four million.
      x: (1, *input), the input of the path kernel; all ones by default.
      key: randomness of the effective rank's estimate.
      progress: called with the name of each part as it begins.

    Returns:
      A ``Report``. Claims that are false in general are reported as found.

    Raises:
      ValueError: shapes, masks or k that do not fit; parameters or inputs that are not finite.
      FloatingPointError: more paths than float64 counts.
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
    m = sum(int(t.sum()) for t in jax.tree.leaves(trains))
    options = {"masks": masks, "trainable": trainable}
    seconds: dict[str, float] = {}

    def part(name: str, run: Callable[[], Any]) -> Any:
        if progress is not None:
            progress(name)
        began = time.perf_counter()
        out = jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - began
        return out

    outputs = jax.eval_shape(apply_fn, params, X).shape[1]
    tangent = part("tangent kernel", lambda: tangent_spectrum(apply_fn, params, X, len(X) * outputs, **options))
    lam = tangent.values
    direct = exact(apply_fn, params, x, **options)
    wanted = k if k is not None else min(m, len(lam), max(1, BYTES // (8 * m))) if direct else (
        min(m, FEW, max(1, ENTRIES // m)))
    if not 1 <= wanted <= m:
        raise ValueError(f"k must be between 1 and the {m} parameters that train, but is {k}")
    data, vectors = part("data factor", lambda: data_spectrum(apply_fn, params, X, masks=masks))
    nu = data.values
    pairs = part("path kernel", lambda: path_kernel.eigenpairs(apply_fn, params, x, k=wanted, tolerance=1e-4,
                                                               **options))
    pi = np.maximum(np.asarray(pairs.values, np.float64), 0.0)
    projected = part("overlaps", lambda: _projected(apply_fn, params, X, pairs.vectors, trains, masks))
    energy = vectors.T @ projected          # V_iᵀ (∇f) z_j = √(ν_i π_j) O_ij
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
    checks = part("checks", lambda: exactness(apply_fn, params, X, tangent, data, pi, energy, vectors, trace_pi,
                                              complete=wanted == m, **options))
    checks["eigenvalues of Π"] = Check(
        bool(pairs.converged), float(np.max(pairs.bounds) / max(pi[0], np.finfo(np.float64).tiny)),
        1e-6 if direct else 1e-3, "each π lies within its error bound of the eigenvalue of its rank")
    return Report(
        lam=lam, nu=nu, pi=pi, pi_bounds=np.asarray(pairs.bounds, np.float64), trace_ntk=tangent.trace,
        trace_pi=trace_pi, gated_trace=gated, effective_rank=rank, log_paths=links.log10_paths,
        log_effective_paths=links.log10_effective_paths, connected=links.connected, overlaps=overlaps,
        carried=carried, captured=float(carried.sum()),
        claims=claims(lam, nu, pi, rest=(tangent.rest, data.rest)), checks=checks, layers=links.layers,
        samples=len(X), outputs=outputs, parameters=m, seconds=seconds)


def _projected(apply_fn: ApplyFn, params: PyTree, X: Array, vectors: PyTree, trains: PyTree,
               masks: PyTree | None) -> np.ndarray:
    """Multiply the Jacobian with the eigenvectors of G: (NK, k), one directional derivative each."""
    floating = jax.tree.map(lambda p: jnp.issubdtype(jnp.result_type(p), jnp.floating), params)
    alive = params if masks is None else jax.tree.map(lambda p, q: jnp.where(q, p, jnp.zeros_like(p)), params, masks)

    @jax.jit
    def project(alive: PyTree, X: Array, z: PyTree) -> Array:
        def of(p: PyTree) -> Array:
            return apply_fn(jax.tree.map(lambda f, new, old: new if f else old, floating, p, alive), X).ravel()

        with jax.default_matmul_precision("highest"):
            tangent = jax.tree.map(lambda v, t, p: jnp.where(t, v.astype(p.dtype), jnp.zeros_like(p)), z, trains, alive)
            return jax.jvp(of, (alive,), (tangent,))[1]
    count = jax.tree.leaves(vectors)[0].shape[0]
    return np.stack([np.asarray(project(alive, X, jax.tree.map(lambda v, j=j: jnp.asarray(v[j]), vectors)), np.float64)
                     for j in range(count)], axis=1)
