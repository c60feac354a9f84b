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
