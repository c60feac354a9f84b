"""Path magnitude, and scores in the three conventions for a frozen BatchNorm's mean, against dense computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.pruning.scores import synflow_l2_scaled, synflow_scaled

from tests.cases import assert_close, normal
from tests.oracles import enumerate_paths
from tests.paths.test_norms import bn_case, folded

X = np.ones((1, 4, 4, 1))


@functools.cache
def dense(convention, q):
    """Differentiates Σ_k R_q in the network's own parameters, written without paths."""
    case = bn_case()

    def total(params):
        if convention == "signed":      # the published procedure: the network itself at |θ|
            return case.apply({n: jnp.abs(v) for n, v in params.items()}, X).sum()
        layers, _ = folded(case)
        flat = type(case)(layers, {}, None, None)
        scale = params["n.scale"] / np.sqrt(np.asarray(case.layers[1][3]) + case.layers[1][4])
        bias = params["n.bias"] - np.asarray(case.layers[1][2]) * scale
        phi = {n: jnp.abs(v) ** q for n, v in {**params, "n.bias": bias}.items()}
        return pk.paths.polynomial(flat.apply, phi, X, q=q, pool="max").sum()
    return case, jax.jit(jax.grad(total))


def test_a_score_is_what_the_norm_loses_without_the_weight():
    case = bn_case()
    layers, params = folded(case)
    for convention, (shape, values) in {"paths": (case.layers, case.params), "folded": (layers, params)}.items():
        scores = pk.path_magnitude(case.apply, case.params, X, batch_norm=convention)
        oracle = enumerate_paths(shape, values, X)
        lost = np.split(np.abs(oracle.jtv).sum(0), np.cumsum([values[n].size for n in sorted(values)])[:-1])
        for name, slope in zip(sorted(values), lost, strict=True):
            if convention == "paths" or name.endswith("kernel"):
                assert_close(np.ravel(scores[name]), np.abs(np.ravel(values[name])) * slope, 1e-12)
    masks = {n: jnp.ones(v.shape, bool) for n, v in case.params.items()}
    masks["b.kernel"] = masks["b.kernel"].at[0, 1, 1, 0].set(False)
    by_norm = pk.paths.distance(case.apply, case.params, X, masks)
    by_score = pk.path_magnitude(case.apply, case.params, X, batch_norm="paths")["b.kernel"][0, 1, 1, 0]
    assert_close(by_score, by_norm, 1e-12)


@pytest.mark.parametrize(("name", "convention", "power", "q"), [
    ("synflow", "folded", 1, 1), ("synflow", "signed", 1, 1), ("paper", "folded", 1, 2), ("conserved", "folded", 2, 2),
    ("released", "folded", 2, 1), ("released", "signed", 2, 1)])
def test_scores_are_the_derivatives_of_the_convention(name, convention, power, q):
    case, slopes_at = dense(convention, q)
    if name == "synflow":
        scores = pk.synflow(case.apply, case.params, X, pool="max", batch_norm=convention)
    else:
        scores = pk.synflow_l2(case.apply, case.params, X, variant=name, pool="max", batch_norm=convention)
    slopes = slopes_at(case.params)
    for n, theta in case.params.items():
        want = np.abs(theta) ** (power - q) * np.abs(theta * slopes[n]) / q
        assert_close(scores[n], want, 1e-11)
    if convention == "signed":
        there = pk.synflow(case.apply, case.params, X, pool="max")
        assert np.abs(np.asarray(scores["c.kernel"]) - there["c.kernel"]).max() > 1e-3


def test_where_means_are_0_the_conventions_and_synflow_agree():
    case = bn_case((0.0, 0.0))
    want = pk.synflow(case.apply, case.params, X, pool="max")
    for convention in ("paths", "folded", "signed"):
        got = pk.path_magnitude(case.apply, case.params, X, pool="max", batch_norm=convention)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), got, want)


def trained(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]) @ p["c"]


def test_scaling_units_changes_path_magnitude_and_what_it_prunes_nowhere():
    params = {"a": normal(0, (5, 6)), "bias": normal(1, (6,)), "b": normal(2, (6, 7)), "c": normal(3, (7, 2))}
    first, second = jnp.exp(normal(4, (6,))), jnp.exp(normal(5, (7,)))
    other = {"a": params["a"] * first, "bias": params["bias"] * first,
             "b": params["b"] * second / first[:, None], "c": params["c"] / second[:, None]}
    x = jnp.ones((1, 5))
    assert_close(trained(params, normal(6, (3, 5))), trained(other, normal(6, (3, 5))), 1e-12)

    def score(p):
        return pk.path_magnitude(trained, p, x)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-11), score(params), score(other))
    kept = [pk.prune(score, p, density=0.3, prunable=lambda path, leaf: leaf.ndim == 2).masks for p in (params, other)]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    by_size = [pk.prune(pk.magnitude, p, density=0.3, prunable=lambda path, leaf: leaf.ndim == 2).masks
               for p in (params, other)]
    assert any((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, by_size), strict=True))


def test_a_convention_that_does_not_exist_is_named():
    case = bn_case()
    with pytest.raises(ValueError, match="must be one of 'paths', 'folded', 'signed', but got 'both'"):
        pk.path_magnitude(case.apply, case.params, X, batch_norm="both")
    with pytest.raises(ValueError, match='pass pool="max"'):
        pk.synflow(case.apply, case.params, X, batch_norm="signed")


def test_scores_of_a_folded_deep_network_stay_in_float32():
    layers = [jnp.full((10, 10), 10.0, jnp.float32)] * 12 + [jnp.full((10, 10), 1e6, jnp.float32)] * 6

    def net(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu((x @ kernel - 0.5) * 2)
        return x
    for convention in ("folded", "signed"):
        scores = pk.synflow(net, layers, jnp.ones((1, 10), jnp.float32), pool="max", batch_norm=convention)
        sums = [float(jnp.asarray(s).sum()) for s in scores]
        assert np.isfinite(sums).all()
        np.testing.assert_allclose(sums[1:], sums[1], rtol=1e-2)      # what flows is conserved but for the means


@pytest.mark.parametrize("convention", ["folded", "signed"])
def test_weights_at_the_end_of_the_range_are_scored_like_any_others(convention):
    size, kernels = 2.0**127, [np.array([[1.0, -1.5], [0.5, 1.0]]), np.array([[-1.0], [0.75]])]

    def net(w, x):
        return jax.nn.relu(x @ w[0]) @ w[1]

    def scores(factor, variant):
        large = [jnp.asarray(k * factor, jnp.float32) for k in kernels]
        options = dict(pool="max", batch_norm=convention)
        x = jnp.ones((1, 2), jnp.float32)
        held = (synflow_scaled(net, large, x, **options) if variant is None else
                synflow_l2_scaled(net, large, x, variant=variant, **options))
        return held.scores, int(held.exponent)
    for variant, power in ((None, 2), ("released", 3), ("paper", 3)):      # φ = θ² in the slope of "paper"
        want, _ = scores(1.0, variant)
        got, exponent = scores(size, variant)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.ldexp(np.asarray(a, np.float64), exponent - 127 * power), b)
