"""Runs with frozen gates: runs of their own, whose pruning and traces are those of the frozen network by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from flax import linen as nn
from pkjax.adapters import linen_init
from pkjax.experiments import Settings, records, run
from pkjax.experiments.gates import check_paths, prunable_with
from pkjax.experiments.measurements import choose
from pkjax.experiments.methods import check_name, model, pruned, score
from pkjax.experiments.settings import grid, recorded_settings
from pkjax.trees import leaf_names

SMALL = {"model": f"{__name__}:Gated", "epochs": 1, "train_samples": 32, "test_samples": 16, "traces": 2,
         "output_samples": 2, "batch_size": 32}


class Soft(nn.Module):
    """A chain of layers without paths."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.gelu(nn.Dense(4)(x.reshape(len(x), -1))))


class Gated(nn.Module):
    """A gated unit behind a normalisation."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x.reshape(len(x), -1))
        return nn.Dense(self.classes, name="out")(nn.silu(nn.Dense(4, name="gate")(x)) * nn.Dense(4, name="up")(x))


def test_a_run_without_gates_keeps_the_key_of_earlier_versions_and_with_them_it_is_another():
    assert Settings().key == "42f044bbfeff5f43"
    assert Settings(model="fc-6x1", pruner="snip", compression=1.0, spectra=2).key == "0e2f3e04868b824a"
    assert not {"gates", "reference"} & set(Settings().to_dict())
    runs = grid({"model": "fc-6x1", "gates": "frozen", "reference": ["ones", "images"]})
    assert Settings(model="fc-6x1", gates="frozen").key == runs[0].key
    assert len({Settings(model="fc-6x1").key, *(chosen.key for chosen in runs)}) == 3
    assert [recorded_settings(chosen.to_dict()).key for chosen in runs] == [chosen.key for chosen in runs]


@pytest.mark.parametrize(("values", "message"), [
    ({"gates": "open"}, "gates must be frozen, or left out, got 'open'"),
    ({"gates": "frozen", "reference": "zeros"}, "reference must be ones or images, got 'zeros'"),
    ({"reference": "ones"}, "reference says where gates are frozen: set gates to frozen"),
    ({"model": "vit_tiny"}, "vit_tiny is not a sum over paths, which runs measure: set gates to frozen"),
    ({"model": "convnext_tiny-4x1"}, "unknown model 'convnext_tiny-4x1'")])
def test_gates_that_are_none_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_a_run_prunes_and_measures_the_frozen_network(tmp_path):
    chosen = Settings(**SMALL, pruner="synflow", compression=0.5, prune_steps=3, gates="frozen", reference="images")
    record, masks = run(chosen)
    train = choose(pk.data.load("digits"), 32, 0)
    module = model(chosen.model, 10, (8, 8, 1))
    ones, reference = pk.ones_input((8, 8, 1)), jnp.asarray(choose(train, 16, 0).images)
    apply_fn, params = pk.from_linen(module, linen_init(module)(jax.random.key(0), jnp.asarray(train.images[:1])))
    assert (record["pruning"]["left_out"], record["pruning"]["total"]) == (["gate/kernel"], 64 * 4 + 4 * 10)
    assert masks["gate"]["kernel"].all()
    by_hand = pk.prune(
        lambda p: pk.synflow(pk.paths.frozen(apply_fn, p, reference), p, ones), params, compression=0.5, steps=3,
        prunable=pk.on_paths(apply_fn, params, ones, gates="frozen"))
    jax.tree.map(np.testing.assert_array_equal, by_hand.masks, masks)
    network = pk.paths.frozen(apply_fn, params, reference, masks=masks)
    trace = pk.path_kernel.trace(network, params, ones, masks=masks, log=True)
    np.testing.assert_allclose(record["history"][0]["ln_trace_pi"], float(trace), rtol=1e-5)
    few = jnp.asarray(choose(train, 2, 0).images)
    each = [pk.path_kernel.gated_trace(pk.paths.frozen(apply_fn, params, x[None], masks=masks), params, x[None],
                                       masks=masks) for x in few]
    np.testing.assert_allclose(record["initial"]["gated_trace"], float(sum(each)), rtol=1e-4)
    records.write_record(tmp_path, record, masks)
    table = records.table(tmp_path)
    assert table[["gates", "reference"]].to_numpy().tolist() == [["frozen", "images"]]


def own_score(params, apply_fn, gates, reference):
    """A score of the user's own that freezes gates as the run does."""
    return pk.synflow(apply_fn, params, pk.ones_input((8, 8, 1)), gates=gates, reference=reference)


@pytest.fixture(scope="module")
def soft():
    apply_fn, params = pk.from_linen(Soft(), Soft().init(jax.random.key(0), jnp.ones((1, 8, 8, 1), jnp.float32)))
    return apply_fn, params, pk.data.load("digits", samples=8)


def test_a_network_without_paths_is_refused_by_name_and_remedy(soft):
    with pytest.raises(pk.NotPathNetworkError, match=r"^soft is not a sum over paths: .*; source: .*to do: do this$"):
        check_paths("soft", *soft[:2], (8, 8, 1), None, "do this")
    check_paths("soft", *soft[:2], (8, 8, 1), "frozen", "")


def test_every_pruner_of_paths_takes_frozen_gates(soft):
    apply_fn, params, digits = soft
    reference, name = jnp.asarray(digits.images), f"{__name__}:own_score"
    prunable = prunable_with("frozen", apply_fn, params, (8, 8, 1))
    kept = {}
    for pruner in ("synflow", "synflow-l2", "synflow-dist", "path-exclusion", "phew", "snip", name):
        found = score(pruner, apply_fn, digits, seed=0, gates="frozen", reference=reference)
        kept[pruner] = pruned(found, params, compression=0.5, steps=2, prunable=prunable)
        assert kept[pruner].kept == round(296 * 10**-0.5)
    jax.tree.map(np.testing.assert_array_equal, kept[name].masks, kept["synflow"].masks)


@pytest.mark.parametrize(("name", "shape", "leaf", "expected"), [
    ("vit_tiny", (32, 32, 3), "patches/conv/kernel", (4, 4, 3, 192)),
    ("vit_tiny-128x2", (8, 8, 1), "blocks/1/attention/key/kernel", (128, 2, 64)),
    ("mlp_mixer-6x1", (28, 28, 1), "patches/conv/kernel", (4, 4, 1, 6)),
    ("convnext_tiny", (8, 8, 1), "stages/0/0/depthwise/kernel", (7, 7, 1, 24))])
def test_networks_of_a_name_have_the_size_of_the_images(name, shape, leaf, expected):
    module = model(name, 10, shape)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape), jnp.float32))["params"]
    sizes = dict(zip(leaf_names(params), (v.shape for v in jax.tree.leaves(params)), strict=True))
    assert sizes[leaf] == expected, sizes


def test_images_that_are_not_square_and_names_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"vit_tiny takes square images \(H, H, C\), got images of shape \(13,\)"):
        model("vit_tiny", 3, (13,))
    for name in ("vit_tiny-plain", "vit_tiny-0x1", "gpt"):
        with pytest.raises(ValueError, match=f"unknown model '{name}'"):
            check_name(name, "model")
