"""Shuffled masks, redrawn weights and inverted scores keep what they must and change the rest."""

import collections
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.pruning.baselines import inverted, reinitialize, shuffle_masks
from pkjax.pruning.masks import apply_masks
from pkjax.pruning.prune import prune
from pkjax.pruning.scores.data_free import magnitude

from tests.cases import unchecked


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32), "bias": jnp.arange(1.0, 9.0)},
        "dense": {"kernel": jnp.asarray(rng.normal(size=(8, 30)), jnp.bfloat16), "steps": jnp.arange(3)},
        "empty": {"kernel": jnp.ones((0, 3))},
    }


@pytest.fixture
def masks(params):
    return prune(magnitude, params, density=0.3).masks


def changed(one, other):
    return [bool((np.asarray(a) != np.asarray(b)).any())
            for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)]


def test_shuffled_masks_keep_the_count_of_every_layer_and_nothing_else(masks, key):
    shuffled = shuffle_masks(masks, key=key)
    assert jax.tree.structure(shuffled) == jax.tree.structure(masks)
    for before, after in zip(*map(jax.tree.leaves, (masks, shuffled)), strict=True):
        assert after.dtype == bool
        assert after.shape == before.shape
        assert int(after.sum()) == int(before.sum())
    assert changed(masks, shuffled) == [False, True, True, False, False]  # biases, integers and no entries stay


def test_the_same_key_shuffles_alike_and_each_leaf_by_itself(masks, key):
    once = shuffle_masks(masks, key=key)
    assert not any(changed(once, shuffle_masks(masks, key=key)))
    assert not any(changed(once, jax.jit(shuffle_masks)(masks, key=key)))
    assert changed(once, shuffle_masks(masks, key=jax.random.key(1)))[1:3] == [True, True]
    twins = shuffle_masks({"a": jnp.arange(99) < 50, "b": np.arange(99) < 50}, key=key)
    assert (twins["a"] != twins["b"]).any()


def test_every_placement_is_equally_likely(key):
    """Two of four places: six outcomes, each near 100 of 600 times (five standard deviations are 46)."""
    draw = jax.vmap(lambda k: shuffle_masks([jnp.array([[True, True], [False, False]])], key=k)[0])
    outcomes = collections.Counter(tuple(np.ravel(m)) for m in np.asarray(draw(jax.random.split(key, 600))))
    assert len(outcomes) == 6
    assert all(abs(count - 100) < 46 for count in outcomes.values())


def test_what_cannot_be_shuffled_is_refused(params, masks, key):
    with pytest.raises(TypeError, match="masks are booleans"):
        shuffle_masks(params, key=key)
    with pytest.raises(TypeError, match=r"shuffle_masks needs a typed key, jax\.random\.key\(seed\)"):
        unchecked(shuffle_masks)(masks, key=jax.random.PRNGKey(0))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_reinitialized_kernels_hold_the_same_weights_elsewhere(transform, params, key):
    drawn = transform(reinitialize)(params, key=key)
    assert changed(params, drawn) == [False, True, True, False, False]
    for before, after in zip(*map(jax.tree.leaves, (params, drawn)), strict=True):
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        np.testing.assert_array_equal(np.sort(np.ravel(before)), np.sort(np.ravel(after)))
    assert not any(changed(drawn, reinitialize(params, key=key)))


def test_an_initializer_draws_every_prunable_leaf(params, key):
    drawn = reinitialize(params, key=key, initializer=jax.nn.initializers.uniform(0.5))
    assert changed(params, drawn) == [False, True, True, False, False]
    assert drawn["dense"]["kernel"].dtype == jnp.bfloat16
    for layer in ("conv", "dense"):
        weights = np.asarray(drawn[layer]["kernel"], np.float64)
        assert weights.min() >= 0
        assert weights.max() <= 0.5
        assert abs(weights.mean() - 0.25) < 0.05  # five standard deviations of the mean of 240 are 0.047
    only = reinitialize(params, key=key, initializer=jax.nn.initializers.ones,
                        prunable=lambda path, leaf: path[-1].key == "bias")
    assert changed(params, only) == [True, False, False, False, False]
    assert only["conv"]["bias"].tolist() == [1.0] * 8


def test_redrawn_weights_are_masked_as_the_old_ones_were(params, masks, key):
    pruned = apply_masks(reinitialize(params, key=key), masks)
    for weights, mask in zip(*map(jax.tree.leaves, (pruned["conv"], masks["conv"])), strict=True):
        np.testing.assert_array_equal(np.asarray(weights != 0) | ~np.asarray(mask), True)
        assert not np.asarray(weights)[~np.asarray(mask)].any()


def test_what_cannot_be_redrawn_is_refused(params, key):
    with pytest.raises(ValueError, match="prunable selects no weight of params"):
        reinitialize(params, key=key, prunable=lambda path, leaf: False)
    with pytest.raises(TypeError, match="'dense/steps', which holds no floating-point numbers"):
        reinitialize(params, key=key, prunable=lambda path, leaf: path[-1].key == "steps")
    with pytest.raises(ValueError, match=r"'dense/kernel' of bfloat16\[8, 30\], but returned float32\[2\]"):
        reinitialize(params, key=key, prunable=lambda path, leaf: path[0].key == "dense" and leaf.ndim == 2,
                     initializer=lambda key, shape, dtype: jnp.ones(2, jnp.float32))
    with pytest.raises(TypeError, match="reinitialize needs a typed key"):
        unchecked(reinitialize)(params, key=jax.random.PRNGKey(0))


def test_inverted_scores_prune_the_highest(params):
    most, least = (prune(score, params, density=density).masks["conv"]["kernel"]
                   for score, density in ((magnitude, 0.5), (inverted(magnitude), 0.5)))
    np.testing.assert_array_equal(most, ~np.asarray(least))  # no ties: what one keeps the other prunes
    np.testing.assert_array_equal(prune(inverted(inverted(magnitude)), params, density=0.5).masks["conv"]["kernel"],
                                  most)


@pytest.mark.parametrize("score", [
    lambda params: params,
    lambda params, *, masks: jax.tree.map(jnp.multiply, params, masks),
    functools.partial(lambda scale, params, masks=None: params, 2.0),
])
def test_an_inverted_score_shows_the_signature_it_has(score):
    assert inspect.signature(inverted(score)) == inspect.signature(score)
    assert inspect.signature(inverted(inverted(score))) == inspect.signature(score)


def test_an_inverted_score_takes_masks_where_the_score_does():
    def score(params, *, masks):
        return jax.tree.map(lambda p, m: jnp.where(m, p, 0.0), params, masks)

    got = inverted(score)({"kernel": jnp.array([3.0, -2.0])}, masks={"kernel": jnp.array([True, False])})
    assert got["kernel"].tolist() == [-3.0, 0.0]


def test_inversions_of_one_function_share_what_is_compiled():
    def score(params):
        traces.append(1)
        return params

    traces = []
    run = jax.jit(lambda f, params: f(params), static_argnums=0)
    for _ in range(2):
        assert run(inverted(score), jnp.arange(3.0)).tolist() == [0.0, -1.0, -2.0]
    assert len(traces) == 1
    assert inverted(score) == inverted(score)
    assert hash(inverted(score)) == hash(inverted(score))
    assert inverted(score) != inverted(magnitude)
    assert inverted(score) != score
