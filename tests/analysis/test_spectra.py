"""Large matrices: the largest eigenvalues alone, from products; the same as of the whole ones."""

import importlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.analysis import spectra
from pkjax.analysis.analyze import analyze
from pkjax.network import read

from tests.cases import FLOAT, coins, normal

analysis = importlib.import_module("pkjax.analysis.analyze")


def net(w, x):
    return jax.nn.relu(jax.nn.relu(x @ w["a"] + w["c"]) @ w["b"]) @ w["e"]


def case(dtype=FLOAT):
    shapes = {"a": (4, 6), "c": (6,), "b": (6, 5), "e": (5, 3)}
    w = {name: normal(i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
    return w, normal(4, (9, 4), dtype)


@pytest.fixture
def large(monkeypatch):
    """Treat nine examples as very many."""
    monkeypatch.setattr(spectra, "WHOLE", 5)
    monkeypatch.setattr(spectra, "LARGEST", 7)


def test_the_largest_eigenvalues_of_a_kernel_that_is_formed_are_those_of_the_whole(large, monkeypatch):
    w, X = case()
    chosen = {"a": True, "b": False, "c": False, "e": True}
    spectrum = spectra.tangent_spectrum(read(net, w, X), X, masks=None, trainable=chosen)
    theta = np.asarray(spectra.ntk(net, w, X, trainable=chosen)).transpose(0, 2, 1, 3).reshape(27, 27)
    np.testing.assert_allclose(spectrum.values, np.linalg.eigvalsh(theta)[::-1][:7], rtol=1e-9)
    np.testing.assert_allclose(spectrum.trace, np.trace(theta))
    np.testing.assert_allclose(spectrum.rest, np.trace(theta) - spectrum.values.sum())
    np.testing.assert_allclose(spectrum.multiply(np.eye(2, 27)), theta[:2], rtol=1e-12)
    assert spectrum.converged


def test_the_largest_eigenvalues_and_what_follows_from_them_are_those_of_the_whole(large, monkeypatch):
    w, X = case()
    masks = {n: coins(i, 0.8, v.shape) for i, (n, v) in enumerate(w.items())}
    with monkeypatch.context() as small:
        small.setattr(spectra, "WHOLE", 4096)
        whole = analyze(net, w, X, masks=masks, k=10)
    monkeypatch.setattr(spectra, "default_memory_limit", lambda: 3 * 27**2 * 8 - 1)
    monkeypatch.setattr(spectra, "ntk", None)      # Θ is not formed
    m = sum(int(v.sum()) for v in masks.values())
    monkeypatch.setattr(analysis, "VECTOR_BYTES", 10 * 8 * m + 7)
    monkeypatch.setattr(spectra, "LARGEST", 11)
    part = analyze(net, w, X, masks=masks)
    assert len(part.pi) == 10, "no more eigenvectors of Π than memory is allowed for"
    assert whole.lam.shape == (27,)
    assert part.lam.shape == part.nu.shape == (11,)
    np.testing.assert_allclose(part.lam, whole.lam[:11], rtol=1e-9)
    np.testing.assert_allclose(part.nu, whole.nu[:11], rtol=1e-9)
    for name in ("trace_ntk", "captured", "gated_trace", "trace_pi"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name), rtol=1e-9)
    assert part.overlaps.shape == (11, 10)
    assert all(check.passed for check in part.checks.values()), part.checks
    assert all(claim.holds for claim in part.claims.values() if claim.proven)
    assert set(whole.claims) - set(part.claims) == {"total, σ for ν"}
    # Σ λ over the whole, against Σ ν π with the last known π on the rest.
    left, right = whole.lam.sum(), (whole.nu[:10] * whole.pi).sum() + whole.nu[10:].sum() * whole.pi[9]
    np.testing.assert_allclose(part.claims["total"].slack, 1 - left / right, rtol=1e-6)


def test_a_search_that_does_not_end_is_reported(large, monkeypatch):
    w, X = case()
    real = spectra.block_lanczos
    monkeypatch.setattr(spectra, "block_lanczos", lambda *a, **k: real(*a, **k, most_products=9))
    with pytest.warns(UserWarning, match="eigenpairs converged"):
        spectrum = spectra.tangent_spectrum(read(net, w, X), X, masks=None, trainable=None)
    assert not spectrum.converged


def test_paths_beyond_float32_are_counted():
    def deep(w, x):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, w)[0]

    w = normal(0, (44, 8, 8), jnp.float32) / 8**0.5
    data = spectra.data_spectrum(deep, w, jnp.ones((2, 8), jnp.float32), masks=None)
    np.testing.assert_allclose(data.values[0], 2 * 8.0**44, rtol=1e-12)
    with pytest.raises(FloatingPointError, match="beyond what float64 holds"):
        spectra.data_spectrum(deep, jnp.concatenate([w] * 8), jnp.ones((2, 8), jnp.float32), masks=None)


def test_the_data_factors_spectrum_takes_a_few_times_its_own_memory():
    def linear(w, x):
        return x @ w

    w, X = normal(0, (8, 50)), normal(1, (128, 8))
    first = spectra.data_spectrum(linear, w, X[:3], masks=None)      # JAX and NumPy load what they keep
    tracemalloc.start()
    try:
        data = spectra.data_spectrum(linear, w, X, masks=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.vectors.shape == (150, 150)
    assert data.vectors.shape == (50 * 128, 256)
    assert peak < 2 * data.vectors.nbytes
    gram = np.asarray(X @ X.T, np.float64)
    np.testing.assert_allclose(data.values[:50], np.linalg.eigvalsh(gram)[-1], rtol=1e-6)
    images = np.tensordot(gram, data.vectors.reshape(128, 50, 256), 1).reshape(6400, 256)
    np.testing.assert_allclose(images, data.vectors * data.values, atol=1e-6 * data.values[0])
    np.testing.assert_allclose(data.vectors.T @ data.vectors, np.eye(256), atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_the_blocks_of_the_data_factor_take_a_few_times_their_own_memory(masked):
    factor = importlib.import_module("pkjax.tangent_kernel.data_factor")
    w, X = [normal(0, (4, 6)), normal(1, (6, 40))], normal(2, (96, 4))
    masks = [coins(i, 0.7, v.shape) for i, v in enumerate(w)] if masked else None
    network = read(lambda w, x: jax.nn.relu(x @ w[0]) @ w[1], w, X, masks=masks, paths=True)
    gates = factor._gates(network, X, frozen=False)
    engine, blocks = factor._pair_by_pair if masked else factor._dense_pairs, 40 * 96 * 96 * X.dtype.itemsize
    takes = [engine.lower(network, X, gates), factor._mirrored.lower(jax.ShapeDtypeStruct((40, 96, 96), X.dtype))]
    for compiled in (lowered.compile().memory_analysis() for lowered in takes):
        assert compiled.output_size_in_bytes + compiled.temp_size_in_bytes < 2.5 * blocks
