"""Theorem 1: what is proven holds on every network, the counterexample breaks what is not, the analyzer tells."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pkjax import paths
from pkjax.analysis.analyze import analyze
from pkjax.analysis.theorem1 import claims
from pkjax.tangent_kernel.kernel import ntk_plan

from tests.cases import cases, live
from tests.oracles import enumerate_paths


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance * max(1e-30, np.abs(b).max()))


def counterexample():
    """Two separate linear chains, x → diag(w₁) x → diag(w₂) ·, with π = (1, 2) and ν = (2, 1) along them."""
    def net(w, x):
        return (x @ w["a"]) @ w["b"]
    w = {"a": jnp.diag(jnp.sqrt(jnp.array([0.5, 1.0]))), "b": jnp.diag(jnp.sqrt(jnp.array([0.5, 1.0])))}
    masks = {"a": jnp.eye(2, dtype=bool), "b": jnp.eye(2, dtype=bool)}
    return net, w, masks, jnp.diag(jnp.array([jnp.sqrt(2.0), 1.0]))


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
@settings(deadline=None, derandomize=True, max_examples=200)
def test_proven_claims_hold_for_any_two_factors(seed, rows, columns):
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.5)
    T = rng.normal(size=(columns, 4)) * np.exp(rng.normal(size=(columns, 1)) * 2)
    lam, nu, pi = (np.maximum(np.linalg.eigvalsh(m)[::-1], 0) for m in (J @ T @ T.T @ J.T, J @ J.T, T @ T.T))
    assume(lam[0] > 1e-9)
    found = claims(lam, nu, pi)
    for name, claim in found.items():
        assert claim.holds or not claim.proven, (name, claim)
    short = claims(lam, nu, pi[:1])
    assert all(claim.holds for claim in short.values() if claim.proven)


def test_a_violated_theorem_is_reported():
    lam, nu, pi = np.array([3.0, 1.0]), np.array([1.0, 1.0]), np.array([2.0, 1.0])
    found = claims(lam, nu, pi)
    assert not found["largest"].holds
    assert not found["partial sums"].holds
    assert not found["partial products"].holds
    assert not found["shifted"].holds
    assert found["largest"].slack == pytest.approx(-0.5)


def test_singular_values_in_place_of_eigenvalues_fail_for_large_inputs():
    net, w, masks, X = counterexample()
    report = analyze(net, w, 100 * X, masks=masks)
    assert not report.claims["total, σ for ν"].holds
    assert report.claims["total"].holds


@given(cases(kinds=("dense", "conv")))
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
def test_the_analyzer_agrees_with_enumeration(case):
    oracle = enumerate_paths(case.layers, case.params, case.X, case.masks)
    assume(live(case, oracle))
    assume(oracle.values.size < 4000)
    m = sum(int(np.sum(v)) for v in (case.masks or {n: np.ones(v.shape) for n, v in case.params.items()}).values())
    params = {n: jnp.asarray(v) for n, v in case.params.items()}
    masks = None if case.masks is None else {n: jnp.asarray(v) for n, v in case.masks.items()}
    report = analyze(case.apply, params, case.X, masks=masks, k=m)
    spectrum = np.linalg.eigvalsh(oracle.jtv.T @ oracle.jtv)[::-1][:m]
    close(report.lam, np.linalg.eigvalsh(oracle.theta)[::-1])
    close(report.nu, np.linalg.eigvalsh(oracle.data_factor)[::-1])
    close(report.pi, spectrum)
    close(report.trace_pi, np.trace(oracle.pi))
    close(report.trace_ntk, np.trace(oracle.theta))
    ones = paths.factorize(case.apply, params, case.X, masks=masks)
    close(report.gated_trace, ((ones.jvf**2) @ (ones.jtv**2).sum(1)).sum())
    close(10**report.log_paths, oracle.values.size, 1e-9)
    close((report.overlaps**2 * np.outer(report.nu, report.pi)).sum(), report.trace_ntk, 1e-6)
    assert report.captured == pytest.approx(1, abs=1e-6)
    close(report.carried, (report.overlaps**2 * np.outer(report.nu, report.pi)).sum(0) / report.trace_ntk, 1e-6)
    assert all(check.passed for check in report.checks.values()), report.checks
    assert all(claim.holds for claim in report.claims.values() if claim.proven)


def test_a_check_fails_where_a_custom_rule_gives_another_slope():
    @jax.custom_jvp
    def straight_through(v):
        return jax.nn.relu(v)
    straight_through.defjvp(lambda primals, tangents: (jax.nn.relu(primals[0]), tangents[0]))
    w = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))), "b": jnp.ones((4, 1))}
    X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))
    report = analyze(lambda w, x: straight_through(x @ w["a"]) @ w["b"], w, X)
    assert not report.checks["f is its gated path sum"].passed
    assert not report.checks["homogeneity"].passed
    assert report.checks["trace of Θ"].passed


def test_where_no_jacobian_fits_a_random_direction_checks_the_kernel(monkeypatch):
    def net(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]
    rng = np.random.default_rng(2)
    w = {"a": jnp.asarray(rng.normal(size=(30, 400))), "b": jnp.asarray(rng.normal(size=(400, 5)))}
    X = jnp.asarray(rng.normal(size=(3, 30)))
    masks = {"a": jnp.asarray(rng.random((30, 400)) < 0.5), "b": jnp.ones((400, 5), bool)}
    needed = {name: ntk_plan(net, w, X, engine=name, tile=1).peak_memory for name in ("structured", "jacobian")}
    limit = needed["jacobian"] - 1
    assert needed["structured"] <= limit
    monkeypatch.setattr(plans, "default_memory_limit", lambda devices=1: limit)
    report = analyze(net, w, X, masks=masks, k=3)
    assert "Θ from the full Jacobian" not in report.checks
    check = report.checks["Θ along a random direction"]
    assert check.passed
    assert check.error <= 1e-12
    assert all(check.passed for check in report.checks.values())


def test_a_report_becomes_json():
    net, w, masks, X = counterexample()
    told = []
    report = analyze(net, w, X, masks=masks, progress=told.append)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["claims"]["per index"]["holds"] is False
    assert plain["layers"][0] == {"name": "a", "shape": [2, 2], "kept": 2, "total": 4, "emptied": False,
                                  "density": 0.5, "flow": 1.0}
    assert told[0] == "tangent kernel"
    assert set(told) <= set(plain["seconds"])


def test_bad_input_is_refused_by_name():
    net, w, masks, X = counterexample()
    with pytest.raises(ValueError, match=r"shape \(N, \*input\)"):
        analyze(net, w, jnp.ones(3))
    with pytest.raises(ValueError, match="failed on an input of"):
        analyze(net, w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"X leaf .* holds 1 values that are NaN"):
        analyze(net, w, X.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="params leaf 'a' holds 1 values"):
        analyze(net, {**w, "a": w["a"].at[0, 0].set(jnp.inf)}, X)
    with pytest.raises(ValueError, match="k must be between 1 and the 4"):
        analyze(net, w, X, masks=masks, k=5)
    with pytest.raises(ValueError, match="batch of one like X"):
        analyze(net, w, X, x=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="masks leaf"):
        analyze(net, w, X, masks={"a": jnp.ones((3, 2), bool), "b": masks["b"]})
    for lam, nu, pi, message in [([1.0], [1.0, 1.0], [1.0], "equally long"), ([], [], [], "non-empty"),
                                 ([1.0, 2.0], [1.0, 1.0], [1.0], "descending")]:
        with pytest.raises(ValueError, match=message):
            claims(np.array(lam), np.array(nu), np.array(pi))
