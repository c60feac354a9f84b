"""Vision Transformer, MLP-Mixer, ConvNeXt and GPT: sizes of the literature, and PyTorch's outputs for their weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from flax import nnx
from pkjax import models

from tests.cases import assert_close
from tests.models.tiny import TINY, built, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    """As users have it: Flax's LayerNorm promotes float64 with float32, to float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def shapes(build, **sizes):
    """The parameters' shapes and types, without the parameters."""
    return nnx.state(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0), **sizes)), nnx.Param)


@pytest.mark.parametrize(("build", "sizes", "published"), [
    (models.vit_tiny, {}, 5_717_416),                                             # DeiT-Ti
    (models.mlp_mixer, {}, 18_528_264),                                           # Mixer-S/16
    (models.mlp_mixer, {"depth": 12, "width": 768}, 59_880_472),                  # Mixer-B/16
    (models.convnext_tiny, {}, 28_589_128),
    (models.gpt, {"vocabulary": 50257, "context": 1024, "width": 768, "depth": 12, "heads": 12}, 124_439_808),
    (models.gpt, {"last": True}, 809_856)])
def test_networks_have_the_published_number_of_parameters(build, sizes, published):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(build, **sizes))) == published


each = pytest.mark.parametrize("name", TINY)


# -- the same networks in PyTorch, of its own layers -----------------------------------------------------------------


def held(torch, leaf):
    return torch.tensor(np.array(leaf))


def dense(torch, w, x):
    return torch.nn.functional.linear(x, held(torch, w["kernel"]).T, held(torch, w["bias"]))


def norm(torch, w, x, eps=1e-6):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], held(torch, w["scale"]), held(torch, w["bias"]), eps)


def conv(torch, w, x, **how):
    """Channels last, as in Flax."""
    kernel = held(torch, w["kernel"]).permute(3, 2, 0, 1)
    return torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, held(torch, w["bias"]), **how).permute(0, 2, 3, 1)


def mlp(torch, w, x):
    return dense(torch, w["down"], torch.nn.functional.gelu(dense(torch, w["up"], x)))


def encoder(torch, w, x, *, causal=False, eps=1e-6, approximate="none"):
    """PyTorch's own transformer block."""
    width, heads, _ = w["attention"]["query"]["kernel"].shape
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, functools.partial(torch.nn.functional.gelu, approximate=approximate), eps,
        batch_first=True, norm_first=True, dtype=torch.float64)
    joint = [w["attention"][part] for part in ("query", "key", "value")]
    out = w["attention"]["out"]
    layer.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([held(torch, part["kernel"]).reshape(width, -1).T for part in joint]),
        "self_attn.in_proj_bias": torch.cat([held(torch, part["bias"]).reshape(-1) for part in joint]),
        "self_attn.out_proj.weight": held(torch, out["kernel"]).reshape(-1, width).T,
        "self_attn.out_proj.bias": held(torch, out["bias"]),
        **{f"linear{i}.weight": held(torch, w["mlp"][part]["kernel"]).T for i, part in ((1, "up"), (2, "down"))},
        **{f"linear{i}.bias": held(torch, w["mlp"][part]["bias"]) for i, part in ((1, "up"), (2, "down"))},
        **{f"norm{i}.weight": held(torch, w[f"norm{i}"]["scale"]) for i in (1, 2)},
        **{f"norm{i}.bias": held(torch, w[f"norm{i}"]["bias"]) for i in (1, 2)}})
    mask = torch.full((x.shape[1],) * 2, -math.inf, dtype=torch.float64).triu(1) if causal else None
    return layer(x, src_mask=mask)


def vit(torch, w, x):
    x = conv(torch, w["patches"]["conv"], x, stride=4).reshape(len(x), 4, -1)
    x = torch.cat([held(torch, w["class_token"]).expand(len(x), 1, -1), x], 1) + held(torch, w["positions"])
    for block in w["blocks"].values():
        x = encoder(torch, block, x)
    return dense(torch, w["head"], norm(torch, w["norm"], x)[:, 0])


def mixer(torch, w, x):
    x = conv(torch, w["patches"]["conv"], x, stride=4).reshape(len(x), 4, -1)
    for block in w["blocks"].values():
        x = x + mlp(torch, block["across_tokens"], norm(torch, block["norm1"], x).mT).mT
        x = x + mlp(torch, block["across_channels"], norm(torch, block["norm2"], x))
    return dense(torch, w["head"], norm(torch, w["norm"], x).mean(1))


def convnext(torch, w, x):
    x = norm(torch, w["stem_norm"], conv(torch, w["stem"], x, stride=2))
    for i, stage in w["stages"].items():
        if i:
            x = conv(torch, w["reductions"][i - 1]["conv"], norm(torch, w["reductions"][i - 1]["norm"], x), stride=2)
        for block in stage.values():
            y = conv(torch, block["depthwise"], x, padding=3, groups=x.shape[-1])
            x = x + held(torch, block["scale"]) * mlp(torch, block["mlp"], norm(torch, block["norm"], y))
    return dense(torch, w["head"], norm(torch, w["norm"], x.mean((1, 2))))


def gpt(torch, w, tokens):
    embedding = held(torch, w["tokens"]["embedding"])
    x = torch.nn.functional.embedding(tokens, embedding) + held(torch, w["positions"])[:tokens.shape[1]]
    for block in w["blocks"].values():
        x = encoder(torch, block, x, causal=True, eps=1e-5, approximate="tanh")
    return norm(torch, w["norm"], x, 1e-5) @ embedding.T


@each
def test_outputs_are_those_of_pytorch(name):
    torch = pytest.importorskip("torch")
    apply_fn, params, x = problem(name)
    other = {"vit": vit, "mixer": mixer, "convnext": convnext, "gpt": gpt,
             "gpt's last": lambda *given: gpt(*given)[:, -1]}[name]
    want = other(torch, params, held(torch, x)).detach().numpy()
    assert want.shape == {"gpt": (2, 3, 5)}.get(name, (2, 5))
    assert np.abs(np.diff(want, axis=0)).max() > 1e-3
    assert_close(jax.jit(apply_fn)(params, x), want, 1e-10)


# -- initialisation --------------------------------------------------------------------------------------------------


def test_weights_are_truncated_normal_biases_zero_and_scales_one():
    model = models.vit_tiny(10, image=8, patch=4, depth=1, rngs=nnx.Rngs(0))
    deviation = 0.02 * 0.8796      # of a normal cut off at two deviations
    for name, leaf in pk.from_nnx(model)[1]["blocks"][0]["mlp"].items():
        assert not np.any(leaf["bias"]), name
        assert abs(np.std(leaf["kernel"]) / deviation - 1) < 0.02
        assert np.abs(leaf["kernel"]).max() <= 0.04
    assert abs(np.std(model.positions) / deviation - 1) < 0.1
    assert np.all(model.norm.scale[...] == 1)


def test_gpt_divides_what_adds_to_the_stream_by_the_root_of_its_layers():
    block = models.gpt(depth=8, rngs=nnx.Rngs(0)).blocks[3]
    for inner, last in ((block.mlp.up, block.mlp.down), (block.attention.value, block.attention.out)):
        assert abs(np.std(inner.kernel) / np.std(last.kernel) - 4) < 0.15


def test_layer_scale_starts_where_it_is_told():
    model = models.convnext_tiny(10, depths=(1,), widths=(4,), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.stages[0][0].scale, np.float32(1e-6))


# -- sizes that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "sizes", "message"), [
    (models.vit_tiny, {"patch": 5}, "patch must divide image, but got patch 5 and image 224"),
    (models.vit_tiny, {"heads": 5}, "heads must divide width, but got heads 5 and width 192"),
    (models.vit_tiny, {"depth": 0}, "depth must be positive, got 0"),
    (models.mlp_mixer, {"image": 30}, "patch must divide image, but got patch 16 and image 30"),
    (models.mlp_mixer, {"token_width": 0}, "token_width must be positive, got 0"),
    (models.convnext_tiny, {"widths": (3, 4)}, r"one size for each stage, got depths \(3, .* widths \(3, 4\)"),
    (models.convnext_tiny, {"depths": (3, 3, 0, 3)}, r"depths\[2\] must be positive, got 0"),
    (models.convnext_tiny, {"layer_scale": 0.0}, r"layer_scale must be positive, got 0\.0"),
    (models.gpt, {"heads": 3}, "heads must divide width, but got heads 3 and width 128"),
    (models.gpt, {"context": 0}, "context must be positive, got 0")])
def test_impossible_sizes_are_named(build, sizes, message):
    with pytest.raises(ValueError, match=message):
        shapes(build, **sizes)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("vit", (2, 4, 8, 2), r"takes images \(8, 8, 2\), got a batch of shape \(2, 4, 8, 2\): build it with image="),
    ("mixer", (2, 8, 8, 1), r"takes images \(8, 8, 2\), got a batch of shape \(2, 8, 8, 1\)"),
    ("convnext", (2, 8, 3, 2), r"at least 4×4 pixels and 2 channels, got a batch of shape \(2, 8, 3, 2\)"),
    ("convnext", (2, 8, 8, 3), r"2 channels, got a batch of shape \(2, 8, 8, 3\)"),
    ("gpt", (2, 5), r"T from 1 to its context of 4, got shape \(2, 5\)"),
    ("gpt", (2, 0), r"takes tokens \(N, T\) .*, got shape \(2, 0\)")])
def test_inputs_of_another_size_are_named(name, shape, message):
    model = nnx.eval_shape(lambda: built(name))
    x = jax.ShapeDtypeStruct(shape, jnp.int32 if name == "gpt" else jnp.float64)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda model, x: model(x), model, x)


def test_a_token_beyond_the_vocabulary_makes_its_example_nan():
    apply_fn, params, tokens = problem("gpt")
    logits = apply_fn(params, tokens.at[1, 1].set(5))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


@each
def test_networks_of_one_definition_are_equal_functions(name):
    assert pk.from_nnx(built(name))[0] == pk.from_nnx(built(name, seed=1))[0]
