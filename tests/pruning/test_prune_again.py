"""Pruning goes on from masks, and runs inside jit and vmap."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

from tests.cases import FLOAT, checking_leaks

pytestmark = pytest.mark.filterwarnings("ignore::pkjax.pruning.result.EmptiedLayerWarning")


def draw(seed, dtype=FLOAT):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in
            {"a": (5, 8), "b": (8, 6), "bias": (6,), "c": (6, 3)}.items()}


def net(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"] + p["bias"]) @ p["c"]


X = jnp.asarray(np.random.default_rng(9).normal(size=(7, 5)))


def loss(p):
    return (net(p, X) ** 2).mean()


SCORES = {
    "magnitude": pk.magnitude,
    "grasp": lambda p: pk.grasp(loss, p),
    "synflow": lambda p: pk.synflow(net, p, jnp.ones((1, 5))),
    "with masks": lambda p, masks: jax.tree.map(lambda w, m: jnp.where(m, w, 99.0), p, masks),
}


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def inside(masks, outer):
    return all(not (np.asarray(m) & ~np.asarray(o)).any() for m, o in zip(*map(jax.tree.leaves, (masks, outer)),
                                                                          strict=True))


@pytest.mark.parametrize("name", SCORES)
def test_what_is_pruned_never_comes_back_and_counts_are_of_the_whole(name):
    params, rng = draw(0), np.random.default_rng(1)
    start = {n: jnp.asarray(rng.random(p.shape) < 0.6) for n, p in params.items()}
    held = sum(int(start[n].sum()) for n in "abc")
    for steps in (1, 3):
        result = pk.prune(SCORES[name], params, density=0.3, steps=steps, masks=start)
        assert inside(result.masks, start)
        assert (result.kept, result.total) == (round(0.3 * 106), 106)
        assert result.kept == sum(int(result.masks[n].sum()) for n in "abc")
        assert result.history == tuple(min(held, round(0.3 ** (k / steps) * 106)) for k in range(1, steps + 1))
        assert [layer.total for layer in result.layers] == [40, 48, 18]
        equal(result.masks["bias"], start["bias"])
    jax.tree.map(lambda mask: mask.block_until_ready(), start)     # none was given away


@pytest.mark.parametrize("name", ["magnitude", "synflow", "with masks"])
def test_pruning_on_is_pruning_in_steps(name):
    """The oracle is a loop in one call: its second step starts from what its first has left."""
    params = draw(2)
    first = pk.prune(SCORES[name], params, density=0.5)
    again = pk.prune(SCORES[name], params, density=0.2, masks=first.masks)
    equal(again.masks, pk.prune(SCORES[name], params, density=0.2, steps=2,
                                schedule=lambda step, steps, density: (0.5, density)[step - 1]).masks)


def test_masks_that_keep_as_many_as_asked_come_back():
    masks = pk.prune(pk.magnitude, draw(3), density=0.25).masks
    equal(pk.prune(SCORES["grasp"], draw(3), density=0.25, masks=jax.tree.map(np.asarray, masks)).masks, masks)


def test_a_floor_counts_what_is_there():
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), draw(0)) | {"c": jnp.zeros((6, 3), bool).at[0].set(True)}
    result = pk.prune(pk.inverted(pk.magnitude), draw(0), density=0.2, masks=masks, min_per_layer=5)
    assert inside(result.masks, masks)
    assert [layer.kept >= least for layer, least in zip(result.layers, (5, 5, 3), strict=True)] == [True] * 3
    assert result.kept == round(0.2 * 106)


def test_masks_that_keep_too_few_are_named():
    params = draw(0)
    masks = jax.tree.map(lambda p: jnp.abs(p) > 1, params)
    with pytest.raises(ValueError, match=r"masks keep \d+ weights of a, b, c, fewer than the 53 asked for"):
        pk.prune(pk.magnitude, params, density=0.5, masks=masks)
    with pytest.raises(ValueError, match=r"masks keep 0 weights of c, fewer than the 5 asked for"):
        pk.prune(pk.magnitude, params, density=0.3, scope=pk.layer_scope,
                 masks=jax.tree.map(lambda p: jnp.ones(p.shape, bool), params) | {"c": jnp.zeros((6, 3), bool)})
    with pytest.raises(ValueError, match="masks leaf 'c' has shape"):
        pk.prune(pk.magnitude, params, density=0.5, masks={**masks, "c": jnp.ones(3, bool)})
    with pytest.raises(TypeError, match="masks are booleans"):
        pk.prune(pk.magnitude, params, density=0.5, masks=params)


@pytest.mark.parametrize("name", SCORES)
def test_masks_of_many_seeds_in_one_program_are_those_of_each(name):
    seeds = [draw(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)

    def run(p):
        return pk.prune(SCORES[name], p, density=0.3, steps=3)

    batch = jax.jit(jax.vmap(run))(stacked)
    for i, params in enumerate(seeds):
        alone = run(params)
        equal(jax.tree.map(lambda mask, i=i: mask[i], batch.masks), alone.masks)
        assert int(batch.kept[i]) == alone.kept
        assert [int(layer.kept[i]) for layer in batch.layers] == [layer.kept for layer in alone.layers]
        assert [int(kept[i]) for kept in batch.history] == list(alone.history)
        assert [bool(layer.emptied[i]) for layer in batch.layers] == [layer.emptied for layer in alone.layers]
    assert (batch.total, batch.density.shape) == (106, (4,))
    assert "masks=<4 leaves" in repr(batch)
    assert batch._repr_html_() is None


def test_masks_are_the_same_inside_jit_and_what_needs_numbers_is_left_out():
    params = draw(5)
    masks = jax.tree.map(lambda p: jnp.abs(p) > 0.3, params)
    lines = []
    got = jax.jit(lambda p, m: pk.prune(pk.magnitude, p, density=0.2, steps=2, masks=m, progress=lines.append))(params,
                                                                                                             masks)
    want = pk.prune(pk.magnitude, params, density=0.2, steps=2, masks=masks)
    equal(got.masks, want.masks)
    assert got.to_dict() == want.to_dict()
    assert got.layers == want.layers
    assert not lines
    with warnings.catch_warnings(action="error"):
        few = jax.jit(lambda p, m: pk.prune(pk.magnitude, p, density=0.9, masks=m))(params, masks)
        gone = jax.jit(lambda p: pk.prune(pk.magnitude, p, compression=3).kept)(params)
        sick = {**params, "a": params["a"] * jnp.nan}
        poisoned = jax.jit(lambda p: pk.prune(pk.magnitude, p, density=0.5).kept)(sick)
    equal({n: few.masks[n] for n in "abc"}, {n: masks[n] for n in "abc"})
    assert (int(gone), int(poisoned)) == (0, 53)


def test_keys_may_be_traced_where_parameters_are_not():
    params, keys = draw(0), jax.random.split(jax.random.key(0), 3)
    batch = jax.vmap(lambda key: pk.prune(lambda p: pk.random(p, key=key), params, density=0.3).masks)(keys)
    for i, key in enumerate(keys):
        alone = pk.prune(lambda p, key=key: pk.random(p, key=key), params, density=0.3).masks
        equal({n: batch[n][i] for n in "abc"}, {n: alone[n] for n in "abc"})


def test_no_tracer_leaks():
    with checking_leaks():
        jax.jit(lambda p: pk.prune(SCORES["synflow"], p, density=0.3, steps=2).masks)(draw(0))
