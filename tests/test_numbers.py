"""Every public function says which of its numbers are none, that nothing is left, and what leaves its type's range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

from tests.cases import FLOAT, normal

KEY = jax.random.key(0)
WEIGHTS = {"a": normal(0, (3, 4)), "b": normal(1, (4,)), "c": normal(2, (4, 2))}
X = jnp.abs(normal(3, (3, 3))) + 0.1
HOLES = jnp.asarray([1.0, np.nan], FLOAT)
NOTHING = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), WEIGHTS)
SINGLE = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (WEIGHTS, X))


def net(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]


def ones(X):
    return jnp.ones_like(X[:1])


# (network, parameters, examples, **masks) → the result
MASKED = {
    "polynomial": lambda f, p, X, **o: pk.paths.polynomial(f, jax.tree.map(jnp.abs, p), X, q=2, **o),
    "scaled_polynomial": lambda f, p, X, **o: pk.paths.scaled_polynomial(f, jax.tree.map(jnp.abs, p), X, q=2, **o),
    "gates": pk.paths.gates,
    "log_count": lambda f, p, X, **o: pk.paths.log_count(f, p, X[:1], **o),
    "factorize": lambda f, p, X, **o: pk.paths.factorize(f, p, X, **o).values,
    "trace": lambda f, p, X, **o: pk.path_kernel.trace(f, p, ones(X), **o),
    "log trace": lambda f, p, X, **o: pk.path_kernel.trace(f, p, ones(X), log=True, **o),
    "matvec": lambda f, p, X, **o: pk.path_kernel.matvec(f, p, ones(X), **o)(p),
    "dense": lambda f, p, X, **o: pk.path_kernel.dense(f, p, ones(X), **o),
    "count_above": lambda f, p, X, **o: pk.path_kernel.count_above(f, p, ones(X), [0.5], **o),
    "eigenvalues": lambda f, p, X, **o: pk.path_kernel.eigenvalues(f, p, ones(X), k=2, **o),
    "bounded_eigenvalues": lambda f, p, X, **o: pk.path_kernel.bounded_eigenvalues(f, p, ones(X), k=2, **o).values,
    "eigenpairs": lambda f, p, X, **o: pk.path_kernel.eigenpairs(f, p, ones(X), k=2, **o).values,
    "effective_rank": lambda f, p, X, **o: pk.path_kernel.effective_rank(f, p, ones(X), key=KEY, probes=2, **o),
    "density": lambda f, p, X, **o: pk.path_kernel.density(f, p, ones(X), key=KEY, probes=1, depth=2, **o).nodes,
    "gated_trace": pk.path_kernel.gated_trace,
    "data_factor": pk.data_factor,
    "ntk": pk.ntk,
    "ntk_plan": lambda f, p, X, **o: pk.ntk_plan(f, p, X, **o).operations,
    "ntk_trace": pk.ntk_trace,
    "ntk_matvec": lambda f, p, X, **o: pk.ntk_matvec(f, p, X, **o)(jnp.ones((len(X), 2), X.dtype)),
    "ntk_eigenpairs": lambda f, p, X, **o: pk.ntk_eigenpairs(f, p, X, k=1, **o).values,
    "ntk_trace_estimate": lambda f, p, X, **o: pk.ntk_trace_estimate(f, p, X, key=KEY, probes=2, **o).value,
    "ntk_frobenius": lambda f, p, X, **o: pk.ntk_frobenius(f, p, X, key=KEY, probes=2, **o).value,
    "ntk_effective_rank": lambda f, p, X, **o: pk.ntk_effective_rank(f, p, X, key=KEY, probes=2, **o).value,
    "ntk_density": lambda f, p, X, **o: pk.ntk_density(f, p, X, key=KEY, probes=1, depth=2, **o).nodes,
    "path_exclusion": pk.path_exclusion,
    "ntk_trace_saliency": pk.ntk_trace_saliency,
    "connectivity": lambda f, p, X, **o: pk.connectivity(f, p, ones(X) * X[:1], **o).log10_effective_paths,
    "prune again": lambda f, p, X, **o: pk.prune(lambda q: pk.synflow(f, q, X[:1]), p, density=0.5, **o).kept,
    "analyze": lambda f, p, X, **o: pk.analyze(f, p, X, **o).trace_pi,
    "linearize": lambda f, p, X, **o: pk.dynamics.linearize(f, p, X, **o)(p),
}
CALLS = MASKED | {
    "synflow": lambda f, p, X: pk.synflow(f, p, X[:1]),
    "synflow_l2": lambda f, p, X: pk.synflow_l2(f, p, X[:1]),
    "snip": lambda f, p, X: pk.snip(lambda q: (f(q, X) ** 2).mean(), p),
    "grasp": lambda f, p, X: pk.grasp(lambda q: (f(q, X) ** 2).mean(), p),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_that_keep_nothing_are_one_error(name):
    with pytest.raises(ValueError, match="masks keep no parameter: all 24 are masked"):
        MASKED[name](net, WEIGHTS, X, masks=NOTHING)


@pytest.mark.parametrize("name", CALLS)
def test_parameters_that_are_not_finite_are_named(name):
    with pytest.raises(ValueError, match="params leaf 'c' holds 1 values that are NaN or infinite"):
        CALLS[name](net, {**WEIGHTS, "c": WEIGHTS["c"].at[0, 0].set(jnp.nan)}, X)


@pytest.mark.parametrize("score", [pk.magnitude, lambda p: pk.random(p, key=KEY),
                                   lambda p: pk.prune(pk.magnitude, p, density=0.5)])
def test_functions_of_parameters_alone_name_them_too(score):
    with pytest.raises(ValueError, match="params leaf 'b' holds 4 values"):
        score({**WEIGHTS, "b": WEIGHTS["b"] * jnp.inf})


@pytest.mark.parametrize("name", ["gates", "log_count", "trace", "ntk", "connectivity", "snip", "synflow",
                                  "prune again"])
def test_arrays_that_a_network_holds_are_named_where_they_are_not_finite(name):
    with pytest.raises(ValueError, match=r"closes over an array float..\[(1, )?2\] that holds 1 values"):
        CALLS[name](lambda p, x: net(p, x) * HOLES, WEIGHTS, X)


def test_an_array_of_missing_values_that_never_come_through_is_no_error():
    def filled(p, x):
        return net(p, x) * jnp.where(jnp.isnan(HOLES), jnp.zeros((), FLOAT), HOLES)
    assert pk.path_kernel.trace(filled, WEIGHTS, ones(X)) > 0


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_without_examples_is_an_error(name):
    with pytest.raises(ValueError, match=r"holds no example|X must be a batch of shape \(N, \*input\) with N >= 1"):
        CALLS[name](net, WEIGHTS, X[:0])


LARGE = ["polynomial", "trace", "matvec", "dense", "effective_rank", "density", "gated_trace", "ntk", "ntk_trace",
         "ntk_matvec", "ntk_eigenpairs", "ntk_trace_estimate", "ntk_frobenius", "ntk_effective_rank", "ntk_density",
         "ntk_trace_saliency", "snip", "grasp", "analyze", "linearize"]
SMALL = ["polynomial", "dense", "effective_rank", "gated_trace", "ntk", "ntk_trace", "ntk_matvec", "linearize"]


@pytest.mark.parametrize(("name", "size"), [*((n, 1e25) for n in LARGE), *((n, 1e-25) for n in SMALL)])
def test_numbers_outside_of_float32_are_an_error(name, size):
    weights, examples = SINGLE
    with pytest.raises(FloatingPointError, match=r"(float32|float64)"):
        CALLS[name](net, jax.tree.map(lambda leaf: leaf * jnp.float32(size), weights), examples)


@pytest.mark.parametrize("name", ["scaled_polynomial", "log trace", "path_exclusion", "connectivity", "prune again",
                                  "synflow", "synflow_l2"])
def test_what_keeps_exponents_aside_is_right_at_any_size_of_the_weights(name):
    weights, examples = SINGLE
    bare = {**weights, "b": jnp.zeros(4, jnp.float32)}
    for size in (1e25, 1e-25):
        result = CALLS[name](net, jax.tree.map(lambda leaf, size=size: leaf * jnp.float32(size), bare), examples)
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(result)]
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert any(leaf.any() for leaf in leaves)


def test_half_precision_overflows_nothing_silently():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (WEIGHTS, X))
    weights = jax.tree.map(lambda leaf: leaf * jnp.float16(1000), half[0])
    for name in ("polynomial", "ntk_matvec"):
        with pytest.raises(FloatingPointError, match="float16"):
            CALLS[name](net, weights, half[1])
    for name in ("trace", "gated_trace", "synflow"):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(CALLS[name](net, weights, half[1])))


@pytest.mark.parametrize(("depth", "size"), [(8, 1e6), (8, 1e-6), (3, 1e20), (3, 1e-20)])
def test_the_logarithm_of_the_trace_is_right_at_any_depth_and_size(depth, size):
    """Layers of one weight w: Tr Π = d w^(2(d − 1)); with 0 for biases, also what they carry."""
    def deep(p, x):
        for layer in p:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x
    layers = [{"kernel": jnp.full((1, 1), size, jnp.float32), "bias": jnp.zeros(1, jnp.float32)}] * depth
    x, w = jnp.ones((1, 1), jnp.float32), float(np.float32(size))

    def kernels(path, leaf):
        return leaf.ndim == 2
    of_kernels = math.log(depth) + 2 * (depth - 1) * math.log(w)
    log = pk.path_kernel.trace(deep, layers, x, trainable=kernels, log=True)
    assert float(log) == pytest.approx(of_kernels, rel=1e-4)
    # A bias of layer i ends after d − 1 − i more layers.
    terms = [2 * i * math.log(w) for i in range(depth)]
    everything = max(*terms, of_kernels)
    total = everything + math.log(sum(math.exp(t - everything) for t in [*terms, of_kernels]))
    assert float(pk.path_kernel.trace(deep, layers, x, log=True)) == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_signals_that_overflow_or_vanish_have_the_gates_of_those_that_do_not():
    weights, examples = SINGLE
    bare = {**weights, "b": jnp.zeros(4, jnp.float32)}

    def deep(p, x):
        x = jax.nn.leaky_relu(x @ p["a"] + p["b"], 0.5)
        x = jnp.maximum(x @ p["c"], x[:, :2])
        return jnp.maximum(x, x[:, ::-1] @ p["a"][:2, :2])
    at_one = pk.paths.gates(deep, {**bare, "c": bare["c"] * 1e-3}, examples)
    for size in (1e22, 1e-22):
        gates = pk.paths.gates(deep, {**bare, "a": bare["a"] * jnp.float32(size), "c": bare["c"] * 1e-3}, examples)
        assert len(gates) == len(at_one)
        assert (gates[0] == at_one[0]).all()
        assert (gates[0] != gates[0][:1, :1]).any()


def test_under_jit_a_trace_outside_of_its_type_is_infinite_or_zero_and_its_logarithm_right():
    weights, examples = SINGLE
    for size, value in ((1e25, np.inf), (1e-25, 0.0)):
        bare = {**weights, "b": jnp.zeros(4, jnp.float32)}
        scaled = jax.tree.map(lambda leaf, size=size: leaf * jnp.float32(size), bare)
        plainly, log = jax.jit(lambda p: [pk.path_kernel.trace(net, p, ones(examples), trainable=pk.kernels, log=log)
                                          for log in (False, True)])(scaled)
        assert plainly == value
        assert np.isfinite(log)


@pytest.mark.parametrize("name", ["scaled_polynomial", "trace", "log trace", "gated_trace", "connectivity",
                                  "count_above", "ntk", "synflow", "snip"])
def test_a_variance_of_0_without_epsilon_is_an_error(name):
    weights, examples = SINGLE
    with pytest.raises((FloatingPointError, ValueError), match=r"not finite|holds NaN or infinity"):
        CALLS[name](lambda p, x: net(p, x) * jax.lax.rsqrt(jnp.zeros(2, jnp.float32)), weights, examples)


def test_effective_paths_are_the_same_however_a_network_of_relu_is_scaled_unit_by_unit():
    """ReLU(c s) = c ReLU(s): with c into a unit and 1/c out of it no path's value changes."""
    weights, examples = SINGLE
    bare = {**weights, "b": jnp.zeros(4, jnp.float32)}
    counts = [CALLS["connectivity"](net, {**bare, "a": bare["a"] * c, "c": bare["c"] / c[:, None]}, examples)
              for c in (np.ones(4, np.float32), np.asarray([1e20, 1e-20, 1, 1e10], np.float32))]
    assert counts[0] == pytest.approx(counts[1], abs=1e-5)
