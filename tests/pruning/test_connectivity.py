"""Connectivity of masked networks against reachability in a graph and integer path counts."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.pruning.connectivity import connectivity
from pkjax.pruning.prune import prune
from pkjax.pruning.result import DisconnectedWarning
from pkjax.pruning.scores.data_free import magnitude

pytestmark = pytest.mark.filterwarnings("ignore::pkjax.pruning.result.DisconnectedWarning")

WIDTHS = (3, 4, 4, 2)
ONES = jnp.ones((1, 3))


def network(p, x):
    for i in range(3):
        x = x @ p[f"layer{i}"]["kernel"] + p[f"layer{i}"]["bias"]
        if i < 2:
            x = jax.nn.relu(x)
    return x


def draw(seed, density):
    rng = np.random.default_rng(seed)
    params = {
        f"layer{i}": {"kernel": rng.normal(size=(WIDTHS[i], WIDTHS[i + 1])), "bias": rng.normal(size=WIDTHS[i + 1])}
        for i in range(3)
    }
    return params, jax.tree.map(lambda p: rng.random(p.shape) < density, params)


def by_counting(params, masks, power):
    """Σ_p |v_p|^power over live paths, by matrix products: those from inputs, and those from inputs and biases."""
    from_inputs, everything = np.ones(3), np.ones(3)
    for layer, mask in zip(params.values(), masks.values(), strict=True):
        kernel, bias = (np.abs(layer[k]) ** power * mask[k] for k in ("kernel", "bias"))
        from_inputs, everything = from_inputs @ kernel, everything @ kernel + bias
    return from_inputs.sum(), everything.sum()


def flows(params, masks):
    """Share of Σ_p |v_p| that each kernel carries: what is lost without it."""
    total = by_counting(params, masks, 1)[1]
    without = []
    for name in masks:
        dead = {n: {**m, "kernel": m["kernel"] & (n != name)} for n, m in masks.items()}
        without.append(by_counting(params, dead, 1)[1])
    return [(total - w) / total if total else 0.0 for w in without]


def test_connected_means_a_chain_of_kept_weights_from_input_to_output():
    seen = []
    for seed, density in enumerate([0.9, 0.5, 0.4, 0.35, 0.3, 0.3, 0.25, 0.25, 0.2]):
        params, masks = draw(seed, density)
        report = connectivity(network, jax.tree.map(jnp.asarray, params), ONES, masks=jax.tree.map(jnp.asarray, masks))
        from_inputs, count = by_counting(params, masks, 0)
        assert report.connected == (from_inputs > 0)
        seen.append((report.connected, bool(count > 0)))
        if count == 0:
            assert report.log10_paths == -math.inf
            assert report.log10_effective_paths is None
        else:
            assert report.log10_paths == pytest.approx(math.log10(count), abs=1e-10)
            effective = by_counting(params, masks, 2)[1] ** 2 / by_counting(params, masks, 4)[1]
            assert report.log10_effective_paths == pytest.approx(math.log10(effective), abs=1e-9)
            assert report.log10_effective_paths <= report.log10_paths + 1e-9
        assert [layer.kept for layer in report.layers] == [int(m["kernel"].sum()) for m in masks.values()]
        assert [layer.flow for layer in report.layers] == pytest.approx(flows(params, masks), rel=1e-10)
        json.dumps(report.to_dict(), allow_nan=False)
    # Networks that live, that live from biases alone, and that are dead: each must have been among them.
    assert {(True, True), (False, True), (False, False)} == set(seen)


def test_a_zero_weight_that_is_kept_is_a_path():
    params, _ = draw(0, 1.0)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    everything = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    report = connectivity(network, zeros, ONES, masks=everything)
    assert report.connected
    assert report.log10_effective_paths is None


def test_a_shortcut_keeps_a_network_connected_whose_block_is_emptied():
    def residual(p, x):
        return (x + jax.nn.relu(x @ p["block"])) @ p["head"]

    params = {"block": jnp.ones((3, 3)), "head": jnp.ones((3, 2))}
    masks = {"block": jnp.zeros((3, 3), bool), "head": jnp.ones((3, 2), bool)}
    report = connectivity(residual, params, ONES, masks=masks)
    assert report.connected
    assert report.log10_paths == pytest.approx(math.log10(6))
    assert [layer.emptied for layer in report.layers] == [True, False]


@pytest.mark.parametrize("cut", [False, True])
def test_more_paths_than_float32_holds_are_counted(cut):
    def deep(p, x):
        for kernel in p:
            x = jax.nn.relu(x @ kernel)
        return x

    params = [jnp.full((512, 512), 0.1, jnp.float32)] * 15
    masks = [jnp.ones((512, 512), bool)] * 15
    if cut:
        masks[7] = jnp.zeros((512, 512), bool)
    report = connectivity(deep, params, jnp.ones((1, 512), jnp.float32), masks=masks)
    assert report.connected is not cut
    assert report.log10_paths == (-math.inf if cut else pytest.approx(16 * math.log10(512)))


def test_a_single_chain_through_a_deep_network_is_found_in_float32():
    """One weight a layer leads on; the other kept weights all end at units that lead nowhere."""

    def deep(p, x):
        for kernel in p:
            x = jax.nn.relu(x @ kernel)
        return x

    chain = jnp.zeros((64, 64), bool).at[0, 0].set(True).at[0, 1:].set(True)
    params = [jnp.ones((64, 64), jnp.float32)] * 12
    x = jnp.ones((1, 64), jnp.float32)
    last = chain.at[0, 1:].set(False)
    assert connectivity(deep, params, x, masks=[chain] * 11 + [last]).log10_paths == 0.0
    assert connectivity(deep, params, x, masks=[chain] * 11 + [last]).connected
    assert not connectivity(deep, params, x, masks=[chain] * 11 + [last.at[0, 0].set(False)]).connected


def test_a_pruned_network_reports_the_same_layers_as_its_pruning():
    params = jax.tree.map(jnp.asarray, draw(3, 1.0)[0])
    result = prune(magnitude, params, density=0.5)
    layers = connectivity(network, params, ONES, masks=result.masks).layers
    assert [dataclasses.replace(layer, flow=None) for layer in layers] == list(result.layers)


def test_layers_that_nothing_flows_through_are_named_when_a_network_is_cut():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones((2, 1))}
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params) | {"b": jnp.zeros((2, 2), bool)}
    with pytest.warns(DisconnectedWarning, match="Nothing flows through a, b, c"):
        connectivity(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], params, ONES, masks=masks)
    with pytest.warns(DisconnectedWarning, match="Nothing flows through a, b[.]"):
        connectivity(lambda p, x: (x @ p["a"] @ p["b"] + p["bias"]) @ p["c"], params | {"bias": jnp.ones(2)}, ONES,
                     masks=masks | {"bias": jnp.ones(2, bool)})


def test_masks_that_do_not_fit_are_refused():
    params = jax.tree.map(jnp.asarray, draw(0, 1.0)[0])
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        connectivity(network, params, ONES, masks={"layer0": params["layer0"]})
