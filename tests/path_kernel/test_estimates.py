"""Random estimates of the path kernel's spectrum are within their errors of the enumerated one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import path_kernel as pk

from tests.cases import Case
from tests.path_kernel.oracle import explicit, ones, spectrum


def test_effective_rank_is_within_its_standard_error(key):
    case = Case([("dense", "a", 8, True), ("leaky", 0.0), ("dense", "b", 3, True)],
                {n: np.random.default_rng(i).normal(size=s) for i, (n, s) in enumerate(
                    {"a.bias": 8, "a.kernel": (6, 8), "b.bias": 3, "b.kernel": (8, 3)}.items())}, None, np.ones((1, 6)))
    gram = explicit(case)
    truth = np.trace(gram) ** 2 / np.sum(gram**2)
    rank, error = jax.jit(lambda p: pk.effective_rank_estimate(case.apply, p, ones(case), key=key, probes=200))(
        case.params)
    assert error < 0.1 * truth
    assert abs(rank - truth) < 4 * error
    x = ones(case).astype(np.float32)
    single = pk.effective_rank(case.apply, jax.tree.map(np.float32, case.params), x, key=key)
    assert single.dtype == np.float32
    assert abs(float(single) - truth) < 0.3 * truth


def test_density_has_the_moments_of_the_spectrum(key):
    case = Case([("dense", "a", 8, False), ("leaky", 0.0), ("dense", "b", 3, False)],
                {"a.kernel": np.random.default_rng(0).normal(size=(6, 8)),
                 "b.kernel": np.random.default_rng(1).normal(size=(8, 3))}, None, np.ones((1, 6)))
    truth = spectrum(explicit(case))
    # More steps than there are distinct eigenvalues: the Lanczos recursion ends early and must not leave NaN.
    estimate = jax.jit(lambda p: pk.density(case.apply, p, ones(case), key=key, probes=400, depth=72))(case.params)
    assert np.isfinite(estimate.nodes).all()
    np.testing.assert_allclose(estimate.weights.sum(1), 72, rtol=1e-6)
    for power in (1, 2):
        moment = np.asarray((estimate.weights * estimate.nodes**power).sum(1))
        error = moment.std() / 20
        assert abs(moment.mean() - np.sum(truth**power)) <= 4 * error + 1e-6 * truth[0]**power
    np.testing.assert_allclose(estimate.nodes.max(), truth[0], rtol=1e-6)
    step = np.diff(np.log10(estimate.points))[0]
    assert abs(float(estimate.density.sum()) * step - (truth > 1e-9 * truth[0]).sum()) < 2


def test_bad_input_of_the_estimates_is_named():
    net, w = (lambda p, x: x @ p["a"]), {"a": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="probes"):
        pk.effective_rank(net, w, jnp.ones((1, 3)), key=jax.random.key(0), probes=1)
