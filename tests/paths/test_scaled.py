"""Scaled path polynomials against float64, where it holds the values, and against logarithms where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.network import read
from pkjax.paths.exponents import NOTHING, Scaled, normalized, power_of_two, shifted
from pkjax.paths.magnitudes import magnitudes
from pkjax.pruning.scores import synflow_l2_scaled, synflow_scaled
from pkjax.pruning.scores.data_free import _scaled_scores

VARIANTS = ("synflow", "paper", "conserved", "released")


def score(name, net, params, x):
    if name == "synflow":
        return synflow_scaled(net, params, x)
    return synflow_l2_scaled(net, params, x, variant=name)


def residual(params, x):
    """Blocks that double the signal or not, with biases, constants and shortcuts: exponents that differ on a sum."""
    for p in params:
        x = x + jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"] + 0.5
    return x


def draw(depth, width, gain, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [{name: jnp.asarray(gain * rng.normal(size=size), dtype) for name, size in
             {"a": (width, width), "bias": (width,), "b": (width, width)}.items()} for _ in range(depth)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_scaled_numbers_are_exact(dtype):
    array = jnp.asarray([3.0, -0.75, 0.0], dtype)
    for by in (-100, -30, 0, 1, 100):
        held = normalized(Scaled(shifted(array, jnp.asarray(by)), jnp.asarray(5)), skip_zeros=True)
        assert 1 <= float(jnp.abs(held.mantissa).max()) < 2
        assert int(held.exponent) == 5 + by + 1
        np.testing.assert_array_equal(shifted(held.mantissa, held.exponent - 5 - by), array)
    zero = Scaled(jnp.zeros(3, dtype), jnp.asarray(5))
    assert int(normalized(zero, skip_zeros=True).exponent) == NOTHING
    assert int(normalized(zero, skip_zeros=False).exponent) == 5
    bounds = jnp.finfo(dtype)
    for e in (bounds.minexp, -3, 0, 7, bounds.maxexp - 1):
        assert float(power_of_two(int(e), dtype)) == 2.0 ** int(e)
    assert float(power_of_two(int(bounds.maxexp), dtype)) == np.inf
    assert float(power_of_two(-(1 << 25), dtype)) == 0


def test_a_mantissa_with_its_exponent_is_the_polynomial_and_so_are_derivatives():
    params, x = draw(3, 4, 1.0, jnp.float64), jnp.ones((2, 4))
    phi = jax.tree.map(abs, params)
    for q in (0, 1, 2, 3):
        mantissa, exponent = pk.paths.scaled_polynomial(residual, phi, x, q=q)
        want = pk.paths.polynomial(residual, phi, x, q=q)
        np.testing.assert_allclose(np.ldexp(mantissa, exponent), want, rtol=1e-13)
        assert 1 <= float(mantissa.max()) < 2

        def total(phi, q=q):
            mantissa, exponent = pk.paths.scaled_polynomial(residual, phi, x, q=q)
            return mantissa.sum(), exponent
        slope = jax.grad(total, has_aux=True)(phi)[0]
        true = jax.grad(lambda phi, q=q: pk.paths.polynomial(residual, phi, x, q=q).sum())(phi)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.ldexp(a, int(exponent)), b, rtol=1e-12), slope, true)  # noqa: B023
    with pytest.raises(ValueError, match="whole number"):
        pk.paths.scaled_polynomial(residual, phi, x, q=1.5)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_of_a_deep_network_in_float32_are_those_of_float64(name):
    """Six blocks of gain 10⁴: R_1 is about 1e57, and R_2 its square."""
    scored = jax.jit(lambda p, x: score(name, residual, p, x))
    narrow, less = scored(draw(6, 6, 1e4, jnp.float32), jnp.ones((1, 6), jnp.float32))
    wide, more = scored(draw(6, 6, 1e4, jnp.float64), jnp.ones((1, 6)))
    assert int(less) > 64
    top = max(float(b.max()) for b in jax.tree.leaves(wide))
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        # The last biases carry so little of what the weights do that the ratio alone is beyond float32.
        np.testing.assert_allclose(np.ldexp(np.asarray(a, np.float64), int(less) - int(more)), b, rtol=1e-4,
                                   atol=1e-35 * top)


def test_a_small_program_is_right_or_says_that_it_is_not_sure():
    """Weights near 1 by their largest entries, many far below it, some layers sparse: one program for all draws."""
    x, outcomes = jnp.ones((1, 4), jnp.float32), set()
    for seed in range(24):
        rng = np.random.default_rng(seed)

        def leaf(size, rng=rng):
            value = rng.normal(size=size) * 10.0 ** rng.uniform(-9 * rng.integers(2), 0, size)
            value *= rng.random(size) < 0.7
            value[(0,) * len(size)] = 1.0
            return jnp.asarray(value / np.abs(value).max() * 2.0 ** rng.uniform(-15, 1), jnp.float32)
        params = [{"a": leaf((4, 4)), "bias": leaf((4,)), "b": leaf((4, 4))} for _ in range(5)]
        network = read(residual, params, x, paths=True)
        known = magnitudes(network, x, 1)
        assert known.lean
        outcomes.add(bool(_scaled_scores(network, x, known=known, power=1, q=1, pool="sum")[2]))
        scores, exponent = synflow_scaled(residual, params, x)
        wide, more = synflow_scaled(residual, jax.tree.map(lambda p: p.astype(jnp.float64), params), jnp.ones((1, 4)))
        top = max(float(b.max()) for b in jax.tree.leaves(wide))
        for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(wide), strict=True):
            np.testing.assert_allclose(np.ldexp(np.asarray(a, np.float64), int(exponent) - int(more)), b, rtol=1e-4,
                                       atol=1e-6 * top)
    assert outcomes == {True} or outcomes == {True, False}


def test_a_chain_far_below_its_weights_is_found_by_the_careful_program():
    """Largest entries meet zeros: what is left is 2^−16 a layer, which no bound on largest entries foresees."""
    layer = np.array([[2.0, 0.0], [0.0, 2.0**-14]])
    params = [jnp.asarray(layer * keep, jnp.float32) for keep in ([[0, 1], [1, 1]], *[np.ones((2, 2))] * 6)]

    def net(p, x):
        for kernel in p:
            x = x @ kernel
        return x
    x = jnp.ones((1, 2), jnp.float32)
    network = read(net, params, x, paths=True)
    known = magnitudes(network, x, 1)
    assert known.lean
    assert not bool(_scaled_scores(network, x, known=known, power=1, q=1, pool="sum")[2])
    scores, exponent = synflow_scaled(net, params, x)
    assert float(np.log2(np.float64(scores[5][1, 1])) + int(exponent)) == pytest.approx(-14 * 7)


def test_a_trace_beyond_float32_has_its_logarithm():
    params = draw(6, 6, 1e4, jnp.float32)
    x = jnp.ones((1, 6), jnp.float32)
    got = pk.path_kernel.trace(residual, params, x, log=True)
    wide = pk.path_kernel.trace(residual, jax.tree.map(lambda p: p.astype(jnp.float64), params), jnp.ones((1, 6)))
    assert float(wide) > 1e39
    assert float(got) == pytest.approx(float(jnp.log(wide)), rel=1e-6)


def test_zero_biases_count_in_a_trace_and_weigh_nothing_in_scores():
    """Twelve layers of tiny weights: the last bias alone makes the trace, and scores keep their range."""
    def net(params, x):
        for p in params:
            x = jax.nn.relu(x @ p["a"] + p["bias"])
        return x
    params = [{"a": p["a"], "bias": jnp.zeros(5, jnp.float32)} for p in draw(12, 5, 1e-5, jnp.float32)]
    x = jnp.ones((1, 5), jnp.float32)
    assert float(pk.path_kernel.trace(net, params, x, log=True)) == pytest.approx(np.log(5), rel=1e-6)
    scores, exponent = synflow_scaled(net, params, x)
    wide, more = synflow_scaled(net, jax.tree.map(lambda p: p.astype(jnp.float64), params), jnp.ones((1, 5)))
    for a, b in zip(scores, wide, strict=True):
        np.testing.assert_allclose(np.ldexp(np.asarray(a["a"], np.float64), int(exponent) - int(more)), b["a"],
                                   rtol=1e-5)
        assert not a["bias"].any()


@pytest.mark.parametrize("function", [pk.path_kernel.trace, synflow_scaled], ids=["trace", "synflow"])
def test_what_is_compiled_grows_as_the_depth_does(function):
    """XLA fuses nothing that exponents come from into the layers after it: three times the depth, not nine."""
    def deep(p, x):
        for kernel in p:
            x = jax.nn.relu(x @ kernel)
        return x

    def size(depth):
        params = [jnp.ones((2, 2), jnp.float32)] * depth
        compiled = jax.jit(lambda p: function(deep, p, jnp.ones((1, 2), jnp.float32))).lower(params).compile()
        return compiled.as_text().count("\n")
    assert size(18) < 3.5 * size(6)


@pytest.mark.parametrize("size", [1.0, 37.0, 3000.0])
def test_constants_of_any_size_leave_the_small_program_sure_and_right(size):
    """Constants above 4, such as the scales of a normalisation, need no second program."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(5, 5)) / 3, jnp.float32) for _ in range(12)]
    scale, x = jnp.asarray(rng.uniform(0.5, 1, 5) * size, jnp.float32), jnp.ones((1, 5), jnp.float32)

    def net(p, x):
        for kernel in p:
            x = x + jnp.maximum((x * scale.astype(x.dtype)) @ kernel, 0)
        return x
    network = read(net, params, x, paths=True)
    known = magnitudes(network, x, 1)
    assert known.lean
    scores, exponent, sure = _scaled_scores(network, x, known=known, power=1, q=1, pool="sum")
    assert bool(sure)
    exact, more = synflow_scaled(net, [p.astype(jnp.float64) for p in params], jnp.ones((1, 5)))
    for a, b in zip(scores, exact, strict=True):
        np.testing.assert_allclose(np.ldexp(np.asarray(a, np.float64), int(exponent) - int(more)), b, rtol=1e-5)
