"""Theorem 1: what is proven holds on every network, the counterexample breaks what is not."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pkjax.analysis.analyze import analyze
from pkjax.analysis.theorem1 import evaluate_claims

from tests.analysis.counterexample import counterexample


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance * max(1e-30, np.abs(b).max()))


def test_the_counterexample_breaks_the_bound_per_index_alone():
    net, w, masks, X = counterexample()
    report = analyze(net, w, X, masks=masks)
    close(report.lam, [2, 2, 0, 0])
    close(report.nu, [2, 1, 0, 0])
    close(report.pi[:2], [2, 1])
    assert not report.claims["per index"].holds
    assert report.claims["per index"].worst == 1
    close(report.claims["per index"].slack, -1.0)     # λ_2 = 2 against ν_2 π_2 = 1
    assert report.claims["total"].holds
    assert report.claims["partial sums"].holds
    assert report.claims["partial products"].holds
    assert all(claim.holds for claim in report.claims.values() if claim.proven)
    assert all(check.passed for check in report.checks.values())


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_proven_claims_hold_for_any_two_factors(seed, rows, columns):
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.5)
    T = rng.normal(size=(columns, 4)) * np.exp(rng.normal(size=(columns, 1)) * 2)
    lam, nu, pi = (np.maximum(np.linalg.eigvalsh(m)[::-1], 0) for m in (J @ T @ T.T @ J.T, J @ J.T, T @ T.T))
    assume(lam[0] > 1e-9)
    outcome = evaluate_claims(lam, nu, pi)
    for name, claim in outcome.items():
        assert claim.holds or not claim.proven, (name, claim)
    short = evaluate_claims(lam, nu, pi[:1])
    assert all(claim.holds for claim in short.values() if claim.proven)


def test_a_violated_theorem_is_reported():
    lam, nu, pi = np.array([3.0, 1.0]), np.array([1.0, 1.0]), np.array([2.0, 1.0])
    outcome = evaluate_claims(lam, nu, pi)
    assert not outcome["largest"].holds
    assert not outcome["partial sums"].holds
    assert not outcome["partial products"].holds
    assert not outcome["shifted"].holds
    assert outcome["largest"].slack == pytest.approx(-0.5)


def test_singular_values_in_place_of_eigenvalues_fail_for_large_inputs():
    net, w, masks, X = counterexample()
    report = analyze(net, w, 100 * X, masks=masks)
    assert not report.claims["total, σ for ν"].holds
    assert report.claims["total"].holds


def test_lists_that_are_not_spectra_are_refused_by_name():
    for lam, nu, pi, message in [([1.0], [1.0, 1.0], [1.0], "equally long"), ([], [], [], "non-empty"),
                                 ([1.0, 2.0], [1.0, 1.0], [1.0], "descending")]:
        with pytest.raises(ValueError, match=message):
            evaluate_claims(np.array(lam), np.array(nu), np.array(pi))
