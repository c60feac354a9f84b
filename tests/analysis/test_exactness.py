"""The exactness checks fail where something is wrong, and have a second way where memory is short."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.analysis import exactness, spectra
from pkjax.analysis.analyze import analyze
from pkjax.network import read
from pkjax.paths import NotPathNetworkError
from pkjax.tangent_kernel import plan
from pkjax.tangent_kernel.kernel import ntk_plan


def test_a_custom_rule_that_gives_another_slope_is_refused_by_name():
    @jax.custom_jvp
    def straight_through(v):
        return jax.nn.relu(v)
    straight_through.defjvp(lambda primals, tangents: (jax.nn.relu(primals[0]), tangents[0]))
    w = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))), "b": jnp.ones((4, 1))}
    X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))
    with pytest.raises(NotPathNetworkError, match="derivative rule of 'straight_through"):
        analyze(lambda w, x: straight_through(x @ w["a"]) @ w["b"], w, X)


def test_a_check_fails_where_what_it_compares_is_wrong():
    w = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))), "b": jnp.ones((4, 1))}
    X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))

    def net(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]
    network = read(net, w, X, paths=True)
    right = jax.device_get(exactness._evaluate(network, X))
    tangent = spectra.tangent_spectrum(network, X, masks=None, trainable=None)
    analysis = exactness.Analysis(network=network, signals=X, options={}, tangent=tangent, pi=np.ones(1), trace_pi=1.0,
                                  data=spectra.data_spectrum(net, w, X, masks=None), energy=np.ones((2, 1)),
                                  complete=False, held=network, on_paths=tangent)
    checks = exactness._path_sum_checks(analysis, right) | exactness._trace_checks(analysis)
    assert all(check.passed for check in checks.values())
    for name, changed in {"f is its gated path sum": {"sums": right.sums + 0.1},
                          "gradients agree": {"gradient": [g * 1.01 for g in right.gradient]},
                          "homogeneity": {"euler": right.euler * 1.01}}.items():
        outcome = exactness._path_sum_checks(analysis, right._replace(**changed))
        assert {n for n, check in outcome.items() if not check.passed} == {name}
    wrong = dataclasses.replace(analysis, tangent=dataclasses.replace(tangent, trace=1.01 * tangent.trace))
    assert not exactness._trace_checks(wrong)["trace of Θ"].passed


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
    monkeypatch.setattr(plan, "default_memory_limit", lambda devices=1: limit)
    report = analyze(net, w, X, masks=masks, k=3)
    assert "Θ from the full Jacobian" not in report.checks
    check = report.checks["Θ along a random direction"]
    assert check.passed
    assert check.error <= 1e-12
    assert all(check.passed for check in report.checks.values())
