"""Pruning keeps exactly what a stable sort would keep, step by step, and says what went wrong."""

import itertools
import json
import math
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pkjax.pruning.masks import apply_masks
from pkjax.pruning.prune import prune
from pkjax.pruning.result import EmptiedLayerWarning, PruneResult
from pkjax.pruning.schedules import exponential, linear
from pkjax.pruning.scopes import global_scope, layer_scope
from pkjax.pruning.scores.data_free import magnitude, random
from pkjax.pruning.top_k import keep_largest, order_keys
from pkjax.pruning.zero_scores import ZeroScoresWarning
from pkjax.trees import kernels

from tests.cases import FLOAT

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 3)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())

# Values between which floats go wrong: both zeros, denormals, neighbours, extremes, and plenty of ties.
VALUES = (
    0.0,
    -0.0,
    1.0,
    np.nextafter(np.float32(1), np.float32(2)),
    -1.0,
    1e-45,
    -1e-45,
    3e-39,
    -3e-39,
    1e-38,
    3e38,
    -3e38,
)
tricky = st.lists(st.sampled_from([float(np.float32(v)) for v in VALUES]), min_size=TOTAL, max_size=TOTAL)


def split(flat, dtype):
    """Cut a flat list into leaves in flattening order."""
    ends = np.cumsum([0, *SIZES.values()])
    flat = np.asarray(flat, dtype)
    return {
        name: flat[a:b].reshape(shape)
        for (name, shape), a, b in zip(SHAPES.items(), ends, ends[1:], strict=False)
    }


def flatten(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def best_by_sorting(scores, alive, k):
    """The oracle: sort the live scores downwards, stably, and keep the first k."""
    candidates = np.flatnonzero(alive)
    order = candidates[np.argsort(-np.asarray(scores)[candidates].astype(np.longdouble), kind="stable")]
    mask = np.zeros(len(scores), bool)
    mask[order[:k]] = True
    return mask


def everything(path, leaf):
    return True


def itself(params):
    """A score function that is compiled once: every parameter is its own score."""
    return params


@jax.jit
def selected(scores, alive, k):
    return keep_largest(order_keys(scores, alive), k)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=100, deadline=None)
@given(scores=tricky, alive=st.lists(st.booleans(), min_size=TOTAL, max_size=TOTAL), share=st.floats(0, 1))
def test_selection_is_the_head_of_a_stable_sort(dtype, scores, alive, share):
    k = round(share * sum(alive))
    got = selected(list(split(scores, dtype).values()), list(split(alive, bool).values()), jnp.asarray(k))
    expected = best_by_sorting(np.asarray(scores, dtype), alive, k)
    assert flatten(got).tolist() == expected.tolist()
    assert flatten(got).sum() == k


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=TOTAL, max_size=TOTAL),
    k=st.integers(0, TOTAL),
)
def test_selection_is_exact_for_any_floats(scores, k):
    alive = [jnp.ones(shape, bool) for shape in SHAPES.values()]
    got = selected(list(split(scores, np.float64).values()), alive, jnp.asarray(k))
    assert flatten(got).tolist() == best_by_sorting(scores, np.ones(TOTAL, bool), k).tolist()


def test_scores_of_different_precision_compete_by_value():
    scores = {
        "a": jnp.array([[1.5, 2.0]], jnp.float16),
        "b": jnp.array([1.75, 0.5], jnp.float64),
        "c": jnp.array([1.625], jnp.bfloat16),
    }
    result = prune(lambda p: scores, jax.tree.map(jnp.ones_like, scores), density=3 / 5, prunable=everything)
    assert flatten(result.masks).tolist() == [False, True, True, False, True]


@settings(max_examples=10, deadline=None)
@given(scores=tricky, density=st.floats(1e-3, 1.0))
def test_exactly_the_rounded_share_is_kept_at_every_density(scores, density):
    scores = jax.tree.map(jnp.asarray, split(scores, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptiedLayerWarning)
        warnings.simplefilter("ignore", ZeroScoresWarning)
        result = prune(itself, scores, density=density, prunable=everything)
    k = round(density * TOTAL)
    assert result.kept == flatten(result.masks).sum() == sum(layer.kept for layer in result.layers) == k
    assert (
        flatten(result.masks).tolist() == best_by_sorting(flatten(scores), np.ones(TOTAL, bool), k).tolist()
    )


def whole_numbers(seed, zeros=0.3):
    """Weights on which float arithmetic is exact, many of them 0."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.integers(-9, 10, shape) * (rng.random(shape) > zeros), FLOAT)
        for name, shape in {"a": (6, 8), "b": (8, 8), "c": (8, 4)}.items()
    }


def rowwise(p, xp=jnp):
    """A score that changes as weights go, and that likes what is already gone."""
    return {
        name: xp.where(leaf == 0, 50.0, xp.abs(leaf)) * xp.sum(xp.abs(leaf), axis=0) - 5.0
        for name, leaf in p.items()
    }


SEEN = []


def watched(p):
    """``rowwise``, which notes in SEEN the parameters that it is shown; compiled once a scope."""
    jax.debug.callback(lambda p: SEEN.append(p), p, ordered=True)
    return rowwise(p)


@pytest.mark.filterwarnings("ignore::pkjax.pruning.result.EmptiedLayerWarning")
@pytest.mark.parametrize("schedule", [exponential, linear])
@pytest.mark.parametrize("scope", [global_scope, layer_scope])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_keeps_the_best_of_what_is_left(schedule, scope, seed):
    params, steps, density = whole_numbers(seed), 7, 0.13
    SEEN.clear()
    result = prune(watched, params, density=density, steps=steps, schedule=schedule, scope=scope)
    jax.effects_barrier()

    sizes = [leaf.size for leaf in params.values()]
    ends = np.cumsum([0, *sizes])
    cuts = [(0, ends[-1])] if scope is global_scope else list(itertools.pairwise(ends))
    alive, history = np.ones(ends[-1], bool), []
    for step in range(1, steps + 1):
        masked = {
            n: np.where(alive[a:b].reshape(v.shape), v, 0.0)
            for (n, v), a, b in zip(params.items(), ends, ends[1:], strict=False)
        }
        assert (flatten(SEEN[step - 1]) == flatten(masked)).all()
        scores, share = flatten(rowwise(masked, np)), schedule(step, steps, density)
        after = np.concatenate(
            [best_by_sorting(scores[a:b], alive[a:b], round(share * (b - a))) for a, b in cuts]
        )
        assert not (after & ~alive).any()
        alive = after
        history.append(int(alive.sum()))
    assert len(SEEN) == steps
    assert result.history == tuple(history)
    assert (flatten(result.masks) == alive).all()


def test_a_weight_of_zero_that_is_alive_ranks_above_every_pruned_one():
    """Half of the weights go in the first step; the zeros among the rest may go later, the pruned never return."""
    params = {"k": jnp.array([[0.5, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 5.0]])}
    first = jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])

    def score(p):
        untouched = (p["k"] != 0).sum() == 6
        return {"k": jnp.where(untouched, first, jnp.where(p["k"] == 0, -7.0, 1.0))}

    half = prune(score, params, density=0.5)
    assert half.masks["k"].tolist() == [[False] * 4 + [True] * 4]
    quarter = prune(score, params, density=0.25, steps=2)
    assert quarter.masks["k"].tolist() == [[False] * 4 + [True, False, False, True]]
    three = prune(score, params, density=3 / 8, steps=2, schedule=lambda k, n, d: (0.5, d)[k - 1])
    assert three.masks["k"].tolist() == [[False] * 4 + [True, True, False, True]]


def test_ties_fall_by_index_the_same_way_every_time():
    params = {"b": jnp.ones((3, 3)), "a": jnp.ones((2, 2))}
    for _ in range(2):
        result = prune(magnitude, params, density=6 / 13)
        assert flatten(result.masks).tolist() == [True] * 6 + [False] * 7
        assert bool(result.masks["a"].all())


@pytest.mark.filterwarnings("ignore::pkjax.pruning.result.EmptiedLayerWarning")
def test_the_score_is_traced_once_and_the_loop_compiled_once():
    @chex.assert_max_traces(n=1)
    def score(p):
        return magnitude(p)

    assert prune(score, whole_numbers(0), compression=1, steps=100).history[-1] == round(0.1 * 144)


def test_progress_is_a_line_a_step_and_changes_nothing_else(capsys):
    @chex.assert_max_traces(n=2)    # once in each of two calls, of five steps
    def score(p):
        return rowwise(p)

    params, lines = whole_numbers(4), []
    silent = prune(rowwise, params, density=0.2, steps=5)
    for progress in (True, lines.append):
        shown = prune(score, params, density=0.2, steps=5, progress=progress)
        assert shown.history == silent.history
        assert shown.layers == silent.layers
        assert (flatten(shown.masks) == flatten(silent.masks)).all()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == lines == [
        f"pruning: step {k} of 5, {kept} of 144 weights kept" for k, kept in enumerate(silent.history, start=1)]


def test_layer_scope_keeps_the_same_share_of_every_layer():
    result = prune(magnitude, whole_numbers(0), density=0.25, scope=layer_scope)
    assert [(layer.kept, layer.total) for layer in result.layers] == [(12, 48), (16, 64), (8, 32)]


def test_a_scope_may_join_layers_as_it_likes():
    result = prune(magnitude, whole_numbers(0), density=0.25, scope=lambda path, leaf: path[0].key == "b")
    kept = {layer.name: layer.kept for layer in result.layers}
    assert kept["b"] == 16
    assert kept["a"] + kept["c"] == 20


def test_only_prunable_leaves_are_pruned_and_counted():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4), "steps": jnp.array(3)}
    result = prune(lambda p: random(p, key=jax.random.key(0)), params, density=0.5)
    assert (result.kept, result.total) == (8, 16)
    assert result.masks["bias"].all()
    assert result.masks["steps"].all()
    assert jax.tree.structure(result.masks) == jax.tree.structure(params)
    assert all(mask.dtype == bool for mask in jax.tree.leaves(result.masks))
    assert [layer.name for layer in result.layers] == ["kernel"]


def test_compression_is_minus_the_logarithm_of_density():
    params = {"kernel": jnp.arange(1000.0).reshape(10, 100)}
    result = prune(magnitude, params, compression=1.5)
    assert result.kept == round(10**-1.5 * 1000) == 32
    assert result.density == 0.032
    assert result.compression == pytest.approx(-math.log10(0.032))
    assert prune(magnitude, params, compression=0).kept == 1000
    assert prune(magnitude, params, density=np.float32(0.5), steps=np.int64(2)).kept == 500


@given(density=st.floats(1e-6, 1.0), steps=st.integers(1, 200))
def test_schedules_fall_to_the_density_exactly(density, steps):
    for schedule in (exponential, linear):
        values = [schedule(k, steps, density) for k in range(1, steps + 1)]
        assert values[-1] == density
        assert all(a >= b for a, b in zip([1.0, *values], values, strict=False))


def test_emptied_layers_are_named_in_the_warning_and_the_report():
    params = {"first": jnp.ones((2, 2)), "middle": 0.1 * jnp.ones((3, 3)), "last": 2 * jnp.ones((2, 2))}
    with pytest.warns(EmptiedLayerWarning, match="no weight in 1 of 3 layers: middle"):
        result = prune(magnitude, params, density=8 / 17)
    assert result.emptied == ("middle",)
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["kept"] == 8
    assert report["layers"][2] == {
        "name": "middle",
        "flow": None,
        "shape": [3, 3],
        "kept": 0,
        "total": 9,
        "emptied": True,
        "density": 0.0,
    }
    assert "emptied" in result._repr_html_()


def test_a_network_pruned_to_nothing_is_reported_not_hidden():
    with pytest.warns(EmptiedLayerWarning, match="kernel"):
        result = prune(magnitude, {"kernel": jnp.ones((2, 2))}, compression=3)
    assert (result.kept, result.compression) == (0, math.inf)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["compression"] is None


def test_the_result_travels_through_jit_as_a_pytree():
    result = prune(magnitude, {"kernel": jnp.arange(4.0).reshape(2, 2)}, density=0.5)
    same = jax.jit(lambda r: r)(result)
    assert isinstance(same, PruneResult)
    assert same.layers == result.layers
    assert (same.masks["kernel"] == result.masks["kernel"]).all()


def untouched(params):
    raise AssertionError("the score was computed although the call is wrong")


GOOD = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.zeros(3)}


@pytest.mark.parametrize(("options", "error", "message"), [
    ({}, ValueError, "exactly one of compression .* and density"),
    ({"compression": 1.0, "density": 0.1}, ValueError, "exactly one of compression .* and density"),
    ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], but got 0.0"),
    ({"density": -0.5}, ValueError, r"density must lie in \(0, 1\]"),
    ({"density": 1.5}, ValueError, r"density must lie in \(0, 1\]"),
    ({"density": math.nan}, ValueError, r"density must lie in \(0, 1\]"),
    ({"density": np.ones(2)}, TypeError, "density must be a number"),
    ({"compression": -1}, ValueError, "compression must be at least 0 .* got -1"),
    ({"compression": math.nan}, ValueError, "compression must be at least 0"),
    ({"compression": math.inf}, ValueError, "compression must be at least 0"),
    ({"density": 0.5, "steps": 0}, ValueError, "steps must be at least 1, but got 0"),
    ({"density": 0.5, "steps": 2.0}, TypeError, "steps must be an integer, but got 2.0"),
    ({"density": 0.5, "prunable": lambda path, leaf: False}, ValueError, "no weight .* bias, kernel"),
    ({"density": 0.5, "steps": 3, "schedule": lambda k, n, d: d if k != 2 else 0.9}, ValueError, "at step 2 of 3"),
    ({"density": 0.5, "steps": 2, "schedule": lambda k, n, d: 0.9}, ValueError, "must end at the density 0.5"),
])  # fmt: skip
def test_wrong_options_are_named_before_anything_is_computed(options, error, message):
    with pytest.raises(error, match=message):
        prune(untouched, GOOD, **options)


@pytest.mark.parametrize(("params", "prunable", "error", "message"), [
    ({**GOOD, "kernel": GOOD["kernel"].at[0, 1].set(jnp.nan)}, kernels, ValueError, "leaf 'kernel' holds 1 values"),
    ({**GOOD, "bias": GOOD["bias"].at[0].set(jnp.inf)}, kernels, ValueError, "params leaf 'bias' holds 1 values"),
    ({**GOOD, "kernel": jnp.ones((2, 3), int)}, everything, TypeError, "'kernel', which holds no floating-point"),
    ({}, kernels, ValueError, "no weight of params .*none"),
    ({"kernel": jnp.ones((0, 3))}, kernels, ValueError, "no weight of params"),
])  # fmt: skip
def test_unfit_parameters_are_named_before_anything_is_computed(params, prunable, error, message):
    with pytest.raises(error, match=message):
        prune(untouched, params, density=0.5, prunable=prunable)


@pytest.mark.parametrize(("scores", "error", "message"), [
    (lambda p: {"kernel": p["kernel"]}, ValueError, "scores must have the tree structure .* 'bias' is missing"),
    (lambda p: {**p, "kernel": p["kernel"].T}, ValueError, r"scores leaf 'kernel' has shape \(3, 2\)"),
    (lambda p: p["kernel"], ValueError, "scores must have the tree structure of params"),
    (lambda p: {**p, "kernel": jnp.ones((2, 3), int)}, TypeError, "floating-point numbers, but .* int64"),
])  # fmt: skip
def test_scores_of_another_shape_are_refused_while_tracing(scores, error, message):
    with pytest.raises(error, match=message):
        prune(scores, GOOD, density=0.5)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(
    ("poison", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")]
)
def test_bad_scores_name_their_step_and_leaf(poison, word, progress):
    params = {"fine": jnp.ones((2, 5)), "sick": jnp.ones((2, 5))}

    def score(p):
        alive = sum((leaf != 0).sum() for leaf in p.values())  # 20, 15, 10, ...
        return {**p, "sick": p["sick"].at[0, 0].set(jnp.where(alive <= 10, poison, 2.0))}

    with pytest.raises(FloatingPointError, match=f"scores are {word} at step 3 in 'sick'"):
        prune(score, params, density=5 / 20, steps=3, schedule=linear, progress=progress)


def test_bad_scores_of_pruned_weights_and_fixed_leaves_do_no_harm():
    """A score such as g/θ is 0/0 where θ has been pruned: nobody asks for it there."""
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
    result = prune(lambda p: jax.tree.map(lambda t: t * t / t, p), params, density=0.25, steps=2)
    assert result.masks["kernel"].tolist() == [[False] * 4, [False, False, True, True]]


def test_pruned_networks_compute_with_the_kept_weights_alone():
    result = prune(magnitude, GOOD, density=0.5)
    assert apply_masks(GOOD, result.masks)["kernel"].tolist() == [[0.0, 0.0, 0.0], [4.0, 5.0, 6.0]]
