"""Every function of the path kernel reads its network afresh, and compiles once for equal ones."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from pkjax import path_kernel as pk
from pkjax import paths
from pkjax.network import read

from tests.cases import checking_leaks, compilations, normal
from tests.path_kernel.oracle import flat

KEY = jax.random.key(0)


def gram(pairs):
    z = flat(pairs.vectors, len(pairs.values))
    return (z.T * pairs.values) @ z


TRACED = {
    "trace": pk.trace,
    "log": lambda *a, **o: pk.trace(*a, log=True, **o),
    "matvec": lambda f, p, x, **o: ravel_pytree(pk.matvec(f, p, x, **o)(p))[0],
    "dense": pk.dense,
    "effective_rank": lambda *a, **o: pk.effective_rank(*a, key=KEY, probes=4, **o),
    "effective_rank_estimate": lambda *a, **o: pk.effective_rank_estimate(*a, key=KEY, probes=4, **o).value,
    "density": lambda *a, **o: pk.density(*a, key=KEY, probes=2, depth=3, points=5, **o).nodes.max(),
    "gated_trace": pk.gated_trace,
}
SOLVED = {
    "count_above": lambda *a, **o: pk.count_above(*a, [0.1, 0.5, 2.0], **o),
    "eigenvalues": lambda *a, **o: pk.eigenvalues(*a, k=3, **o),
    "bounded_eigenvalues": lambda *a, **o: pk.bounded_eigenvalues(*a, k=3, method="counting", **o).values,
    "eigenpairs": lambda *a, **o: gram(pk.eigenpairs(*a, k=4, method="lanczos", tolerance=1e-10, **o)),
}
CALLS = TRACED | SOLVED
WEIGHTS = {"a": normal(0, (3, 2)), "b": normal(1, (2, 2))}
ONES = jnp.ones((1, 3))


def net(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def scaled_by(constant):
    return lambda p, x: net(p, x) * constant


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_what_a_function_closes_over_may_change_between_calls(name):
    state = {"number": 1.0, "array": jnp.ones(2)}

    def changing(p, x):
        return state["number"] * net(p, x) * state["array"]
    before = CALLS[name](changing, WEIGHTS, ONES)
    state |= {"number": 10.0, "array": jnp.array([1.0, 0.1])}
    after = CALLS[name](changing, WEIGHTS, ONES)
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0
    close(after, CALLS[name](lambda p, x: 10.0 * net(p, x) * jnp.array([1.0, 0.1]), WEIGHTS, ONES))


@pytest.mark.parametrize("name", CALLS)
def test_one_program_serves_other_closures_weights_masks_constants_and_inputs(name):
    # Masks that keep all of a leaf, a part, or nothing are alike to the compiler; of a network without a path it makes
    # the careful program, too.
    for seed, kept in enumerate([jnp.zeros((2, 2), bool), jnp.ones((2, 2), bool), jnp.eye(2, dtype=bool)]):
        constant, weights = jnp.full(2, 1.0 + seed), jax.tree.map(lambda v, seed=seed: v + seed, WEIGHTS)
        masks, x = {"a": jnp.ones((3, 2), bool).at[0, 0].set(False), "b": kept}, (1.0 + seed) * ONES
        with compilations() as count:
            CALLS[name](scaled_by(constant), weights, x, masks=masks)
    assert count() == 0


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_pinned_after_the_call(name):
    constant, weights = jnp.full(2, 3.0), {n: v + 1.0 for n, v in WEIGHTS.items()}
    kept = [weakref.ref(v) for v in (constant, *weights.values())]
    CALLS[name](scaled_by(constant), weights, ONES)
    del constant, weights
    gc.collect()
    assert [r() for r in kept] == [None] * 3


@pytest.mark.parametrize("name", CALLS)
def test_no_tracer_leaks(name):
    with checking_leaks():
        CALLS[name](scaled_by(jnp.ones(2)), WEIGHTS, ONES)


@pytest.mark.parametrize("name", TRACED)
def test_an_ensemble_of_weights_is_one_program(name):
    ensemble = jax.tree.map(lambda v: jnp.stack([v, v + 1]), WEIGHTS)
    mapped = jax.jit(jax.vmap(lambda p: TRACED[name](net, p, ONES)))(ensemble)
    for i in range(2):
        close(mapped[i], TRACED[name](net, jax.tree.map(lambda v, i=i: v[i], ensemble), ONES))


@pytest.mark.parametrize("name", CALLS)
def test_tokens_are_one_hot_vectors_and_bytes_are_numbers(name):
    tokens = jnp.array([1])
    close(CALLS[name](lambda p, t: jax.nn.relu(p["a"][t]) @ p["b"], WEIGHTS, tokens),
          CALLS[name](net, WEIGHTS, jax.nn.one_hot(tokens, 3)))
    pixels = jnp.array([[255, 51, 0]], jnp.uint8)
    close(CALLS[name](lambda p, x: net(p, x.astype(p["a"].dtype) / 255), WEIGHTS, pixels),
          CALLS[name](lambda p, x: net(p, x / 255), WEIGHTS, pixels.astype(float)))


@pytest.mark.parametrize("name", CALLS)
def test_narrow_numbers_are_computed_with_in_float32(name):
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), WEIGHTS)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), narrow)
    out = CALLS[name](net, narrow, ONES.astype(jnp.bfloat16))
    assert out.dtype != jnp.bfloat16
    np.testing.assert_array_equal(out, CALLS[name](net, wide, ONES.astype(jnp.float32)))


@pytest.mark.parametrize("name", ["trace", "gated_trace", "eigenvalues"])
@pytest.mark.parametrize(("fn", "x"), [
    (lambda p, x: net(p, x).reshape(-1, 1, 2, 1), ONES),
    (lambda p, x: {"logits": net(p, x)}, ONES),
    (lambda p, x: net(p, jnp.concatenate([x["left"], x["right"][:, :, 0]], 1)),
     {"left": ONES[:, :1], "right": ONES[:, 1:, None]}),
    (read(net, WEIGHTS, ONES).fn, ONES),
], ids=["output (N, H, W, C)", "tree of one output", "tree of inputs", "program"])
def test_other_forms_of_a_network_have_the_same_kernel(name, fn, x):
    close(CALLS[name](fn, WEIGHTS, x), CALLS[name](net, WEIGHTS, ONES))


def test_outputs_of_one_number_an_example_are_taken():
    close(pk.trace(lambda p, x: net(p, x)[:, 0], WEIGHTS, ONES), pk.trace(lambda p, x: net(p, x)[:, :1], WEIGHTS, ONES))


@pytest.mark.parametrize("name", CALLS)
def test_networks_that_join_examples_are_refused(name):
    with pytest.raises(ValueError, match="each row of the output must depend on its own example alone"):
        CALLS[name](lambda p, x: net(p, x - x.mean(0)), WEIGHTS, ONES)


def test_gated_trace_of_tokens_is_that_of_one_hot_vectors():
    p = {"e": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "w": jnp.ones((2, 1))}
    tokens = jnp.array([[0, 1], [2, 2]])
    # Paths (position, row, feature): Σ over positions of 2 (weights of 1) and the row's squared length.
    squares = (np.asarray(p["e"])[np.asarray(tokens)] ** 2).sum((1, 2))
    assert 4 * 2 + squares.sum() == 160
    close(pk.gated_trace(lambda p, t: p["e"][t].sum(1) @ p["w"], p, tokens), 160)


def test_a_slice_of_scanned_weights_may_be_used_again():
    def scanned(w, x):
        return jax.lax.scan(lambda h, m: (jax.nn.relu(h @ m), None), x, w)[0] @ w[0]

    def unrolled(w, x):
        for m in w:
            x = jax.nn.relu(x @ m)
        return x @ w[0]
    w, x = normal(3, (3, 2, 2)), jnp.ones((1, 2))
    jtv = np.asarray(paths.factorize(unrolled, w, x).jtv)
    close(pk.trace(scanned, w, x), np.sum(jtv**2))
    close(pk.dense(scanned, w, x), jtv.T @ jtv)
    assert np.sum(jtv**2) > 1.01 * jax.grad(lambda phi: paths.polynomial(unrolled, phi, x, q=2).sum())(w**2).sum()


def test_empty_leaves_scans_of_no_step_and_integers_among_the_parameters_are_taken():
    p = {"count": jnp.array(2), "none": jnp.zeros((0, 3, 3)), "order": jnp.array([2, 0, 1])} | WEIGHTS

    def odd(p, x):
        x = jax.lax.scan(lambda h, m: (h @ m, None), x[:, p["order"]], p["none"])[0]
        return net(p, x) * p["count"].astype(x.dtype)

    def plain(p, x):
        return 2 * net(p, x)
    for name in ("trace", "log", "dense", "gated_trace", "count_above", "eigenvalues", "effective_rank"):
        close(CALLS[name](odd, p, ONES), CALLS[name](plain, WEIGHTS, ONES))
    product = pk.matvec(odd, p, ONES)(p)
    assert {n: v.dtype for n, v in product.items()} == {n: v.dtype for n, v in p.items()}
    assert not product["order"].any()
    pairs = pk.eigenpairs(odd, p, ONES, k=2)
    assert jax.tree.map(jnp.shape, pairs.vectors) == jax.tree.map(lambda v: (2, *v.shape), p)


def test_start_values_are_checked_as_the_signals_that_the_network_takes():
    with pytest.raises(ValueError, match="x must be non-negative"):
        pk.trace(lambda p, x: net(p, x.astype(float)), WEIGHTS, jnp.array([[-1, 0, 2]]))
    with pytest.raises(ValueError, match="x must be a batch of one"):
        pk.eigenvalues(lambda p, t: p["a"][t], WEIGHTS, jnp.array([0, 1]), k=1)
