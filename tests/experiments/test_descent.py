"""A real training beside its linearisation: equal where the network is linear, close where it is wide."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.experiments.descent import trajectories

from tests.cases import coins, normal


def network(width):
    def apply_fn(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"] / np.sqrt(width)

    return apply_fn, {"a": normal(1, (6, width)), "b": normal(2, (width, 2))}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(5, 6))), jnp.asarray(rng.normal(size=(5, 2)))


def test_a_network_that_is_linear_in_its_weights_is_its_linearisation(batch):
    X, y = batch
    w = normal(1, (6, 2))
    found = trajectories(lambda w, x: x @ w, w, X, y, steps=200, points=9)
    for name, values in found.measured.items():
        np.testing.assert_allclose(values, found.linearized[name], rtol=1e-9)
    assert found.steps[0] == 1
    assert found.steps[-1] == 200
    np.testing.assert_allclose(found.trace_pi, 12)            # each of the 12 weights is a path with slope 1


def test_the_wider_a_network_the_closer_its_linearisation(batch):
    gaps = []
    for width in (20, 400, 8000):
        found = trajectories(*network(width), *batch, steps=100, points=5)
        gaps.append(abs(found.measured["loss"] - found.linearized["loss"]).max() / found.measured["loss"][0])
    assert gaps[2] < 0.01 < 0.2 * gaps[0]
    assert found.measured["loss"][-1] < found.measured["loss"][0]


def test_the_walk_is_gradient_descent_and_masks_hold(batch):
    X, y = batch
    apply_fn, params = network(12)
    masks = {"a": coins(3, 0.5, (6, 12)), "b": jnp.ones((12, 2), bool)}
    found = trajectories(apply_fn, params, X, y, steps=10, points=4, learning_rate=0.01, masks=masks)
    start = now = pk.apply_masks(params, masks)
    for _ in range(10):
        slope = jax.grad(lambda w: ((apply_fn(w, X) - y) ** 2).sum() / 2)(now)
        now = jax.tree.map(lambda p, g, m: jnp.where(m, p - 0.01 * g, 0.0), now, slope, masks)
    change = np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(*map(jax.tree.leaves, (now, start)), strict=True)))
    np.testing.assert_allclose(found.measured["weight_change"][-1], change, rtol=1e-9)
    np.testing.assert_allclose(found.measured["output_norm"][-1], np.linalg.norm(apply_fn(now, X)), rtol=1e-9)


def test_the_forecast_has_the_least_squares_of_its_form(batch):
    found = trajectories(*network(30), *batch, steps=50, points=20, learning_rate=2e-4)
    rise = 1 - np.exp(-2e-4 * found.trace_pi * found.steps)
    a = rise @ found.measured["weight_change"] / (rise @ rise)
    np.testing.assert_allclose(found.forecast["weight_change"], a * rise, rtol=1e-6)


def test_a_training_that_diverges_and_too_few_points_are_errors(batch):
    apply_fn, params = network(12)
    with pytest.raises(FloatingPointError, match="diverges at a learning rate of 1e\\+03"):
        trajectories(apply_fn, params, *batch, steps=100, learning_rate=1e3)
    with pytest.raises(ValueError, match="at least 2, got 1 and 40"):
        trajectories(apply_fn, params, *batch, steps=1)


def test_trajectories_are_drawn_in_three_panels(batch):
    found = trajectories(*network(30), *batch, steps=50, points=6, learning_rate=2e-4)
    figure = pk.plots.trajectories(found, "a title")
    lines = [{line.get_label(): line.get_ydata() for line in ax.lines} for ax in figure.axes]
    np.testing.assert_array_equal(lines[0]["network"], found.measured["weight_change"])
    np.testing.assert_array_equal(lines[1]["forecast by Tr Π"], found.forecast["output_norm"])
    assert sorted(lines[2]) == ["linearised", "network"]
