"""Effective units against flows added up path by path."""

import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax import effective_units

from tests.cases import approx, half_masks, normal


def net(p, x):
    return jnp.maximum(x @ p["a"]["kernel"] + p["a"]["bias"], 0.0) @ p["b"]["kernel"]


PARAMS = {"a": {"bias": normal(0, (3,)), "kernel": normal(1, (4, 3))}, "b": {"kernel": normal(2, (3, 2))}}


@pytest.mark.parametrize("masked", [False, True])
def test_flows_are_sums_over_the_paths_through_each_unit(masked):
    masks = half_masks(PARAMS) if masked else None
    theta = pk.apply_masks(PARAMS, masks)
    a, b, bias = (np.asarray(theta[n][k]) for n, k in (("a", "kernel"), ("b", "kernel"), ("a", "bias")))
    flows = {"a/kernel": np.zeros(3), "b/kernel": np.zeros(2)}
    for unit in range(3):
        for out in range(2):
            from_inputs = sum((a[i, unit] * b[unit, out]) ** 2 for i in range(4))
            flows["a/kernel"][unit] += from_inputs
            flows["b/kernel"][out] += from_inputs + (bias[unit] * b[unit, out]) ** 2
    reports = effective_units(net, PARAMS, jnp.ones((1, 4)), masks=masks)
    assert [report.name for report in reports] == list(flows)
    for report, flow in zip(reports, flows.values(), strict=True):
        shares = flow[flow > 0] / flow.sum()
        assert (report.units, report.live) == (len(flow), len(shares))
        assert report.participation == approx(1 / (shares**2).sum(), rel=1e-6)
        assert report.perplexity == approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert report.participation <= report.perplexity * (1 + 1e-9) <= report.live * (1 + 2e-9)


def test_equal_units_all_count_and_weights_of_any_size_do():
    for size in (1e-30, 1.0, 1e30):
        weights = {"a": jnp.full((2, 5), size, jnp.float32), "b": jnp.full((5, 1), size, jnp.float32)}
        first, last = effective_units(lambda p, x: x @ p["a"] @ p["b"], weights, jnp.ones((1, 2), jnp.float32))
        assert (first.participation, first.perplexity, last.live) == pytest.approx((5, 5, 1))


def test_the_output_axis_can_be_the_first_and_must_exist():
    transposed = {"a": normal(1, (4, 3)).T, "b": normal(2, (3, 2)).T}
    ways = (effective_units(lambda p, x: x @ p["a"].T @ p["b"].T, transposed, jnp.ones((1, 4)), axis=0),
            effective_units(lambda p, x: x @ p["a"] @ p["b"], {k: v.T for k, v in transposed.items()},
                            jnp.ones((1, 4))))
    assert ways[0] == ways[1]
    with pytest.raises(ValueError, match=r"axis=2 is not an axis of leaf 'a'"):
        effective_units(lambda p, x: x @ p["a"].T @ p["b"].T, transposed, jnp.ones((1, 4)), axis=2)


def test_a_network_without_paths_has_no_effective_unit():
    nothing = {"a": {"bias": jnp.zeros(3), "kernel": PARAMS["a"]["kernel"]}, "b": {"kernel": jnp.zeros((3, 2))}}
    first, _ = effective_units(net, nothing, jnp.ones((1, 4)))
    assert (first.live, first.participation, first.perplexity) == (0, 0.0, 0.0)
