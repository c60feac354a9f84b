"""Scores of weights in half precision are those of the same weights in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

DTYPES = (jnp.bfloat16, jnp.float16)


def net(p, x):
    x = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(x + p["bias"]).reshape(len(x), -1) @ p["head"]


def loss(p, batch):
    images, labels = batch
    return ((net(p, images) - labels) ** 2).mean()


def draw(dtype):
    rng = np.random.default_rng(0)
    shapes = {"bias": (5,), "conv": (3, 3, 2, 5), "head": (80, 6)}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(6, 4, 4, 2)), dtype), jnp.asarray(rng.normal(size=(6, 6)), dtype)


SCORES = {
    "random": lambda X, y: lambda p: pk.random(p, key=jax.random.key(0)),
    "magnitude": lambda X, y: pk.magnitude,
    "snip": lambda X, y: lambda p: pk.snip(loss, p, [(X, y)]),
    "grasp": lambda X, y: lambda p: pk.grasp(loss, p, [(X[:4], y[:4]), (X[4:], y[4:])]),
    "synflow": lambda X, y: lambda p: pk.synflow(net, p, jnp.abs(X[:1])),
    "synflow_l2": lambda X, y: lambda p: pk.synflow_l2(net, p, jnp.abs(X[:1])),
    "path_exclusion": lambda X, y: lambda p: pk.path_exclusion(net, p, X),
    "ntk_trace_saliency": lambda X, y: lambda p: pk.ntk_trace_saliency(net, p, X),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_scores_and_masks_are_those_of_the_same_weights_in_float32(name, dtype):
    params, X, y = draw(dtype)
    wide, wide_X, wide_y = jax.tree.map(lambda v: v.astype(jnp.float32), (params, X, y))
    narrow, want = SCORES[name](X, y), SCORES[name](wide_X, wide_y)
    got = narrow(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, got, want(wide))
    masks, expected = (pk.prune(score, p, compression=1, steps=3).masks
                       for score, p in ((narrow, params), (want, wide)))
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_connectivity_counts_in_float32_at_least(dtype):
    params, X, _ = draw(dtype)
    masks = pk.prune(pk.magnitude, params, density=0.5).masks
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), params)
    assert pk.connectivity(net, params, X[:1], masks=masks) == pk.connectivity(net, wide, X[:1].astype(jnp.float32),
                                                                                masks=masks)
