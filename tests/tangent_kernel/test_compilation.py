"""Several cotangents pass a normalisation in float32 safe from XLA's fault, or with a warning that they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from pkjax import ntk, ntk_trace
from pkjax.analysis.frozen_kernel import _jacobian
from pkjax.network import read
from pkjax.tangent_kernel.compilation import _is_at_fault, is_curved

from tests.cases import drawn_like, normal


def net(p, x):
    """Large enough for the fault."""
    h = x @ p["in"]
    h = h - h.mean(-1, keepdims=True)
    return jnp.einsum("nle,ek->nk", h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True)) * p["scale"], p["out"])


PARAMS = drawn_like({"in": (128, 128), "scale": (128,), "out": (128, 65)})
X = normal(1, (3, 64, 128))
SINGLE = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (PARAMS, X))


@pytest.fixture(scope="module")
def jacobian():
    """In float64, which the fault does not meet."""
    blocks = jax.jit(jax.jacrev(net))(PARAMS, X)
    return {name: np.reshape(block, (3 * 65, -1)) for name, block in blocks.items()}


def test_outside_of_jit_the_kernel_its_trace_and_the_jacobian_are_those_of_float64(jacobian):
    whole = np.concatenate(list(jacobian.values()), 1)
    theta = (whole @ whole.T).reshape(3, 65, 3, 65).transpose(0, 2, 1, 3)
    bound = 1e-5 * np.abs(theta).max()
    for engine in ("structured", "jacobian"):
        np.testing.assert_allclose(ntk(net, *SINGLE, engine=engine), theta, rtol=1e-5, atol=bound)
    np.testing.assert_allclose(ntk_trace(net, *SINGLE), np.einsum("nnkk", theta), rtol=1e-5)
    for got, want in zip(_jacobian(read(net, *SINGLE), SINGLE[1]), map(jacobian.get, sorted(jacobian)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_within_jit_a_warning_says_what_to_do_and_networks_that_are_not_curved_have_none():
    if jax.default_backend() != "cpu" or not _is_at_fault():
        pytest.skip("XLA computes this rightly here")
    with pytest.warns(RuntimeWarning, match="set XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= before JAX starts"):
        jax.eval_shape(lambda p, x: ntk_trace(net, p, x), *SINGLE)
    jax.eval_shape(lambda p, x: ntk_trace(net, p, x), PARAMS, X)
    jax.eval_shape(lambda p, x: ntk_trace(lambda p, x: jax.nn.relu(x @ p["in"]).sum(1) @ p["out"], p, x), *SINGLE)


def test_the_search_for_the_fault_may_come_first_within_jit():
    want = _is_at_fault()
    _is_at_fault.cache_clear()

    def within(x):
        assert _is_at_fault() is want
        return x
    jax.eval_shape(within, X)


def test_curved_are_networks_of_less_than_double_precision_whose_signals_meet_or_bend():
    assert is_curved(read(net, *SINGLE))
    assert not is_curved(read(net, PARAMS, X))
    assert is_curved(read(lambda p, x: net(*jax.tree.map(lambda a: a.astype(jnp.float32), (p, x))).astype(x.dtype),
                          PARAMS, X))
    assert not is_curved(read(lambda p, x: jax.nn.relu(x @ p["in"]).sum(1) @ p["out"], *SINGLE))


def test_curved_are_networks_that_standardise_their_weights_not_those_whose_normalisation_holds_its_averages():
    def standardised(p, x):
        w = p["in"] - p["in"].mean(-1, keepdims=True)
        return jax.nn.relu(x @ (w * lax.rsqrt(jnp.square(w).mean(-1, keepdims=True)))).sum(1) @ p["out"]

    def averaged(p, x):
        h = jax.nn.relu((x @ p["in"] - p["mean"]) * (p["scale"] * lax.rsqrt(jnp.abs(p["variance"]))))
        return h.sum(1) @ p["out"]

    @jax.custom_jvp
    def ruled(w):
        return w * lax.rsqrt(jnp.square(w).mean(-1, keepdims=True))

    ruled.defjvp(lambda at, d: jax.jvp(lambda w: w / jnp.linalg.norm(w), at, d))
    averages = {"mean": SINGLE[0]["scale"], "variance": SINGLE[0]["scale"]}
    assert is_curved(read(standardised, *SINGLE))
    assert is_curved(read(lambda p, x: jax.nn.relu(x @ ruled(p["in"])).sum(1) @ p["out"], *SINGLE))
    assert not is_curved(read(averaged, SINGLE[0] | averages, SINGLE[1]))
