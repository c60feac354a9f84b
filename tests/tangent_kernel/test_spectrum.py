"""Spectral quantities of the tangent kernel from products alone, against the kernel itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import (
    ntk,
    ntk_density,
    ntk_effective_rank,
    ntk_eigenpairs,
    ntk_frobenius,
    ntk_matvec,
    ntk_trace,
    ntk_trace_estimate,
)
from pkjax.dynamics import linearize

from tests.cases import half_masks, named_network, normal


@functools.cache
def network(name="mlp"):
    apply_fn, params, x = named_network(name)
    x = jnp.concatenate([x, x[:4] * 1.3 + 0.1, x[::-1] - 0.2])
    theta = np.asarray(ntk(apply_fn, params, x, engine="jacobian"))
    n, _, k, _ = theta.shape
    return apply_fn, params, x, theta.transpose(0, 2, 1, 3).reshape(n * k, n * k)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 18, 100])
def test_products_do_not_depend_on_the_batch(batch_size):
    apply_fn, params, x, theta = network()
    v = normal(0, apply_fn(params, x).shape)
    got = ntk_matvec(apply_fn, params, x, batch_size=batch_size)(v)
    np.testing.assert_allclose(got.ravel(), theta @ v.ravel(), rtol=1e-11)


@pytest.mark.parametrize("batch_size", [2, None])
def test_products_of_a_network_with_backward_rules_are_those_of_its_jacobian(batch_size):
    @jax.custom_vjp
    def straight(w):
        return jnp.sign(w)

    straight.defvjp(lambda w: (straight(w), None), lambda _, d: (3 * d,))

    def net(w, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ straight(w)), None), x, length=2)[0]

    w, x, v = normal(0, (3, 3)), normal(1, (3, 3)), normal(2, (3, 3))
    rows = jax.jacrev(net)(w, x).reshape(9, 9)
    got = ntk_matvec(net, w, x, batch_size=batch_size)(v)
    np.testing.assert_allclose(got.ravel(), rows @ rows.T @ v.ravel(), rtol=1e-11)
    moved = linearize(net, w, x)(w + v) - net(w, x)
    np.testing.assert_allclose(moved.ravel(), rows @ v.ravel(), rtol=1e-11)
    np.testing.assert_allclose(ntk_eigenpairs(net, w, x, k=1).values, np.linalg.eigvalsh(rows @ rows.T)[-1:], rtol=1e-9)


def test_a_backward_rule_that_is_not_linear_is_refused_by_products_alone():
    @jax.custom_vjp
    def clipped(z):
        return z

    clipped.defvjp(lambda z: (z, None), lambda _, d: (jnp.clip(d, -0.5, 0.5),))
    w, x = normal(0, (3, 2)), normal(1, (3, 3))
    with pytest.raises(ValueError, match=r"custom_vjp rule that is not linear .* compute ntk"):
        ntk_matvec(lambda w, x: clipped(x @ w), w, x)(normal(2, (3, 2)))
    np.testing.assert_allclose(ntk(lambda w, x: clipped(x @ w), w, x)[0, 0], np.eye(2) * np.sum(x[0]**2) / 4)


@pytest.mark.parametrize("probes", [4, 12])
def test_the_estimate_of_the_trace_is_within_its_error(probes):
    apply_fn, params, x, theta = network()
    estimates, errors = jax.lax.map(lambda key: jnp.stack(ntk_trace_estimate(
        apply_fn, params, x, key=key, probes=probes)), jax.random.split(jax.random.key(3), 40)).T
    spread = float(estimates.std(ddof=1))
    assert abs(float(estimates.mean()) - np.trace(theta)) < 5 * spread / 40**0.5 + 1e-9
    assert 0.3 < float(errors.mean()) / spread < 3                   # the reported error is the actual one
    assert spread < 0.2 * np.trace(theta)


def test_with_half_as_many_probes_as_rows_the_trace_is_exact():
    apply_fn, params, x, theta = network()
    estimate, error = ntk_trace_estimate(apply_fn, params, x, key=jax.random.key(1), probes=len(theta))
    np.testing.assert_allclose(estimate, np.trace(theta), rtol=1e-11)
    assert float(error) < 1e-9 * np.trace(theta)


def test_norm_and_effective_rank_are_within_their_errors():
    apply_fn, params, x, theta = network()
    norm = np.linalg.norm(theta)
    estimate, error = ntk_frobenius(apply_fn, params, x, key=jax.random.key(1), probes=300)
    assert abs(float(estimate) - norm) < 5 * float(error) < 0.5 * norm
    rank = np.trace(theta) ** 2 / norm**2
    estimate, error = ntk_effective_rank(apply_fn, params, x, key=jax.random.key(1), probes=300)
    assert abs(float(estimate) - rank) < 5 * float(error) < rank


@pytest.mark.parametrize("masked", [False, True])
def test_the_largest_eigenpairs_are_those_of_the_kernel(masked):
    apply_fn, params, x, _ = network()
    masks = half_masks(params) if masked else None
    theta = np.asarray(ntk(apply_fn, params, x, masks=masks)).transpose(0, 2, 1, 3).reshape(54, 54)
    pairs = ntk_eigenpairs(apply_fn, params, x, k=7, masks=masks)
    want = np.linalg.eigvalsh(theta)[::-1][:7]
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, want, rtol=1e-9, atol=1e-9 * want[0])
    u = pairs.vectors.reshape(7, -1)
    np.testing.assert_allclose(u @ u.T, np.eye(7), atol=1e-10)
    residuals = np.linalg.norm(u @ theta - pairs.values[:, None] * u, axis=1)
    np.testing.assert_allclose(residuals, pairs.residuals, atol=1e-9 * want[0])


def test_every_copy_of_a_multiple_eigenvalue_is_found():
    x = jnp.eye(6)
    pairs = ntk_eigenpairs(lambda w, z: z @ w, jnp.ones((6, 4)), x * jnp.asarray([3.0, 3, 3, 2, 2, 1])[:, None], k=21)
    np.testing.assert_allclose(pairs.values, [9] * 12 + [4] * 8 + [1], rtol=1e-9)


def test_eigenvalues_in_half_precision_are_those_of_double_precision_to_a_few_epsilon():
    w, x = normal(0, (4, 3)), normal(1, (3, 4))
    single = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (w, x))
    want = np.linalg.eigvalsh(ntk(lambda w, x: x @ w, w, x).transpose(0, 2, 1, 3).reshape(9, 9))[::-1][:4]
    pairs = ntk_eigenpairs(lambda w, x: x @ w, *single, k=4)
    np.testing.assert_allclose(pairs.values, want, atol=0.03 * want[0])


def test_eigenpairs_under_jit_are_refused():
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda w: ntk_eigenpairs(lambda w, x: x @ w, w, jnp.ones((2, 3)), k=1).values)(jnp.ones((3, 2)))


def test_the_density_counts_every_eigenvalue():
    apply_fn, params, x, theta = network()
    density = ntk_density(apply_fn, params, x, key=jax.random.key(2), probes=60, depth=54)
    np.testing.assert_allclose(density.weights.sum(1), len(theta), rtol=1e-6)
    np.testing.assert_allclose((density.nodes * density.weights).sum(1).mean(), np.trace(theta), rtol=0.1)
    assert abs(float(density.nodes.max()) / np.linalg.eigvalsh(theta)[-1] - 1) < 1e-6


def test_statistics_of_a_kernel_of_two_hundred_thousand_rows():
    """A linear layer: Θ = X Xᵀ ⊗ 1, so everything is known of a kernel that would take 160 GB."""
    n, k = 20_000, 10
    x = normal(0, (n, 3), jnp.float32) * jnp.asarray([3.0, 2.0, 1.0], jnp.float32)
    w = jnp.ones((3, k), jnp.float32)
    values = np.repeat(np.linalg.eigvalsh(np.asarray(x, np.float64).T @ np.asarray(x, np.float64))[::-1], k)

    def linear(w, x):
        return x @ w

    np.testing.assert_allclose(ntk_trace(linear, w, x), values.sum(), rtol=1e-5)
    np.testing.assert_allclose(ntk_eigenpairs(linear, w, x, k=12).values, values[:12], rtol=1e-4)
    norm, error = ntk_frobenius(linear, w, x, key=jax.random.key(1), probes=16)
    assert abs(float(norm) - np.linalg.norm(values)) < 6 * float(error)


@pytest.mark.parametrize(("function", "options", "message"), [
    (ntk_trace_estimate, {"key": jax.random.key(0), "probes": 1}, "probes must be at least 2"),
    (ntk_frobenius, {"key": jax.random.key(0), "probes": 1}, "probes must be at least 2"),
    (ntk_eigenpairs, {"k": 0}, "k must be a whole number between 1 and NK = 54"),
    (ntk_eigenpairs, {"k": 55}, "k must be a whole number between 1 and NK = 54"),
    (ntk_eigenpairs, {"k": 1, "batch_size": 0}, "batch_size must be a whole number of examples, 1 or more"),
    (ntk_eigenpairs, {"k": 2.0}, "k must be a whole number"),
    (ntk_eigenpairs, {"k": 1, "batch_size": 2.5}, "batch_size must be a whole number of examples"),
    (ntk_eigenpairs, {"k": 1, "tolerance": -1.0}, "tolerance must be above 0, or None, got -1.0"),
])
def test_bad_requests_are_refused(function, options, message):
    apply_fn, params, x, _ = network()
    with pytest.raises(ValueError, match=message):
        function(apply_fn, params, x, **options)
