"""Leaves on paths, against enumerated paths and differences of outputs; whole leaves never go unsaid."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import nn

from tests.cases import FLOAT, normal

ONES = jnp.ones((1, 2, 2), FLOAT)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-2)


def mixed(q, k, v):
    return nn.softmax(jnp.einsum("nid,njd->nij", q, k)) @ v


def attention(w, x):
    x = x + w["place"]
    y = norm(x)
    x = x + mixed(y @ w["query"], y @ w["key"], y @ w["value"]) @ w["mix"]
    return (x + nn.gelu(norm(x) @ w["up"]) @ w["down"]).reshape(len(x), -1) @ w["head"]


def fused(w, x):
    return mixed(*jnp.split(x @ w["query key value"], 3, -1)).reshape(len(x), -1) @ w["head"]


def gated(w, x):
    up, gate = jnp.split(x.reshape(len(x), -1) @ w["up gate"], 2, -1)
    return nn.relu(nn.silu(gate) * up) @ w["down"]


def squeezed(w, x):
    y = nn.relu(x @ w["a"])
    return (y * nn.sigmoid(nn.relu(y.mean(1, keepdims=True) @ w["squeeze"]) @ w["excite"])).mean(1) @ w["b"]


def dead(w, x):      # of 6 weights of "a" 2 lead nowhere, and of "b" all
    return nn.relu(x.reshape(len(x), -1)[:, :3] @ w["a"])[:, :1] @ w["c"] + 0 * x[:, 0, :1] @ w["b"]


CASES = {
    "attention": (attention, {"place": (2, 2), "query": (2, 2), "key": (2, 2), "value": (2, 2), "mix": (2, 2),
                              "up": (2, 2), "down": (2, 2), "head": (4, 1)}, {"query", "key"}),
    "fused": (fused, {"query key value": (2, 6), "head": (4, 1)}, {"query key value"}),
    "gated": (gated, {"up gate": (4, 4), "down": (2, 2)}, {"up gate"}),
    "squeezed": (squeezed, {"a": (2, 3), "squeeze": (3, 1), "excite": (1, 3), "b": (3, 2)}, {"squeeze", "excite"}),
    "dead": (dead, {"a": (3, 2), "b": (1, 1), "c": (1, 2)}, {"b"}),
}


def parts(name):
    fn, shapes, out = CASES[name]
    return fn, {key: normal(i, shape) for i, (key, shape) in enumerate(shapes.items())}, out


@pytest.mark.parametrize("name", CASES)
def test_a_leaf_is_left_out_iff_it_has_no_path_or_weights_that_act_without_one(name):
    fn, w, out = parts(name)
    frozen = pk.paths.frozen(fn, w, normal(50, (1, 2, 2)))
    # A weight lies on a path iff a difference in it alone moves the sum over paths of positive weights.
    listed = pk.paths.factorize(frozen, w, normal(50, (1, 2, 2)), max_paths=100_000)
    lies = (np.asarray(listed.jtv) != 0).any(0)
    moved, at = jax.jit(jax.vmap(jax.vmap(lambda w, x: fn(w, x[None])[0], (None, 0)), (0, None))), 0
    expected = {}
    for key in sorted(w):
        on = lies[at:at + w[key].size]
        steps = 0.3 * jnp.eye(1 + w[key].size, w[key].size, -1, FLOAT).reshape(-1, *w[key].shape)
        several = {name: w[key] + steps if name == key else jnp.repeat(leaf[None], len(steps), 0)
                   for name, leaf in w.items()}
        f = np.asarray(moved(several, normal(51, (8, 2, 2))))
        acts = (np.abs(f[1:] - f[:1]) > 1e-6).any((1, 2))
        expected[key] = bool(on.any() and not (acts & ~on).any())
        at += w[key].size
    assert pk.on_paths(fn, w, ONES, gates="frozen", prunable=None) == expected
    assert {key for key, on in expected.items() if not on} == out


def test_paths_of_relu_need_no_frozen_gates_and_others_are_refused_without():
    def net(w, x):
        return nn.relu(x @ w["a"]) @ w["b"]
    w = {"a": normal(0, (3, 4)), "b": normal(1, (4, 2))}
    assert pk.on_paths(net, w, jnp.ones((1, 3), FLOAT)) == {"a": True, "b": True}
    with pytest.raises(pk.NotPathNetworkError, match='gates="frozen"'):
        pk.on_paths(*parts("attention")[:2], ONES)
    with pytest.raises(ValueError, match="no leaf that prunable selects"):
        pk.on_paths(*parts("attention")[:2], ONES, gates="frozen", prunable=lambda path, _: path[0].key == "key")
    with pytest.raises(ValueError, match='gates must be None or "frozen"'):
        pk.on_paths(net, w, jnp.ones((1, 3), FLOAT), gates="open")


def test_leaves_of_zeros_and_other_types_hide_nothing():
    fn, w, _ = parts("attention")
    expected = pk.on_paths(fn, w, ONES, gates="frozen")
    hidden = {**w, "mix": jnp.zeros_like(w["mix"]), "head": jnp.zeros_like(w["head"])}
    assert pk.on_paths(fn, hidden, ONES, gates="frozen") == expected
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), w)
    with jax.numpy_dtype_promotion("standard"):
        assert pk.on_paths(fn, narrow, ONES.astype(jnp.bfloat16), gates="frozen") == expected


def test_tokens_are_inputs_too():
    def net(w, tokens):
        return attention(w, nn.one_hot(tokens, 2, dtype=FLOAT))
    _, w, out = parts("attention")
    on = pk.on_paths(net, w, jnp.array([[0, 1]]), gates="frozen")
    assert {key for key, chosen in on.items() if not chosen} == out


# -- pruning by such scores --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("score", "steps"), [(pk.synflow, 100), (pk.path_exclusion, 1)])
def test_no_leaf_goes_in_whole_without_a_warning(score, steps):
    fn, w, out = parts("squeezed")
    with pytest.warns(pk.EmptiedLayerWarning, match=r"excite, squeeze.* prunable=pk\.on_paths"):
        result = pk.prune(lambda p: score(fn, p, ONES, gates="frozen"), w, density=0.5, steps=steps)
    assert repr(result).splitlines()[-1] == "no weight is left in excite, squeeze"
    with warnings.catch_warnings(action="error"):
        kept = pk.prune(lambda p: score(fn, p, ONES, gates="frozen"), w, density=0.5, steps=steps,
                        prunable=pk.on_paths(fn, w, ONES, gates="frozen"))
    assert kept.total == result.total - 6
    assert not kept.emptied
    assert "no weight" not in repr(kept)
    assert all(kept.masks[name].all() for name in out)


@pytest.mark.parametrize(("name", "told"), [("fused", "8 of 12 in query key value"), ("gated", "8 of 16 in up gate")])
def test_a_part_of_a_leaf_that_makes_coefficients_is_said_too(name, told):
    fn, w, _ = parts(name)
    with pytest.warns(pk.ZeroScoresWarning, match=rf"exactly 0 for {told}, .* prunable=pk\.on_paths"):
        pk.prune(lambda p: pk.synflow(fn, p, ONES, gates="frozen"), w, density=0.4)


def test_coefficients_are_frozen_anew_at_the_weights_of_each_step():
    fn, w, _ = parts("squeezed")
    on = pk.on_paths(fn, w, ONES, gates="frozen")

    def score(p):
        return pk.synflow(fn, p, ONES, gates="frozen", reference=normal(52, (3, 2, 2)))

    masks = None
    for step in range(1, 4):
        masks = pk.prune(score, w, density=pk.exponential(step, 3, 0.5), masks=masks, prunable=on).masks
    together = pk.prune(score, w, density=0.5, steps=3, prunable=on).masks
    jax.tree.map(np.testing.assert_array_equal, masks, together)
    inside = jax.jit(lambda w: pk.prune(score, w, density=0.5, steps=3, prunable=on).masks)(w)
    jax.tree.map(np.testing.assert_array_equal, masks, inside)
