"""Training of the linearised network, solved from its tangent kernel.

With the network replaced by its tangent at θ_0, gradient flow at the learning rate η has

    ω_t = θ_t − θ_0 = −∇fᵀ c_t,   f⁻_t = f_0 − Θ c_t,   ċ_t = η ∇_f L(f⁻_t),   c_0 = 0

so the coefficients c_t (N, K), one number per output and training example, determine everything: the weights
(`weight_change`), the outputs on the training set, and those on other inputs (`predict`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from pkjax import tables
from pkjax.dynamics.arguments import floats, problem, rounding_of
from pkjax.dynamics.tangent_network import predict

__all__ = ["Trajectory", "flow", "linearized"]

Numbers = Float[Array | np.ndarray, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Trajectory:
    """A linearised network in training; the leading axis T is absent if `t` is a single time.

    Returned by `linearized` and `flow`. Prints as a short text and, in a notebook, as a table of its times.

    Examples:
        >>> linearized(jnp.eye(2), jnp.zeros((2, 1)), jnp.ones((2, 1)), learning_rate=1.0, t=jnp.array([0.0, 9.0]))
        Trajectory(
            times=float...[2] 0 … 9,
            outputs=float...[2,2,1],
            coefficients=float...[2,2,1],
            weight_change=float...[2] 0 … 1.414,
            output_norm=float...[2] 0 … 1.414,
            loss=float...[2] 1 … 1.523e-08...)
    """

    times: Shaped[Array, "*T"]
    """Times, or numbers of steps."""
    outputs: Float[Array, "*T N K"]
    """Outputs f⁻_t on the training set."""
    coefficients: Float[Array, "*T N K"]
    """Coefficients c_t, from which `weight_change` computes weights and `predict` other outputs."""
    weight_change: Float[Array, "*T"]
    """`‖ω_t‖`, with `‖ω_t‖² = c_tᵀ Θ c_t`."""
    output_norm: Float[Array, "*T"]
    """`‖f⁻_t‖` over all examples and outputs."""
    loss: Float[Array, "*T"]
    """The loss L."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        each = {"t": self.times, "‖ω‖": self.weight_change, "‖f‖": self.output_norm, "loss": self.loss}
        return tables.pairs({name: np.ravel(value) for name, value in each.items()}, "linearised training")


def linearized(theta: Numbers, f0: Float[Array | np.ndarray, "N K"], y: Shaped[Array | np.ndarray, "..."], *,
               learning_rate: Shaped[ArrayLike, "..."], t: Shaped[ArrayLike, "..."], discrete: bool = False
               ) -> Trajectory:
    """Train the linearised network under the squared error, in closed form.

        f⁻_t = y + e^{−ηΘt} (f_0 − y),   c_t = Θ⁻¹ (I − e^{−ηΘt}) (f_0 − y),   ‖ω_t‖² = c_tᵀ Θ c_t

    for L = ½ Σ (f − y)², summed over examples and outputs, not averaged: the closed forms of the paper are those of
    this loss. For a mean over N examples divide the learning rate by N. With `discrete`, the result is that of gradient
    descent: (I − ηΘ)^t in place of e^{−ηΘt}, which grows without bound if an eigenvalue λ of Θ has ηλ > 2 (norms and
    losses beyond the dtype's range are infinite, outputs then infinite or NaN). Θ is never inverted and may be
    singular: (1 − e^{−ηλt}) / λ is ηt at λ = 0.

    Args:
        theta: (N, N, K, K) as `ntk` returns it, or its matrix (NK, NK).
        f0: (N, K), the initial outputs.
        y: (N, K), the targets.
        learning_rate: η, in 1 / (λ · time); for discrete steps in 1 / λ.
        t: a time or a vector (T,) of times; whole numbers of steps if `discrete`.
        discrete: whether to take steps of gradient descent instead of gradient flow.

    Returns:
        The trajectory at the times `t`, in float64 if JAX has it enabled, otherwise in float32. Works under `jit` and
        `vmap`; it is differentiable in `theta` where the eigenvalues of `theta` are distinct.

    Raises:
        ValueError: shapes do not fit, a learning rate or time is negative or not finite, steps are not integers, or
            `theta` is not symmetric or has negative eigenvalues beyond rounding.

    Source: Gebhart, Saxena and Schrater (2021), equations 7, 8 and 18; Lee et al. (2019), section 2.2.

    Examples:
        >>> run = linearized(jnp.eye(2), jnp.zeros((2, 1)), jnp.ones((2, 1)), learning_rate=0.5, t=2, discrete=True)
        >>> run.outputs                                                # 1 − (1 − 0.5)²
        Array([[0.75],
               [0.75]], ...)
    """
    matrix, start, times, rate = problem(theta, f0, learning_rate, t)
    target = floats(y)
    if target.shape != start.shape:
        raise ValueError(f"y must have the shape {start.shape} of f0 (labels as one-hot rows), got {target.shape}")
    if discrete:
        if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
            raise ValueError(f"t must be whole numbers of steps, of integer dtype, if discrete, got "
                             f"{jnp.result_type(t)}")
        times = jnp.asarray(t).astype(jnp.result_type(int))
    values, vectors = _eigh(matrix, rounding_of(theta))
    if not isinstance(values, jax.core.Tracer) and (known := np.asarray(values))[0] < 0:
        raise ValueError("theta must be positive semidefinite, as tangent kernels are, but has the eigenvalue "
                         f"{known[0]:.3g} beside {known[-1]:.3g}")
    return _solve(values, vectors, start, target, rate, times, discrete=discrete)


def flow(theta: Numbers, f0: Float[Array | np.ndarray, "N K"], loss_fn: Callable[[Array], Array], *,
         learning_rate: Shaped[ArrayLike, "..."], t: Shaped[ArrayLike, "..."], rtol: float = 1e-6) -> Trajectory:
    """Train the linearised network under any loss, by integrating its differential equation.

        ċ_t = η ∇_f L(f⁻_t),   f⁻_t = f_0 − Θ c_t

    The integrator is Radau IIA of order 5, an implicit method, with the exact Jacobian −η ∇²L Θ: the eigenvalues of
    kernels span many orders of magnitude, and the largest would force an explicit method to take small steps. It
    factorises matrices of NK rows, a few whenever its step changes. It runs in SciPy and so not under `jit`.

    Args:
        theta: (N, N, K, K) as `ntk` returns it, or its matrix (NK, NK).
        f0: (N, K), the initial outputs.
        loss_fn: maps outputs (N, K) to the loss, a scalar; JAX must be able to differentiate it twice.
        learning_rate: η.
        t: a time or a vector (T,) of times, in any order.
        rtol: relative error of c that a step may make; below 1e-6 it needs float64.

    Returns:
        The trajectory at the times `t`, as from `linearized`.

    Raises:
        ValueError: shapes do not fit, a learning rate or time is negative or not finite, `theta` is not symmetric, or
            the loss is not a scalar or has no finite gradient at f0.
        RuntimeError: the solver fails, for example because the flow reaches infinity.

    Source: Gebhart, Saxena and Schrater (2021), equations 5 and 6.

    Examples:
        >>> run = flow(jnp.eye(2), jnp.zeros((1, 2)), lambda f: -jax.nn.log_softmax(f)[0, 1], learning_rate=1.0, t=1.0)
        >>> round(float(run.outputs[0, 1]), 2)
        0.4
    """
    from scipy.integrate import solve_ivp

    matrix, start, times, rate = problem(theta, f0, learning_rate, t)
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(jax.eval_shape(loss_fn, start))]
    if shapes != [()]:
        raise ValueError(f"loss_fn must map outputs {start.shape} to one scalar, but returned shapes {shapes}")
    slope = jax.grad(loss_fn)

    def outputs(c: Array) -> Array:
        return start - jnp.matmul(matrix, c, precision="highest").reshape(start.shape)

    @jax.jit
    def gradient(c: Array) -> Array:
        return slope(outputs(c)).ravel()

    @jax.jit
    def jacobian(c: Array) -> Array:
        _, pull = jax.vjp(slope, outputs(c))
        return -jax.vmap(lambda row: pull(row.reshape(start.shape))[0].ravel(), out_axes=1)(matrix)

    began = np.asarray(gradient(np.zeros(matrix.shape[0], matrix.dtype)))
    if not np.isfinite(began).all():
        raise ValueError("loss_fn must have a finite gradient at f0, but it holds NaN or infinity")
    # The learning rate is a scale of time: the solver sees s = ηt.
    ends, place = np.unique(float(rate) * np.asarray(times, np.float64), return_inverse=True)
    c = np.zeros((ends.size, matrix.shape[0]))
    if ends.size and ends[-1] > 0 and began.any():
        # An error of this size in c changes the gradient by at most rtol of its initial size, times ∇²L.
        atol = rtol * np.abs(began).max() / (np.linalg.norm(matrix) or 1.0)
        done = solve_ivp(lambda _, c: np.asarray(gradient(c.astype(matrix.dtype)), np.float64), (0.0, ends[-1]), c[0],
                         method="Radau", t_eval=ends, rtol=rtol, atol=atol,
                         jac=lambda _, c: np.asarray(jacobian(c.astype(matrix.dtype)), np.float64))
        if not done.success or not np.isfinite(done.y).all():
            raise RuntimeError(f"the flow could not be followed to t = {float(times.max()):.3g} (less time, or a "
                               f"larger rtol than {rtol:.1g}, may help): {done.message}")
        c = done.y.T

    @jax.jit
    def describe(c: Array) -> Trajectory:
        f = predict(matrix, start, c)
        loss = lax.map(loss_fn, f.reshape(-1, *start.shape)).reshape(times.shape)
        change = jnp.sqrt(jnp.maximum(((start - f) * c).sum((-1, -2)), 0))
        return Trajectory(times, f, c, change, jnp.sqrt((f**2).sum((-1, -2))), loss)

    return describe(c[place.ravel()].astype(matrix.dtype).reshape(*times.shape, *start.shape))


@partial(jax.jit, static_argnames="rounding")
def _eigh(matrix: Array, rounding: float) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    # Values negative by rounding become zero; those that are more negative stay, for the caller to check.
    return jnp.where((values < 0) & (values >= -rounding * values[-1]), 0, values), vectors


@partial(jax.jit, static_argnames="discrete")
def _solve(values: Array, vectors: Array, start: Array, target: Array, rate: Array, times: Array, *, discrete: bool
           ) -> Trajectory:
    """Evolve the component of f_0 − y along each eigenvector by itself."""
    with jax.default_matmul_precision("highest"):
        z, steps = rate * values, times[..., None]
        t = steps.astype(z.dtype)
        # Both ratios are 1 at z = 0: (1 − e^{−u}) / u, and −log(1 − z) / z, by which a discrete step counts.
        u = t * z * (_log_ratio(z) if discrete else 1)
        decay, gain = jnp.exp(-u), rate * t * (_log_ratio(z) if discrete else 1) * _mean_decay(u)
        if discrete:
            # Beyond z = 1/2 nothing cancels, and beyond z = 1 there is no logarithm.
            power = lax.pow(*jnp.broadcast_arrays(1 - z, steps))
            far = z >= 0.5
            decay = jnp.where(far, power, decay)
            gain = jnp.where(far, rate * (1 - power) / jnp.where(far, z, 1), gain)
        error, goal = (x.ravel() @ vectors for x in (start - target, target))
        # A component of 0 stays 0, however fast the others grow.
        left, moved = (jnp.where(error == 0, 0, x * error) for x in (decay, gain))
        shape = (*times.shape, *start.shape)
        outputs = target + (left @ vectors.T).reshape(shape)
        coefficients = (moved @ vectors.T).reshape(shape)
        return Trajectory(times, outputs, coefficients, jnp.sqrt((values * moved**2).sum(-1)),
                          jnp.sqrt(((goal + left) ** 2).sum(-1)), (left**2).sum(-1) / 2)


def _mean_decay(u: Array) -> Array:
    """Return (1 − e^{−u}) / u."""
    small = jnp.abs(u) < 1e-5
    safe = jnp.where(small, 1, u)
    return jnp.where(small, 1 - u / 2 + u**2 / 6, -jnp.expm1(-safe) / safe)


def _log_ratio(z: Array) -> Array:
    """Return −log(1 − z) / z for z ≤ 1/2, and its value at 1/2 beyond."""
    small = jnp.abs(z) < 1e-5
    safe = jnp.where(small, 0.5, jnp.minimum(z, 0.5))
    return jnp.where(small, 1 + z / 2 + z**2 / 3, -jnp.log1p(-safe) / safe)
