"""The path kernel of networks with frozen gates, against the Jacobian of their listed paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import path_kernel as pk
from pkjax.paths import NotPathNetworkError, frozen

from tests.cases import assert_close, normal
from tests.listed import jacobian, problem
from tests.path_kernel.oracle import flat, spectrum

KEY = jax.random.key(0)
EACH = pytest.mark.parametrize("name", ["gelu", "swiglu", "attention"])
CALLS = {
    "trace": pk.trace,
    "matvec": lambda *a, **o: pk.matvec(*a, **o)(a[1]),
    "dense": pk.dense,
    "gated_trace": pk.gated_trace,
    "count_above": lambda *a, **o: pk.count_above(*a, [0.1], **o),
    "eigenvalues": lambda *a, **o: pk.eigenvalues(*a, k=2, **o),
    "bounded_eigenvalues": lambda *a, **o: pk.bounded_eigenvalues(*a, k=2, **o).values,
    "eigenpairs": lambda *a, **o: pk.eigenpairs(*a, k=2, **o).values,
    "effective_rank": lambda *a, **o: pk.effective_rank(*a, key=KEY, probes=4, **o),
    "effective_rank_estimate": lambda *a, **o: pk.effective_rank_estimate(*a, key=KEY, probes=4, **o).value,
    "density": lambda *a, **o: pk.density(*a, key=KEY, probes=2, depth=3, points=5, **o).nodes,
}
MORE = {name: {"gates": "frozen"} if name == "gated_trace" else {"gates": "frozen", "reference": normal(3, (1, 3))}
        for name in CALLS}


@EACH
def test_kernel_is_that_of_the_listed_paths(name):
    net, w, X, held, listed = problem(name)
    J = np.concatenate([jacobian(paths, held) for paths in listed[0].lists.ravel()])
    gram, ones = J.T @ J, jnp.ones_like(X[:1])

    @jax.jit
    def everything(w, u):
        arguments, options = (net, w, ones), {"gates": "frozen", "reference": X[:1]}
        return (pk.dense(*arguments, **options), pk.trace(*arguments, **options),
                pk.trace(*arguments, log=True, **options), pk.matvec(*arguments, **options)(u))
    matrix, trace, logarithm, product = everything(w, w)
    assert_close(matrix, gram, 1e-10)
    assert_close(trace, np.trace(gram), 1e-10)
    assert_close(np.exp(logarithm), np.trace(gram), 1e-9)
    assert_close(flat(product)[0], gram @ flat(w)[0], 1e-9, 1e-10)
    values = pk.eigenvalues(net, w, ones, k=3, gates="frozen", reference=X[:1])
    assert_close(values, spectrum(gram)[:3], 1e-8)


@EACH
def test_gated_trace_is_the_diagonal_part_of_the_frozen_tangent_trace(name):
    net, w, X, held, listed = problem(name)
    want = 0.0
    for x, of in zip(np.asarray(X), listed, strict=True):
        for paths in of.lists.ravel():
            starts = np.array([1.0 if s is None else x[s] for *_, s in paths])
            want += np.sum(starts**2 * (jacobian(paths, held)**2).sum(1))
    assert_close(pk.gated_trace(net, w, X, gates="frozen"), want, 1e-10)
    assert_close(jax.jit(lambda w: pk.gated_trace(net, w, X, gates="frozen", batch_size=1))(w), want, 1e-10)


def test_coefficients_are_those_of_the_start_values_by_default():
    net, w, X, _, _ = problem("gelu")
    z = jnp.abs(X[:1])
    assert_close(pk.trace(net, w, z, gates="frozen"), pk.trace(frozen(net, w, z), w, z), 1e-12)
    several = pk.trace(net, w, z, gates="frozen", reference=X)
    assert_close(several, pk.trace(frozen(net, w, X), w, z), 1e-12)
    assert abs(float(several / pk.trace(net, w, z, gates="frozen")) - 1) > 1e-3


@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_frozen_gates(name):
    def chain(w, x):
        return jax.nn.silu(x @ w["a"]) @ w["c"]
    w = {"a": normal(0, (3, 4)), "c": normal(1, (4, 2))}
    ones = jnp.ones((1, 3))
    linear = frozen(chain, w, ones if name == "gated_trace" else MORE[name]["reference"])
    got = CALLS[name](chain, w, ones, **MORE[name])
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-9), got, CALLS[name](linear, w, ones))
    with pytest.raises(NotPathNetworkError, match='gates="frozen"'):
        CALLS[name](chain, w, ones)
    with pytest.raises(ValueError, match='gates must be None or "frozen", but got'):
        CALLS[name](chain, w, ones, gates="thawed")


@pytest.mark.parametrize("name", CALLS)
def test_relu_networks_are_what_they_were(name):
    def chain(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["c"]
    w = {"a": normal(0, (3, 4)), "c": normal(1, (4, 2))}
    jax.tree.map(np.testing.assert_array_equal, CALLS[name](chain, w, jnp.ones((1, 3))),
                 CALLS[name](chain, w, jnp.ones((1, 3)), **MORE[name]))


def test_a_reference_without_frozen_gates_is_refused():
    net, w, X, _, _ = problem("gelu")
    with pytest.raises(ValueError, match="reference is the input"):
        pk.trace(net, w, jnp.abs(X[:1]), reference=X)


def test_a_weight_twice_on_a_frozen_path_adds_its_second_derivative():
    def twice(w, x):
        return jax.nn.gelu(x @ w) @ w
    w, X = normal(0, (2, 2)), normal(1, (2, 2))
    # With the coefficients of x, the gradient of each path is taken by hand: w_ij a_j w_jk x_i.
    want = 0.0
    for x in np.asarray(X, np.float64):
        z = x @ np.asarray(w)
        a = np.asarray(jax.nn.gelu(z)) / z
        for i, j, k in np.ndindex(2, 2, 2):
            slope = np.zeros((2, 2))
            slope[i, j] += w[j, k]
            slope[j, k] += w[i, j]
            want += np.sum((slope * a[j] * x[i])**2)
    assert_close(pk.gated_trace(twice, w, X, gates="frozen"), want, 1e-10)


def test_narrow_numbers_are_computed_in_single_precision():
    net, w, X, _, _ = problem("attention")
    w16, z16 = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (w, jnp.ones_like(X[:1])))
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), w16)
    got = pk.trace(net, w16, z16, gates="frozen", reference=X[:1].astype(jnp.bfloat16))
    want = pk.trace(net, wide, z16.astype(jnp.float32), gates="frozen",
                    reference=X[:1].astype(jnp.bfloat16).astype(jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, 1e-5)
