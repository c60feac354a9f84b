"""Alignment of kernel and targets against its definition by matrices, and from products against the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax import kernel_alignment, ntk_alignment

from tests.cases import approx, half_masks, named_network, normal


def by_matrices(theta, y, centered):
    """⟨K, Y⟩ / (‖K‖ ‖Y‖) with K the NK × NK matrix, Y = y yᵀ, both between centring matrices if so asked."""
    n, _, k, _ = theta.shape
    K = theta.transpose(0, 2, 1, 3).reshape(n * k, n * k)
    Y = np.outer(y.ravel(), y.ravel())
    if centered:
        H = np.kron(np.eye(n) - 1 / n, np.eye(k))
        K, Y = H @ K @ H, H @ Y @ H
    return (K * Y).sum() / np.linalg.norm(K) / np.linalg.norm(Y)


@pytest.fixture(scope="module")
def network():
    apply_fn, params, x = named_network("mlp")
    masks = half_masks(params)
    theta = np.asarray(pk.ntk(apply_fn, params, x, masks=masks))
    return apply_fn, params, x, masks, theta, normal(3, (len(x), theta.shape[-1]))


@pytest.mark.parametrize("centered", [False, True])
def test_alignment_is_the_cosine_between_the_matrices(network, centered):
    *_, theta, y = network
    expected = by_matrices(theta, np.asarray(y), centered)
    assert float(kernel_alignment(theta, y, centered=centered)) == approx(expected, rel=1e-10)
    assert float(jax.jit(lambda t: kernel_alignment(t, y, centered=centered))(theta)) == approx(expected, rel=1e-10)
    assert 0 <= expected <= 1


@pytest.mark.parametrize("centered", [False, True])
def test_from_products_it_is_within_its_error_of_the_matrix(network, centered):
    apply_fn, params, x, masks, theta, y = network
    expected = by_matrices(theta, np.asarray(y), centered)
    value, error = ntk_alignment(apply_fn, params, x, y, key=jax.random.key(0), centered=centered, probes=400,
                                 masks=masks, batch_size=2)
    assert abs(float(value) - expected) < 5 * float(error)
    assert 0 < float(error) < 0.1 * expected


def test_shifting_features_changes_the_plain_alignment_and_not_the_centred_one():
    x, y = normal(0, (6, 3)), normal(1, (6,))
    kernels = [z @ z.T for z in (x, x + 5)]
    assert float(kernel_alignment(kernels[0], y, centered=True)) == approx(
        float(kernel_alignment(kernels[1], y, centered=True)), rel=1e-9)
    assert abs(float(kernel_alignment(kernels[0], y)) - float(kernel_alignment(kernels[1], y))) > 0.01


def test_the_best_aligned_kernel_is_that_of_the_targets_at_any_size_of_numbers():
    y = normal(2, (5, 2))
    theta = jnp.einsum("nk,ml->nmkl", y, y)
    for size in (1e-30, 1.0, 1e30):
        for centered in (False, True):
            assert float(kernel_alignment(theta * size, y * size, centered=centered)) == approx(1.0, rel=1e-6)


def test_an_alignment_that_is_not_defined_is_an_error(network):
    apply_fn, params, x, _, theta, y = network
    with pytest.raises(ValueError, match="centred, the kernel or the targets are 0"):
        kernel_alignment(theta, jnp.full_like(y, 0.1), centered=True)
    with pytest.raises(ValueError, match="centred, the kernel or the targets are 0"):
        ntk_alignment(apply_fn, params, x, jnp.full_like(y, 0.1), key=jax.random.key(0), centered=True)
    with pytest.raises(ValueError, match="the kernel or the targets are 0"):
        kernel_alignment(0 * theta, y)
    with pytest.raises(ValueError, match=r"theta must have the shape \(N, N, \*out, \*out\)"):
        kernel_alignment(theta[:-1], y)
    with pytest.raises(ValueError, match=r"y must have the shape .* of the network's outputs"):
        ntk_alignment(apply_fn, params, x, y[:, :1], key=jax.random.key(0))
    with pytest.raises(TypeError, match="one-hot vectors of labels"):
        kernel_alignment(theta, np.zeros(len(x), int))
    with pytest.raises(ValueError, match="probes must be at least 2"):
        ntk_alignment(apply_fn, params, x, y, key=jax.random.key(0), probes=1)
