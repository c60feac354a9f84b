"""Custom derivative rules: a rule that is the derivative of its function is read, any other is refused by name."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import lax
from pkjax import paths
from pkjax.paths.custom_rules import disagreement
from pkjax.paths.polynomial import path_sum

from tests.cases import FLOAT

rng = np.random.default_rng(0)
W = {"a": jnp.asarray(rng.normal(size=(4, 4)), FLOAT), "b": jnp.asarray(rng.normal(size=(4, 2)), FLOAT)}
X = jnp.asarray(rng.normal(size=(3, 4)), FLOAT)


def with_vjp(function, backward):
    @jax.custom_vjp
    def ruled(v):
        return function(v)
    ruled.defvjp(lambda v: (function(v), v), lambda v, g: (backward(v, g),))
    return ruled


def with_jvp(function, slope):
    @jax.custom_jvp
    def ruled(v):
        return function(v)
    ruled.defjvp(lambda primals, tangents: (ruled(primals[0]), slope(primals[0], tangents[0])))
    return ruled


def scaled_by(closed_over, factor):
    return with_vjp(lambda v: v * closed_over, lambda v, g: g * closed_over * factor)


@jax.custom_gradient
def gradient_times_seven(v):
    return 2 * v, lambda g: 7 * g


@jax.custom_gradient
def gradient_times_two(v):
    return 2 * v, lambda g: 2 * g


def relu(v):
    return jnp.maximum(v, 0)


def opened(v, g):
    return jnp.where(v > 0, g, 0)


WRAPPED = {
    "plain": lambda f: f, "jit": jax.jit, "vmap": jax.vmap, "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda v: lax.scan(lambda s, _: (f(s), None), v, None, length=2)[0],
    "cond": lambda f: lambda v: lax.cond(True, f, jnp.negative, v),
}
IDENTITY = with_vjp(lambda v: v, lambda v, g: g)
HALF = with_vjp(lambda v: v, lambda v, g: g / 2)
WRONG = {
    "halved": HALF,
    "reversed": with_vjp(lambda v: v, lambda v, g: -g),
    "clipped": with_vjp(lambda v: v, lambda v, g: jnp.clip(g, -1, 1)),
    "clipped by norm": with_vjp(lambda v: v, lambda v, g: g / jnp.maximum(1, jnp.sqrt((g**2).sum()))),
    "surrogate": with_jvp(relu, lambda v, t: jax.nn.sigmoid(v) * t),
    "leak": with_jvp(relu, lambda v, t: jnp.where(v > 0, t, t / 4)),
    "saturating": with_jvp(relu, lambda v, t: jnp.where((v > 0) & (v < 100), t, 0)),
    "straight through": with_jvp(jnp.sign, lambda v, t: t),
    "of a function of JAX": with_jvp(jax.nn.relu, lambda v, t: 2 * t),
    "closes over an array": scaled_by(jnp.arange(1, 5, dtype=FLOAT), 2),
    "custom_gradient": gradient_times_seven,
}
RIGHT = {
    "identity": IDENTITY,
    "relu by jvp": with_jvp(relu, opened),
    "relu by vjp": with_vjp(relu, opened),
    "relu and a reversal": with_jvp(lambda v: relu(v)[:, ::-1], lambda v, t: opened(v, t)[:, ::-1]),
    "closes over an array": scaled_by(jnp.arange(1, 5, dtype=FLOAT), 1),
    "custom_gradient": gradient_times_two,
    "of JAX": jax.nn.relu,
}


def network(hidden):
    return lambda w, x: hidden(x @ w["a"]) @ w["b"]


def refuses(hidden, match):
    with pytest.raises(paths.NotPathNetworkError, match=match) as caught:
        paths.polynomial(network(hidden), W, X, q=1)
    assert "test_custom_rules.py:" in str(caught.value)


def follows(hidden):
    net = network(hidden)
    jacobian, theta = pk.ntk(net, W, X, engine="jacobian"), pk.ntk(net, W, X)
    np.testing.assert_allclose(theta, jacobian, rtol=1e-10)
    return theta


@pytest.mark.parametrize("rule", WRONG)
def test_a_rule_that_is_no_derivative_is_refused_by_name_and_the_kernel_follows_it(rule):
    refuses(WRONG[rule], "the derivative rule of .* is not the derivative")
    net = network(WRONG[rule])
    rows = jnp.concatenate([leaf.reshape(6, -1) for leaf in jax.tree.leaves(jax.jacrev(net)(W, X))], 1)
    np.testing.assert_allclose(follows(WRONG[rule]).transpose(0, 2, 1, 3).reshape(6, 6), rows @ rows.T, rtol=1e-10)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_rules_are_seen_wherever_they_stand(wrapper):
    refuses(WRAPPED[wrapper](lambda v: HALF(v)), "'ruled at .*test_custom_rules.py")
    net = network(WRAPPED[wrapper](IDENTITY))
    np.testing.assert_allclose(path_sum(net, W, X, gates=paths.gates(net, W, X)), net(W, X), rtol=1e-10)


@pytest.mark.parametrize("rule", RIGHT)
def test_a_rule_that_is_the_derivative_is_read_through(rule):
    net = network(RIGHT[rule])
    gates = paths.gates(net, W, X)
    np.testing.assert_allclose(path_sum(net, W, X, gates=gates), net(W, X), rtol=1e-10)
    own = jax.jacrev(net)(W, X)
    held = jax.jacrev(lambda w: path_sum(net, w, X, gates=gates))(W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), held, own)
    follows(RIGHT[rule])
    np.testing.assert_allclose(pk.path_kernel.trace(net, W, jnp.ones_like(X[:1])),
                               (paths.factorize(net, W, X[:1]).jtv**2).sum(), rtol=1e-10)


@pytest.mark.parametrize(("rule", "slope"), [
    (with_jvp(relu, opened), 0.0), (with_vjp(relu, opened), 0.0),
    (with_jvp(relu, lambda v, t: jnp.where(v >= 0, t, 0)), 1.0), (jax.nn.relu, 0.0)])
def test_a_rule_settles_ties(rule, slope):
    (gate,) = paths.gates(network(rule), W, jnp.zeros((1, 4), FLOAT))
    assert gate.tolist() == [[slope] * 4]


def test_a_rule_is_judged_by_the_closure_that_it_has_now():
    factor = 1.0
    ruled = with_vjp(lambda v: v, lambda v, g: factor * g)
    paths.gates(network(ruled), W, X)
    factor = 2.0
    refuses(ruled, "is not the derivative")


def test_a_function_of_parameters_and_signal_may_have_a_rule():
    @jax.custom_jvp
    def dense(w, x):
        return x @ w
    dense.defjvp(lambda primals, tangents: (dense(*primals), tangents[1] @ primals[0] + primals[1] @ tangents[0]))
    net = lambda w, x: dense(w["b"], jax.nn.relu(dense(w["a"], x)))  # noqa: E731
    assert paths.sites(net, W, X[:1])[1] == {0: (0,), 1: (1,)}

    @jax.custom_jvp
    def frozen(w, x):
        return x @ w
    frozen.defjvp(lambda primals, tangents: (frozen(*primals), tangents[1] @ primals[0]))
    with pytest.raises(paths.NotPathNetworkError, match="frozen"):
        paths.log_count(lambda w, x: frozen(w["a"], x) @ w["b"], W, X[:1])


def test_a_rule_that_raises_is_refused():
    def broken(v, g):
        raise RuntimeError("no derivative here")
    refuses(with_vjp(lambda v: v, broken), "cannot be evaluated.*no derivative here")


def test_nothing_of_a_judged_rule_is_kept():
    closed_over = jnp.arange(1, 5, dtype=FLOAT) + 0.5
    array = weakref.ref(closed_over)
    (eqn,) = jax.make_jaxpr(scaled_by(closed_over, 1))(X[0]).eqns
    assert len(eqn.invars) == 2, "the array is an operand"
    assert disagreement(eqn, [closed_over, None]) == ""
    del closed_over, eqn
    gc.collect()
    assert array() is None
