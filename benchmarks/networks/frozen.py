"""Networks that have paths with frozen gates: those that are refused without, pkjax's own, and others."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pkjax as pk

from benchmarks.networks import others
from benchmarks.networks.attention import Llama, Swin
from benchmarks.networks.blocks import efficientnet_b0, mobilenet_v2, mobilenet_v3
from benchmarks.networks.catalogue import (
    PHOTO,
    REFUSED,
    TORCHVISION,
    Attention,
    Entry,
    equinox,
    flat,
    haiku,
    linen,
    nnx_module,
)
from benchmarks.networks.images import ResNet

RESNET, SLIM_RESNET = ((2, 2, 2, 2), False), ((2, 1), False, 4, 1, 64, 3)
GPT2 = {"context": 1024, "depth": 12, "width": 768, "heads": 12, "last": True}
LSTM = nn.OptimizedLSTMCell

_SLIM = {
    "MobileNetV2": (linen(lambda: mobilenet_v2(nn.relu6, slim=True)), (16, 16, 3)),
    "MobileNetV3-Large": (linen(lambda: mobilenet_v3(slim=True)), (16, 16, 3)),
    "EfficientNet-B0": (linen(lambda: efficientnet_b0(slim=True)), (16, 16, 3)),
    "MLP-Mixer B/16": (linen(lambda: others.Mixer(nn.gelu, True, 4, 6, (5, 7), 2, 3)), (16, 16, 3)),
    "MLP-Mixer B/16 without LayerNorm": (linen(lambda: others.Mixer(nn.gelu, False, 4, 6, (5, 7), 2, 3)), (16, 16, 3)),
    "ViT-B/16": (linen(lambda: others.ViT(4, 8, 2, 2, 3)), (16, 16, 3)),
    "LSTM of 128": (linen(lambda: others.Recurrent(LSTM(4, param_dtype=jnp.float64), 3)), (3, 2)),
    "hk.nets.MLP with tanh": (haiku(flat((6, 5, 3), jnp.tanh), False), (4, 4, 1)),
    "MNIST tutorial of Equinox": (
        equinox(lambda key: others.EquinoxConvNet(key, (jax.nn.sigmoid, jax.nn.relu), 8, (5, 4))), (1, 8, 8)),
    "eqx.nn.MultiheadAttention": (equinox(lambda key: Attention(key, 2, 4)), (3, 4)),
}
_LAST = {"hk.nets.MLP with tanh": "linear_2", "eqx.nn.MultiheadAttention": "output_proj"}

FROZEN = {name: replace(entry, slim=_SLIM[name][0], slim_shape=_SLIM[name][1], last=_LAST.get(name, "head"))
          for name, entry in REFUSED.items()} | {
    "ResNet-18 with GELU": Entry(
        "Flax Linen", linen(lambda: ResNet(*RESNET, activation=nn.gelu)), PHOTO, 11_689_512, TORCHVISION,
        linen(lambda: ResNet(*SLIM_RESNET, activation=nn.gelu)), (32, 32, 3)),
    "ResNet-18 with SiLU": Entry(
        "Flax Linen", linen(lambda: ResNet(*RESNET, activation=nn.silu)), PHOTO, 11_689_512, TORCHVISION,
        linen(lambda: ResNet(*SLIM_RESNET, activation=nn.silu)), (32, 32, 3)),
    "Swin-T": Entry(
        "Flax Linen", linen(Swin), PHOTO, 28_288_354, TORCHVISION,
        linen(lambda: Swin(2, 4, (2, 2), (2, 2), 2, 3)), (8, 8, 3)),
    "SmolLM-135M (LLaMA)": Entry(
        "Flax Linen", linen(Llama, jnp.int32), (64,), 134_515_008,
        "49152 · 576 + 30 · (4 · 576² · ⅔ + 3 · 576 · 1536 + 2 · 576) + 576",
        linen(lambda: Llama(11, 8, 6, 2, 4, 2), jnp.int32), (5,), "last", 49152, 11),
    "models.vit_tiny": Entry(
        "Flax NNX", nnx_module(lambda rngs: pk.models.vit_tiny(rngs=rngs)), PHOTO, 5_717_416, "timm",
        nnx_module(lambda rngs: pk.models.vit_tiny(3, image=8, patch=4, depth=2, width=4, heads=2, rngs=rngs)),
        (8, 8, 3)),
    "models.mlp_mixer, S/16": Entry(
        "Flax NNX", nnx_module(lambda rngs: pk.models.mlp_mixer(rngs=rngs)), PHOTO, 18_528_264, "timm",
        nnx_module(lambda rngs: pk.models.mlp_mixer(3, image=8, patch=4, depth=2, width=4, rngs=rngs)), (8, 8, 3)),
    "models.convnext_tiny": Entry(
        "Flax NNX", nnx_module(lambda rngs: pk.models.convnext_tiny(rngs=rngs)), PHOTO, 28_589_128, TORCHVISION,
        nnx_module(lambda rngs: pk.models.convnext_tiny(3, patch=2, depths=(1, 1), widths=(4, 6), rngs=rngs)),
        (8, 8, 3)),
    "models.gpt, GPT-2 small": Entry(
        "Flax NNX", nnx_module(lambda rngs: pk.models.gpt(50257, rngs=rngs, **GPT2)), (64,), 124_439_808,
        "OpenAI's weights, counted",
        nnx_module(lambda rngs: pk.models.gpt(11, context=6, depth=2, width=4, heads=2, last=True, rngs=rngs)), (5,),
        "['norm']", 50257, 11),
}
