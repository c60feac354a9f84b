"""What is compiled serves every score of the same operations; nothing keeps closures, and no answer is stale."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

COMPILED = [0]
PARAMS = {"a": (5, 8), "b": (8, 6), "bias": (6,), "c": (6, 3)}


@jax.monitoring.register_event_duration_secs_listener
def _count(name, seconds, **more):
    COMPILED[0] += name == "/jax/core/compile/backend_compile_duration"


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in PARAMS.items()}


def scores(seed):
    """Scores that differ from seed to seed in what they close over alone."""
    X = jnp.asarray(np.random.default_rng(seed).normal(size=(7, 5)))
    scale, key = jnp.asarray(1.0 + seed), jax.random.key(seed)

    def net(p, x):
        return scale * jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"] + p["bias"]) @ p["c"]

    def loss(p, x=X):
        return (net(p, x) ** 2).mean()

    return {
        "magnitude": pk.magnitude,
        "random": lambda p: pk.random(p, key=key),
        "snip": lambda p: pk.snip(loss, p),
        "grasp": lambda p: pk.grasp(loss, p),
        "snip of batches": lambda p: pk.snip(loss, p, [X[:4], X[4:]]),
        "grasp of batches": lambda p: pk.grasp(loss, p, [X[:4], X[4:]]),
        "synflow": lambda p: pk.synflow(net, p, jnp.abs(X[:1])),
        "synflow_l2": lambda p: pk.synflow_l2(net, p, jnp.abs(X[:1])),
        "path_exclusion": lambda p: pk.path_exclusion(net, p, X),
        "ntk_trace_saliency": lambda p: pk.ntk_trace_saliency(net, p, X),
    }


def everything(score, params, masks):
    """A score alone, and pruning in one program, from masks, and step by step."""
    alone = score(params)
    whole = pk.prune(score, params, density=0.5, steps=2)
    again = pk.prune(score, params, density=0.25, masks=masks)
    lines = []
    stepwise = pk.prune(score, params, density=0.5, steps=2, progress=lines.append)
    jax.tree.map(np.testing.assert_array_equal, whole.masks, stepwise.masks)
    return jax.block_until_ready((alone, whole.masks, again.masks))


@pytest.mark.parametrize("name", scores(0))
def test_other_weights_masks_and_closures_compile_nothing(name):
    counts, answers = [], []
    for seed in range(3):
        score, params = scores(seed)[name], draw(seed)
        masks = jax.block_until_ready(jax.tree.map(lambda p: jnp.asarray(np.abs(p) > 0.3), params))
        before = COMPILED[0]
        answers.append(everything(score, params, masks))
        counts.append(COMPILED[0] - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
    want = jax.jit(scores(2)[name])(draw(2))      # what is shared is right: of a program of its own it is the same
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), answers[2][0], want)


@pytest.mark.parametrize("score", [pk.snip, pk.grasp])
@pytest.mark.parametrize("batches", [False, True])
def test_the_same_loss_compiles_nothing_twice(score, batches):
    X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)))

    def loss(p, x=X):
        return (jnp.tanh(x @ p["a"] @ p["b"]) ** 2).mean()

    arguments = ([X[:4], X[4:]],) if batches else ()
    score(loss, draw(0), *arguments)
    before = COMPILED[0]
    score(loss, draw(0), *arguments)
    assert COMPILED[0] == before


@pytest.mark.parametrize("name", [name for name in scores(0) if name != "magnitude"])
def test_no_cache_holds_what_a_score_closes_over(name):
    score = scores(0)[name]
    reference = weakref.ref(score)
    pk.prune(score, draw(0), density=0.5)
    score(draw(0))
    del score
    gc.collect()
    assert reference() is None


def test_no_answer_is_stale():
    factor = {"a": 1.0, "b": 2.0}

    def score(p):
        return {name: jnp.abs(leaf) * factor.get(name, 1.0) for name, leaf in p.items()}

    first = pk.prune(score, draw(0), density=0.3)
    factor.update(a=2.0, b=1.0)
    second = pk.prune(score, draw(0), density=0.3)
    assert first.layers[1].kept > second.layers[1].kept
    assert first.layers[0].kept < second.layers[0].kept


def test_connectivity_is_compiled_once_and_never_stale():
    masks = pk.prune(pk.magnitude, draw(0), density=0.6).masks
    reports, counts = [], []
    for scale in (1.0, 2.0, 3.0):
        factor = jnp.asarray(scale)
        before = COMPILED[0]
        reports.append(pk.connectivity(lambda p, x, c=factor: c * jax.nn.relu(x @ p["a"]) @ p["b"] @ p["c"], draw(0),
                                       jnp.ones((1, 5)), masks=masks))
        counts.append(COMPILED[0] - before)
    assert counts[1:] == [0, 0]
    for report in reports:
        assert report.log10_paths == reports[0].log10_paths
        assert report.log10_effective_paths == pytest.approx(reports[0].log10_effective_paths)
