"""The path kernel's dual Gram and its traces against enumerated paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from pkjax import path_kernel as pk
from pkjax import paths

from tests.cases import cases, normal
from tests.oracles import enumerate_paths
from tests.path_kernel.oracle import KINDS, TIED, explicit, flat, ones, spectrum


@given(cases(kinds=KINDS))
@settings(max_examples=10, deadline=None)
def test_dual_gram_is_that_of_the_enumerated_jacobian(case):
    gram = explicit(case)
    scale = np.abs(gram).max()
    u = {n: np.random.default_rng(0).normal(size=v.shape) for n, v in case.params.items()}

    @jax.jit
    def everything(params, u):
        arguments = (case.apply, params, ones(case))
        return (pk.dense(*arguments, masks=case.masks), pk.trace(*arguments, masks=case.masks),
                pk.trace(*arguments, masks=case.masks, log=True), pk.matvec(*arguments, masks=case.masks)(u))

    matrix, trace, logarithm, product = everything(case.params, u)
    np.testing.assert_allclose(matrix, gram, atol=1e-10 * scale)
    np.testing.assert_allclose(trace, np.trace(gram), rtol=1e-10)
    np.testing.assert_allclose(np.exp(logarithm), np.trace(gram), rtol=1e-9, atol=0)  # -inf where no path is left
    np.testing.assert_allclose(flat(product)[0], gram @ flat(u)[0], atol=1e-9 * scale)


def test_a_weight_twice_on_a_path_adds_its_second_derivative_to_the_trace():
    gram = explicit(TIED)
    first = np.sum(flat(jax.grad(lambda phi: paths.polynomial(TIED.apply, phi, ones(TIED), q=2).sum())(
        {n: v**2 for n, v in TIED.params.items()})))
    assert np.trace(gram) > 1.001 * first
    np.testing.assert_allclose(pk.trace(TIED.apply, TIED.params, ones(TIED)), np.trace(gram), rtol=1e-12)
    np.testing.assert_allclose(pk.dense(TIED.apply, TIED.params, ones(TIED)), gram, atol=1e-11)
    pairs = pk.eigenpairs(TIED.apply, TIED.params, ones(TIED), k=18)
    np.testing.assert_allclose(pairs.values, spectrum(gram), atol=1e-11 * np.trace(gram))


@given(cases(kinds=KINDS))
@settings(max_examples=8, deadline=None)
def test_gated_trace_is_the_diagonal_part_of_the_ntk_trace(case):
    oracle = enumerate_paths(case.layers, case.params, case.X, case.masks)
    expected = np.sum(oracle.jvf**2 * (oracle.jtv**2).sum(1))
    total = jax.jit(lambda p, X: pk.gated_trace(case.apply, p, X, masks=case.masks))(case.params, case.X)
    np.testing.assert_allclose(total, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("leaves", ["i", "h", "o", "ihob"])
def test_gated_trace_over_leaves_of_a_recurrent_network_is_that_over_enumerated_paths(leaves):
    def net(p, x):
        h = jnp.zeros((x.shape[0], 2), x.dtype)
        for t in range(x.shape[1]):
            h = jax.nn.relu(x[:, t] @ p["i"] + h @ p["h"] + p["b"])
        return h @ p["o"]

    w = {"i": normal(0, (3, 2)), "h": normal(1, (2, 2)), "o": normal(2, (2, 1)), "b": jnp.zeros(2)}
    X = normal(3, (2, 3, 3))
    factors = paths.factorize(net, w, X)
    names = [name for name in sorted(w) for _ in range(w[name].size)]
    slopes = factors.jtv[:, np.isin(names, list(leaves))]
    want = np.sum(factors.jvf**2 * (slopes**2).sum(1))
    np.testing.assert_allclose(pk.gated_trace(net, w, X, trainable={n: n in leaves for n in w}), want, rtol=1e-10)


def test_bad_input_of_the_kernel_is_named():
    net, w = (lambda p, x: x @ p["a"]), {"a": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="batch of one"):
        pk.trace(net, w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="non-negative"):
        pk.trace(net, w, -jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        pk.trace(net, {"a": w["a"] * jnp.nan}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="tree structure"):
        pk.matvec(net, w, jnp.ones((1, 3)))({"b": w["a"]})


def test_the_trace_through_pooled_convolutions_is_counted_tap_by_tap():
    # Large enough for the fused products of jaxlib 0.10 on processors, which are wrong for ones that it knows of.
    def net(w, x):
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return lax.reduce_window(y, np.float32(0), lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    ones = jnp.ones((1, 28, 28, 1), np.float32)
    taps = (28 + 2 * 27)**2                          # places at which a tap of the kernel meets the image
    for _ in range(2):
        assert pk.trace(net, jnp.asarray(normal(0, (3, 3, 1, 8)), np.float32), ones) == 8 * taps
