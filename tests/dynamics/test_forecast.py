"""The forecast from Tr Π against the linearised training of a kernel with one eigenvalue, and its fit."""

import jax
import numpy as np
import pytest
from pkjax.dynamics import fit_forecast, forecast, linearized

from tests.dynamics.cases import T


def test_the_forecast_is_the_weight_change_of_a_kernel_with_one_eigenvalue():
    """Θ = Tr Π · I: a is the distance to the end, and f_0 = 0 starts where b is 0."""
    trace, y = 3.0, np.ones((4, 1))
    run = linearized(trace * np.eye(4), 0 * y, y, learning_rate=0.1, t=T)
    curve = forecast(trace, learning_rate=0.1, t=T, a=np.sqrt(4 / trace))
    np.testing.assert_allclose(run.weight_change, curve, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(run.output_norm, forecast(trace, learning_rate=0.1, t=T, a=2.0), rtol=1e-12, atol=1e-14)
    back = linearized(trace * np.eye(4), y, 3 * y, learning_rate=0.1, t=T)
    np.testing.assert_allclose(back.output_norm, forecast(trace, learning_rate=0.1, t=T, a=6.0, b=2.0), rtol=1e-12)


def test_forecasts_broadcast_over_networks_and_times():
    traces = np.logspace(-2, 3, 6)
    curves = forecast(traces[:, None], learning_rate=0.01, t=T, a=2.0, b=0.5)
    assert curves.shape == (6, 4)
    decay = np.exp(-0.01 * traces[:, None] * T)
    np.testing.assert_allclose(curves, 2 * (1 - decay) + 0.5 * decay, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda x: forecast(x, learning_rate=0.01, t=60, a=2.0))(1e-14),
                               2 * 0.01 * 60 * 1e-14, rtol=1e-12)


def test_the_fit_is_that_of_least_squares_on_the_curves():
    rng = np.random.default_rng(0)
    traces, eta, t = np.logspace(-1, 4, 40), 0.001, 60
    noisy = np.asarray(forecast(traces, learning_rate=eta, t=t, a=3.0, b=1.0)) + 0.1 * rng.normal(size=40)
    decay = np.exp(-eta * t * traces)
    for start, design in ((True, np.stack([1 - decay, decay], 1)), (False, (1 - decay)[:, None])):
        want, squares, *_ = np.linalg.lstsq(design, noisy)
        fit = fit_forecast(traces, noisy, learning_rate=eta, t=t, start=start)
        np.testing.assert_allclose([fit.a, fit.b][:1 + start], want, rtol=1e-10)
        np.testing.assert_allclose(fit.r_squared, 1 - squares[0] / (40 * noisy.var()), rtol=1e-10)
        assert start == (fit.b is not None)
    exact = fit_forecast(traces, forecast(traces, learning_rate=eta, t=t, a=3.0), learning_rate=eta, t=t)
    np.testing.assert_allclose([exact.a, exact.r_squared], [3.0, 1.0], rtol=1e-12)
    jitted = jax.jit(lambda v: fit_forecast(traces, v, learning_rate=eta, t=t, start=True))(noisy)
    np.testing.assert_allclose(jitted.a, fit_forecast(traces, noisy, learning_rate=eta, t=t, start=True).a)


def test_bad_requests_are_refused():
    for message, call in (
        ("t must be finite", lambda: forecast(1.0, learning_rate=0.1, t=np.inf, a=1.0)),
        ("trace_pi must be finite and 0 or more", lambda: forecast(-1.0, learning_rate=0.1, t=1, a=1.0)),
        (r"broadcast, got trace_pi · learning_rate · t \(3,\), a \(2,\)",
         lambda: forecast(np.ones(3), learning_rate=0.1, t=1, a=np.ones(2))),
        ("2 values .* do not determine a and b",
         lambda: fit_forecast(np.full(2, 1e9), np.ones(2), learning_rate=0.1, t=1, start=True)),
        ("do not determine a:", lambda: fit_forecast(np.ones(2), np.ones(2), learning_rate=0.1, t=0)),
        ("values must be finite", lambda: fit_forecast(1.0, np.nan, learning_rate=0.1, t=1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
