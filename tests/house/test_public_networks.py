"""Public networks have their published sizes, are read or refused as the page says, and are sums over their paths."""

import json
import math
from pathlib import Path

import jax
import pytest
from benchmarks import public_networks
from benchmarks.networks import libraries
from benchmarks.networks.catalogue import ACCEPTED, ENTRIES, REFUSED
from benchmarks.networks.figures import frozen_exactness, frozen_refusal, layers, parted
from benchmarks.networks.frozen import FROZEN

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "public_networks.json").read_text())
MEASURED, MEASURED_FROZEN = FIGURES["networks"], FIGURES["frozen"]
DEEP = ("ResNet-50", "ResNeXt-50, 32×4d", "Wide ResNet-50-2", "DenseNet-121", "ShuffleNetV2 ×1.0", "EfficientNet-B0",
        "MobileNetV3-Large", "MLP-Mixer B/16", "ViT-B/16", "hk.nets.ResNet50, version 2",
        "IRNN")
"""Full networks that take longest to read."""
QUICK = ("MobileNetV2 with ReLU", "MLP-Mixer B/16 with ReLU, without LayerNorm", "IRNN", "MNIST tutorial of NNX",
         "hk.nets.MobileNetV1", "hk.nets.MLP, LeNet-300-100", "MNIST tutorial of Equinox with ReLU")
"""Slim networks that take a few seconds, of every library and of most operations."""

QUICK_FROZEN = ("eqx.nn.MultiheadAttention", "LSTM of 128")
"""Slim networks with frozen gates that take a few seconds; tests/models has pkjax's own."""


def marked(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow if slow(name) else ()) for name in names]


@pytest.mark.parametrize("name", marked(ENTRIES, lambda name: name in DEEP))
def test_full_networks_have_the_published_parameters_and_are_read_or_refused(name):
    entry = ENTRIES[name]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        assert libraries.parameters(entry.full(entry.shape)) == entry.parameters == MEASURED[name]["parameters"]
        refused = public_networks.refusal(entry)
    assert refused == MEASURED[name]["refused"]
    assert (refused is None) == (name in ACCEPTED)


@pytest.mark.parametrize("name", marked(ACCEPTED, lambda name: name not in QUICK))
def test_slim_networks_are_the_sums_over_their_paths_and_conserve_them(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        differences = public_networks.exactness(ACCEPTED[name])
    assert set(differences) == {"sum over paths", "polynomial", "conservation"}
    assert max(differences.values()) < 1e-12, differences


def test_a_wrong_gate_is_noticed(monkeypatch):
    gates = public_networks.pk.paths.gates
    monkeypatch.setattr(public_networks.pk.paths, "gates", lambda *args: [1 - gate for gate in gates(*args)])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert public_networks.exactness(ACCEPTED["hk.nets.MLP, LeNet-300-100"])["sum over paths"] > 0.01


@pytest.mark.parametrize(("name", "widths"), [("hk.nets.MLP, LeNet-300-100", (784, 300, 100, 10)),
                                              ("eqx.nn.MLP, 784-128-128-10", (784, 128, 128, 10))])
def test_perceptrons_have_the_paths_of_their_widths(name, widths):
    paths = sum(math.prod(widths[start:]) for start in range(len(widths)))      # from inputs, and from biases
    assert MEASURED[name]["log10_paths"] == pytest.approx(math.log10(paths), abs=1e-6)


def test_the_page_shows_what_was_measured():
    assert list(MEASURED) == list(ENTRIES)
    for name in ACCEPTED:
        assert all(math.isfinite(MEASURED[name].get(size, 0)) for size in ("log10_paths", "log10_trace"))
        assert all(difference < 1e-12 for difference in MEASURED[name].get("differences", {}).values())
    page = (ROOT / "docs" / "public_networks.md").read_text()
    for table in (*public_networks.tables(MEASURED), public_networks.frozen_table(MEASURED_FROZEN)):
        assert table in page
    assert f"{len(ACCEPTED)} of {len(ACCEPTED) + len(REFUSED)}" in page


@pytest.mark.parametrize("name", [name for name in FROZEN if name not in REFUSED])
def test_networks_with_frozen_gates_have_the_published_parameters(name):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        assert libraries.parameters(FROZEN[name].full(FROZEN[name].shape)) == FROZEN[name].parameters
    assert MEASURED_FROZEN[name]["parameters"] == FROZEN[name].parameters


@pytest.mark.parametrize("name", marked(FROZEN, lambda name: name not in QUICK_FROZEN))
def test_slim_networks_with_frozen_gates_are_the_sums_over_their_paths_or_refused(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        refused = frozen_refusal(FROZEN[name])
        assert refused == MEASURED_FROZEN[name]["refused"]
        if refused is None:
            differences = frozen_exactness(FROZEN[name])
            assert set(differences) == {"sum over paths", "conservation"}
            assert max(differences.values()) < 1e-12, differences


def test_every_network_that_is_refused_stands_in_the_table_of_frozen_gates():
    assert list(MEASURED_FROZEN) == list(FROZEN)
    assert set(REFUSED) < set(FROZEN)


@pytest.mark.parametrize("name", [name for name, figures in MEASURED_FROZEN.items() if "seconds" in figures])
def test_only_what_makes_coefficients_lies_on_no_path(name):
    figures = MEASURED_FROZEN[name]
    assert figures["scores_finite"]
    assert all(math.isfinite(figures[size]) for size in ("log10_paths", "log10_trace"))
    off, _ = parted(figures["leaves_off_paths"])
    assert set(layers(off).split(", ")) <= {"", "query", "key", "gate", "Dense", "query_proj", "key_proj", "position"}


def test_perceptrons_have_as_many_paths_with_frozen_gates():
    relu, tanh = MEASURED["hk.nets.MLP, LeNet-300-100"], MEASURED_FROZEN["hk.nets.MLP with tanh"]
    assert tanh["log10_paths"] == pytest.approx(relu["log10_paths"], abs=1e-6)      # tanh(0) = 0 starts no path
