"""A is the Gram matrix of the gated inputs of all paths, found without listing them."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import paths
from pkjax.tangent_kernel.data_factor import data_factor

from tests.cases import FLOAT, coins, normal

relu = jax.nn.relu


def draw(shapes, seed=0, dtype=FLOAT):
    return {name: normal((seed, i), shape, dtype) for i, (name, shape) in enumerate(shapes.items())}


def two_layers(p, x):
    return relu(relu(x @ p["a"] + p["c"]) @ p["b"] + p["d"]) @ p["e"]


def leaky_residual(p, x):
    h = x @ p["a"]
    h = h + 0.5 * jnp.where(h > 0, h, 0.1 * h) @ p["b"]
    return h @ p["e"] + p["d"]


def gated_residual(p, x):
    h = relu(x @ p["a"])
    return (h + relu(h @ p["b"])) @ p["e"]


def convnet(p, x):
    y = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.lax.reduce_window(relu(y), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return y.mean((1, 2)) @ p["e"]


NETS = {
    "two layers": (two_layers, dict(a=(3, 4), c=(4,), b=(4, 3), d=(3,), e=(3, 2)), (3,)),
    "leaky residual": (leaky_residual, dict(a=(3, 3), b=(3, 3), e=(3, 2), d=(2,)), (3,)),
    "gated residual": (gated_residual, dict(a=(3, 3), b=(3, 3), e=(3, 2)), (3,)),
    "convnet": (convnet, dict(k=(3, 3, 1, 2), e=(2, 2)), (4, 4, 1)),
}


def case(name, n=5):
    apply_fn, shapes, shape = NETS[name]
    return apply_fn, draw(shapes), normal(1, (n, *shape))


def enumerated(p, x, masks=None):
    """A of ``two_layers`` from an explicit list of its paths, in plain loops."""
    p = {k: np.asarray(v) for k, v in p.items()}
    m = {k: np.ones(v.shape, bool) for k, v in p.items()} if masks is None else masks
    p = {k: np.where(m[k], v, 0) for k, v in p.items()}
    x = np.asarray(x)
    h1 = x @ p["a"] + p["c"]
    h2 = np.maximum(h1, 0) @ p["b"] + p["d"]
    g1, g2 = h1 > 0, h2 > 0
    columns = [[], []]
    for k in range(2):
        for j in range(3):
            if not m["e"][j, k]:
                continue
            if m["d"][j]:
                columns[k].append(g2[:, j] * 1.0)
            for i in range(4):
                if not m["b"][i, j]:
                    continue
                if m["c"][i]:
                    columns[k].append(g1[:, i] * g2[:, j] * 1.0)
                columns[k] += [g1[:, i] * g2[:, j] * x[:, s] for s in range(3) if m["a"][s, i]]
    jvf = [np.stack(c, 1) for c in columns]
    assert min(np.abs(j).sum() for j in jvf) > 0
    assert len({tuple(row) for row in g1}) > 1
    return np.stack([j @ j.T for j in jvf])


def test_a_is_the_gram_matrix_over_explicitly_listed_paths():
    apply_fn, params, x = case("two layers")
    np.testing.assert_allclose(data_factor(apply_fn, params, x), enumerated(params, x), rtol=1e-12, atol=1e-12)


def test_a_masked_weight_carries_no_path_but_a_zero_weight_does():
    apply_fn, params, x = case("two layers")
    masks = {k: coins(i, 0.7, v.shape) for i, (k, v) in enumerate(params.items())}
    want = enumerated(params, x, {k: np.asarray(v) for k, v in masks.items()})
    np.testing.assert_allclose(data_factor(apply_fn, params, x, masks=masks), want, rtol=1e-12, atol=1e-12)
    params["c"] = jnp.zeros_like(params["c"])
    np.testing.assert_allclose(data_factor(apply_fn, params, x), enumerated(params, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_a_agrees_with_the_path_factorization_and_outputs_do_not_mix(name):
    apply_fn, params, x = case(name)
    jvf = np.asarray(paths.factorize(apply_fn, params, x).jvf)
    full = (jvf @ jvf.T).reshape(5, 2, 5, 2)
    assert np.abs(full[:, 0, :, 1]).max() == 0
    a = np.asarray(data_factor(apply_fn, params, x))
    assert np.abs(a).max() > 0.1
    np.testing.assert_allclose(a, np.einsum("nkmk->knm", full), rtol=1e-12, atol=1e-12)


def test_a_of_a_dense_network_without_biases_is_a_product_of_gram_matrices():
    params = draw(dict(a=(6, 8), b=(8, 7), e=(7, 3)))
    x = normal(1, (6, 6))
    g1 = np.asarray(x @ params["a"] > 0, float)
    g2 = np.asarray(relu(x @ params["a"]) @ params["b"] > 0, float)
    want = np.asarray(x @ x.T) * (g1 @ g1.T) * (g2 @ g2.T)
    a = data_factor(lambda p, x: relu(relu(x @ p["a"]) @ p["b"]) @ p["e"], params, x)
    np.testing.assert_allclose(a, np.stack([want] * 3), rtol=1e-12, atol=1e-12)


def count_pair_passes(monkeypatch):
    """How often pairs are taken one by one."""
    module, calls = importlib.import_module("pkjax.tangent_kernel.data_factor"), []
    real = module._pair_by_pair
    monkeypatch.setattr(module, "_pair_by_pair", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def leaky_and_scaled(p, x):
    h = x.reshape(len(x), -1) @ p["a"] * p["s"] + p["c"]
    h = jnp.where(h > 0, h, 0.1 * h)
    return jnp.maximum(h @ p["b"], 0.0) @ p["e"] + 3.0 * p["d"]


def gated_output(p, x):
    return relu(relu(x.reshape(len(x), -1) @ p["a"] + p["c"]) @ p["f"])


@pytest.mark.parametrize("net", [leaky_and_scaled, gated_output])
def test_all_pairs_of_a_dense_network_are_taken_at_once_and_masks_that_keep_all_change_nothing(net, monkeypatch):
    params = draw(dict(a=(6, 5), s=(5,), c=(5,), b=(5, 4), e=(4, 3), d=(3,), f=(5, 3)))
    x = normal(1, (7, 2, 3))
    calls = count_pair_passes(monkeypatch)
    at_once = data_factor(net, params, x)
    assert not calls
    pair_by_pair = data_factor(net, params, x, masks=jax.tree.map(lambda p: jnp.ones(p.shape, bool), params))
    assert calls
    assert np.abs(at_once).max() > 0.1
    np.testing.assert_allclose(at_once, pair_by_pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gated residual", "convnet"])
def test_networks_whose_units_differ_go_pair_by_pair(name, monkeypatch):
    apply_fn, params, x = case(name)
    calls = count_pair_passes(monkeypatch)
    data_factor(apply_fn, params, x)
    assert calls
    with pytest.raises(paths.NotDensePairsError):
        paths.dense_pairs(apply_fn, params, x, jax.vmap(lambda x: paths.gates(apply_fn, params, x[None]))(x))


def test_too_many_paths_for_the_type_are_an_error_and_not_infinity():
    def net(p, x):
        for _ in range(40):
            x = relu(x @ p)
        return x

    p, x = jnp.ones((64, 64), jnp.float32), jnp.ones((2, 64), jnp.float32)
    with pytest.raises(FloatingPointError, match=r"too many paths for float32: call data_factor on float64"):
        data_factor(net, p, x)
    np.testing.assert_allclose(data_factor(net, p.astype(jnp.float64), x.astype(jnp.float64))[0, 0, 0], 64.0**40)


def test_blocks_are_symmetric_to_the_last_bit_and_positive_semi_definite():
    apply_fn, params, x = case("convnet", n=7)
    a = np.asarray(data_factor(apply_fn, params, x))
    assert (a == a.transpose(0, 2, 1)).all()
    assert np.linalg.eigvalsh(a).min() > -1e-12 * np.abs(a).max()


def test_pairs_in_small_batches_and_under_jit_give_the_same(monkeypatch):
    apply_fn, params, x = case("two layers")
    want = data_factor(apply_fn, params, x)
    monkeypatch.setattr(importlib.import_module("pkjax.tangent_kernel.data_factor"), "ENTRIES", 60)
    np.testing.assert_allclose(data_factor(apply_fn, params, x), want, rtol=1e-13)
    np.testing.assert_allclose(jax.jit(lambda p, x: data_factor(apply_fn, p, x))(params, x), want, rtol=1e-13)


def test_float32_stays_float32():
    apply_fn, params, x = case("two layers")
    want = data_factor(apply_fn, params, x)
    narrow = data_factor(apply_fn, {k: v.astype(jnp.float32) for k, v in params.items()}, x.astype(jnp.float32))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, np.asarray(want), rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    apply_fn, params, x = case("two layers")
    with pytest.raises(ValueError, match="X must be a batch of shape"):
        data_factor(apply_fn, params, x[:0])
    with pytest.raises(ValueError, match="masks must have the tree structure of params, but leaf 'a' is missing"):
        data_factor(apply_fn, params, x, masks={"b": jnp.ones((4, 3), bool)})
    with pytest.raises(ValueError, match=r"X leaf .* holds 1 values that are NaN"):
        data_factor(apply_fn, params, x.at[0, 0].set(jnp.nan))
    with pytest.raises(paths.NotPathNetworkError, match="tanh"):
        data_factor(lambda p, x: jnp.tanh(x @ p["a"]), params, x)


def test_units_summed_before_a_wide_layer_are_counted_right():
    """XLA's CPU compiler got sums times matrices of equal columns wrong (jaxlib 0.10)."""
    def net(w, x):
        return x.sum((1, 2)) @ w

    w, x = jnp.full((512, 10), 2.0, jnp.float32), jnp.ones((4, 2, 2, 512), jnp.float32)
    np.testing.assert_array_equal(data_factor(net, w, x), np.full((10, 4, 4), 2 * 2 * 512.0))
    np.testing.assert_allclose(float(paths.log_count(net, w, x)), np.log10(4 * 2 * 2 * 512 * 10))
