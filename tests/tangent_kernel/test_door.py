"""Functions of Θ and A read a network afresh, compile it once, and hold on to nothing."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

from tests.cases import checking_leaks, compilations, normal

lax = jax.lax
KEY = jax.random.key(3)
V = normal(9, (4, 2))
CALLS = {
    "ntk": pk.ntk,
    "ntk by Jacobians": lambda f, p, X, **o: pk.ntk(f, p, X, engine="jacobian", **o),
    "ntk in tiles": lambda f, p, X, **o: pk.ntk(f, p, X, tile=3, **o),
    "ntk_trace": pk.ntk_trace,
    "ntk_matvec": lambda f, p, X, **o: pk.ntk_matvec(f, p, X, **o)(V),
    "ntk_eigenpairs": lambda f, p, X, **o: pk.ntk_eigenpairs(f, p, X, k=2, **o).values,
    "ntk_trace_estimate": lambda f, p, X, **o: pk.ntk_trace_estimate(f, p, X, key=KEY, **o).value,
    "ntk_frobenius": lambda f, p, X, **o: pk.ntk_frobenius(f, p, X, key=KEY, **o).value,
    "ntk_effective_rank": lambda f, p, X, **o: pk.ntk_effective_rank(f, p, X, key=KEY, **o).value,
    "ntk_density": lambda f, p, X, **o: pk.ntk_density(f, p, X, key=KEY, **o).nodes,
    "data_factor": pk.data_factor,
    "linearize": lambda f, p, X, **o: pk.dynamics.linearize(f, p, X, **o)(jax.tree.map(lambda v: v + 1, p)),
    "weight_change": lambda f, p, X, **o: pk.dynamics.weight_change(f, p, X, V, **o)["a"],
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]


@pytest.fixture(scope="module")
def case():
    params = {"a": normal(0, (3, 5)), "b": normal(1, (5,)), "c": normal(2, (5, 2))}
    return params, normal(3, (4, 3))


def scaled(scale):
    return lambda p, x: scale * mlp(p, x)


@calls
def test_a_number_that_changes_between_two_calls_is_read_anew(call, case):
    params, X = case
    scale = 1.0

    def net(p, x):
        return jax.nn.relu(x @ p["a"] * scale + p["b"]) @ p["c"]

    call(net, params, X)
    scale = 3.0
    np.testing.assert_array_equal(call(net, params, X),
                                  call(lambda p, x: jax.nn.relu(x @ p["a"] * 3.0 + p["b"]) @ p["c"], params, X))


@calls
def test_another_closure_other_constants_weights_masks_and_inputs_compile_nothing(call, case):
    params, X = case
    masks = [jax.tree.map(lambda p, n=n: normal(n, p.shape) > -0.7, params) for n in (11, 12)]
    other = jax.tree.map(lambda p: np.asarray(p) * 1.5, params)
    scales, Y = (jnp.array(2.0), jnp.array(0.5)), np.asarray(X) + 1
    for options in ({}, {"masks": 0}):
        first, second = ({k: masks[n] for k in options} for n in (0, 1))
        jax.block_until_ready(call(scaled(scales[0]), params, X, **first))
        with compilations() as count:
            jax.block_until_ready(call(scaled(scales[1]), other, Y, **second))
        assert count() == 0


@calls
def test_nothing_outlives_the_call(call, case):
    params, X = jax.tree.map(lambda v: v + 0, case)
    table = jnp.full((2,), 2.0)
    call(scaled(table), params, X)
    watched = [weakref.ref(leaf) for leaf in (table, *jax.tree.leaves(params), X)]
    del table, params, X
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)


@calls
def test_no_tracer_leaks(call, case):
    with checking_leaks():
        call(scaled(2.0), *case)


@pytest.mark.parametrize("name", ["ntk", "ntk_trace", "ntk_matvec", "data_factor", "weight_change"])
def test_under_jit_and_vmap_values_are_the_same(name, case):
    params, X = case
    want = CALLS[name](mlp, params, X)
    np.testing.assert_allclose(jax.jit(lambda p, X: CALLS[name](mlp, p, X))(params, X), want, rtol=1e-10)
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    np.testing.assert_allclose(jax.vmap(lambda p: CALLS[name](mlp, p, X))(stacked)[1], want, rtol=1e-10)


def test_examples_that_know_each_other_are_refused(case):
    params, X = case
    for net in (lambda p, x: mlp(p, x) - mlp(p, x).mean(0), lambda p, x: mlp(p, x).T,
                lambda p, x: mlp(p, x).mean(0, keepdims=True)):
        for call in (pk.ntk, pk.ntk_trace, pk.data_factor):
            with pytest.raises(ValueError, match=r"one row for each example|its own example alone"):
                call(net, params, X)


def test_outputs_come_back_in_their_shape(case):
    params, X = case
    theta, a = pk.ntk(mlp, params, X), pk.data_factor(mlp, params, X)
    image = (lambda p, x: mlp(p, x).reshape(-1, 1, 2, 1)), (1, 2, 1)
    single = (lambda p, x: mlp(p, x)[:, 1]), ()
    tree = (lambda p, x: {"logits": mlp(p, x)}), (2,)
    for net, shape in (image, single, tree):
        part = slice(1, 2) if shape == () else slice(None)
        np.testing.assert_allclose(pk.ntk(net, params, X), theta[:, :, part, part].reshape(4, 4, *shape, *shape),
                                   rtol=1e-12)
        np.testing.assert_allclose(pk.data_factor(net, params, X), a[part].reshape(*shape, 4, 4), rtol=1e-12)
        assert pk.ntk_matvec(net, params, X)(jnp.ones((4, *shape))).shape == (4, *shape)
        assert pk.ntk_eigenpairs(net, params, X, k=2).vectors.shape == (2, 4, *shape)


def test_inputs_are_trees_of_arrays(case):
    params, X = case
    pair = {"left": X, "right": (X + 1,)}

    def two(p, x):
        return mlp(p, x["left"]) + mlp(p, x["right"][0])

    def one(p, x):
        return mlp(p, x) + mlp(p, x + 1)

    np.testing.assert_allclose(pk.ntk(two, params, pair), pk.ntk(one, params, X), rtol=1e-12)
    np.testing.assert_allclose(pk.ntk_trace(two, params, pair), pk.ntk_trace(one, params, X), rtol=1e-12)
    assert pk.data_factor(two, params, pair).shape == (2, 4, 4)
    with pytest.raises(ValueError, match="with one such N"):
        pk.ntk_plan(two, params, {"left": X, "right": (X[:2],)})


def test_errors_name_the_line_and_the_scope_of_networks_on_trees_of_inputs():
    def net(w, x):
        with jax.named_scope("readout"):
            return jnp.tanh(x["left"] @ w) + x["right"] @ w

    line = net.__code__.co_firstlineno + 2
    inputs = {"left": normal(4, (4, 3)), "right": normal(5, (4, 3))}
    with pytest.raises(pk.NotPathNetworkError, match=rf"(?s)test_door\.py:{line} .*module: readout"):
        pk.data_factor(net, normal(0, (3, 2)), inputs)


def test_tokens_are_one_hot_vectors():
    params = {"e": normal(0, (3, 2)), "w": normal(1, (2, 2))}
    tokens = jnp.array([[0, 1], [2, 2]])
    vectors = jax.nn.one_hot(tokens, 3, dtype=params["e"].dtype)

    def lookup(p, t):
        return jax.nn.relu(p["e"][t].sum(1)) @ p["w"]

    def product(p, x):
        return jax.nn.relu((x @ p["e"]).sum(1)) @ p["w"]

    for call in (pk.ntk, pk.ntk_trace, pk.data_factor):
        np.testing.assert_allclose(call(lookup, params, tokens), call(product, params, vectors), rtol=1e-12)


def test_bytes_are_numbers(case):
    params, _ = case
    images = jnp.arange(12, dtype=jnp.uint8).reshape(4, 3) * 20

    def net(p, x):
        return mlp(p, x.astype(jnp.float64) / 255)

    for call in (pk.ntk, pk.ntk_trace, pk.data_factor):
        np.testing.assert_allclose(call(net, params, images), call(net, params, images.astype(jnp.float64)), rtol=1e-12)


def test_what_is_no_array_is_refused_by_name(case):
    params, X = case
    for bad in ("x", jax.ShapeDtypeStruct((4, 3), float)):
        with pytest.raises(ValueError, match=f"X .* holds a {type(bad).__name__}"):
            pk.ntk(mlp, params, bad)
    with pytest.raises(ValueError, match="leaf 'b' is a str"):
        pk.ntk(mlp, params | {"b": "w"}, X)
    with pytest.raises(ValueError, match=r"is a function.*\(apply_fn, params, x\)"):
        pk.ntk(mlp, mlp, X)


def test_complex_parameters_are_refused_and_integers_and_empty_leaves_are_no_parameters(case):
    params, X = case
    with pytest.raises(ValueError, match="params leaf 'a' is complex"):
        pk.ntk(lambda p, x: (x @ p["a"]).real @ p["c"], params | {"a": params["a"].astype(complex)}, X)
    more = params | {"steps": jnp.array(3), "none": jnp.zeros((0, 4))}
    np.testing.assert_array_equal(pk.ntk(mlp, more, X), pk.ntk(mlp, params, X))
    np.testing.assert_array_equal(pk.ntk_trace(mlp, more, X), pk.ntk_trace(mlp, params, X))


@pytest.mark.parametrize("engine", ["auto", "structured", "jacobian", "neural-tangents"])
def test_the_kernel_is_zero_where_no_entry_trains(case, engine):
    params, X = case
    empty = jnp.zeros((0, 2))
    np.testing.assert_array_equal(pk.ntk(lambda w, x: 2.0 * x[:, :1] * (1 + w.sum()), empty, X, engine=engine),
                                  np.zeros((4, 4, 1, 1)))
    assert pk.ntk_plan(lambda w, x: 2.0 * x[:, :1] * (1 + w.sum()), empty, X, engine=engine).tiles == 1
    masks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), params)
    for call in (pk.ntk, pk.ntk_plan):
        with pytest.raises(ValueError, match="masks keep no parameter"):
            call(mlp, params, X, X[:3], masks=masks, engine=engine)


@calls
def test_outputs_of_no_numbers_are_refused(call, case):
    params, X = case
    with pytest.raises(ValueError, match=r"one number or more for each example, but returned shape \(1, 0\)"):
        call(lambda p, x: mlp(p, x)[:, :0], params, X)


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_a_convolution_over_several_images_an_example_is_the_kernel_of_them_all(engine):
    def net(w, x):
        image = x.reshape(-1, 1, 1)
        return lax.conv_general_dilated(image, w, (1,), "VALID",
                                        dimension_numbers=("NWC", "WIO", "NWC")).reshape(x.shape)

    X, w = jnp.array([[1.0, 2.0]]), jnp.ones((1, 1, 1))
    np.testing.assert_array_equal(pk.ntk(net, w, X, engine=engine)[0, 0], [[1, 2], [2, 4]])
    assert pk.ntk_trace(net, w, X) == 5
