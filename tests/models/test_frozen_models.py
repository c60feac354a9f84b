"""Paths of ViT, MLP-Mixer, ConvNeXt and GPT with frozen gates: their number, and sums of SynFlow's scores."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.trees import leaf_names

from tests.cases import assert_close
from tests.models.tiny import TINY, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")
each = pytest.mark.parametrize("name", TINY)
each_architecture = pytest.mark.parametrize("name", ["vit", "mixer", "convnext", "gpt"])


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def frozen(name):
    apply_fn, params, x = problem(name)
    return pk.paths.frozen(apply_fn, params, x[:1])


@each
def test_network_frozen_at_an_input_has_its_outputs(name):
    apply_fn, params, x = problem(name)
    assert_close(frozen(name)(params, x[:1]), apply_fn(params, x[:1]), 1e-10)
    assert np.abs(frozen(name)(params, x[1:]) - apply_fn(params, x[1:])).max() > 1e-3


# -- the number of paths to each entry of the signal, by recurrences read off the papers' formulae ---------------------


def normed(n):
    """Of each channel: straight on, by the mean of all, and the bias."""
    return n + n.sum(-1, keepdims=True) + 1


def dense(n, width):
    return np.tile(n.sum(-1, keepdims=True) + 1, width)


def mlp(n, hidden):
    return dense(dense(n, hidden), n.shape[-1])


def transformer_block(n, sees):
    width = n.shape[-1]
    n = n + dense(sees @ dense(normed(n), width), width)
    return n + mlp(normed(n), 4 * width)


def vit():
    n = np.full((5, 4), 1 + 1 + 4 * 4 * 2.0)      # position, bias and the pixels of a patch
    n[0] = 1 + 1                                  # position, class token
    for _ in range(2):
        n = transformer_block(n, np.ones((5, 5)))
    return dense(normed(n[0]), 5).sum()


def mixer(pixels=4 * 4 * 2):
    n = np.full((4, 4), 1.0 + pixels)
    n = n + mlp(normed(n).T, 2).T
    n = n + mlp(normed(n), 16)
    return dense(normed(n).sum(0), 5).sum()


def convnext():
    n = normed(np.full((4, 4, 4), 1 + 2 * 2 * 2.0))
    for width in (4, 6):
        if width == 6:      # a convolution with stride 2
            n = dense(normed(n).reshape(2, 2, 2, 2, 4).sum((1, 3)), 6)
        n = n + mlp(normed(np.broadcast_to(n.sum((0, 1)) + 1, n.shape)), 4 * width)    # 7×7 pixels are all there are
    return dense(normed(n.sum((0, 1))), 5).sum()


def gpt(last):
    n = np.full((3, 4), 1 + 1.0)                  # embedding, position
    n = transformer_block(n, np.tri(3))
    return 5 * normed(n)[-1 if last else slice(None)].sum()


COUNTS = {"vit": vit, "mixer": mixer, "convnext": convnext, "gpt": functools.partial(gpt, last=False),
          "gpt's last": functools.partial(gpt, last=True)}


@each
def test_paths_are_as_many_as_the_recurrences_of_the_papers_formulae_say(name):
    apply_fn, params, x = problem(name)
    assert_close(pk.paths.log_count(apply_fn, params, x[:1], gates="frozen"), np.log10(COUNTS[name]()), 1e-12)


def test_without_patches_only_paths_from_biases_are_left():
    apply_fn, params, x = problem("mixer")
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    masks["patches"]["conv"]["kernel"] &= False
    with pytest.warns(pk.DisconnectedWarning):
        report = pk.connectivity(apply_fn, params, x[:1], masks=masks, gates="frozen")
    assert not report.connected
    assert_close(report.log10_paths, np.log10(mixer(pixels=0)), 1e-12)


# -- SynFlow's sums: what enters a layer leaves it --------------------------------------------------------------------


@functools.cache
def synflow_sums(name):
    """Σ θ ∂R/∂θ of each leaf, by name, and R."""
    apply_fn, params, x = problem(name)
    z = x[:1] if "gpt" in name else jnp.ones_like(x[:1])
    scores = pk.synflow(apply_fn, params, z, gates="frozen", reference=x[:1])
    total = pk.paths.polynomial(frozen(name), jax.tree.map(jnp.abs, params), z, q=1).sum()
    sums = [float(score.sum()) for score in jax.tree.leaves(scores)]
    return dict(zip(leaf_names(params), sums, strict=True)), float(total)


def matching(sums, pattern):
    values = [value for name, value in sums.items() if re.fullmatch(pattern, name)]
    assert values, pattern
    return sum(values)


ENTERS = {"mlp/down/kernel": "mlp/up/.*", "mlp/up/kernel": "norm2/.*", "attention/out/kernel": "attention/value/.*",
          "attention/value/kernel": "norm1/.*"}
MIXES = {"across_tokens/down/kernel": "across_tokens/up/.*", "across_tokens/up/kernel": "norm1/.*",
         "across_channels/down/kernel": "across_channels/up/.*", "across_channels/up/kernel": "norm2/.*"}
CONVOLVES = {"scale": "mlp/down/.*", "mlp/down/kernel": "mlp/up/.*", "mlp/up/kernel": "norm/.*",
             "norm/scale": "depthwise/.*"}
FLOWS = {
    "vit": {f"blocks/{i}/{after}": f"blocks/{i}/{before}" for i in range(2) for after, before in ENTERS.items()},
    "gpt": {f"blocks/0/{after}": f"blocks/0/{before}" for after, before in ENTERS.items()},
    "mixer": {f"blocks/0/{after}": f"blocks/0/{before}" for after, before in MIXES.items()},
    "convnext": {f"stages/{i}/0/{after}": f"stages/{i}/0/{before}" for i in range(2)
                 for after, before in CONVOLVES.items()} | {
        "reductions/0/conv/kernel": "reductions/0/norm/.*", "stem_norm/scale": "stem/.*"},
}
STARTS = r"(.*/)?bias|class_token|positions"


@each_architecture
def test_synflow_scores_of_a_layer_sum_to_those_of_what_enters_it(name):
    sums, _ = synflow_sums(name)
    for after, before in FLOWS[name].items():
        assert_close(matching(sums, after), matching(sums, before), 1e-10)


@each_architecture
def test_every_path_ends_once_and_starts_once(name):
    sums, total = synflow_sums(name)
    ends = matching(sums, r"norm/.*")
    starts = matching(sums, STARTS)
    if name == "gpt":       # each path ends at the embedding, and starts at it or elsewhere
        assert_close(ends, total, 1e-10)
        assert_close(sums["tokens/embedding"], total + (total - starts), 1e-10)
    else:
        assert_close(sums["head/kernel"] + sums["head/bias"], total, 1e-10)
        assert_close(sums["head/kernel"], ends, 1e-10)
        assert_close(starts + sums["stem/kernel" if name == "convnext" else "patches/conv/kernel"], total, 1e-10)


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_queries_and_keys_lie_on_no_path(name):
    sums, _ = synflow_sums(name)
    assert {leaf for leaf, value in sums.items() if value == 0} == {
        leaf for leaf in sums if re.search("query|key", leaf)}
