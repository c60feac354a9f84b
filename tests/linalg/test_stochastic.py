"""Random estimates of a matrix from its products, against the matrix itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.linalg.stochastic import Estimate, frobenius, quadrature, trace

from tests.cases import FLOAT, normal

N = 40


@pytest.fixture(scope="module")
def matrix():
    factor = normal(0, (N, N)) * 0.8 ** np.arange(N)
    return factor @ factor.T


def signs(count, key):
    return jax.random.rademacher(key, (count, N), FLOAT)


@pytest.mark.parametrize("probes", [4, 12])
def test_traces_scatter_around_the_trace_as_their_errors_say(matrix, probes):
    keys = jax.random.split(jax.random.key(1), 60)
    values, errors = jax.lax.map(lambda key: jnp.stack(trace(lambda v: matrix @ v, jnp.zeros(N), key, probes)), keys).T
    spread = float(values.std(ddof=1))
    assert abs(float(values.mean() - jnp.trace(matrix))) < 5 * spread / 60**0.5
    assert 0.3 < float(errors.mean()) / spread < 3


def test_the_mean_square_is_the_squared_frobenius_norm_whoever_draws_the_signs(matrix):
    scale = jnp.trace(matrix)
    want = float((matrix**2).sum() / scale**2)
    key = jax.random.key(2)
    value, error = frobenius(lambda s: matrix @ s, signs(400, key), scale)
    assert abs(float(value) - want) < 5 * float(error) < 0.5 * want
    keys = jax.random.split(key, 400)
    drawn = frobenius(lambda k: matrix @ jax.random.rademacher(k, (N,), FLOAT), keys, scale, batch_size=7)
    assert isinstance(drawn, Estimate)
    assert abs(float(drawn.value) - want) < 5 * float(drawn.standard_error) < 0.5 * want


def test_the_quadrature_of_each_probe_has_the_moments_of_the_matrix_in_it(matrix):
    probes = signs(3, jax.random.key(3))
    density = quadrature(lambda v: matrix @ v, probes, jnp.asarray(float(N)), jax.random.key(4), depth=12, points=50,
                         decades=6.0, width=0.1)
    assert density.nodes.shape == density.weights.shape == (3, 12)
    vectors = probes
    for power in range(4):
        want = (probes * vectors).sum(1)                             # sᵀ Aᵖ s, with sᵀ s = N
        np.testing.assert_allclose((density.weights * density.nodes**power).sum(1), want, rtol=1e-9)
        vectors = vectors @ matrix


@pytest.mark.parametrize("depth", [2, 3, 17])
def test_the_density_integrates_to_the_number_of_eigenvalues_however_few_differ(depth):
    """Of two different eigenvalues, two steps tell everything; what follows them is noise and must not count."""
    values = jnp.asarray(np.repeat([1.0, 0.01], [10, 30]))
    density = quadrature(lambda v: values * v, signs(2, jax.random.key(5)), jnp.asarray(40.0), jax.random.key(6),
                         depth=depth, points=400, decades=4.0, width=0.05)
    decades = np.log10(density.points)
    counts = [np.trapezoid(np.where(part, density.density, 0), decades) for part in (decades > -1, decades < -1)]
    np.testing.assert_allclose(counts, [10, 30], rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_moments_of_a_matrix_of_low_rank_do_not_depend_on_the_depth(rank, dtype):
    factor = normal(1, (N, rank), dtype)
    probes = signs(4, jax.random.key(7)).astype(dtype)
    density = quadrature(lambda v: factor @ (factor.T @ v), probes, jnp.asarray(N, dtype), jax.random.key(8), depth=30,
                         points=50, decades=6.0, width=0.1)
    tolerance = 1e3 * float(jnp.finfo(dtype).eps)
    assert float(density.nodes.min()) > -tolerance * float(density.nodes.max())
    np.testing.assert_allclose(density.weights.sum(1), N, rtol=tolerance)
    want = ((probes @ factor) ** 2).sum(1)
    np.testing.assert_allclose((density.weights * density.nodes).sum(1), want, rtol=tolerance)
