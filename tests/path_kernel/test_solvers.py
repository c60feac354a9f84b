"""Products and searches of the iterative solver, in the types and sizes in which they run."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import key, normal
from pkjax import path_kernel as pk
from pkjax.linalg.rows import DeviceRows
from pkjax.path_kernel import solvers
from pkjax.path_kernel.estimates import effective_rank_by
from pkjax.path_kernel.gram import read_start

W = {"a": normal(key(0), (5, 8), jnp.float32), "b": normal(key(1), (8, 4), jnp.float32)}
MASKS = {"a": np.arange(40).reshape(5, 8) % 3 > 0, "b": np.ones((8, 4), bool)}
ONE = jnp.ones((1, 5), jnp.float32)


def net(w, x):
    return jnp.maximum(x @ w["a"], 0) @ w["b"]


@pytest.mark.parametrize("masks", [None, MASKS])
@pytest.mark.parametrize("most", [1, 8])
def test_products_with_rows_on_host_and_device_are_those_of_the_matrix(masks, most):
    gram = np.asarray(pk.dense(net, W, ONE, masks=masks), np.float64)
    kept = np.ones(72, bool) if masks is None else np.concatenate([MASKS["a"].ravel(), MASKS["b"].ravel()])
    gram = gram[kept][:, kept]
    multiply = solvers._products(*read_start(net, W, ONE, masks, None), most)
    rows = np.random.default_rng(0).normal(size=(3, kept.sum())).astype(np.float32)
    near = {"rtol": 1e-4, "atol": 1e-5 * np.abs(gram).max()}
    np.testing.assert_allclose(multiply(rows), rows @ gram, **near)
    on_device = multiply(jnp.asarray(rows))
    assert not isinstance(on_device, np.ndarray)
    np.testing.assert_allclose(on_device, rows @ gram, **near)


@pytest.mark.parametrize("space", ["HostRows", "DeviceRows"])
def test_large_networks_are_searched_in_float32_and_judged_in_float64(space, monkeypatch):
    exact = pk.eigenpairs(net, W, ONE, k=6, method="dense")
    types = []
    real = solvers._products

    def recorded(network, z, most=8):
        multiply = real(network, z, most)
        return lambda rows: types.append((str(rows.dtype), len(rows))) or multiply(rows)

    monkeypatch.setattr(solvers, "_products", recorded)
    monkeypatch.setattr(solvers, "_NARROW_ABOVE", 0)
    if space == "DeviceRows":
        monkeypatch.setattr(solvers, "HostRows", DeviceRows)
    pairs = pk.eigenpairs(net, W, ONE, k=6, method="lanczos")
    assert pairs.converged
    assert (np.abs(pairs.values - exact.values) <= pairs.bounds + 1e-12).all()
    assert pairs.bounds.max() <= 1e-4 * exact.values[-1]
    assert [kind for kind, _ in types].count("float64") == 1     # the k pairs, at the end
    assert types[-1] == ("float64", 6)


def test_the_effective_rank_by_products_is_that_of_the_matrix():
    gram = np.asarray(pk.dense(net, W, ONE), np.float64)
    rank = effective_rank_by(solvers.search_products(net, W, ONE, None, None), 72, np.trace(gram), key(3), probes=400)
    assert rank == pytest.approx(np.trace(gram)**2 / (gram**2).sum(), rel=0.1)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_pairs_of_a_read_program_of_float32_lie_within_their_bounds(method):
    """Its products are in float32, which the bounds know: the eigenvalues of the matrix in float64 are the oracle."""
    exact = pk.eigenpairs(net, W, ONE, k=6, method="dense")
    pairs = pk.eigenpairs(read_start(net, W, ONE, None, None)[0].fn, W, ONE, k=6, method=method)
    assert pairs.converged
    assert pairs.values.dtype == pairs.residuals.dtype == pairs.bounds.dtype == np.float64
    assert (np.abs(pairs.values - exact.values) <= pairs.bounds).all()
    assert pairs.bounds.max() <= 1e-3 * exact.values[0]
