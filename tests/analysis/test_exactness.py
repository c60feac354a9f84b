"""The exactness checks fail where something is wrong, and have a second way where memory is short."""

import jax
import jax.numpy as jnp
import numpy as np
from pkjax.analysis.analyze import analyze
from pkjax.tangent_kernel import plan
from pkjax.tangent_kernel.kernel import ntk_plan


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
    monkeypatch.setattr(plan, "default_memory_limit", lambda devices=1: limit)
    report = analyze(net, w, X, masks=masks, k=3)
    assert "Θ from the full Jacobian" not in report.checks
    check = report.checks["Θ along a random direction"]
    assert check.passed
    assert check.error <= 1e-12
    assert all(check.passed for check in report.checks.values())
