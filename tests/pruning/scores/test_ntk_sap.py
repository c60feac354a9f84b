"""NTK-SAP is the derivative of the trace of dense Jacobians, at draws that are new in every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

from tests.cases import FLOAT, assert_close, normal

PARAMS = {"a": {"kernel": normal(0, (4, 6)), "bias": normal(1, (6,))}, "b": {"kernel": normal(2, (6, 3))}}
KEY = jax.random.key(7)


def network(p, x):
    return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]


class Draws:
    """An initializer and NumPy's record of what it drew."""

    def __init__(self):
        self.drawn = []

    def __call__(self, key, shape, dtype):
        value = jax.random.normal(key, shape, dtype)
        self.drawn.append(value)
        return value


def traced(theta, masks, X):
    """Tr Θ of what trains, from the dense Jacobian."""
    jacobian = jax.jacrev(network)(theta, X)
    return sum((jnp.where(m, g, 0) ** 2).sum() for g, m in zip(jax.tree.leaves(jacobian), jax.tree.leaves(masks),
                                                               strict=True))


def inputs(masks, samples):
    kept = sum(int(np.sum(m)) for m in jax.tree.leaves(masks))
    return jax.random.normal(jax.random.split(jax.random.fold_in(KEY, kept))[1], (samples, 4), FLOAT)


@pytest.fixture(scope="module")
def case():
    masks = jax.tree.map(lambda v: jnp.asarray(np.random.default_rng(3).random(v.shape) < 0.6), PARAMS)
    draws = Draws()
    found = pk.ntk_sap(network, PARAMS, (4,), key=KEY, masks=masks, initializer=draws, samples=5, batch_size=2)
    theta = {"a": {"kernel": draws.drawn[0], "bias": PARAMS["a"]["bias"]}, "b": {"kernel": draws.drawn[1]}}
    return masks, pk.apply_masks(theta, masks), found


def test_the_score_is_the_derivative_of_the_dense_trace_at_the_drawn_weights(case):
    masks, theta, found = case
    slope = jax.grad(traced)(theta, masks, inputs(masks, 5))
    jax.tree.map(lambda s, t, g: assert_close(s, np.abs(t * g)), found, theta, slope)
    assert float(found["a"]["kernel"].max()) > 0
    assert not np.asarray(found["a"]["kernel"])[~np.asarray(masks["a"]["kernel"])].any()


def test_the_authors_score_tends_to_the_documented_limit(case):
    """The mean over perturbations of ‖f((θ + εu) ∘ m) − f(θ ∘ m)‖²/ε², differentiated by m, has one more term."""
    masks, theta, _ = case
    X = inputs(masks, 5)
    weights = {name: theta[name]["kernel"] for name in ("a", "b")}

    def out(m, w):
        return network({"a": {"kernel": w["a"] * m["a"], "bias": theta["a"]["bias"]},
                        "b": {"kernel": w["b"] * m["b"]}}, X)

    def change(m, u, eps):
        moved = jax.tree.map(lambda w, d: w + eps * d, weights, u)
        return ((out(m, moved) - out(m, weights)) ** 2).sum() / eps**2

    m = {name: masks[name]["kernel"].astype(FLOAT) for name in weights}
    slopes = jax.jit(jax.grad(change))
    eps = 1e-6 if np.dtype(FLOAT) == np.float64 else 1e-2
    mean = jax.tree.map(jnp.zeros_like, m)
    sizes = [v.size for v in jax.tree.leaves(m)]
    # E u uᵀ = I exactly: the unit vectors, each with both signs.
    for i in range(sum(sizes)):
        for sign in (1, -1):
            flat = np.zeros(sum(sizes))
            flat[i] = sign
            parts = np.split(flat, np.cumsum(sizes)[:-1])
            u = {name: jnp.asarray(part.reshape(m[name].shape), FLOAT)
                 for name, part in zip(("a", "b"), parts, strict=True)}
            mean = jax.tree.map(lambda t, g: t + g / 2, mean, slopes(m, u, eps))
    limit_masks = {**masks, "a": {**masks["a"], "bias": jnp.zeros(6, bool)}}    # they perturb the prunable weights
    trace = jax.grad(traced)(theta, limit_masks, X)
    jacobian = jax.jacrev(network)(theta, X)
    for name in weights:
        squares = (jacobian[name]["kernel"] ** 2).sum((0, 1))
        want = weights[name] * trace[name]["kernel"] + 2 * jnp.where(masks[name]["kernel"], squares, 0)
        present = np.asarray(masks[name]["kernel"])
        np.testing.assert_allclose(np.asarray(mean[name])[present], np.asarray(want)[present], rtol=1e-3, atol=1e-3)


def test_every_step_draws_anew_and_the_key_decides_everything():
    seen = []

    def score(p, masks):
        scores = pk.ntk_sap(network, p, (4,), key=KEY, masks=masks, samples=4)
        seen.append(scores["b"]["kernel"])
        return scores

    by_steps = pk.prune(score, PARAMS, density=0.3, steps=3, jit=False)
    alive = np.asarray(by_steps.masks["b"]["kernel"])
    ratios = [np.asarray(s)[alive] for s in seen]
    assert not np.allclose(ratios[0], ratios[1])
    assert not np.allclose(ratios[1], ratios[2])
    compiled = pk.prune(lambda p, masks: pk.ntk_sap(network, p, (4,), key=KEY, masks=masks, samples=4), PARAMS,
                        density=0.3, steps=3)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, by_steps.masks, compiled.masks)))
    # The weights at hand play no part, their biases do.
    other = jax.tree.map(lambda v: v, PARAMS)
    other["b"] = {"kernel": 3 * PARAMS["b"]["kernel"]}
    first, again = (pk.ntk_sap(network, p, (4,), key=KEY, samples=4) for p in (PARAMS, other))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, again)))
    assert not np.array_equal(first["b"]["kernel"],
                              pk.ntk_sap(network, PARAMS, (4,), key=jax.random.key(8), samples=4)["b"]["kernel"])


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"samples": 0}, ValueError, "samples must be a whole number of examples, 1 or more, got 0"),
    ({"batch_size": 0}, ValueError, "batch_size must be a whole number of examples, 1 or more, got 0"),
    ({"initializer": lambda key, shape, dtype: jnp.zeros(2, dtype)}, ValueError, "initializer was asked for leaf"),
    ({"masks": {"a": jnp.ones(2, bool)}}, ValueError, "masks must have the tree structure of params")])
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        pk.ntk_sap(network, PARAMS, (4,), key=KEY, **options)
