"""The path transform against enumeration in plain Python, JAX's own derivatives, and networks that have no paths."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from pkjax import paths
from pkjax.paths import rules
from pkjax.paths.polynomial import path_sum, record

from tests.cases import cases, live
from tests.oracles import enumerate_paths

# Shrinking a failing network would compile hundreds more.
NETWORKS = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def drawn(case):
    """Redraw dead networks."""
    oracle = enumerate_paths(case.layers, case.params, case.X, case.masks)
    assume(live(case, oracle))
    return oracle


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance * max(1e-30, np.abs(b).max()))


def ones(case):
    return np.ones((1, *case.X.shape[1:]))


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual")))
def test_the_path_polynomial_is_the_sum_over_enumerated_paths(case):
    oracle = drawn(case)

    @jax.jit
    def evaluate(params):
        sums = [paths.polynomial(case.apply, {n: jnp.abs(v) ** q for n, v in params.items()}, ones(case), q=q,
                                 masks=case.masks).sum() for q in (0, 1, 2, 3)]
        return record(case.apply, params, case.X, masks=case.masks)[0], sums
    f, sums = evaluate(case.params)
    close(f, oracle.outputs)
    close(sums, [oracle.values.size, *((np.abs(oracle.values) ** q).sum() for q in (1, 2, 3))])   # 0⁰ is 1: a zero bias
    close(10 ** paths.log_count(case.apply, case.params, ones(case), masks=case.masks), oracle.values.size)


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual")))
def test_gates_select_the_active_paths(case):
    oracle = drawn(case)

    @jax.jit
    def evaluate(params):
        gates = paths.gates(case.apply, params, case.X, masks=case.masks)
        squares = {n: v**2 for n, v in params.items()}
        return (path_sum(case.apply, params, case.X, gates=gates, masks=case.masks),
                paths.polynomial(case.apply, squares, case.X**2, q=2, gates=[g**2 for g in gates], masks=case.masks))
    f, gated = evaluate(case.params)
    close(f, oracle.outputs)
    close(np.asarray(gated).ravel(), (oracle.jvf**2) @ oracle.values**2)


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual")))
def test_enumeration_factors_the_gradient_and_the_tangent_kernel(case):
    oracle = drawn(case)
    found = paths.factorize(case.apply, case.params, case.X, masks=case.masks)
    jacobian = jax.jit(jax.jacrev(case.apply))({n: jnp.asarray(v) for n, v in case.alive.items()}, case.X)
    dense = np.concatenate([np.asarray(jacobian[n]).reshape(found.jvf.shape[0], -1)
                            * (1 if case.masks is None else case.masks[n].ravel())
                            for n in sorted(case.params)], axis=1)
    assert found.values.size == oracle.values.size
    close(np.sort(found.values), np.sort(oracle.values))
    close(found.jvf @ found.values, oracle.outputs.ravel())
    close(found.jvf @ found.jtv, dense)
    close(oracle.jvf @ oracle.jtv, dense)
    close(found.jvf @ found.pi @ found.jvf.T, dense @ dense.T)
    close(found.jvf @ found.jvf.T, oracle.data_factor)
    close(np.linalg.eigvalsh(found.pi), np.linalg.eigvalsh(oracle.pi))


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual")))
def test_taps_give_the_gradient_of_every_parameter(case):
    drawn(case)
    x, params = case.X[:1], {n: jnp.asarray(v) for n, v in case.alive.items()}
    found, of_leaf = paths.sites(case.apply, params, x)
    taps = tuple(jnp.zeros(s.shape, s.dtype) for s in found)
    deltas, h = jax.jit(jax.jacrev(lambda t: paths.tapped(case.apply, params, x, t), has_aux=True))(taps)
    jacobian = jax.jit(jax.jacrev(case.apply))(params, x)
    assert set(of_leaf) == set(range(len(params)))
    for i, name in enumerate(sorted(params)):
        pulled = sum(np.stack([found[s].pullback(h[s], d) for d in deltas[s][0]]) for s in of_leaf[i])
        close(pulled, np.asarray(jacobian[name][0]))


def test_few_draws_are_dead():
    counts = Counter()

    @settings(NETWORKS, max_examples=24)
    @given(cases(kinds=("dense", "conv", "residual")))
    def draw(case):
        oracle = enumerate_paths(case.layers, case.params, case.X, case.masks)
        counts["live" if live(case, oracle) else "dead"] += 1
    draw()
    assert counts["dead"] < counts["live"], counts


def broken_sub(interp, eqn, ins):
    return [interp.linear("sub", jax.lax.sub, ins)]


def broken_mul(interp, eqn, ins):
    out = rules.mul(interp, eqn, ins)[0]
    return [interp.linear("mul", lambda v: v * 1.01, [out])] if out.on_input else [out]


def broken_max(interp, eqn, ins):
    return [next(v for v in ins if hasattr(v, "on_input"))]


@pytest.mark.parametrize(("primitive", "rule"), [("sub", broken_sub), ("mul", broken_mul), ("max", broken_max)])
def test_broken_rules_are_caught(monkeypatch, primitive, rule):
    layers = [("dense", "a", 3, True), ("bn", "b", (0.5, -0.3, 0.2), (1.0, 2.0, 0.5), 1e-3), ("leaky", 0.0),
              ("dense", "c", 1, False)]
    rng = np.random.default_rng(0)
    params = {"a.kernel": rng.normal(size=(2, 3)), "a.bias": rng.normal(size=3), "b.scale": np.ones(3),
              "b.bias": np.zeros(3), "c.kernel": rng.normal(size=(3, 1))}
    from tests.cases import Case
    case = Case(layers, params, None, rng.normal(size=(3, 2)))
    oracle = enumerate_paths(layers, params, case.X)

    def agrees():
        absolute = {n: np.abs(v) for n, v in params.items()}
        total = paths.polynomial(case.apply, absolute, ones(case), q=1).sum()
        f = record(case.apply, params, case.X)[0]
        return np.allclose(total, np.abs(oracle.values).sum()) and np.allclose(f, oracle.outputs)
    assert agrees()
    monkeypatch.setitem(rules.RULES, primitive, rule)
    assert not agrees()


# What the interpreter accepts.

def gradients_match(apply_fn, params, x):
    """The path sum with gates held has the network's own value and gradient."""
    gates = paths.gates(apply_fn, params, x)
    close(path_sum(apply_fn, params, x, gates=gates), apply_fn(params, x))
    own = jax.jacrev(apply_fn)(params, x)
    held = jax.jacrev(lambda p: path_sum(apply_fn, p, x, gates=gates))(params)
    jax.tree.map(close, held, own)


W = {"a": jnp.asarray(np.random.default_rng(1).normal(size=(4, 4))),
     "b": jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)))}
X = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)))


@pytest.mark.parametrize("hidden", [
    jax.nn.relu, jax.nn.leaky_relu, jnp.abs, lambda v: jnp.maximum(v, 0.1 * v), lambda v: jnp.clip(v, 0),
    lambda v: v * (v > 0).astype(v.dtype), lambda v: jnp.where(v > 0, v, 0), lambda v: jnp.minimum(v, 0),
    lambda v: v * jnp.sign(v),
    lambda v: jnp.concatenate([v[:, :2], jax.nn.relu(-v[:, 2:])], axis=1),
    lambda v: jax.lax.clamp(0.0, v, jnp.inf), lambda v: jnp.pad(v, ((0, 0), (1, 0)))[:, :4],
    lambda v: jnp.maximum(v, v[:, ::-1]), lambda v: jnp.repeat(v.reshape(-1, 2, 2).max(-1), 2, axis=1),
    lambda v: jnp.repeat(v.reshape(-1, 2, 2).min(-1), 2, axis=1), lambda v: v[:, jnp.array([2, 0, 1, 1])],
    lambda v: jnp.zeros_like(v).at[:, 1].set(v[:, 0]).at[:, 2].add(v[:, 3]), lambda v: jnp.cumsum(v, axis=1),
    lambda v: jnp.roll(v, 1, axis=1), lambda v: jnp.concatenate(jnp.split(v, 2, axis=1)[::-1], axis=1),
    jax.jit(lambda v: jax.nn.relu(v)), jax.checkpoint(lambda v: jax.nn.relu(v)),
    jax.vmap(lambda v: jax.nn.relu(v) @ jnp.eye(4)), lambda v: jnp.einsum("ni,ij->nj", v, jnp.ones((4, 4)) / 4),
    lambda v: jax.lax.cond(True, jax.nn.relu, jnp.abs, v), lambda v: -v / 3 - 0.0,
    lambda v: jax.lax.fori_loop(0, 2, lambda i, s: jax.nn.relu(s), v), lambda v: v - v.mean(axis=1, keepdims=True),
])
def test_piecewise_linear_operations_are_accepted(hidden):
    gradients_match(lambda w, x: hidden(x @ w["a"]) @ w["b"], W, X)


def test_stacked_layers_under_scan_are_no_tying():
    stack = jnp.stack([W["a"], W["a"] + 0.1])

    def net(w, x):
        return jax.lax.scan(lambda s, k: (jax.nn.relu(s @ k), None), x, w["k"])[0] @ w["b"]
    params = {"b": W["b"], "k": stack}
    gradients_match(net, params, X)
    assert paths.tied(net, params, X[:1]) == (False, False)


def test_a_matrix_used_twice_in_a_row_is_tied():
    assert paths.tied(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["a"] @ w["b"], W, X[:1]) == (True, False)
    assert paths.tied(lambda w, x: (x @ w["a"] + jax.nn.relu(x) @ w["a"]) @ w["b"], W, X[:1]) == (False, False)


def test_the_transform_works_under_jit_grad_jvp_of_grad_and_vmap():
    def net(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]

    def objective(w, z):
        return paths.polynomial(net, w, z, q=2).sum()

    def closed(w, z):
        return (z @ w["a"] @ w["b"]).sum()
    z = jnp.ones((1, 4))
    u = jax.tree.map(jnp.ones_like, W)
    jax.tree.map(close, jax.jit(jax.grad(objective))(W, z), jax.grad(closed)(W, z))
    jax.tree.map(close, jax.jvp(lambda w: jax.jit(jax.grad(objective))(w, z), (W,), (u,))[1],
                 jax.jvp(lambda w: jax.grad(closed)(w, z), (W,), (u,))[1])
    close(jax.vmap(lambda z: objective(W, z[None]))(X), jax.vmap(lambda z: closed(W, z[None]))(X))


def test_ties_go_as_jax_differentiates_them():
    zero, w = jnp.zeros((1, 2)), jnp.ones((2, 2))
    for activation in (jax.nn.relu, lambda v: jnp.maximum(v, 0.0), jnp.abs, lambda v: jnp.clip(v, 0)):
        (gate,) = paths.gates(lambda w, x, a=activation: a(x @ w), w, zero)
        close(gate[0], jax.grad(lambda v, a=activation: a(v).sum())(zero[0]) + 0.0, 1e-15)
    (pooled,) = paths.gates(lambda w, x: nn.max_pool((x @ w)[:, :, None], (2,), (2,))[:, :, 0], w, zero)
    assert pooled.tolist() == [[[1.0, 0.0]]] or pooled.tolist() == [[[[1.0, 0.0]]]]


def test_pool_max_keeps_the_maximum_of_the_window():
    net = lambda w, x: nn.max_pool((x @ w)[:, :, None], (2,), (2,))[:, :, 0]  # noqa: E731
    w = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    assert float(paths.polynomial(net, w, jnp.ones((1, 2)), q=1, pool="max")[0, 0]) == 7
    assert float(paths.polynomial(net, w, jnp.ones((1, 2)), q=1, pool="sum")[0, 0]) == 11
    gradient = jax.grad(lambda w: paths.polynomial(net, w, jnp.ones((1, 2)), q=1, pool="max").sum())(w)
    assert gradient.tolist() == [[0, 1], [0, 1]]


def test_dead_code_may_hold_anything():
    def net(w, x):
        jnp.tanh(x @ w["a"])
        return jax.nn.relu(x @ w["a"]) @ w["b"]
    gradients_match(net, W, X)


# What it refuses.

@pytest.mark.parametrize(("name", "hidden"), [
    ("tanh", jnp.tanh), ("gelu", jax.nn.gelu), ("silu", jax.nn.silu), ("softmax", jax.nn.softmax),
    ("elu", jax.nn.elu), ("relu6", jax.nn.relu6), ("hard_tanh", jax.nn.hard_tanh), ("exp", jnp.exp),
    ("square", jnp.square), ("product", lambda v: v * v), ("division", lambda v: v / v.sum(axis=1, keepdims=True)),
    ("step", lambda v: v + (v > 0).astype(v.dtype)), ("threshold", lambda v: jnp.maximum(v, 0.5)),
    ("cumprod", lambda v: jnp.cumprod(v, 1)),
    ("attention", lambda v: (v[:, :, None] @ v[:, None, :] @ v[:, :, None])[..., 0]),
    ("stop", jax.lax.stop_gradient),
    ("gelu_exact", lambda v: jax.nn.gelu(v, approximate=False)), ("round", jnp.round),
    ("integer", lambda v: v.astype(int).astype(float)),
])
def test_what_has_no_paths_is_refused_by_name_and_line(name, hidden):
    with pytest.raises(paths.NotPathNetworkError) as caught:
        paths.polynomial(lambda w, x: hidden(x @ w["a"]) @ w["b"], W, X, q=1)
    message = str(caught.value)
    assert "operation:" in message
    assert "what to do:" in message
    assert "test_paths.py:" in message


@pytest.mark.parametrize(("layer", "advice"), [
    (nn.BatchNorm(use_running_average=False), "running averages"), (nn.LayerNorm(), "BatchNorm with running averages")])
def test_normalisation_by_the_signal_is_refused_with_the_way_out(layer, advice):
    variables = layer.init(jax.random.key(0), jnp.ones((3, 4), jnp.float32))
    rest = {n: v for n, v in variables.items() if n != "params"}

    def net(p, x):
        out = layer.apply({"params": p, **rest}, x, mutable=list(rest))
        return out[0] if isinstance(out, tuple) else out
    with pytest.raises(ValueError, match=advice), jax.numpy_dtype_promotion("standard"):
        paths.polynomial(net, variables["params"], jnp.ones((3, 4), jnp.float32), q=1)


def plain_layer_norm(v):
    return (v - v.mean(1, keepdims=True)) / jnp.sqrt(v.var(1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(("net", "advice"), [
    (lambda w, x: x @ (w["a"] / jnp.sqrt((w["a"]**2).sum(0))), "compute it once and pass its result as the parameters"),
    (lambda w, x: x @ (w["a"] / jnp.linalg.norm(w["a"], axis=0)), "compute it once and pass its result"),
    (lambda w, x: x @ jnp.tanh(w["a"]), "compute it once and pass its result as the parameters"),
    (lambda w, x: x @ jax.nn.softmax(w["a"]), "compute it once and pass its result as the parameters"),
    (lambda w, x: plain_layer_norm(x @ w["a"]), "normalisation by its own variance"),
    (lambda w, x: nn.LayerNorm(use_bias=False, use_scale=False, dtype=float).apply({}, x @ w["a"]), "divides by the"),
    (lambda w, x: (x @ w["a"])**2, "the signal is squared"), (lambda w, x: jnp.tanh(x @ w["a"]), "activation: relu"),
    (lambda w, x: jax.nn.gelu(x @ w["a"]), "activation: relu"),
    (lambda w, x: (x @ w["a"]) * (x @ w["a"] + 1), "multiplies signals"),
    (lambda w, x: jax.nn.softmax(x @ w["a"]), "return the logits"),
])
def test_advice_fits(net, advice):
    with pytest.raises(paths.NotPathNetworkError, match=advice) as caught, jax.numpy_dtype_promotion("standard"):
        paths.polynomial(net, W, X, q=1)
    assert ("activation" in str(caught.value)) == ("activation" in advice)


def test_running_averages_among_the_parameters_are_told_apart_from_batch_statistics():
    layer = nn.BatchNorm(use_running_average=True, dtype=float, param_dtype=float)
    with jax.numpy_dtype_promotion("standard"):
        variables = layer.init(jax.random.key(0), X)
        with pytest.raises(paths.NotPathNetworkError, match="running averages out of the parameters"):
            paths.polynomial(lambda v, x: layer.apply(v, x), variables, X, q=1)


def test_bad_arguments_are_refused():
    def net(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]
    with pytest.raises(ValueError, match="pool must be"):
        paths.polynomial(net, W, X, q=1, pool="mean")
    with pytest.raises(ValueError, match=r"failed on a batch of 1, float64\[1, 5\]"):
        paths.polynomial(net, W, jnp.ones((3, 5)), q=1)
    with pytest.raises(ValueError, match=r"one row for each example"):
        paths.polynomial(lambda w, x: net(w, x).sum(), W, X, q=1)
    with pytest.raises(ValueError, match="record them"):
        paths.polynomial(net, W, X, q=1, gates=[jnp.ones((3, 4))] * 2)
    with pytest.raises(ValueError, match="record gates"):
        paths.polynomial(net, W, X, q=1, gates=[jnp.ones((2, 4))])
    with pytest.raises(ValueError, match="more gates"):
        paths.polynomial(net, W, X, q=1, gates=[])
    with pytest.raises(ValueError, match="'b' is missing"):
        paths.polynomial(net, W, X, q=1, masks={"a": jnp.ones((4, 4), bool)})
    with pytest.raises(TypeError, match="masks are booleans"):
        paths.polynomial(net, W, X, q=1, masks=W)
    with pytest.raises(ValueError, match="max_paths = 10 "):
        paths.factorize(net, W, X, max_paths=10)
