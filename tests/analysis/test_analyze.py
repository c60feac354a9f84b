"""The analyzer against enumerated paths, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from pkjax import paths
from pkjax.analysis.analyze import analyze

from tests.analysis.counterexample import counterexample
from tests.cases import cases, live
from tests.oracles import enumerate_paths


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance * max(1e-30, np.abs(b).max()))


@given(cases(kinds=("dense", "conv")))
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate],
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
    close(10**report.log10_paths, oracle.values.size, 1e-9)
    close((report.overlaps**2 * np.outer(report.nu, report.pi)).sum(), report.trace_ntk, 1e-6)
    assert report.captured == pytest.approx(1, abs=1e-6)
    close(report.carried, (report.overlaps**2 * np.outer(report.nu, report.pi)).sum(0) / report.trace_ntk, 1e-6)
    assert all(check.passed for check in report.checks.values()), report.checks
    assert all(claim.holds for claim in report.claims.values() if claim.proven)


def test_a_report_becomes_json():
    net, w, masks, X = counterexample()
    parts = []
    report = analyze(net, w, X, masks=masks, progress=parts.append)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["claims"]["per index"]["holds"] is False
    assert plain["layers"][0] == {"name": "a", "shape": [2, 2], "kept": 2, "total": 4, "emptied": False,
                                  "density": 0.5, "flow": 1.0}
    assert plain["log10_paths"] == pytest.approx(np.log10(2))
    assert parts[0] == "traces"
    assert set(parts) <= set(plain["seconds"])
    assert all(0 <= plain["compile_seconds"][name] <= seconds for name, seconds in plain["seconds"].items())


def test_the_quick_form_finds_what_the_whole_one_does():
    net, w, masks, X = counterexample()
    parts = []
    whole, quick = analyze(net, w, X, masks=masks), analyze(net, w, X, masks=masks, quick=True, progress=parts.append)
    assert parts == ["traces", "tangent kernel", "path kernel"]
    for name in ("lam", "trace_ntk", "trace_pi", "gated_trace"):
        np.testing.assert_array_equal(getattr(quick, name), getattr(whole, name))
    np.testing.assert_allclose(quick.pi, whole.pi[:1], rtol=1e-12)
    assert quick.pi_bounds[0] <= whole.pi_bounds[0] + 1e-12
    assert quick.checks["eigenvalues of Π"].passed
    assert quick.quick
    assert not whole.quick
    assert len(analyze(net, w, X, masks=masks, quick=True, k=2).pi) == 2
    assert "claims" not in str(quick)
    assert "π₁, largest of Π" in str(quick)
    plain = json.loads(json.dumps(quick.to_dict(), allow_nan=False))
    assert plain["effective_rank"] is None
    assert plain["nu"] == []


def test_an_analysis_again_compiles_nothing_and_other_weights_do_not_either():
    net, w, masks, X = counterexample()
    analyze(net, w, X, masks=masks)
    again = analyze(net, {name: 2 * leaf for name, leaf in w.items()}, X, masks=masks)
    assert sum(again.compile_seconds.values()) < 0.05, again.compile_seconds


def test_bad_input_is_refused_by_name():
    net, w, masks, X = counterexample()
    with pytest.raises(ValueError, match=r"shape \(N, \*input\)"):
        analyze(net, w, jnp.ones((0, 2)))
    with pytest.raises(ValueError, match="failed on a batch of 1, float64"):
        analyze(net, w, jnp.ones(3))
    with pytest.raises(ValueError, match="failed on a batch of"):
        analyze(net, w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"X leaf .* holds 1 values that are NaN"):
        analyze(net, w, X.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="params leaf 'a' holds 1 values"):
        analyze(net, {**w, "a": w["a"].at[0, 0].set(jnp.inf)}, X)
    with pytest.raises(ValueError, match="k must be between 1 and the 4"):
        analyze(net, w, X, masks=masks, k=5)
    with pytest.raises(ValueError, match="batch of one"):
        analyze(net, w, X, x=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="masks leaf"):
        analyze(net, w, X, masks={"a": jnp.ones((3, 2), bool), "b": masks["b"]})
