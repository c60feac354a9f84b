"""Options of prune beyond the basic loop: floors, densities by layer, masks for scores, streams, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.pruning.top_k import CHUNK, JOINED, keep_largest, order_keys

pytestmark = pytest.mark.filterwarnings("ignore::pkjax.pruning.result.EmptiedLayerWarning")

SHAPES = {"a": (6, 8), "b": (3, 3, 4, 8), "c": (8, 4), "d": (4, 2)}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    # The layers' sizes differ by so much that magnitude alone empties "a" and "d".
    scale = dict(zip(SHAPES, (0.01, 1.0, 3.0, 0.001), strict=True))
    return {name: jnp.asarray(scale[name] * rng.normal(size=shape)) for name, shape in SHAPES.items()}


def kept(result):
    return {layer.name: layer.kept for layer in result.layers}


def test_a_floor_keeps_the_best_of_every_layer_and_the_total(params):
    with pytest.warns(pk.EmptiedLayerWarning, match="a, d"):
        assert kept(pk.prune(pk.magnitude, params, density=0.1, steps=3))["d"] == 0
    result = pk.prune(pk.magnitude, params, density=0.1, steps=3, min_per_layer=3)
    total = sum(leaf.size for leaf in params.values())
    assert result.kept == round(0.1 * total)
    for name in ("a", "d"):
        assert kept(result)[name] == 3
        sizes = np.abs(np.asarray(params[name]))
        assert set(sizes[np.asarray(result.masks[name])]) == set(np.sort(sizes.ravel())[-3:])
    # All of a layer that has fewer; the rest is chosen as ever, by size.
    result = pk.prune(pk.magnitude, params, density=0.5, min_per_layer=20)
    assert kept(result)["d"] == 8
    rest = np.concatenate([np.abs(np.asarray(params[n])).ravel() for n in ("b", "c")])
    marks = np.concatenate([np.asarray(result.masks[n]).ravel() for n in ("b", "c")])
    assert rest[marks].min() > rest[~marks].max()


def test_a_floor_that_the_density_cannot_pay_is_refused(params):
    with pytest.raises(ValueError, match=r"min_per_layer=20 keeps at least 68 weights .* leaves 38"):
        pk.prune(pk.magnitude, params, density=0.1, min_per_layer=20)
    with pytest.raises(ValueError, match="min_per_layer must be at least 0"):
        pk.prune(pk.magnitude, params, density=0.1, min_per_layer=-1)


def test_erk_densities_are_those_of_the_formula_at_every_step(params):
    result = pk.prune(pk.magnitude, params, density=0.2, steps=5, scope=pk.erk_scope)
    total = sum(leaf.size for leaf in params.values())
    assert list(result.history) == [round(0.2 ** (k / 5) * total) for k in range(1, 6)]

    def at(e):
        return {n: min(1.0, e * sum(s) / np.prod(s)) * np.prod(s) for n, s in SHAPES.items()}
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < 0.2 * total else (low, middle)
    for name, count in kept(result).items():
        assert abs(count - at(low)[name]) <= 1


def test_a_score_that_asks_for_masks_gets_those_of_the_step(params):
    seen = []

    def score(p, *, masks):
        jax.debug.callback(lambda m: seen.append(int(sum(x.sum() for x in jax.tree.leaves(m)))), masks, ordered=True)
        assert jax.tree.structure(masks) == jax.tree.structure(p)
        return pk.magnitude(p)

    result = pk.prune(score, params, density=0.5, steps=3)
    jax.effects_barrier()
    assert seen == [result.total, *result.history[:-1]]
    inverted = pk.prune(pk.inverted(score), params, density=0.5)
    plain = pk.prune(pk.magnitude, params, density=0.5)
    assert not any((a & b).any() for a, b in zip(jax.tree.leaves(inverted.masks), jax.tree.leaves(plain.masks),
                                                strict=True))


@pytest.mark.parametrize("progress", [False, True])
def test_scores_over_a_stream_are_taken_outside_of_jit(params, progress):
    batches = [jnp.ones((3, 6)), 2 * jnp.ones((1, 6))]
    passes = []

    def stream():
        passes.append(len(passes))
        yield from batches

    def loss(p, batch):
        return jnp.mean(jnp.tanh(batch @ p["a"] @ p["c"]) ** 2) + 0.1 * (p["b"] ** 2).sum() + (p["d"] ** 2).sum()

    got = pk.prune(lambda p: pk.snip(loss, p, stream()), params, density=0.3, steps=2, jit=False, progress=progress)
    want = pk.prune(lambda p: pk.snip(loss, p, [jnp.concatenate(batches)]), params, density=0.3, steps=2)
    assert passes == [0, 1]
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(got.masks), jax.tree.leaves(want.masks), strict=True))


def test_a_score_function_without_a_hash_prunes(params):
    class Score(dict):
        def __call__(self, p):
            return pk.magnitude(p)
    assert pk.prune(Score(), params, density=0.5).kept == pk.prune(pk.magnitude, params, density=0.5).kept


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.999, 1.0])
def test_leaves_beyond_a_chunk_are_selected_exactly_with_ties(share):
    """A leaf of several chunks and a remainder, small leaves joined in front and behind; few values, many ties."""
    rng = np.random.default_rng(1)
    sizes = [5, 300, 2 * CHUNK + 77, JOINED, 0, 9]
    scores = [rng.integers(-3, 4, n).astype(np.float32) * np.float32(1e-40) for n in sizes]   # denormals, zeros, ties
    scores[2][::3] = rng.random(len(scores[2][::3]), np.float32)
    flat = np.concatenate(scores)
    k = round(share * flat.size)
    keys = order_keys([jnp.asarray(s) for s in scores], [jnp.ones(s.shape, bool) for s in scores])
    marks, counts = jax.jit(keep_largest)(keys, jnp.asarray(k))
    want = np.zeros(flat.size, bool)
    want[np.argsort(-flat.astype(np.float64), kind="stable")[:k]] = True
    got = np.concatenate([np.asarray(m) for m in marks])
    assert (got == want).all()
    assert counts.tolist() == [int(m.sum()) for m in marks]


def test_the_kept_set_does_not_depend_on_the_order_of_the_weights(params):
    rng = np.random.default_rng(2)
    order = {n: rng.permutation(leaf.size) for n, leaf in params.items()}
    moved = {n: leaf.ravel()[order[n]].reshape(leaf.shape) for n, leaf in params.items()}
    plain, other = (pk.prune(pk.magnitude, p, density=0.37, steps=4).masks for p in (params, moved))
    for n in params:
        assert (plain[n].ravel()[order[n]] == other[n].ravel()).all()


def test_layer_sums_of_synflow_are_conserved_before_masks_and_after():
    """Tanaka et al. 2020, theorem 1: every layer of a chain without biases carries R_1."""
    rng = np.random.default_rng(3)
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in (("a", (5, 7)), ("b", (7, 6)), ("c", (6, 3)))}

    def net(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    x = jnp.ones((1, 5))
    masks = pk.prune(lambda p: pk.synflow(net, p, x), params, density=0.4, steps=10).masks
    for p in (params, pk.apply_masks(params, masks)):
        norm = float(pk.paths.polynomial(net, jax.tree.map(abs, p), x, q=1).sum())
        assert norm > 0
        np.testing.assert_allclose([float(s.sum()) for s in pk.synflow(net, p, x).values()], norm, rtol=1e-12)
        square = float(pk.paths.polynomial(net, jax.tree.map(lambda t: t * t, p), x, q=2).sum())
        conserved = pk.synflow_l2(net, p, x, variant="conserved")
        np.testing.assert_allclose([float(s.sum()) for s in conserved.values()], square, rtol=1e-12)
