"""Functions without the keyword take a frozen network as their network, and refuse others by naming frozen gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import nn

from tests.cases import FLOAT, assert_close, normal

ONES, X = jnp.ones((1, 3), FLOAT), normal(3, (5, 3))
W = {"a": normal(0, (3, 4)), "b": normal(1, (4, 2)), "c": normal(2, (4,)), "g": normal(4, (3, 4))}
MASKS = {name: leaf > -0.5 for name, leaf in W.items()}


def gated(w, x):
    y = nn.gelu((x - x.mean(-1, keepdims=True)) @ w["a"] + w["c"])
    return (y * nn.sigmoid(x @ w["g"])) @ w["b"]


def perceptron(w, x):
    return nn.gelu(x @ w["a"] + w["c"]) @ w["b"]


@pytest.fixture(scope="module")
def frozen():
    return pk.paths.frozen(gated, W, X[:1])


CALLS = {
    "path_magnitude": lambda f, w: pk.path_magnitude(f, w, ONES),
    "effective_units": lambda f, w: pk.effective_units(f, w, ONES),
    "phew": lambda f, w: pk.phew(f, w, ONES, key=jax.random.key(0), density=0.5),
    "norm": lambda f, w: pk.paths.norm(f, w, ONES, q=1),
    "distance": lambda f, w: pk.paths.distance(f, w, ONES, None, MASKS),
    "change_bound": lambda f, w: pk.paths.change_bound(f, w, X, masks=MASKS),
    "rescale": lambda f, w: pk.paths.rescale(f, w, ONES, key=jax.random.key(0)),
    "path_condition": lambda f, w: pk.paths.path_condition(f, w, ONES),
    "factorize": lambda f, w: pk.paths.factorize(f, w, ONES),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_network_without_paths_is_refused_with_the_way_out(name):
    with pytest.raises(pk.NotPathNetworkError, match=r'gates="frozen", pkjax\.paths\.frozen'):
        CALLS[name](gated, W)


def test_norms_and_magnitudes_are_those_of_the_enumerated_paths(frozen):
    def norm(w):
        listed = pk.paths.factorize(frozen, w, ONES)
        return np.abs(np.asarray(listed.jvf) * np.asarray(listed.values)).sum()

    assert_close(pk.paths.norm(frozen, W, ONES, q=1), norm(W))
    scores = pk.path_magnitude(frozen, W, ONES)
    for name, at in (("a", (1, 2)), ("b", (2, 0)), ("c", (3,)), ("g", (0, 0))):
        assert_close(scores[name][at], norm(W) - norm({**W, name: W[name].at[at].set(0)}))
    units = {unit.name: unit for unit in pk.effective_units(frozen, W, ONES)}
    assert (units["a"].live, units["b"].live, units["g"].live) == (4, 2, 0)


def test_a_smaller_frozen_network_has_the_same_outputs(frozen):
    masks = {name: jnp.ones_like(leaf, bool) for name, leaf in W.items()}
    masks |= {"a": masks["a"].at[:, 1].set(False), "c": masks["c"].at[1].set(False)}
    small = pk.shrink(frozen, W, ONES, masks=masks)
    assert_close(small.apply_fn(small.params, X), frozen(pk.apply_masks(W, masks), X))


def test_scaled_units_leave_the_frozen_function_as_it_is(frozen):
    scaled = pk.paths.rescale(frozen, W, ONES, key=jax.random.key(0))
    assert_close(frozen(scaled, X), frozen(W, X))
    assert_close(frozen(pk.paths.path_condition(frozen, W, ONES).params, X), frozen(W, X))


def test_walks_pass_frozen_activations_and_no_gated_unit():
    w = {name: W[name] for name in "abc"}
    masks = pk.phew(pk.paths.frozen(perceptron, w, X), w, ONES, key=jax.random.key(0), density=0.5).masks
    np.testing.assert_array_equal(masks["a"].any(0), masks["b"].any(1))
    with pytest.raises(ValueError, match="not a chain of dense and convolution layers"):
        CALLS["phew"](pk.paths.frozen(gated, W, X), W)
def test_px_and_gated_traces_take_choices_by_the_signal_as_choices():
    """The first index of four or more: a square of it would be another entry, or none."""
    def choosing(w, x):
        share, chosen = jax.lax.top_k(nn.softmax(x @ w["a"]), 2)
        return (jnp.take_along_axis(x @ w["g"], chosen, axis=1) * share) @ w["b"][:2]

    def squared(w, z, x):      # R_2 of one input, with the choices and shares of x
        share, chosen = jax.lax.top_k(nn.softmax(x @ W["a"]), 2)
        return ((z @ w["g"])[chosen] * share**2) @ w["b"][:2]

    squares, ones = jax.tree.map(jnp.square, W), jax.tree.map(jnp.ones_like, W)
    data = sum(squared(ones, x**2, x) for x in X)
    slopes = jax.grad(lambda w: squared(w, ONES[0], ONES[0]) @ data)(squares)
    assert max(int(jax.lax.top_k(x @ W["a"], 2)[1].max()) for x in X) > 1
    scores = pk.path_exclusion(choosing, W, X, gates="frozen")
    for name in W:
        assert_close(scores[name], squares[name] * slopes[name], 1e-10)
    each = [jax.grad(lambda w, x=x: squared(w, x**2, x).sum())(squares) for x in X]
    assert_close(pk.path_kernel.gated_trace(choosing, W, X, gates="frozen"), sum(
        leaf.sum() for slope in each for leaf in jax.tree.leaves(slope)), 1e-10)


def test_networks_of_several_inputs_take_a_reference_of_several():
    def pair(w, x):
        return nn.gelu(x["u"] @ w["a"] + x["v"] @ w["g"] + w["c"]) @ w["b"]

    z, at = {"u": ONES, "v": 2 * ONES}, {"u": X[:2], "v": X[2:4]}
    linear = pk.paths.frozen(pair, W, at)
    options = {"gates": "frozen", "reference": at}
    for score in (pk.synflow, pk.synflow_l2):
        jax.tree.map(assert_close, score(pair, W, z, **options), score(linear, W, z))
    assert pk.connectivity(pair, W, z, **options) == pk.connectivity(linear, W, z)
    assert_close(pk.path_kernel.trace(pair, W, z, **options), pk.path_kernel.trace(linear, W, z))
