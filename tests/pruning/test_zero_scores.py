"""Scores of exactly 0: counted, said where they decide, and traced back to the parameters of 0 behind them."""

import warnings

import jax
import jax.numpy as jnp
import pkjax as pk
import pytest
from pkjax.pruning.zero_scores import ZeroScoresWarning

from tests.cases import FLOAT, normal

ONES = jnp.ones((1, 4), FLOAT)
SCALES = ("one", "two")


def residual(p, x):
    for name in SCALES:
        x = x + jax.nn.relu(x @ p[name]["kernel"]) * p[name]["scale"] + p[name]["bias"]
    return x @ p["head"]["kernel"]


def weights(one, two):
    blocks = {name: {"kernel": normal(i, (4, 4)), "scale": jnp.full(4, value, FLOAT), "bias": jnp.zeros(4, FLOAT)}
              for i, (name, value) in enumerate(zip(SCALES, (one, two), strict=True))}
    return {**blocks, "head": {"kernel": normal(9, (4, 2))}}


def synflow(p):
    return pk.synflow(residual, p, ONES)


@pytest.mark.parametrize(("one", "two", "behind"), [(0, 1, "one/scale"), (1, 0, "two/scale"),
                                                    (0, 0, "one/scale, two/scale")])
@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"progress": lambda line: None}])
def test_ties_at_zero_are_said_with_the_leaves_behind_them(one, two, behind, options):
    zeros = 16 * ((one == 0) + (two == 0))
    with pytest.warns(ZeroScoresWarning) as said:
        result = pk.prune(synflow, weights(one, two), density=0.9, **options)
    (text,) = [str(w.message) for w in said]
    assert f"{zeros} of 40 scores are exactly 0, and {zeros - 4} of the weights that are kept" in text
    assert f"Parameters that are all 0 stand behind them: {behind}. " in text
    assert result.zero_scores == result.to_dict()["zero_scores"] == zeros
    assert f"{zeros} scores were 0" in result._repr_html_()


def test_a_branch_that_goes_because_its_scale_is_zero_is_said():
    with (pytest.warns(pk.EmptiedLayerWarning, match="in 1 of 3 layers: one/kernel"),
          pytest.warns(ZeroScoresWarning, match=r"16 of 40 scores are exactly 0\. .*behind them: one/scale")):
        pk.prune(synflow, weights(0, 1), density=0.5)


def test_nothing_is_said_where_zeros_decide_nothing():
    dead = weights(1, 1)
    dead["one"]["kernel"] = dead["one"]["kernel"].at[:, 0].set(0)      # weights of 0: their own scores are 0
    with warnings.catch_warnings(action="error"):
        assert pk.prune(synflow, dead, density=0.5).zero_scores == 4
        assert pk.prune(synflow, dead, density=0.1, steps=3).zero_scores == 4
        assert pk.prune(synflow, dead, density=0.95).zero_scores == 4       # of which two are kept
        assert pk.prune(synflow, weights(0, 1), density=1.0).zero_scores == 16
        assert pk.prune(pk.magnitude, weights(0, 0), density=0.5).zero_scores == 0


def test_ties_that_no_leaf_explains_are_said_too():
    with pytest.warns(ZeroScoresWarning, match=r"40 of 40 scores are exactly 0, and 20 .* which ones\. See the guide"):
        pk.prune(lambda p: jax.tree.map(jnp.zeros_like, p), weights(1, 1), density=0.5,
                 scope=pk.layer_scope)


def test_scores_outside_of_jit_name_the_leaves_that_may_stand_behind_them():
    with pytest.warns(ZeroScoresWarning, match="may stand behind them: one/scale"):
        assert pk.prune(synflow, weights(0, 1), density=0.9, jit=False).zero_scores == 16


def test_zero_scores_are_counted_under_jit_and_vmap():
    def pruned(one):
        params = weights(1, 1)
        params["one"]["scale"] = params["one"]["scale"] * one
        return pk.prune(synflow, params, density=0.9)
    result = jax.jit(jax.vmap(pruned))(jnp.asarray([0.0, 1.0], FLOAT))
    assert result.zero_scores.tolist() == [16, 0]
    assert jnp.allclose(result.density, jnp.asarray(0.9, result.density.dtype))
    assert jnp.allclose(result.compression, -jnp.log10(result.density))
    single = jax.jit(lambda: pruned(jnp.zeros((), FLOAT)))()
    assert (float(single.density), single.to_dict()["zero_scores"]) == (0.9, 16)


def test_layers_of_libraries_have_the_kernels_that_they_should():
    key = jax.tree_util.DictKey
    shapes = {"kernel": (3, 3, 1, 4), "w": (1, 1, 1, 4), "weight": (4, 3), "bias": (4, 1, 1), "scale": (1, 1, 1, 4),
              "offset": (1, 1, 1, 4), "embedding": (9, 4), "embeddings": (9, 4), "gamma": (1, 4), "shift": (1, 1, 4),
              "b": (1, 1, 1, 4), "a": (3, 2), "maps": (2, 3, 2)}
    taken = {name for name, shape in shapes.items() if pk.kernels((key("layer"), key(name)), jnp.ones(shape))}
    assert taken == {"kernel", "w", "weight", "a", "maps"}
    assert pk.kernels((key("kernel"), jax.tree_util.GetAttrKey("value")), jnp.ones((1, 1, 1, 4)))
    assert not pk.kernels((key("scale"), jax.tree_util.GetAttrKey("value")), jnp.ones((1, 4)))
