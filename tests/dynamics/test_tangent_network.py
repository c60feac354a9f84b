"""The network linearised at its parameters: outputs anywhere, and the weights behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import ntk
from pkjax.dynamics import linearize, linearized, predict, weight_change

from tests.cases import half_masks
from tests.dynamics.cases import T, matrix_of, mlp, network, norms, problem


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_elsewhere_are_those_of_the_linearised_network_at_the_weights_of_equation_7(masked):
    params, x, x2, y = network()
    masks = half_masks(params) if masked else None
    chosen = {"masks": masks, "trainable": (lambda path, leaf: leaf.ndim == 2) if masked else None}
    alive = params if masks is None else jax.tree.map(lambda p, m: jnp.where(m, p, 0.0), params, masks)
    theta, cross = ntk(mlp, params, x, **chosen), ntk(mlp, params, x2, x, **chosen)
    run = linearized(theta, mlp(alive, x), y, learning_rate=0.05, t=T)
    omega = weight_change(mlp, params, x, run.coefficients, **chosen)
    np.testing.assert_allclose(norms(omega, 1), run.weight_change, rtol=1e-10, atol=1e-14)
    there, here = linearize(mlp, params, x2, **chosen), linearize(mlp, params, x, **chosen)
    elsewhere = predict(cross, mlp(alive, x2), run.coefficients)
    for i in range(len(T)):
        theta_t = jax.tree.map(lambda p, w: p + w[i], alive, omega)  # noqa: B023
        np.testing.assert_allclose(here(theta_t), run.outputs[i], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(there(theta_t), elsewhere[i], rtol=1e-10, atol=1e-12)
        single = weight_change(mlp, params, x, run.coefficients[i], **chosen)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[i], rtol=1e-12, atol=1e-14),  # noqa: B023
                     single, omega)
        np.testing.assert_allclose(predict(matrix_of(cross), mlp(alive, x2), run.coefficients[i]), elsewhere[i],
                                   rtol=1e-12)
    assert np.abs(elsewhere[-1] - elsewhere[0]).max() > 0.01
    if masked:
        assert not omega["c"].any()
        assert not np.asarray(omega["a"])[:, ~np.asarray(masks["a"])].any()


def test_the_linearised_network_is_the_first_order_of_the_network():
    params, x, _, _ = network()
    tangent = linearize(mlp, params, x)
    np.testing.assert_allclose(tangent(params), mlp(params, x), rtol=1e-14)
    direction = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    gaps = [float(jnp.abs(tangent(q) - mlp(q, x)).max()) for q in
            (jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (1e-4, 1e-5))]
    np.testing.assert_allclose(gaps[0] / gaps[1], 100, rtol=0.01)


def test_leaves_that_cannot_train_stand_still():
    def scaled(params, x):
        return x @ params["w"] * params["n"].astype(x.dtype)

    params, x = {"w": jnp.ones((3, 2)), "n": jnp.asarray(3)}, network()[1]
    omega = weight_change(scaled, params, x, jnp.ones((4, 2)))
    assert omega["n"].dtype == params["n"].dtype
    np.testing.assert_allclose(omega["w"], -3 * np.asarray(x).T @ np.ones((4, 2)), rtol=1e-14)
    np.testing.assert_allclose(linearize(scaled, params, x)({"w": 2 * params["w"], "n": jnp.asarray(3)}),
                               2 * scaled(params, x), rtol=1e-14)


def test_bad_requests_are_refused():
    theta, f0, _ = problem()
    params, x, _, _ = network()
    for message, call in (
        (r"coefficients must have the shape \(4, 2\).*got \(3, 2\)",
         lambda: weight_change(mlp, params, x, np.ones((3, 2)))),
        (r"theta_cross must have the shape \(4, 5, 2, 2\)", lambda: predict(theta, f0, np.ones((5, 2)))),
        (r"coefficients must have the shape", lambda: predict(theta, f0, np.ones(5))),
        ("params_t leaf 'a' has shape", lambda: linearize(mlp, params, x)(params | {"a": np.ones(3)})),
    ):
        with pytest.raises(ValueError, match=message):
            call()
