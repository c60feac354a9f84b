"""Path norms, distances of maskings and the bound on what masks change, against paths listed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from tests.cases import Case, assert_close, cases, coins, live, normal
from tests.oracles import enumerate_paths

NETWORKS = settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
VARIANCE, EPSILON = (0.7, 1.3), 1e-3


def masks_of(params, seed):
    return {name: np.asarray(coins((seed, i), 0.7, v.shape)) for i, (name, v) in enumerate(sorted(params.items()))}


def kept(factors, masks):
    """Which listed paths a masking keeps."""
    def alive(parameter):
        name, _, index = parameter.rstrip("]").partition("[")
        return masks[name][tuple(map(int, index.split(","))) if index else ()]
    return np.array([all(map(alive, path.parameters)) for path in factors.paths])


def values_under(case, masks):
    """The values of all paths of a masked network, those that are gone at 0."""
    return enumerate_paths(case.layers, {n: np.asarray(v) * masks[n] for n, v in case.params.items()},
                           case.X).values


def folded(case):
    """The case with every BatchNorm's mean folded into its bias."""
    params, layers = dict(case.params), []
    for layer in case.layers:
        if layer[0] == "bn":
            _, name, mean, variance, epsilon = layer
            scale = params[f"{name}.scale"] / np.sqrt(np.asarray(variance) + epsilon)
            params[f"{name}.bias"] = params[f"{name}.bias"] - np.asarray(mean) * scale
            layer = ("bn", name, (0.0,) * len(mean), variance, epsilon)
        layers.append(layer)
    return layers, params


def bn_case(mean=(0.4, -0.9)):
    """A small convolutional network with a frozen BatchNorm, a max-pool and a residual block."""
    params = {"a.kernel": normal(0, (2, 2, 1, 2)), "a.bias": normal(1, (2,)), "n.scale": normal(2, (2,)),
              "n.bias": normal(3, (2,)), "b.kernel": normal(4, (2, 2, 2, 2)), "c.kernel": normal(5, (8, 2))}
    layers = [("conv", "a", 2, 2, 1, 1, 1, "SAME", True), ("bn", "n", mean, VARIANCE, EPSILON), ("leaky", 0.0),
              ("residual", [("conv", "b", 2, 2, 1, 1, 1, "SAME", False), ("leaky", 0.0)]), ("pool", "max", 2),
              ("flatten",), ("dense", "c", 2, False)]
    return Case(layers, params, None, np.asarray(normal(6, (3, 4, 4, 1))))


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual")))
def test_norms_are_those_of_the_listed_path_values(case):
    oracle = enumerate_paths(case.layers, case.params, case.X, case.masks)
    assume(live(case, oracle))
    x = np.ones((1, *case.X.shape[1:]))
    for q in (1, 2, 5):
        want = (np.abs(oracle.values) ** q).sum() ** (1 / q)
        assert_close(pk.paths.norm(case.apply, case.params, x, q=q, masks=case.masks), want, 1e-12)
    assert_close(pk.paths.norm(case.apply, case.params, x, masks=case.masks, log=True),
                 np.log(np.abs(oracle.values).sum()), 1e-12)


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual"), masked=False))
def test_the_distance_of_maskings_is_the_norm_of_the_difference_of_their_paths(case):
    masks = [masks_of(case.params, seed) for seed in (1, 2)]
    one, other = (values_under(case, m) for m in masks)
    difference = one - other
    assume(np.abs(difference).sum() > 0)
    x = np.ones((1, *case.X.shape[1:]))
    assert_close(pk.paths.distance(case.apply, case.params, x, *masks), np.abs(difference).sum(), 1e-12)


def test_the_distance_to_the_whole_network_is_the_norm_of_the_lost_paths():
    case = bn_case()
    masks = masks_of(case.params, 4)
    lost = enumerate_paths(case.layers, case.params, case.X).values - values_under(case, masks)
    x = np.ones((1, *case.X.shape[1:]))
    assert_close(pk.paths.distance(case.apply, case.params, x, masks, q=2), np.linalg.norm(lost), 1e-12)


@NETWORKS
@given(cases(kinds=("dense", "conv", "residual"), masked=False))
def test_the_bound_on_a_change_is_the_sum_over_the_lost_paths_and_holds(case):
    masks = masks_of(case.params, 3)
    masked = {n: v * masks[n] for n, v in case.params.items()}
    before, after = (enumerate_paths(case.layers, p, case.X) for p in (case.params, masked))
    result = pk.paths.change_bound(case.apply, case.params, case.X, masks, batch_size=2)
    factors = pk.paths.factorize(case.apply, case.params, case.X)
    start = np.array([np.ones(len(case.X)) if p.source is None else np.abs(case.X.reshape(len(case.X), -1)[:, p.source])
                      for p in factors.paths]).T
    lost = np.abs(factors.values) * ~kept(factors, masks)
    ends = np.array([p.output for p in factors.paths])
    want = np.stack([(start * lost * (ends == k)).sum(1) for k in range(result.bound.shape[1])], 1)
    assert_close(result.bound, want, 1e-11)
    assert_close(result.change, np.abs(before.outputs - after.outputs), 1e-11, atol=1e-12)
    assert (result.change <= result.bound * (1 + 1e-12) + 1e-14).all()
    seen = result.bound > 0
    assert_close(result.ratio[seen], (result.change / np.where(seen, result.bound, 1))[seen], 1e-12)
    assert_close(10 ** result.log10_bound[seen], result.bound[seen], 1e-11)
    assert (result.ratio[~seen] == 0).all()


def test_the_bound_is_nearly_reached_where_paths_do_not_cancel():
    """With positive weights and inputs every lost path is a loss of the output."""
    params = {"a": jnp.abs(normal(0, (4, 5))), "b": jnp.abs(normal(1, (5, 2)))}
    masks = masks_of(params, 1)
    X = jnp.abs(normal(2, (3, 4)))
    result = pk.paths.change_bound(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, X, masks)
    np.testing.assert_allclose(result.ratio, 1, rtol=1e-12)


def deep(params, x):
    for kernel in params:
        x = jax.nn.relu(x @ kernel)
    return x


def test_no_depth_makes_a_norm_overflow_silently():
    layers = [jnp.full((10, 10), 1e8, jnp.float32)] * 40    # 10^41 paths of 10^320 each
    x = jnp.ones((1, 10), jnp.float32)
    assert float(pk.paths.norm(deep, layers, x, log=True)) / np.log(10) == pytest.approx(361, rel=1e-6)
    with pytest.raises(FloatingPointError, match=r"10\^361, outside of what float(32|64) holds: pass log=True"):
        pk.paths.norm(deep, layers, x)
    halves = [jnp.ones((10, 10), bool).at[:, :5].set(False), *[jnp.ones((10, 10), bool)] * 9]
    steep = [jnp.full((10, 10), 1e35, jnp.float32)] * 10    # 10^11 paths of 10^350 each
    assert float(pk.paths.distance(deep, steep, x, halves, log=True)) / np.log(10) == pytest.approx(
        361 + np.log10(0.5), rel=1e-6)
    result = pk.paths.change_bound(deep, layers[:10], x, halves)
    assert result.bound[0, 0] == pytest.approx(0.5e90, rel=1e-5)
    assert result.ratio[0, 0] == pytest.approx(1, rel=1e-5)


def test_a_distance_that_a_difference_of_norms_would_lose_to_rounding_is_exact():
    """One path of value 1e-12 beside others of 1e8: R_1(a) − R_1(b) would be 0 to rounding."""
    params = {"a": jnp.array([[1e8, 1e-12]]), "b": jnp.array([[1.0], [1.0]])}
    masks = {"a": jnp.array([[True, False]]), "b": jnp.array([[True], [True]])}

    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]
    assert float(pk.paths.distance(net, params, jnp.ones((1, 1)), masks)) == pytest.approx(1e-12, rel=1e-12)
    assert pk.paths.change_bound(net, params, jnp.ones((1, 1)), masks).bound[0, 0] == pytest.approx(1e-12, rel=1e-12)


@pytest.mark.parametrize("pool", ["sum", "max"])
def test_a_folded_mean_is_a_bias_less_what_the_mean_is_scaled_by(pool):
    case = bn_case()
    layers, params = folded(case)
    plain = Case(layers, params, None, case.X)
    x = np.ones((1, 4, 4, 1))
    for q in (1, 2, 3):
        got = pk.paths.norm(case.apply, case.params, x, q=q, batch_norm="folded", pool=pool)
        if pool == "sum":
            values = enumerate_paths(layers, params, x).values
            assert_close(got, (np.abs(values) ** q).sum() ** (1 / q), 1e-12)
        else:
            phi = {n: jnp.abs(v) ** q for n, v in params.items()}
            assert_close(got, pk.paths.polynomial(plain.apply, phi, x, q=q, pool=pool).sum() ** (1 / q), 1e-12)
    assert abs(float(pk.paths.norm(case.apply, case.params, x, pool=pool)) / float(
        pk.paths.norm(case.apply, case.params, x, pool=pool, batch_norm="folded")) - 1) > 1e-3


def test_a_mean_is_folded_however_batch_norm_is_written():
    """As a shift before the scale, as one affine map, with a scale that divides, and with nothing that trains."""
    a, b, gamma, beta = normal(0, (3, 4)), normal(1, (4, 2)), normal(2, (4,)), normal(3, (4,))
    mean, deviation = normal(4, (4,)), jnp.exp(normal(5, (4,)))
    params, x = {"a": a, "b": b, "gamma": gamma, "beta": beta}, jnp.ones((1, 3))
    bias = beta - mean / deviation * gamma
    want = float(((jnp.abs(a).sum(0) * jnp.abs(gamma / deviation) + jnp.abs(bias)) @ jnp.abs(b)).sum())
    written = [
        lambda p, x: jax.nn.relu((x @ p["a"] - mean) * (p["gamma"] / deviation) + p["beta"]) @ p["b"],
        lambda p, x: jax.nn.relu((x @ p["a"] - mean) / deviation * p["gamma"] + p["beta"]) @ p["b"],
        lambda p, x: jax.nn.relu(x @ p["a"] * (p["gamma"] / deviation)
                                 + (p["beta"] - mean / deviation * p["gamma"])) @ p["b"],
        lambda p, x: jax.nn.relu(p["beta"] - (mean - (x @ p["a"]).reshape(-1, 2, 2).reshape(-1, 4))
                                 * (p["gamma"] / deviation)) @ p["b"],
    ]
    for net in written[:3]:
        assert_close(pk.paths.norm(net, params, x, batch_norm="folded"), want, 1e-12)
    negated = {**params, "gamma": -gamma}      # β − (μ − x) γ' = (x − μ) γ' + β
    assert_close(pk.paths.norm(written[3], params, x, batch_norm="folded"), want, 1e-12)
    assert abs(float(pk.paths.norm(written[3], negated, x, batch_norm="folded")) - want) > 1e-3

    def bare(p, x):
        return jax.nn.relu((x @ p["a"] - mean) / deviation) @ p["b"]
    alone = float((((jnp.abs(a).sum(0) + jnp.abs(mean)) / deviation) @ jnp.abs(b)).sum())
    for convention in ("paths", "folded"):
        assert_close(pk.paths.norm(bare, {"a": a, "b": b}, x, batch_norm=convention), alone, 1e-12)


def test_a_signed_mean_is_the_network_itself_at_the_absolute_parameters():
    case = bn_case((0.4, 0.9))
    x = np.ones((1, 4, 4, 1))
    absolute = {n: np.abs(v) for n, v in case.params.items()}
    want = enumerate_paths(case.layers, absolute, x).outputs.sum()
    got = pk.paths.norm(case.apply, case.params, x, batch_norm="signed", pool="max")
    assert_close(got, want, 1e-12)
    assert abs(float(got) / float(pk.paths.norm(case.apply, case.params, x, pool="max")) - 1) > 1e-3
    # With q = 2 the constants are c|c|, parameters θ².
    squares = bn_case(tuple(np.array([0.4, 0.9]) ** 2))
    layers = [(*layer[:3], tuple((np.array(VARIANCE) + EPSILON) ** 2), 0.0) if layer[0] == "bn" else layer
              for layer in squares.layers]
    want = enumerate_paths(layers, {n: v**2 for n, v in case.params.items()}, x).outputs.sum() ** 0.5
    assert_close(pk.paths.norm(case.apply, case.params, x, q=2, batch_norm="signed", pool="max"), want, 1e-12)


def test_at_a_mean_of_zero_the_three_conventions_agree():
    case, x = bn_case((0.0, 0.0)), np.ones((1, 4, 4, 1))
    norms = [float(pk.paths.norm(case.apply, case.params, x, q=2, batch_norm=b, pool="max"))
             for b in ("paths", "folded", "signed")]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-13)


def test_norms_differentiate_and_run_under_jit_and_vmap():
    def net(p, x):
        return jax.nn.relu((x @ p["a"] - mean) * p["gamma"] + p["beta"]) @ p["b"]
    mean, X = normal(4, (4,)), normal(6, (3, 3))
    params = {"a": normal(0, (3, 4)), "b": normal(1, (4, 2)), "gamma": normal(2, (4,)), "beta": normal(3, (4,))}
    one, step = (jax.tree.map(fn, params) for fn in (lambda v: 2 * v, lambda v: 1e-6 * normal(7, v.shape)))
    every = jax.tree.map(lambda v, w, s: jnp.stack([v, w, w + s, w - s]), params, one, step)
    for convention, pool in (("paths", "sum"), ("folded", "sum"), ("signed", "max")):
        def value(p, convention=convention, pool=pool):
            return pk.paths.norm(net, p, jnp.ones((1, 3)), q=2, batch_norm=convention, pool=pool)
        out, slopes = jax.jit(jax.vmap(jax.value_and_grad(value)))(every)
        assert_close(out[1], value(one), 1e-12)
        along = sum(jnp.vdot(g[1], s) for g, s in zip(jax.tree.leaves(slopes), jax.tree.leaves(step), strict=True))
        assert_close((out[2] - out[3]) / 2, along, 1e-5)
    masks = masks_of(params, 1)
    got = jax.jit(lambda m: pk.paths.distance(net, params, jnp.ones((1, 3)), m))(masks)
    assert_close(got, pk.paths.distance(net, params, jnp.ones((1, 3)), masks), 1e-12)
    inside = jax.jit(lambda m: pk.paths.change_bound(net, params, X, m))(masks)
    for a, b in zip(inside, pk.paths.change_bound(net, params, X, masks), strict=True):
        assert_close(a, b, 1e-10)


def test_where_no_path_is_left_a_norm_is_0_and_has_no_slope():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.ones((3, 1))}

    def net(p, x):
        return x @ p["a"] @ p["b"]
    x = jnp.ones((1, 2))
    assert float(pk.paths.norm(net, params, x, q=2)) == 0
    assert float(pk.paths.norm(net, params, x, log=True)) == -np.inf
    slopes = jax.grad(lambda p: pk.paths.norm(net, p, x, q=2))(params)
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(slopes))
    masks = jax.tree.map(lambda v: jnp.ones(v.shape, bool), params)
    assert float(pk.paths.distance(net, params, x, masks)) == 0


def test_what_is_wrong_is_named():
    case, x = bn_case((3.0, 3.0)), jnp.ones((1, 4, 4, 1))
    bad = [
        (dict(q=0), ValueError, "q must be a whole number of at least 1, but is 0"),
        (dict(q=1.5), ValueError, "but is 1.5"),
        (dict(q=np.inf), ValueError, "q must be a whole number of at least 1, but is inf"),
        (dict(batch_norm="fold"), ValueError, "must be one of 'paths', 'folded', 'signed', but got 'fold'"),
        (dict(batch_norm="signed"), ValueError, 'pass pool="max"'),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            pk.paths.norm(case.apply, case.params, x, **options)
    with pytest.raises(ValueError, match="batch of one"):
        pk.paths.norm(case.apply, case.params, jnp.ones((2, 4, 4, 1)))
    with pytest.raises(ValueError, match="smallest entry is -1"):
        pk.paths.norm(case.apply, case.params, -x)
    with pytest.raises(ValueError, match="masks"):
        pk.paths.distance(case.apply, case.params, x, {"a.kernel": True})

    def steep(p, x):
        return jax.nn.leaky_relu(x @ p, 3.0)
    with pytest.raises(ValueError, match="slope of 3"):
        pk.paths.change_bound(steep, -jnp.eye(2), jnp.ones((1, 2)), jnp.eye(2) > 0)
    with pytest.raises(FloatingPointError, match="less than 0"):
        pk.paths.norm(lambda p, x: x @ p - 5.0, jnp.eye(2), jnp.ones((1, 2)), batch_norm="signed", pool="max")
