"""N:M patterns against NumPy, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

PARAMS = {"conv": {"kernel": np.random.default_rng(0).normal(size=(3, 3, 8, 5)).astype(np.float32)},
          "dense": {"bias": np.ones(4, np.float32),
                    "kernel": np.random.default_rng(1).integers(-2, 3, (12, 4)).astype(np.float32)}}


def by_hand(scores, alive, n, m, axis):
    """The n live entries of each block with the highest scores, of equals the first, in Python loops."""
    out = np.zeros(scores.shape, bool)
    rows, live, marks = (np.moveaxis(a, axis, -1) for a in (scores, alive, out))
    for place in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            inside = [i for i in range(start, start + m) if live[place][i]]
            marks[place][sorted(inside, key=lambda i, row=rows[place]: (-row[i], i))[:n]] = True
    return out


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 4), (1, 2)])
def test_every_block_keeps_its_n_highest_and_of_equals_the_first(n, m):
    result = pk.prune(pk.magnitude, PARAMS, density=n / m, scope=pk.n_m_scope(n, m))
    for name in PARAMS:
        scores = np.abs(PARAMS[name]["kernel"])
        expected = by_hand(scores, np.ones(scores.shape, bool), n, m, -2)
        assert np.array_equal(result.masks[name]["kernel"], expected)
    assert result.masks["dense"]["bias"].all()
    assert result.kept == sum(np.size(p["kernel"]) for p in PARAMS.values()) * n // m
    assert [layer.kept for layer in result.layers] == [9 * 8 * 5 * n // m, 48 * n // m]


def test_blocks_lie_along_the_axis_that_is_asked_for():
    weights = PARAMS["dense"]["kernel"]
    masks = pk.prune(pk.magnitude, weights, density=0.25, scope=pk.n_m_scope(1, 4, axis=1)).masks
    assert np.array_equal(masks, by_hand(np.abs(weights), np.ones(weights.shape, bool), 1, 4, 1))
    assert np.array_equal(np.asarray(masks).sum(1), np.ones(12))


@pytest.mark.parametrize("jit", [True, False])
def test_in_steps_blocks_lose_their_lowest_first_and_scores_see_what_is_left(jit):
    def score(params, masks):      # what is left of a column decides, so that steps matter
        return jax.tree.map(lambda p, m: jnp.abs(p) * (1 + m.sum(0, dtype=jnp.float32)), params, masks)

    weights = PARAMS["dense"]["kernel"] + np.arange(48, dtype=np.float32).reshape(12, 4) / 100
    result = pk.prune(score, weights, density=0.25, steps=3, scope=pk.n_m_scope(1, 4), jit=jit)
    alive = np.ones(weights.shape, bool)
    for count in (max(1, round(4 * 0.25 ** (k / 3))) for k in (1, 2, 3)):
        alive = by_hand(np.abs(weights) * (1 + alive.sum(0)), alive, count, 4, 0)
    assert np.array_equal(result.masks, alive)
    assert result.history == (36, 24, 12)


def test_given_masks_stay_pruned_and_blocks_with_fewer_keep_what_they_have():
    weights = PARAMS["dense"]["kernel"]
    alive = np.random.default_rng(2).random(weights.shape) < 0.5
    alive[:4, 0] = False
    masks = pk.prune(pk.magnitude, weights, density=0.5, scope=pk.n_m_scope(2, 4), masks=alive).masks
    assert np.array_equal(masks, by_hand(np.abs(weights), alive, 2, 4, 0))
    assert not np.asarray(masks)[:4, 0].any()


def test_masks_of_several_networks_at_once_are_those_of_each():
    several = jnp.stack([PARAMS["dense"]["kernel"], -jnp.arange(48.0, dtype=jnp.float32).reshape(12, 4)])

    def masks(weights):
        return pk.prune(pk.magnitude, weights, density=0.5, scope=pk.n_m_scope(2, 4)).masks

    assert np.array_equal(jax.vmap(masks)(several), jnp.stack([masks(w) for w in several]))


def test_what_does_not_fit_is_an_error_that_says_what_does():
    def prune(params=PARAMS, density=0.5, **options):
        return pk.prune(pk.magnitude, params, density=density, scope=pk.n_m_scope(2, 4), **options)

    with pytest.raises(ValueError, match=r"asked for is 0\.25: pass density=2 / 4"):
        prune(density=0.25)
    with pytest.raises(ValueError, match=r"'a' has length 6 .* not a multiple of 4: leave the leaf out by prunable"):
        prune({"a": jnp.ones((6, 4)), "b": jnp.ones((4, 6))})
    with pytest.raises(ValueError, match=r"axis=-2, which leaf 'bias' of shape \(4,\) lacks"):
        prune({"bias": jnp.ones(4)}, prunable=None)
    with pytest.raises(ValueError, match=r"min_per_layer=1 is not for n_m_scope"):
        prune(min_per_layer=1)
    with pytest.raises(ValueError, match=r"1 ≤ n ≤ m, but got n=5, m=4"):
        pk.n_m_scope(5, 4)
    with pytest.raises(TypeError, match=r"n must be an integer, but got 2\.0"):
        pk.n_m_scope(2.0, 4)


def test_scores_that_are_not_finite_name_their_leaf():
    with pytest.raises(FloatingPointError, match="NaN at step 1 in 'b'"):
        pk.prune(lambda p: jax.tree.map(lambda w: w / w, p), {"a": jnp.ones((4, 1)), "b": jnp.zeros((4, 1))},
                 density=0.5, scope=pk.n_m_scope(2, 4))
