"""Training of a network beside that of its linearisation and the forecast by Tr Π."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import pkjax as pk
from pkjax import tables
from pkjax.trees import ApplyFn

__all__ = ["Trajectories", "trajectories"]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """‖ω_t‖, ‖f_t‖ and the loss over steps of gradient descent, in three ways; all arrays are float64 on the host.

    Returned by `trajectories`; `pk.plots.trajectories` draws it.

    Examples:
        >>> Trajectories(np.ones(2), 0.1, 3.0, {"loss": np.ones(2)}, {}, {}).steps.tolist()
        [1.0, 1.0]
    """

    steps: Float[np.ndarray, " t"]
    """Steps of gradient descent after which the network was measured."""
    learning_rate: float
    """η."""
    trace_pi: float
    """Tr Π at the initialisation."""
    measured: dict[str, np.ndarray]
    """`weight_change`, `output_norm` and `loss` of the network itself, (T,) each."""
    linearized: dict[str, np.ndarray]
    """The same for the network linearised at its initialisation."""
    forecast: dict[str, np.ndarray]
    """`weight_change` and `output_norm` by Tr Π, with a and b fitted to the measurements; NaN where the points do not
    determine them."""

    __repr__ = tables.brief


def trajectories(apply_fn: ApplyFn, params: PyTree, X: Float[Array | np.ndarray, "N ..."],
                 y: Float[Array | np.ndarray, "N K"], *, steps: int = 1000, points: int = 40,
                 learning_rate: float | None = None, masks: PyTree | None = None) -> Trajectories:
    """Train by gradient descent on the squared error, and compare with the linearisation and the forecast.

        L = ½ Σ (f(X, θ) − y)²,   θ_{t+1} = θ_t − η ∇L

    beside the linearised network, which Θ at initialisation determines, and the forecast ‖ω_t‖ ≈ a(1 − e^{−ηTr(Π)t}).

    Args:
        apply_fn: the network.
        params: its parameters θ_0.
        X: (N, *input) the whole training set.
        y: (N, K) targets.
        steps: steps of gradient descent.
        points: number of steps after which to measure, evenly spaced in their logarithm.
        learning_rate: η; None takes 1/λ_1, at which the linearised network converges.
        masks: booleans like `params`; pruned weights stay 0.

    Raises:
        ValueError: `steps` or `points` is below 2, or as in `ntk`.
        FloatingPointError: the network diverges.

    Source: Gebhart et al. (2021), equations 4 to 8 and 18, figure 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> line = trajectories(lambda w, x: x @ w, jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)), steps=4, points=3)
        >>> bool(np.allclose(line.measured["loss"], line.linearized["loss"]))      # linear in w: its own linearisation
        True
    """
    if steps < 2 or points < 2:
        raise ValueError(f"steps and points must be at least 2, got {steps} and {points}")
    X, y = jnp.asarray(X), jnp.asarray(y)
    theta = pk.ntk(apply_fn, params, X, masks=masks)
    rows = theta.shape[0] * theta.shape[2]
    if learning_rate is None:
        matrix = np.asarray(theta, np.float64).transpose(0, 2, 1, 3).reshape(rows, rows)
        learning_rate = float(1 / np.linalg.eigvalsh(matrix)[-1])
    alive = params if masks is None else pk.apply_masks(params, masks)
    ends = np.unique(np.round(np.geomspace(1, steps, points)).astype(int))
    measured = _descend(apply_fn, alive, masks, X, y, learning_rate, ends)
    if not np.isfinite(measured["loss"]).all():
        raise FloatingPointError(f"the network diverges at a learning rate of {learning_rate:.3g}: lower it")
    line = pk.dynamics.linearized(theta, apply_fn(alive, X), y, learning_rate=learning_rate, t=ends, discrete=True)
    trace = float(pk.path_kernel.trace(apply_fn, params, pk.ones_input(X.shape[1:], X.dtype), masks=masks))
    forecast = {name: _forecast(trace, measured[name], learning_rate, ends, start)
                for name, start in (("weight_change", False), ("output_norm", True))}
    linearized = {name: np.asarray(getattr(line, name), np.float64) for name in measured}
    return Trajectories(ends.astype(np.float64), learning_rate, trace, measured, linearized, forecast)


def _descend(apply_fn: ApplyFn, start: PyTree, masks: PyTree | None, X: Array, y: Array, rate: float,
             ends: np.ndarray) -> dict[str, np.ndarray]:
    """Take the steps of gradient descent, and measure the network after those in `ends`."""
    def loss(params: PyTree) -> Array:
        return ((apply_fn(params, X) - y) ** 2).sum() / 2

    def down(p: Array, g: Array) -> Array:
        return p - jnp.asarray(rate, p.dtype) * g

    @jax.jit
    def walk(params: PyTree, count: Array) -> tuple[PyTree, dict[str, Array]]:
        def step(_: Array, params: PyTree) -> PyTree:
            moved = jax.tree.map(down, params, jax.grad(loss)(params))
            return moved if masks is None else pk.apply_masks(moved, masks)

        params = jax.lax.fori_loop(0, count, step, params)
        moved = jax.tree.leaves(jax.tree.map(lambda p, q: jnp.sum((p - q) ** 2), params, start))
        return params, {"weight_change": jnp.sqrt(sum(moved)), "output_norm": jnp.linalg.norm(apply_fn(params, X)),
                        "loss": loss(params)}

    params, rows = start, []
    for count in np.diff(ends, prepend=0):
        params, row = walk(params, jnp.asarray(count))
        rows.append(jax.device_get(row))
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def _forecast(trace: float, values: np.ndarray, rate: float, steps: np.ndarray, start: bool) -> np.ndarray:
    options: dict[str, Any] = {"learning_rate": rate, "t": steps.astype(np.float64)}
    try:
        fit = pk.dynamics.fit_forecast(trace, values, start=start, **options)
    except ValueError:      # every point lies beyond the bend, or before it
        return np.full(len(steps), np.nan)
    return np.asarray(pk.dynamics.forecast(trace, a=fit.a, b=fit.b, **options), np.float64)
