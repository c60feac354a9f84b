"""Saliencies of data against enumerated paths, dense Jacobians and Hessians, and for any cut of the data."""

import gc
import itertools
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from pkjax.paths.errors import NotPathNetworkError
from pkjax.pruning.scores import grasp, ntk_trace_saliency, path_exclusion, snip
from pkjax.pruning.scores.batches import checked, inputs

from tests.cases import FLOAT, cases
from tests.oracles import enumerate_paths

N = 7
REMAINDER, SINGLE = [3, 3, 1], [1] * N


class ConvNet(nn.Module):
    """Convolution, frozen BatchNorm, ReLU, max-pooling and a dense layer, in the type of the input."""

    @nn.compact
    def __call__(self, x, train=False):
        layer = {"dtype": x.dtype, "param_dtype": x.dtype}
        x = nn.BatchNorm(use_running_average=not train, epsilon=1e-3, **layer)(nn.Conv(2, (3, 3), **layer)(x))
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        return nn.Dense(2, **layer)(x.reshape(x.shape[0], -1))


def random_tree(tree, seed, low=-1.0, high=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(low, high, v.shape)), tree)


LAYERS = [("conv", "Conv_0", 2, 3, 1, 1, 1, "SAME", True), ("bn", "BatchNorm_0", (0.4, -0.3), (0.5, 2.0), 1e-3),
          ("leaky", 0.0), ("pool", "max", 2), ("flatten",), ("dense", "Dense_0", 2, True)]


def convnet(dtype=FLOAT):
    """The network of LAYERS: its function, parameters and data."""
    X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 1)), dtype)
    shapes = {"Conv_0": {"kernel": (3, 3, 1, 2), "bias": 2}, "BatchNorm_0": {"scale": 2, "bias": 2},
              "Dense_0": {"kernel": (8, 2), "bias": 2}}
    rng = np.random.default_rng(2)
    params = {layer: {name: jnp.asarray(rng.uniform(-1, 1, shape), dtype) for name, shape in leaves.items()}
              for layer, leaves in shapes.items()}
    stats = {"BatchNorm_0": {"mean": jnp.array([0.4, -0.3], dtype), "var": jnp.array([0.5, 2.0], dtype)}}
    return *pk.from_linen(ConvNet(), {"params": params, "batch_stats": stats}), X


def tanh_net(p, x):
    return jnp.tanh(x @ p["a"] + p["c"]) @ p["b"]


@pytest.fixture(scope="module")
def small():
    """A network without paths, and its data."""
    params = random_tree({"a": jnp.zeros((3, 4)), "b": jnp.zeros((4, 2)), "c": jnp.zeros(4)}, 3)
    rng = np.random.default_rng(4)
    return params, rng.normal(size=(N, 3)), rng.normal(size=(N, 2))


def batch_loss(p, batch):
    X, y = batch
    return jnp.mean(jnp.sum((tanh_net(p, jnp.asarray(X)) - y) ** 2, axis=1))


def cut(tree, sizes):
    ends = np.cumsum([0, *sizes])
    return [jax.tree.map(lambda v, a=a, b=b: v[a:b], tree) for a, b in itertools.pairwise(ends)]


def close(got, want, tolerance=1e-12):
    top = max(float(np.abs(w).max(initial=0.0)) for w in jax.tree.leaves(want))
    assert top > 0
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * top), got, want)


def narrow(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


# -- SNIP and GraSP over a stream --------------------------------------------------------------------------------------

@pytest.mark.parametrize("score", [snip, grasp])
def test_scores_are_those_of_the_mean_loss_however_the_examples_are_cut(score, small):
    params, X, y = small
    want = score(lambda p: batch_loss(p, (X, y)), params)
    for sizes in (REMAINDER, SINGLE):
        close(score(batch_loss, params, cut((X, y), sizes)), want)
    got = score(batch_loss, narrow(params), cut(narrow((X, y)), REMAINDER))
    close(got, want, 2e-6)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


def test_streamed_grasp_is_weight_times_dense_hessian_times_mean_gradient(small):
    params, X, y = small

    def whole(a):
        return batch_loss({**params, "a": a.reshape(3, 4)}, (X, y))
    flat = params["a"].ravel()
    want = flat * (jax.hessian(whole)(flat) @ jax.grad(whole)(flat))
    got = grasp(batch_loss, params, cut((X, y), [2, 5]), prunable=lambda path, leaf: path[0].key == "a")
    np.testing.assert_allclose(got["a"].ravel(), want, rtol=1e-11)
    assert not got["b"].any()


def test_the_loss_is_traced_once_for_every_shape_of_batch(small):
    params, X, y = small
    traces = []

    def counted(p, batch):
        traces.append(batch[0].shape)
        return batch_loss(p, batch)

    snip(counted, params, cut((X, y), [2, 2, 2, 1]))
    assert traces == [(2, 3), (1, 3)]
    traces.clear()
    grasp(counted, params, cut((X, y), [2, 2, 2, 1]))
    assert traces == [(2, 3), (1, 3)] * 2


def test_rounding_does_not_grow_with_the_stream(small):
    params, _, _ = small
    rng = np.random.default_rng(5)
    data = rng.normal(size=(2000, 3)), 3 + rng.normal(size=(2000, 2))
    want = snip(batch_loss, params, [data])
    close(snip(batch_loss, narrow(params), cut(narrow(data), [1] * 2000)), want, 5e-7)


def test_batches_are_let_go_as_the_stream_runs(small):
    params, X, y = small
    seen, most = [], []

    def stream():
        for _ in range(20):
            batch = np.tile(X, (100, 1)), np.tile(y, (100, 1))
            seen.append(weakref.ref(batch[0]))
            gc.collect()
            most.append(sum(ref() is not None for ref in seen))
            yield batch

    snip(batch_loss, params, stream())
    assert len(most) == 20
    assert max(most) <= 3


def test_snip_reads_an_iterator_and_grasp_refuses_it_untouched(small):
    params, X, y = small
    data = cut((X, y), [4, 3])
    close(snip(batch_loss, params, iter(data)), snip(batch_loss, params, data))
    once = iter(data)
    with pytest.raises(TypeError, match="twice, but a list_iterator can be read only once: pass a list, or an object"):
        grasp(lambda p, b: pytest.fail("computed"), params, once)
    assert next(once) is data[0]

    class Shrinking:
        def __iter__(self):
            yield data.pop()

    with pytest.raises(ValueError, match="gave 3 examples when read first and 4 when read again"):
        grasp(batch_loss, params, Shrinking())


@pytest.mark.parametrize("score", [snip, grasp])
def test_streams_score_inside_prune_and_jit(score, small):
    params, X, y = small
    data = cut((X, y), [4, 3])
    want = score(batch_loss, params, data)
    close(jax.jit(lambda p: score(batch_loss, p, data))(params), want)
    result = pk.prune(lambda p: score(batch_loss, p, data), params, density=0.5, steps=2)
    assert result.kept == 10


def test_wrong_streams_are_named(small):
    params, X, y = small
    wrong = {
        r"share a leading axis.*batch 1 have the shapes \[\(2, 3\), \(3, 2\)\]": [(X, y), (X[:2], y[:3])],
        r"share a leading axis.*batch 0 have the shapes \[\(\)\]": [1.0],
        r"share a leading axis.*batch 0 have the shapes \[\]": [()],
        "batch 0 holds no example": [(X[:0], y[:0])],
        r"batches, batch 1, leaf '0' holds 1 values that are NaN": [(X, y), (np.where(X[0, 0] == X, np.nan, X), y)],
    }
    for message, batches in wrong.items():
        with pytest.raises(ValueError, match=message):
            list(checked(batches, "batches"))
    for score in (snip, grasp):
        with pytest.raises(ValueError, match="batches holds no batch"):
            score(batch_loss, params, [])
        with pytest.raises(ValueError, match="batch 0 holds no example"):
            score(batch_loss, params, [(X[:0], y[:0])])
        with pytest.raises(TypeError, match=r"must be an iterable of batches, got a dict; pass \[batch\]"):
            score(batch_loss, params, {"X": X})
        with pytest.raises(TypeError, match="scalar"):
            score(lambda p, batch: tanh_net(p, batch[0]), params, [(X, y)])
    with pytest.raises(FloatingPointError, match="not finite"):
        snip(lambda p, batch: batch_loss(p, batch) * jnp.inf, params, [(X, y)])


# -- Path eXclusion ----------------------------------------------------------------------------------------------------

def listed(layers, params, X, masks=None):
    """PX path by path, and what each weight's squared derivatives sum to."""
    oracle = enumerate_paths(layers, params, X, masks)
    n, outputs = oracle.outputs.shape
    z1 = (oracle.jvf**2).sum(1).reshape(n, outputs)                        # Σ_{p→k} a_p² x_s²
    theta = np.concatenate([np.ravel(params[name]) for name in sorted(params)])
    through = (oracle.jtv * theta) ** 2                                   # v_p² where the weight lies on p
    scores = (z1.sum(0)[oracle.ends][:, None] * through).sum(0)
    return scores, ((oracle.jvf @ oracle.jtv) ** 2).sum(0), oracle


@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(cases(kinds=("dense", "conv", "residual")))
def test_px_is_the_sum_over_enumerated_paths_and_bounds_the_squared_derivatives(case):
    want, squared, oracle = listed(case.layers, case.params, case.X, case.masks)
    assume(np.ptp(oracle.outputs, axis=0).min() > 1e-6)
    scores = path_exclusion(case.apply, case.params, case.X, masks=case.masks)
    got = np.concatenate([np.ravel(scores[name]) for name in sorted(scores)])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * want.max())
    theta = np.concatenate([np.ravel(case.params[name]) for name in sorted(scores)])
    alive = True if case.masks is None else np.concatenate([np.ravel(case.masks[name]) for name in sorted(scores)])
    assert (got >= alive * theta**2 * squared - 1e-9 * got.max()).all()
    assert squared.sum() > 0


def test_px_through_frozen_batchnorm_and_max_pooling_sums_over_the_enumerated_paths():
    apply_fn, params, X = convnet()
    flat = {f"{layer}.{name}": v for layer, leaves in params.items() for name, v in leaves.items()}
    want, _, _ = listed(LAYERS, flat, X)
    scores = path_exclusion(apply_fn, params, X)
    got = np.concatenate([np.ravel(scores[name.split(".")[0]][name.split(".")[1]]) for name in sorted(flat)])
    np.testing.assert_allclose(got, want, rtol=1e-11)
    apply_fn, params, X = convnet(jnp.float32)
    close(jax.jit(lambda p, x: path_exclusion(apply_fn, p, x))(params, X), scores, 1e-5)


def relu_net(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.fixture(scope="module")
def relus():
    params = random_tree({"a": jnp.zeros((3, 4)), "b": jnp.zeros((4, 4)), "c": jnp.zeros((4, 2))}, 6)
    return params, np.random.default_rng(7).normal(size=(N, 3))


@pytest.fixture(scope="module")
def whole(relus):
    """The scores of ``relu_net`` on all examples at once."""
    return {score: score(relu_net, *relus) for score in (path_exclusion, ntk_trace_saliency)}


@pytest.mark.parametrize("score", [path_exclusion, ntk_trace_saliency])
def test_scores_of_inputs_add_up_over_examples_however_they_are_cut(score, relus, whole):
    params, X = relus
    close(score(relu_net, params, iter(cut(X, REMAINDER))), whole[score])
    close(score(relu_net, narrow(params), cut(narrow(X), SINGLE)), whole[score], 5e-6)


def test_a_masked_weight_carries_no_path_where_a_zero_weight_does(relus):
    params, X = relus
    masks = jax.tree.map(lambda v: v > -0.3, params)
    masked = path_exclusion(relu_net, params, X, masks=masks)
    layers = [("dense", "a", 4, False), ("leaky", 0.0), ("dense", "b", 4, False), ("leaky", 0.0),
              ("dense", "c", 2, False)]
    want, _, _ = listed(layers, {f"{n}.kernel": v for n, v in params.items()}, X,
                        {f"{n}.kernel": np.asarray(m) for n, m in masks.items()})
    np.testing.assert_allclose(np.concatenate([np.ravel(masked[n]) for n in "abc"]), want, rtol=1e-11)
    assert not masked["b"][~masks["b"]].any()
    zeroed = path_exclusion(relu_net, pk.apply_masks(params, masks), X)
    assert float(zeroed["b"].sum()) > 1.1 * float(masked["b"].sum())


def test_px_with_max_pooling_left_in_place_counts_one_path_of_the_window():
    def net(p, x):
        pooled = jax.lax.reduce_window(x * p["w"], -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return pooled.reshape(-1, 1) * p["v"]

    params = {"w": jnp.array(1.5), "v": jnp.array([2.0])}
    X = jnp.asarray(np.random.default_rng(8).normal(size=(3, 2, 2, 1)))
    energy = float((np.asarray(X).reshape(3, 4).max(1) ** 2).sum()) * 1.5**2 * 2.0**2
    assert float(path_exclusion(net, params, X, pool="max")["w"]) == pytest.approx(energy)
    assert float(path_exclusion(net, params, X)["w"]) == pytest.approx(4 * energy)


def test_px_beyond_the_range_of_its_type_keeps_its_ratios(relus, whole):
    """1e18 times the inputs and 100 times the weights are 1e48 times the scores, more than float32 holds."""
    params, X = relus
    want = whole[path_exclusion]
    got = path_exclusion(relu_net, jax.tree.map(lambda v: 100 * v, narrow(params)), narrow(1e18 * X))
    close(jax.tree.map(lambda v: v / got["a"].max(), got), jax.tree.map(lambda v: v / want["a"].max(), want), 1e-5)
    factor = float(np.log2(1e48 * float(want["b"].sum()) / float(got["b"].sum())))
    assert factor > 10
    assert factor == pytest.approx(round(factor), abs=1e-5)


@pytest.mark.parametrize("score", [path_exclusion, ntk_trace_saliency])
def test_integer_leaves_score_zero_and_keep_their_place(score, relus, whole):
    params, X = relus
    got = score(relu_net, {**params, "count": jnp.array([3, 4])}, X)
    assert got.pop("count").tolist() == [0.0, 0.0]
    close(got, whole[score])


# -- the derivative of Tr Θ --------------------------------------------------------------------------------------------

def dense_derivative(apply_fn, params, X, moving):
    """θ ∘ ∂/∂θ of the squared entries of the dense Jacobian, ``moving`` marking the columns that count."""
    def total(p):
        jacobian = jax.jacfwd(lambda q: apply_fn(q, X))(p)
        return sum((jnp.where(m, j, 0) ** 2).sum() for j, m in zip(jax.tree.leaves(jacobian), jax.tree.leaves(moving),
                                                                   strict=True))
    return jax.tree.map(jnp.multiply, params, jax.jit(jax.grad(total))(params))


def test_trace_saliency_is_the_derivative_of_the_dense_jacobians_square():
    apply_fn, params, X = convnet()
    want = dense_derivative(apply_fn, params, X, jax.tree.map(lambda v: True, params))
    close(ntk_trace_saliency(apply_fn, params, X, batch_size=2), want)
    apply_fn, params, X = convnet(jnp.float32)
    close(jax.jit(lambda p, x: ntk_trace_saliency(apply_fn, p, x))(params, X), want, 1e-5)


def test_trace_saliency_is_the_finite_difference_of_the_trace():
    apply_fn, params, X = convnet()
    scores, step = ntk_trace_saliency(apply_fn, params, X), 1e-6
    for layer, name, index in (("Conv_0", "kernel", (1, 1, 0, 1)), ("BatchNorm_0", "scale", (0,)),
                               ("Dense_0", "kernel", (3, 1))):
        def moved(by, layer=layer, name=name, index=index):
            leaf = params[layer][name].at[index].multiply(1 + by)
            return float(pk.ntk_trace(apply_fn, {**params, layer: {**params[layer], name: leaf}}, X))
        want = (moved(step) - moved(-step)) / (2 * step)
        assert float(scores[layer][name][index]) == pytest.approx(want, rel=1e-6)


def test_trace_saliency_counts_what_trains_and_drops_what_is_masked(small):
    params, X, _ = small
    masks = jax.tree.map(lambda v: v > -0.4, params)
    trainable = {"a": True, "b": True, "c": False}
    alive = pk.apply_masks(params, masks)
    moving = {n: m & trainable[n] for n, m in masks.items()}
    want = dense_derivative(tanh_net, alive, jnp.asarray(X), moving)
    got = ntk_trace_saliency(tanh_net, params, X, masks=masks, trainable=trainable)
    close(got, want)
    assert got["c"].any()
    assert not any(got[n][~masks[n]].any() for n in got)


def test_the_batch_size_changes_no_trace_saliency(relus, whole):
    close(ntk_trace_saliency(relu_net, *relus, batch_size=3), whole[ntk_trace_saliency])


def test_trace_saliencies_add_up_to_the_degree_of_the_trace(relus, whole):
    """Tr Θ of L layers without biases is homogeneous of degree 2(L - 1) in the weights."""
    sums = [float(leaf.sum()) for leaf in jax.tree.leaves(whole[ntk_trace_saliency])]
    assert sum(sums) == pytest.approx(4 * float(pk.ntk_trace(relu_net, *relus)), rel=1e-12)


@pytest.mark.parametrize("score", [path_exclusion, ntk_trace_saliency])
def test_wrong_data_are_named(score, relus):
    params, X = relus
    with pytest.raises(ValueError, match=r"X, batch 0, leaf '\(root\)' holds 1 values that are NaN"):
        score(relu_net, params, np.where(X[0, 0] == X, np.nan, X))
    with pytest.raises(ValueError, match="X: batch 0 holds no example"):
        score(relu_net, params, X[:0])
    with pytest.raises(ValueError, match="X holds no batch"):
        score(relu_net, params, [])
    with pytest.raises(ValueError, match=r"failed on a batch of 1, float64\[1, 4\]"):
        score(relu_net, params, np.ones((2, 4)))
    with pytest.raises(ValueError, match="params leaf 'b' holds"):
        score(relu_net, {**params, "b": params["b"] * jnp.nan}, X)
    with pytest.raises(ValueError, match="leaf 'c' is missing"):
        score(relu_net, params, X, masks={"a": params["a"] > 0, "b": params["b"] > 0})
    huge = jax.tree.map(lambda v: v * jnp.float32(1e30), narrow(params))
    if score is path_exclusion:     # squares that float32 does not hold are over a power of two
        assert all(np.isfinite(s).all() and s.any() for s in jax.tree.leaves(score(relu_net, huge, narrow(X))))
    else:
        with pytest.raises(FloatingPointError, match="not finite"):
            score(relu_net, huge, narrow(X))


def test_wrong_streams_of_inputs_are_named(relus):
    _, X = relus
    with pytest.raises(ValueError, match=r"X, batch 1,.*holds 21 values that are NaN or infinite"):
        list(inputs([X, X * np.inf])[1])
    with pytest.raises(ValueError, match=r"the first is float64\[3\] and batch 1 holds float64\[2\]"):
        list(inputs([X, X[:, :2]])[1])


def test_wrong_options_are_named(relus):
    params, X = relus
    with pytest.raises(ValueError, match='pool must be "sum" or "max"'):
        path_exclusion(relu_net, params, X, pool="average")
    with pytest.raises(NotPathNetworkError, match="tanh"):
        path_exclusion(lambda p, x: jnp.tanh(relu_net(p, x)), params, X)
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match="batch_size must be a whole number of examples"):
            ntk_trace_saliency(relu_net, params, X, batch_size=wrong)


@pytest.mark.parametrize("score", [path_exclusion, ntk_trace_saliency])
def test_scores_of_integers_are_those_of_the_numbers_that_the_network_makes_of_them(score, relus):
    params, X = relus
    whole = np.round(np.asarray(X) * 3).astype(np.int32)

    def net(p, x):
        return relu_net(p, x.astype(FLOAT))

    jax.tree.map(np.testing.assert_array_equal, score(net, params, whole), score(relu_net, params, whole.astype(FLOAT)))


@pytest.mark.parametrize("score", [path_exclusion, ntk_trace_saliency])
def test_scores_of_inputs_prune_in_several_steps(score, relus):
    params, X = relus
    result = pk.prune(lambda p: score(relu_net, p, X), params, density=0.5, steps=2)
    assert (result.kept, result.total) == (18, 36)
