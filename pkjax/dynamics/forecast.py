"""Forecasts of training from a single number, the trace of the path kernel."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from pkjax import tables
from pkjax.dynamics.arguments import common_shape, floats, nonnegative

__all__ = ["ForecastFit", "fit_forecast", "forecast"]

EXPONENT = "trace_pi · learning_rate · t"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ForecastFit:
    """The free parameters of `forecast` that fit measured values best.

    Returned by `fit_forecast`.

    Examples:
        >>> ForecastFit(a=jnp.array(3.0), b=None, r_squared=jnp.array(0.9))
        ForecastFit(a=3, b=None, r_squared=0.9)
    """

    a: Float[Array, ""]
    """The final level."""
    b: Float[Array, ""] | None
    """The initial level; None if it is assumed to be 0."""
    r_squared: Float[Array, ""]
    """1 − (sum of squared residuals) / (sum of squared deviations from the mean): below 0 if the mean fits better, NaN
    if all values are equal."""

    __repr__ = tables.brief


def forecast(trace_pi: Shaped[ArrayLike, "..."], *, learning_rate: Shaped[ArrayLike, "..."],
             t: Shaped[ArrayLike, "..."], a: Shaped[ArrayLike, "..."], b: Shaped[ArrayLike, "..."] | None = None
             ) -> Float[Array, "..."]:
    """Forecast how far training gets, from the trace of the path kernel alone, which stands in for Θ.

        ‖ω_t‖ ≈ a (1 − e^{−ηTr(Π)t}),   with b: ‖f⁻_t‖ ≈ a (1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t}

    Args:
        trace_pi: Tr Π, of one network or of many.
        learning_rate: η.
        t: time, or steps.
        a: the final level.
        b: the initial level; None means 0.

    Returns:
        The forecast, in the shape that the arguments broadcast to. Works under `jit`, `vmap` and `grad`.

    Raises:
        ValueError: shapes do not broadcast, or a trace, learning rate or time is negative or not finite.

    Source: Gebhart, Saxena and Schrater (2021), section 5.1 and figure 1.

    Examples:
        >>> round(float(forecast(2.0, learning_rate=0.001, t=500, a=3.0, b=1.0)), 3)
        2.264
    """
    z = _exponent(trace_pi, learning_rate, t)
    top, bottom = floats(a), None if b is None else floats(b)
    common_shape(**{EXPONENT: z, "a": top}, **({} if bottom is None else {"b": bottom}))
    risen = -top * jnp.expm1(-z)
    return risen if bottom is None else risen + bottom * jnp.exp(-z)


def fit_forecast(trace_pi: Shaped[ArrayLike, "..."], values: Shaped[ArrayLike, "..."], *,
                 learning_rate: Shaped[ArrayLike, "..."], t: Shaped[ArrayLike, "..."], start: bool = False
                 ) -> ForecastFit:
    """Fit the free parameters of `forecast` to measured values, by linear least squares.

    Args:
        trace_pi: Tr Π of the networks.
        values: measured `‖ω_t‖` or `‖f_t‖`, one per network or time.
        learning_rate: η.
        t: time, or steps.
        start: whether to fit the initial level b too; otherwise it is 0.

    Returns:
        a, b and the share of the variance that the curve explains. Works under `jit`.

    Raises:
        ValueError: as for `forecast`; values are not finite; or they do not determine the parameters, because there
            are fewer points than parameters, or all are so early or so late that one parameter has no weight.

    Source: Gebhart, Saxena and Schrater (2021), section 5.1 and figure 1.

    Examples:
        >>> traces = jnp.asarray([1., 10., 100.])
        >>> measured = forecast(traces, learning_rate=0.01, t=5, a=3.0, b=1.0)
        >>> fit = fit_forecast(traces, measured, learning_rate=0.01, t=5, start=True)
        >>> round(float(fit.a), 3), round(float(fit.b), 3), round(float(fit.r_squared), 3)
        (3.0, 1.0, 1.0)
    """
    z, measured = _exponent(trace_pi, learning_rate, t), floats(values)
    if not isinstance(measured, jax.core.Tracer) and not np.isfinite(measured).all():
        raise ValueError("values must be finite, but some are NaN or infinite")
    shape = common_shape(**{EXPONENT: z, "values": measured})
    fit, rank = _least_squares(jnp.broadcast_to(z, shape), jnp.broadcast_to(measured, shape), start=start)
    # Older JAX gives a matrix of zeros the rank 1; the level that it returns is infinite.
    if not isinstance(rank, jax.core.Tracer) and (rank < 1 + start or not np.isfinite(fit.a)):
        least, most = (f"{float(f(z, initial=i)):.3g}" for f, i in ((np.min, np.inf), (np.max, 0)))
        raise ValueError(f"{measured.size} values at ηTr(Π)t between {least} and {most} do not determine "
                         f"{'a and b' if start else 'a'}: take points where the curve bends, ηTr(Π)t near 1")
    return fit


@partial(jax.jit, static_argnames="start")
def _least_squares(z: Array, values: Array, *, start: bool) -> tuple[ForecastFit, Array]:
    z, values = z.ravel(), values.ravel()
    design = jnp.stack([-jnp.expm1(-z), jnp.exp(-z)][:1 + start], 1)
    levels, _, rank, _ = jnp.linalg.lstsq(design, values)
    residual, deviation = values - design @ levels, values - values.mean()
    explained = 1 - (residual**2).sum() / (deviation**2).sum()
    return ForecastFit(levels[0], levels[1] if start else None, explained), rank


def _exponent(trace_pi: ArrayLike, learning_rate: ArrayLike, t: ArrayLike) -> Array:
    parts = {"trace_pi": trace_pi, "learning_rate": learning_rate, "t": t}
    arrays = {name: nonnegative(name, value) for name, value in parts.items()}
    common_shape(**arrays)
    return arrays["trace_pi"] * arrays["learning_rate"] * arrays["t"]
