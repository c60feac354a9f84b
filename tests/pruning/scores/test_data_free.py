"""Saliencies against paths listed one by one, dense Hessians and finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.paths.errors import NotPathNetworkError
from pkjax.pruning.prune import prune
from pkjax.pruning.scores.data_free import magnitude, random, synflow, synflow_l2
from pkjax.pruning.scores.loss import grasp, snip

from tests.cases import unchecked

WIDTHS = (3, 4, 4, 2)
ONES = jnp.ones((1, 3))


def network(p, x):
    for i in range(3):
        x = x @ p[f"layer{i}"]["kernel"] + p[f"layer{i}"]["bias"]
        if i < 2:
            x = jax.nn.leaky_relu(x, 0.25)
    return x


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=(n, m))), "bias": jnp.asarray(rng.normal(size=m))}
        for i, (n, m) in enumerate(itertools.pairwise(WIDTHS))
    }


def listed_paths(params, z):
    """All paths of the network: the entries on each, the product of the weights, and the input it starts at."""
    paths = []
    for start in range(3):  # the layer at which a path begins: at an input entry, or at a bias of any layer
        for units in itertools.product(*(range(n) for n in WIDTHS[start + 1 :])):
            heads = [[(f"layer{start}", "bias", (units[0],))]]
            weights_in = [1.0]
            if start == 0:
                heads += [[("layer0", "kernel", (i, units[0]))] for i in range(WIDTHS[0])]
                weights_in += [float(v) for v in np.ravel(z)]
            tail = [(f"layer{start + 1 + l}", "kernel", pair) for l, pair in enumerate(itertools.pairwise(units))]
            for head, weight in zip(heads, weights_in, strict=True):
                entries = head + tail
                value = np.prod([float(params[l][k][i]) for l, k, i in entries])
                paths.append((entries, value, weight))
    return paths


def by_listing(params, z, contribution):
    """Sum a contribution (path value, weight entry, input entry) over the paths through each weight."""
    scores = jax.tree.map(lambda p: np.zeros(p.shape), params)
    for entries, value, start in listed_paths(params, z):
        for layer, kind, index in entries:
            scores[layer][kind][index] += contribution(value, float(params[layer][kind][index]), start)
    return scores


CONTRIBUTIONS = {
    "synflow": lambda v, t, z: abs(v) * z,
    "paper": lambda v, t, z: v**2 / abs(t) * z,
    "conserved": lambda v, t, z: v**2 * z,
    "released": lambda v, t, z: abs(v) * abs(t) * z,
}


@pytest.mark.parametrize("name", CONTRIBUTIONS)
@pytest.mark.parametrize("z", [ONES, jnp.array([[0.5, 0.0, 2.0]])])
def test_path_scores_are_sums_over_the_listed_paths(name, z, params):
    got = synflow(network, params, z) if name == "synflow" else synflow_l2(network, params, z, variant=name)
    want = by_listing(params, z, CONTRIBUTIONS[name])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12), got, want)
    assert len(listed_paths(params, z)) == 3 * 4 * 4 * 2 + 4 * 4 * 2 + 4 * 2 + 2


@pytest.mark.parametrize("score", [synflow, lambda *a: synflow_l2(*a, variant="conserved")])
def test_true_saliencies_are_conserved_from_layer_to_layer(score, params):
    params = {name: {**layer, "bias": jnp.zeros_like(layer["bias"])} for name, layer in params.items()}
    sums = [float(layer["kernel"].sum()) for layer in score(network, params, ONES).values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-12)


def test_the_papers_variant_is_not_conserved(params):
    params = {name: {**layer, "bias": jnp.zeros_like(layer["bias"])} for name, layer in params.items()}
    sums = [float(layer["kernel"].sum()) for layer in synflow_l2(network, params, ONES).values()]
    assert max(sums) > 1.1 * min(sums)


def loss(p):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)))
    y = jnp.asarray(np.random.default_rng(2).normal(size=(8, 2)))
    return jnp.mean((network(p, x) - y) ** 2)


def test_snip_is_the_finite_difference_of_the_loss_along_each_weight(params):
    scores, step = snip(loss, params), 1e-6
    for layer, kind, index in [("layer0", "kernel", (1, 2)), ("layer1", "bias", (3,)), ("layer2", "kernel", (0, 1))]:
        weight = float(params[layer][kind][index])

        def moved(factor, layer=layer, kind=kind, index=index, weight=weight):
            leaf = params[layer][kind].at[index].set(weight * factor)
            return float(loss({**params, layer: {**params[layer], kind: leaf}}))

        want = abs(moved(1 + step) - moved(1 - step)) / (2 * step)
        assert float(scores[layer][kind][index]) == pytest.approx(want, rel=1e-6)


def test_grasp_is_weight_times_dense_hessian_times_gradient_over_the_kernels_alone(params):
    names = list(params)

    def kernels_only(flat):
        ends = np.cumsum([0] + [params[n]["kernel"].size for n in names])
        parts = [flat[a:b].reshape(params[n]["kernel"].shape) for n, a, b in zip(names, ends, ends[1:], strict=False)]
        return loss({n: {**params[n], "kernel": part} for n, part in zip(names, parts, strict=True)})

    flat = jnp.concatenate([params[n]["kernel"].ravel() for n in names])
    want = flat * (jax.jacrev(jax.jacrev(kernels_only))(flat) @ jax.grad(kernels_only)(flat))
    scores = grasp(loss, params)
    got = jnp.concatenate([scores[n]["kernel"].ravel() for n in names])
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    assert not any(scores[n]["bias"].any() for n in names)
    everything = grasp(loss, params, prunable=lambda path, leaf: True)
    assert not np.allclose(everything["layer0"]["kernel"], scores["layer0"]["kernel"], rtol=1e-3)


def test_random_scores_depend_on_key_and_leaf_alone(params, key):
    first, again = random(params, key=key), random(jax.tree.map(jnp.zeros_like, params), key=key)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = random(params, key=jax.random.key(1))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        assert (a != b).all()
    square = random({"a": jnp.ones((50, 50)), "b": jnp.ones((50, 50), jnp.float32)}, key=key)
    assert square["b"].dtype == jnp.float32
    assert abs(float(square["a"].mean()) - 0.5) < 0.03
    assert abs(np.corrcoef(np.ravel(square["a"]), np.ravel(square["b"]))[0, 1]) < 0.1
    with pytest.raises(TypeError, match="typed key"):
        unchecked(random)(params, key=jax.random.PRNGKey(0))


def test_magnitude_is_the_absolute_value(params):
    jax.tree.map(lambda s, p: np.testing.assert_array_equal(s, np.abs(p)), magnitude(params), params)


SCORES = {
    "magnitude": magnitude,
    "random": lambda p: random(p, key=jax.random.key(0)),
    "snip": lambda p: snip(loss, p),
    "grasp": lambda p: grasp(loss, p),
    "synflow": lambda p: synflow(network, p, ONES.astype(p["layer0"]["kernel"].dtype)),
    "synflow_l2": lambda p: synflow_l2(network, p, ONES.astype(p["layer0"]["kernel"].dtype)),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_the_same_under_jit_and_prune_in_several_steps(name, params):
    eager, jitted = SCORES[name](params), jax.jit(SCORES[name])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), eager, jitted)
    result = prune(SCORES[name], params, density=0.5, steps=3)
    assert (result.kept, result.total) == (18, 36)


@pytest.mark.parametrize("name", ["magnitude", "random", "synflow", "synflow_l2"])
def test_scores_keep_single_precision(name, params):
    scores = SCORES[name](jax.tree.map(lambda p: p.astype(jnp.float32), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(scores)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["magnitude", "random", "snip", "grasp", "synflow"])
def test_leaves_that_are_no_floats_score_zero(name, params):
    def apply_fn(p, x):
        return network({k: v for k, v in p.items() if k != "count"}, x) * 1.0

    scores = {
        **SCORES,
        "snip": lambda p: snip(lambda p: loss({k: v for k, v in p.items() if k != "count"}), p),
        "grasp": lambda p: grasp(lambda p: loss({k: v for k, v in p.items() if k != "count"}), p),
        "synflow": lambda p: synflow(apply_fn, p, ONES),
    }[name]({**params, "count": jnp.array([3, 4])})
    assert scores["count"].tolist() == [0.0, 0.0]
    assert scores["layer0"]["kernel"].any()


def test_a_zero_weight_scores_zero_on_the_paths_it_closes(params):
    params["layer1"]["kernel"] = params["layer1"]["kernel"].at[1].set(0.0)
    for score in (SCORES["synflow"], SCORES["synflow_l2"]):
        scores = score(params)
        assert not scores["layer1"]["kernel"][1].any()
        assert not scores["layer0"]["kernel"][:, 1].any()
        assert scores["layer0"]["kernel"][:, 0].all()


@pytest.mark.parametrize("score", [synflow, synflow_l2])
def test_wrong_inputs_are_named(score, params):
    with pytest.raises(ValueError, match=r"x must not be negative, but its smallest entry is -0.5.*absolute"):
        score(network, params, jnp.array([[1.0, -0.5, 1.0]]))
    with pytest.raises(ValueError, match="x holds NaN or infinity"):
        score(network, params, jnp.array([[1.0, jnp.nan, 1.0]]))
    with pytest.raises(ValueError, match="pool must be"):
        score(network, params, ONES, pool="average")
    with pytest.raises(NotPathNetworkError, match="tanh"):
        score(lambda p, x: jnp.tanh(network(p, x)), params, ONES)


def test_wrong_options_are_named(params):
    with pytest.raises(ValueError, match="variant must be one of 'paper', 'conserved', 'released', but got 'best'"):
        synflow_l2(network, params, ONES, variant="best")
    with pytest.raises(ValueError, match=r"prunable selects no weight of params .*layer0/bias"):
        grasp(loss, params, prunable=lambda path, leaf: False)
    with pytest.raises(TypeError, match=r"'count', which holds no floating-point"):
        grasp(loss, {**params, "count": jnp.array(3)}, prunable=lambda path, leaf: True)
    with pytest.raises(TypeError, match="scalar"):
        snip(lambda p: network(p, ONES), params)


def test_scores_beyond_float32_prune_as_in_float64(params):
    huge = jax.tree.map(lambda p: (1e15 * p).astype(jnp.float32), params)
    ones = ONES.astype(jnp.float32)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(synflow(network, huge, ones)))
    narrow = prune(lambda p: synflow(network, p, ones), huge, density=0.5).masks
    wide = prune(lambda p: synflow(network, p, ONES), jax.tree.map(lambda p: 1e15 * p, params), density=0.5).masks
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True))


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_of_weights_that_float32_does_not_hold_are_scored_like_any_others(params, size):
    # Without biases one factor for all kernels leaves the order of their scores as it is.
    bare = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(jnp.float32) * np.float32("bias" not in jax.tree_util.keystr(path)), params)
    scaled, ones = jax.tree.map(lambda p: p * jnp.float32(size), bare), ONES.astype(jnp.float32)
    for variant in ("paper", "conserved", "released"):
        a, b = (synflow_l2(network, tree, ones, variant=variant) for tree in (bare, scaled))
        kernels = [np.concatenate([np.asarray(tree[layer]["kernel"]).ravel() for layer in tree]) for tree in (a, b)]
        assert (kernels[1] > 0).all()
        ratio = kernels[1] / kernels[0]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_scores_that_are_not_finite_are_an_error_alone_and_inside_prune(params):
    """Squares of weights beyond 1e19 do not fit into float32."""
    huge = jax.tree.map(lambda p: (1e25 * p).astype(jnp.float32), params)

    def loss(p):
        return (network(p, ONES.astype(jnp.float32)) ** 2).sum()
    with pytest.raises(FloatingPointError, match=r"snip gives scores that are not finite.*float64"):
        snip(loss, huge)
    with pytest.raises(FloatingPointError, match=r"scores are (infinite|NaN) at step 1 in .*float64"):
        prune(lambda p: snip(loss, p), huge, density=0.5)


def test_prune_keeps_the_exponents_of_weights_whose_squares_float32_does_not_hold(params):
    huge = jax.tree.map(lambda p: (1e25 * p).astype(jnp.float32), params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), huge)

    def masks(tree):
        ones = ONES.astype(jax.tree.leaves(tree)[0].dtype)
        return prune(lambda p: synflow_l2(network, p, ones), tree, density=0.5).masks

    jax.tree.map(np.testing.assert_array_equal, masks(huge), masks(wide))
