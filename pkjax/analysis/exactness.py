"""The analyzer's exactness checks: what it reports, computed a second way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from pkjax.analysis.spectra import Spectrum, TangentSpectrum
from pkjax.paths import gates
from pkjax.paths.polynomial import path_sum
from pkjax.tangent_kernel.kernel import ntk, ntk_plan
from pkjax.tangent_kernel.products import ntk_trace
from pkjax.trees import ApplyFn, Trainable, is_floating, trainable_masks

__all__ = ["Check", "exactness"]

FEW = 4
"""Examples on which Θ is recomputed by other engines."""


TINY = float(np.finfo(np.float32).tiny)


class Check(NamedTuple):
    """One identity, tested."""

    passed: bool
    error: float
    """Largest difference, relative to the largest value."""
    tolerance: float
    text: str
    """The identity in formulae."""


def _check(error: float, tolerance: float, text: str) -> Check:
    return Check(bool(error <= tolerance), float(error), float(tolerance), text)


def _relative(a: ArrayLike, b: ArrayLike) -> float:
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(left - right).max(initial=0.0) / max(np.abs(right).max(initial=0.0), TINY))


def exactness(apply_fn: ApplyFn, params: PyTree, X: Array, tangent: TangentSpectrum, data: Spectrum,
              pi: np.ndarray, energy: np.ndarray, vectors: np.ndarray, trace_pi: float, *, complete: bool,
              masks: PyTree | None = None, trainable: Trainable = None) -> dict[str, Check]:
    """Recompute by other means what the analyzer found.

    Args:
      apply_fn: the network.
      params: its parameters θ.
      X: (N, *input).
      tangent: λ and products with Θ.
      data: ν.
      pi: π.
      energy: √(ν_i π_j) O_ij.
      vectors: the eigenvectors of A.
      trace_pi: Tr Π.
      complete: whether ``pi`` is the whole spectrum.
      masks: booleans like ``params``.
      trainable: which parameters Θ differentiates.

    Returns:
      A dictionary from the identity's name to what became of it. Agreement with neural-tangents is among them where
      that package is installed.
    """
    eps = float(np.finfo(np.result_type(*(p.dtype for p in jax.tree.leaves(params) if is_floating(p)))).eps)
    loose = max(1e-12, 100 * eps)
    found: dict[str, Check] = {}
    alive = params if masks is None else jax.tree.map(lambda p, q: jnp.where(q, p, jnp.zeros_like(p)), params, masks)
    few, outputs = X[:FEW], tangent.rows // len(X)

    @jax.jit
    def identities(theta: PyTree, z: Array) -> tuple[Any, ...]:
        with jax.default_matmul_precision("highest"):
            held = gates(apply_fn, theta, z)
            f, pull = jax.vjp(lambda p: apply_fn(p, z), theta)
            sums, pull_sums = jax.vjp(lambda p: path_sum(apply_fn, p, z, gates=held), theta)
            sources = path_sum(apply_fn, theta, jnp.zeros_like(z), gates=held)
            _, along_z = jax.jvp(lambda v: apply_fn(theta, v), (z,), (z,))
            random = jax.random.normal(jax.random.key(1), f.shape, f.dtype)
            return f, sums, along_z + sources, random, pull(random)[0], pull_sums(random)[0]
    f, sums, euler, random, gradient, gradient_of_sums = jax.device_get(identities(alive, few))
    found["f is its gated path sum"] = _check(_relative(sums, f), loose, "f(x) = Σ_p c_p v_p(θ) a_p(x) x_s(p)")
    both = zip(jax.tree.leaves(gradient_of_sums), jax.tree.leaves(gradient), strict=True)
    found["gradients agree"] = _check(max(_relative(a, b) for a, b in both if is_floating(a)), loose,
                                      "∇_θ f = ∇_θ of the gated path sum, gates held")
    found["homogeneity"] = _check(_relative(euler, f), loose,
                                  "∇_x f · x + (paths from biases and constants) = f (Euler)")
    rows = len(few) * outputs
    block = tangent.multiply(np.eye(rows, tangent.rows))[:, :rows]
    block = block.reshape(len(few), outputs, len(few), outputs).transpose(0, 2, 1, 3)

    def engine(name: str) -> np.ndarray | None:
        try:
            ntk_plan(apply_fn, params, few, engine=name, masks=masks, trainable=trainable)
        except ValueError:      # the Jacobian of a single example is beyond the memory limit
            return None
        return np.asarray(ntk(apply_fn, params, few, engine=name, masks=masks, trainable=trainable))
    dense = engine("jacobian")
    if dense is not None:
        found["Θ from the full Jacobian"] = _check(_relative(block, dense), max(1e-12, 1e3 * eps),
                                                   f"Θ = ∇f ∇fᵀ on {few.shape[0]} examples")
    else:
        trains = trainable_masks(params, trainable, masks)
        norm = sum(float(np.sum(np.square(g, dtype=np.float64), where=np.asarray(t)))
                   for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(trains), strict=True) if is_floating(g))
        product = np.einsum("ia,ijab,jb->", random, block, random, dtype=np.float64)
        found["Θ along a random direction"] = _check(_relative(product, norm), max(1e-12, 1e3 * eps),
                                                     f"uᵀΘu = ‖∇(u · f)‖² on {few.shape[0]} examples")
    try:
        other = engine("neural-tangents")
    except ImportError:
        other = None
    if other is not None:
        found["Θ from neural-tangents"] = _check(_relative(block, other), max(1e-12, 1e3 * eps),
                                                 f"agreement with neural-tangents on {few.shape[0]} examples")
    # Bessel: an incomplete list of eigenvectors of Π cannot carry more of Θ than there is, direction by direction.
    carried, whole = (energy**2).sum(1), np.einsum("ai,ia->i", vectors, tangent.multiply(vectors.T))
    excess = float(np.max(carried - whole)) / max(float(whole.max()), TINY)
    if complete:
        found["overlaps"] = _check(_relative(carried, whole), max(1e-10, 1e4 * eps),
                                   "Σ_j ν_i π_j O_ij² = V_iᵀ Θ V_i, whose sum is Tr Θ")
        found["trace of Π"] = _check(_relative(np.array([pi.sum()]), np.array([trace_pi])), max(1e-10, 1e3 * eps),
                                     "Tr Π = Σ π_j")
    else:
        found["overlaps"] = _check(max(excess, 0.0), max(1e-10, 1e4 * eps), "Σ_{j≤k} ν_i π_j O_ij² ≤ V_iᵀ Θ V_i")
    if len(tangent.values) == tangent.rows:
        found["trace of Θ"] = _check(_relative(np.array([tangent.values.sum()]), np.array([tangent.trace])),
                                     max(1e-10, 1e3 * eps), "Tr Θ = Σ λ_i")
    else:
        norms = float(ntk_trace(apply_fn, params, X, masks=masks, trainable=trainable))
        found["trace of Θ"] = _check(_relative(np.array([norms]), np.array([tangent.trace])), max(1e-10, 1e3 * eps),
                                     "Tr Θ = Σ ‖∇f_k(x)‖², from norms of gradients")
        found["largest of Θ and A"] = Check(tangent.converged and data.converged, 0.0, 0.0,
                                            "the searches for the largest λ and ν are complete")
    return found
