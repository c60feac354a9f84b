"""Rescaled units: the function and its paths stay, and conditioning reaches the minimum of a dense divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from pkjax.network import read
from pkjax.paths.units import read_units
from scipy.optimize import minimize

from tests.cases import assert_close, cases, live, named_network, normal, shared
from tests.oracles import enumerate_paths

KEY = jax.random.key(0)
SMALL = {"a": normal(0, (3, 4)), "bias": normal(1, (4,)), "b": normal(2, (4, 3)), "c": normal(3, (3, 2))}


def small(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]) @ p["c"]


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(cases(kinds=("dense", "conv", "residual"), masked=False))
def test_rescaling_changes_parameters_but_no_path_and_no_output(case):
    oracle = enumerate_paths(case.layers, case.params, case.X)
    assume(live(case, oracle))
    params = jax.tree.map(jnp.asarray, case.params)
    other = pk.paths.rescale(case.apply, params, case.X, key=KEY)
    again = enumerate_paths(case.layers, other, case.X)
    assert_close(again.values, oracle.values, 1e-11)
    assert_close(again.outputs, oracle.outputs, 1e-11)
    assert_close(again.data_factor, oracle.data_factor, 1e-11)


def units_of(apply_fn, params, x):
    network = read(apply_fn, params, x, paths=True)
    return read_units(network, network.batch(x))


@pytest.mark.parametrize(("name", "units"), [("mlp", 9 + 8), ("convnet", 4 + 4 + 5), ("frozen norm", 7),
                                             ("positions", 6)])
def test_every_unit_that_is_free_is_found(name, units):
    """Residual sums tie the stem's channels to those of the block; a mean that is not 0 pins what it is added to."""
    apply_fn, params, X = named_network(name)
    assert units_of(apply_fn, params, X[:1]).free == units
    other = pk.paths.rescale(apply_fn, params, X[:1], key=KEY)
    assert_close(apply_fn(other, X), apply_fn(params, X), 1e-11)
    assert any(float(jnp.abs(a - b).max()) > 1e-2 for a, b in zip(*map(jax.tree.leaves, (params, other)), strict=True))
    ones = jnp.ones_like(X[:1])
    assert_close(pk.paths.norm(apply_fn, other, ones), pk.paths.norm(apply_fn, params, ones), 1e-11)


def test_normalised_residual_networks_with_grouped_convolutions_are_rescaled():
    def net(p, x):
        def conv(h, kernel, groups=1):
            return jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", feature_group_count=groups,
                                                dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jax.nn.relu((conv(x, p["stem"]) - 0.0) * p["scale"] + p["shift"])
        h = h + conv(jax.nn.leaky_relu(conv(h, p["groups"], 2), 0.1), p["second"]) / 2
        h = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return jnp.concatenate([h.mean((1, 2)), jnp.abs(h).max((1, 2))], -1) @ p["head"] * p["gain"]
    params = {"stem": normal(0, (3, 3, 2, 4)), "scale": normal(1, (4,)), "shift": normal(2, (4,)),
              "groups": normal(3, (3, 3, 2, 6)), "second": normal(4, (1, 1, 6, 4)), "head": normal(5, (8, 3)),
              "gain": normal(6, (3,))}
    X = normal(7, (3, 4, 4, 2))
    assert units_of(net, params, X[:1]).free == 4 + 4 + 6 + 3       # before the scale, behind it, groups, before gain
    other = pk.paths.rescale(net, params, X[:1], key=KEY)
    assert_close(net(other, X), net(params, X), 1e-11)


def divergence(params, z):
    """The log-determinant divergence of diag(G) from its mean, by a dense G."""
    diagonal = np.diag(np.asarray(pk.path_kernel.dense(small, params, z)))
    return np.log(diagonal.mean()) - np.log(diagonal).mean()


def test_conditioning_reaches_the_minimum_of_the_divergence_of_a_dense_diagonal():
    z = jnp.ones((1, 3))
    result = pk.paths.path_condition(small, SMALL, z)
    assert_close(result.before, divergence(SMALL, z), 1e-10)
    assert_close(result.after, divergence(result.params, z), 1e-10)
    assert result.units == 7
    assert_close(small(result.params, z), small(SMALL, z), 1e-12)
    diagonal = np.diag(np.asarray(pk.path_kernel.dense(small, SMALL, z)))
    parts = np.split(diagonal, np.cumsum([12, 12, 4]))       # a, b, bias, c: in the order of their names

    def at(u):
        first, second = np.exp(u[:4]), np.exp(u[4:])
        a, b, bias, c = (p.reshape(SMALL[n].shape) for p, n in zip(parts, ("a", "b", "bias", "c"), strict=True))
        scaled = np.concatenate([np.ravel(v) for v in (a / first, bias / first, b * first[:, None] / second,
                                                       c * second[:, None])])
        return np.log(scaled.mean()) - np.log(scaled).mean()
    assert_close(result.after, minimize(at, np.zeros(7), tol=1e-12).fun, 1e-8)


def test_conditioned_parameters_do_not_depend_on_the_scales_that_they_had():
    z = jnp.ones((1, 3))
    other = pk.paths.rescale(small, SMALL, z, key=KEY, spread=2.0)
    results = [pk.paths.path_condition(small, p, z, tolerance=1e-12) for p in (SMALL, other)]
    assert results[1].before > results[0].before + 0.1
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), *(r.params for r in results))


def test_conditioning_evens_the_spectrum_of_the_path_kernel():
    z = jnp.ones((1, 3))
    uneven = pk.paths.rescale(small, SMALL, z, key=KEY, spread=2.0)
    even = pk.paths.path_condition(small, uneven, z).params
    ranks = []
    for params in (uneven, even):
        values = np.linalg.eigvalsh(np.asarray(pk.path_kernel.dense(small, params, z)))
        ranks.append(values.sum() ** 2 / (values**2).sum())
        assert_close(np.sort(np.asarray(pk.path_kernel.eigenvalues(small, params, z, k=5))), values[-5:], 1e-8)
    assert ranks[1] > 1.5 * ranks[0]


def test_masked_weights_count_for_nothing_in_conditioning():
    masks = {n: jnp.ones(v.shape, bool) for n, v in SMALL.items()}
    masks["b"] = masks["b"].at[0].set(False).at[:, 1].set(False)      # unit 0 of the first layer and 1 of the second
    result = pk.paths.path_condition(small, SMALL, jnp.ones((1, 3)), masks=masks)
    alive = pk.apply_masks(result.params, masks)
    assert_close(small(alive, jnp.ones((1, 3))), small(pk.apply_masks(SMALL, masks), jnp.ones((1, 3))), 1e-11)
    smaller = {"a": SMALL["a"][:, 1:], "bias": SMALL["bias"][1:], "b": SMALL["b"][1:][:, [0, 2]],
               "c": SMALL["c"][jnp.array([0, 2])]}
    alone = pk.paths.path_condition(small, smaller, jnp.ones((1, 3)))
    assert_close(result.after, alone.after, 1e-8)


def test_what_cannot_be_rescaled_says_why():
    with pytest.raises(pk.paths.NotRescalableError, match="tied weights"):
        pk.paths.rescale(shared, {"again": jnp.eye(5), "bias": jnp.ones(5)}, jnp.ones((1, 5)), key=KEY)
    with pytest.raises(pk.paths.NotRescalableError, match="before they meet a signal"):
        pk.paths.rescale(lambda p, x: x @ (p["a"] @ p["b"]), {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.ones((1, 2)),
                         key=KEY)

    def compared(p, x):
        first, second = x @ p["a"], x @ p["b"]
        return jnp.where(first > second, first, 0.5 * first) @ p["c"] + second @ p["d"]
    params = {"a": normal(0, (3, 4)), "b": normal(1, (3, 4)), "c": normal(2, (4, 4)),
              "d": normal(3, (4, 4))}
    with pytest.raises(pk.paths.NotRescalableError, match="comparing signals"):
        pk.paths.rescale(compared, params, jnp.ones((1, 3)), key=KEY, spread=3.0)


def test_a_scale_that_a_type_does_not_hold_is_an_error():
    def net(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]
    x, unit = jnp.ones((1, 2), jnp.float32), {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones((3, 1), jnp.float32)}
    for changed in ({"a": unit["a"] * 3e38}, {"b": unit["b"] * 2e-38}):
        with pytest.raises(FloatingPointError, match=f"leaf '{min(changed)}' out of the range of its type, float32"):
            pk.paths.rescale(net, unit | changed, x, key=jax.random.key(0), spread=3.0)
    for spread in (-1.0, np.nan):
        with pytest.raises(ValueError, match="spread must be finite and at least 0, but is"):
            pk.paths.rescale(net, unit, x, key=jax.random.key(0), spread=spread)
