"""The analyzer's exactness checks: what it reports, computed a second way."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from pkjax.analysis.frozen_kernel import FrozenKernel
from pkjax.analysis.spectra import DataSpectrum, TangentSpectrum
from pkjax.network import Network
from pkjax.path_kernel.gram import floating_entries, floating_leaves, with_floating
from pkjax.paths.algebras import Polynomial
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.polynomial import recorded_gates
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.tangent_kernel.kernel import ntk, ntk_plan
from pkjax.tangent_kernel.products import ntk_trace

__all__ = ["Analysis", "Check", "exactness"]

EXAMPLES = 4
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


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the analyzer has computed of one network on one batch."""

    network: Network
    """Read as a sum over paths, at the highest precision of products."""
    signals: Shaped[Array, "N *signal"]
    """The examples as it takes them."""
    options: dict[str, Any]
    """The arguments ``masks`` and ``trainable``."""
    tangent: TangentSpectrum
    """λ, and products with Θ."""
    data: DataSpectrum
    """ν, and the eigenvectors V of A."""
    pi: Float[np.ndarray, "k"]
    """π."""
    trace_pi: float
    """Tr Π."""
    energy: Float[np.ndarray, "l k"]
    """√(ν_i π_j) O_ij."""
    complete: bool
    """Whether ``pi`` is the whole spectrum."""
    held: Network
    """The network whose gradients are J_v^f J_θ^v: the same, or with frozen gates one of the same outputs."""
    on_paths: TangentSpectrum
    """λ of J_v^f Π J_v^fᵀ, Θ or with frozen gates Θ_frozen, and products with it."""
    frozen: FrozenKernel | None = None
    """With frozen gates, how the two differ."""

    @property
    def symbol(self) -> str:
        """How formulae write it."""
        return "Θ" if self.frozen is None else "Θ_frozen"

    @property
    def few(self) -> Array:
        """The examples on which Θ is recomputed."""
        return self.signals[:EXAMPLES]

    @property
    def eps(self) -> float:
        """Machine epsilon of the parameters' type."""
        return float(np.finfo(np.result_type(*(leaf.dtype for leaf in floating_leaves(self.network)))).eps)

    def tolerance(self, multiple: float, floor: float) -> float:
        """Return the error that rounding explains: a multiple of machine epsilon, at least ``floor``."""
        return max(floor, multiple * self.eps)


class Evaluation(NamedTuple):
    """The network and its gated path sum on a few examples, with derivatives."""

    f: Array                     # (N, K)
    sums: Array                  # (N, K) the gated path sum
    euler: Array                 # (N, K) ∇_x f · x plus the paths that do not start at the input
    direction: Array             # (N, K) a random u
    gradient: list[Array]        # ∇_θ (u · f), of the floating-point leaves; of coefficients none
    gradient_of_sums: list[Array]    # ∇_θ (u · sums), gates held
    whole_gradient: list[Array]  # ∇_θ (u · f), of coefficients too


def exactness(analysis: Analysis) -> dict[str, Check]:
    """Recompute by other means what the analyzer found.

    Returns:
        A dictionary from the identity's name to the outcome. Agreement with neural-tangents is included where that
        package is installed.
    """
    evaluation = jax.device_get(_evaluate(
        analysis.network, analysis.few, None if analysis.frozen is None else analysis.held))
    return {**_path_sum_checks(analysis, evaluation), **_kernel_checks(analysis, evaluation),
            **_overlap_checks(analysis), **_trace_checks(analysis)}


@compiled_for_few_calls(most=1 << 40)      # it runs once
def _evaluate(network: Network, z: Array, held: Network | None = None) -> Evaluation:
    """Evaluate a network, read at the highest precision, on signals of a few examples."""
    gates, theta, n = recorded_gates(network, z, held is not None)[1], floating_leaves(network), len(z)
    twice = tuple(jnp.concatenate([gate, gate]) for gate in gates)

    def outputs(p: list[Array], z: Array, of: Network = network) -> Array:
        return of.over(with_floating(of, p).params, z)

    def path_sum(p: list[Array]) -> tuple[Array, Array]:
        """All paths, and those that do not start at the input."""
        both = evaluate_paths(partial(Polynomial, None), with_floating(network, p), jnp.concatenate([z, 0 * z]), twice)
        return both[:n], both[n:]

    f, along = jax.linearize(partial(outputs, of=held or network), theta, z)
    sums, pull_sums, constant = jax.vjp(path_sum, theta, has_aux=True)
    still = [jnp.zeros_like(leaf) for leaf in theta]
    pull = jax.linear_transpose(lambda p: along(p, jnp.zeros_like(z)), theta)
    direction = jax.random.normal(jax.random.key(1), f.shape, f.dtype)
    gradient = pull(direction)[0]
    whole = gradient
    if held is not None:
        f, pull_whole = jax.vjp(lambda p: outputs(p, z), theta)
        (whole,) = pull_whole(direction)
    return Evaluation(f, sums, along(still, z) + constant, direction, gradient, pull_sums(direction)[0], whole)


def _path_sum_checks(analysis: Analysis, evaluation: Evaluation) -> dict[str, Check]:
    """The network against its gated path sum."""
    f, loose = evaluation.f, analysis.tolerance(1e2, 1e-12)
    both = zip(evaluation.gradient_of_sums, evaluation.gradient, strict=True)
    name, held = ("gradients agree", "") if analysis.frozen is None else (
        "frozen gradients are J_v^f J_θ^v", ", gates held")
    return {
        "f is its gated path sum": _check(_relative(evaluation.sums, f), loose, "f(x) = Σ_p c_p v_p(θ) a_p(x) x_s(p)"),
        name: _check(max(_relative(a, b) for a, b in both), loose,
                     f"∇_θ f{held} = ∇_θ of the gated path sum, gates held"),
        "homogeneity": _check(_relative(evaluation.euler, f), loose,
                              f"∇_x f · x + (paths from biases and constants) = f (Euler){held}"),
    }


def _kernel_checks(analysis: Analysis, evaluation: Evaluation) -> dict[str, Check]:
    """Θ on a few examples against other engines; against one gradient where their Jacobian is too large."""
    tangent, tolerance = analysis.tangent, analysis.tolerance(1e3, 1e-12)
    outputs, n = analysis.network.size, len(analysis.few)
    arguments = (analysis.network.fn, analysis.network.params, analysis.few)
    block = _block(tangent, n, outputs)

    def by_engine(name: str) -> np.ndarray | None:
        try:
            ntk_plan(*arguments, engine=name, **analysis.options)
        except ValueError:      # the Jacobian of a single example is beyond the memory limit
            return None
        return np.asarray(ntk(*arguments, engine=name, **analysis.options))

    checks: dict[str, Check] = {}
    dense = by_engine("jacobian")
    if dense is not None:
        checks["Θ from the full Jacobian"] = _check(_relative(block, dense), tolerance,
                                                    f"Θ = ∇f ∇fᵀ on {n} examples")
    else:
        checks["Θ along a random direction"] = _check(
            _along(analysis, block, evaluation.direction, evaluation.whole_gradient), tolerance,
            f"uᵀΘu = ‖∇(u · f)‖² on {n} examples")
    if analysis.frozen is not None:
        frozen = _block(analysis.on_paths, n, outputs)
        checks["Θ_frozen along a random direction"] = _check(
            _along(analysis, frozen, evaluation.direction, evaluation.gradient_of_sums), tolerance,
            f"uᵀΘ_frozen u = ‖∇(u · the gated path sum)‖², gates held, on {n} examples")
        sums = np.sum([(leaf.trace, leaf.frozen_trace) for leaf in analysis.frozen.leaves], 0)
        checks["traces by leaf"] = _check(
            _relative(sums, np.array([tangent.trace, analysis.frozen.trace])), analysis.tolerance(1e3, 1e-10),
            "Tr Θ and Tr Θ_frozen are the sums over the leaves")
    try:
        other = by_engine("neural-tangents")
    except ImportError:
        other = None
    if other is not None:
        checks["Θ from neural-tangents"] = _check(_relative(block, other), tolerance,
                                                  f"agreement with neural-tangents on {n} examples")
    return checks


def _block(kernel: TangentSpectrum, n: int, outputs: int) -> np.ndarray:
    """A kernel on the first examples: (n, n, K, K)."""
    rows = n * outputs
    block = kernel.multiply(np.eye(rows, kernel.rows))[:, :rows]
    return block.reshape(n, outputs, n, outputs).transpose(0, 2, 1, 3)


def _along(analysis: Analysis, block: np.ndarray, u: ArrayLike, gradient: Sequence[ArrayLike]) -> float:
    """How far a kernel on the few examples, taken along u, is from the squared norm of a gradient."""
    leaves = zip(gradient, floating_entries(analysis.network), strict=True)
    norm = sum(float(np.sum(np.square(g, dtype=np.float64), where=np.asarray(t))) for g, t in leaves)
    return _relative(np.einsum("ia,ijab,jb->", u, block, u, dtype=np.float64), norm)


def _overlap_checks(analysis: Analysis) -> dict[str, Check]:
    """What the eigenvectors of Π carry of Θ, or of Θ_frozen, against that kernel itself."""
    vectors, tolerance = analysis.data.vectors, analysis.tolerance(1e4, 1e-10)
    carried = (analysis.energy**2).sum(1)
    whole = np.einsum("ai,ia->i", vectors, analysis.on_paths.multiply(vectors.T))
    symbol = analysis.symbol
    if analysis.complete:
        return {
            "overlaps": _check(_relative(carried, whole), tolerance,
                               f"Σ_j ν_i π_j O_ij² = V_iᵀ {symbol} V_i, whose sum is Tr {symbol}"),
            "trace of Π": _check(_relative(analysis.pi.sum(), analysis.trace_pi), analysis.tolerance(1e3, 1e-10),
                                 "Tr Π = Σ π_j"),
        }
    # Bessel: an incomplete list of eigenvectors of Π cannot carry more of Θ than there is, direction by direction.
    excess = float(np.max(carried - whole)) / max(float(whole.max()), TINY)
    return {"overlaps": _check(max(excess, 0.0), tolerance,
                               f"Σ_{{j≤k}} ν_i π_j O_ij² ≤ V_iᵀ {symbol} V_i")}


def _trace_checks(analysis: Analysis) -> dict[str, Check]:
    """Tr Θ against its eigenvalues, or against gradients where only the largest are known."""
    tolerance, found = analysis.tolerance(1e3, 1e-10), analysis.data.converged
    kernels = [("Θ", "", analysis.network, analysis.tangent)]
    if analysis.frozen is not None:
        kernels.append(("Θ_frozen", ", gates held", analysis.held, analysis.on_paths))
    checks: dict[str, Check] = {}
    for symbol, held, network, tangent in kernels:
        if len(tangent.values) == tangent.rows:
            checks[f"trace of {symbol}"] = _check(_relative(tangent.values.sum(), tangent.trace), tolerance,
                                                  f"Tr {symbol} = Σ λ_i")
            continue
        norms = float(ntk_trace(network.fn, network.params, analysis.signals, **analysis.options))
        found &= tangent.converged
        checks[f"trace of {symbol}"] = _check(_relative(norms, tangent.trace), tolerance,
                                              f"Tr {symbol} = Σ ‖∇f_k(x)‖², from norms of gradients" + held)
        checks["largest of Θ and A"] = Check(found, 0.0, 0.0, "the searches for the largest λ and ν are complete")
    return checks


def _check(error: float, tolerance: float, text: str) -> Check:
    return Check(bool(error <= tolerance), float(error), float(tolerance), text)


def _relative(a: ArrayLike, b: ArrayLike) -> float:
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(left - right).max(initial=0.0) / max(np.abs(right).max(initial=0.0), TINY))
