"""The networks of the table: at full size, and slim ones of the same operations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.networks import libraries, others
from benchmarks.networks.blocks import efficientnet_b0, mobilenet_v2, mobilenet_v3
from benchmarks.networks.images import VGG, AlexNet, DenseNet, ResNet, ShuffleNetV2, SqueezeNet
from benchmarks.networks.libraries import Built

PHOTO = (224, 224, 3)
TORCHVISION = "torchvision"
"""Its documentation says how many parameters each model has."""


@dataclass(frozen=True)
class Entry:
    """A public network."""

    library: str                        # whose layers it has; with a dot, a network that the library ships
    full: Callable[[tuple[int, ...]], Built]
    shape: tuple[int, ...]
    parameters: int
    source: str                         # of the number of parameters
    slim: Callable[[tuple[int, ...]], Built] | None = None
    slim_shape: tuple[int, ...] = ()
    last: str = "head"                  # in the names of the last layer's parameters
    tokens: int = 0                     # inputs are integers below this one, not numbers
    slim_tokens: int = 0


def linen(make: Callable[[], nn.Module], dtype: Any = jnp.float32) -> Callable[[tuple[int, ...]], Built]:
    """A module of Flax Linen, for inputs of this type."""
    return lambda shape: libraries.linen(make(), shape, dtype)


def nnx_module(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[tuple[int, ...]], Built]:
    """A module of Flax NNX."""
    return lambda shape: libraries.nnx(make)


def haiku(make: Callable[[], Callable[..., jax.Array]], modes: bool = True) -> Callable[[tuple[int, ...]], Built]:
    """A function of Haiku, with `is_training` where it has modes."""
    def build(shape: tuple[int, ...]) -> Built:
        return libraries.haiku(lambda x, training: make()(x, training) if modes else make()(x), shape)

    return build


def equinox(make: Callable[[jax.Array], eqx.Module]) -> Callable[[tuple[int, ...]], Built]:
    """A module of Equinox."""
    return lambda shape: libraries.equinox(make)


def _slim_haiku(bottleneck: bool, v2: bool) -> Callable[[], hk.nets.ResNet]:
    return lambda: hk.nets.ResNet((1, 1, 1, 1), 3, None, v2, bottleneck, (4, 4, 8, 8))


def flat(sizes: tuple[int, ...], activation: Callable[..., jax.Array] = jax.nn.relu
         ) -> Callable[[], Callable[..., jax.Array]]:
    """A perceptron of Haiku."""
    return lambda: lambda x: hk.nets.MLP(sizes, activation=activation)(hk.Flatten()(x))


def _perceptron(width: int) -> Callable[[jax.Array], eqx.Module]:
    return lambda key: eqx.nn.MLP(784, 10, width, 2, key=key)


class Attention(eqx.Module):
    """Attention of tokens among themselves."""

    attention: eqx.nn.MultiheadAttention

    def __init__(self, key: jax.Array, heads: int = 8, width: int = 512):
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(x, x, x)


ACCEPTED = {
    "AlexNet": Entry(
        "Flax Linen", linen(AlexNet), PHOTO, 61_100_840, TORCHVISION,
        linen(lambda: AlexNet((4, 4, 6, 4, 4), 8, 3)), (67, 67, 3)),
    "VGG-19": Entry(
        "Flax Linen", linen(VGG), PHOTO, 143_667_240, TORCHVISION,
        linen(lambda: VGG(((4, 2), (6, 2), (8, 2)), 8, 3)), (16, 16, 3)),
    "ResNet-18": Entry(
        "Flax NNX", nnx_module(others.NnxResNet), PHOTO, 11_689_512, TORCHVISION,
        nnx_module(lambda rngs: others.NnxResNet(rngs, 4, (2, 1), 3)), (32, 32, 3)),
    "ResNet-50": Entry(
        "Flax Linen", linen(ResNet), PHOTO, 25_557_032, TORCHVISION,
        linen(lambda: ResNet((2, 1), True, 4, classes=3)), (32, 32, 3)),
    "ResNeXt-50, 32×4d": Entry(
        "Flax Linen", linen(lambda: ResNet(groups=32, inner=4)), PHOTO, 25_028_904, TORCHVISION,
        linen(lambda: ResNet((1, 1), True, 8, 2, 32, 3)), (32, 32, 3)),
    "Wide ResNet-50-2": Entry(
        "Flax Linen", linen(lambda: ResNet(inner=128)), PHOTO, 68_883_240, TORCHVISION,
        linen(lambda: ResNet((1, 1), True, 4, inner=128, classes=3)), (32, 32, 3)),
    "DenseNet-121": Entry(
        "Flax Linen", linen(DenseNet), PHOTO, 7_978_856, TORCHVISION,
        linen(lambda: DenseNet((2, 2), 4, 3)), (32, 32, 3)),
    "SqueezeNet 1.1": Entry(
        "Flax Linen", linen(SqueezeNet), PHOTO, 1_235_496, TORCHVISION,
        linen(lambda: SqueezeNet(4, ((2, 2), (3,)), 3)), (32, 32, 3)),
    "ShuffleNetV2 ×1.0": Entry(
        "Flax Linen", linen(ShuffleNetV2), PHOTO, 2_278_604, TORCHVISION,
        linen(lambda: ShuffleNetV2(4, (8, 12), (2, 1), 8, 3)), (32, 32, 3)),
    "MobileNetV2 with ReLU": Entry(
        "Flax Linen", linen(lambda: mobilenet_v2(nn.relu)), PHOTO, 3_504_872, TORCHVISION,
        linen(lambda: mobilenet_v2(nn.relu, slim=True)), (16, 16, 3)),
    "U-Net": Entry(
        "Flax Linen", linen(others.UNet), (572, 572, 1), 31_030_658, "its paper's figure 1, layer by layer",
        linen(lambda: others.UNet(2, 2, 2)), (44, 44, 1)),
    "MLP-Mixer B/16 with ReLU, without LayerNorm": Entry(
        "Flax Linen", linen(lambda: others.Mixer(nn.relu, False)), PHOTO, 59_842_072, "timm, less 25 LayerNorms",
        linen(lambda: others.Mixer(nn.relu, False, 4, 6, (5, 7), 2, 3)), (16, 16, 3)),
    "IRNN": Entry(
        "Flax Linen", linen(lambda: others.Recurrent(nn.SimpleCell(100, activation_fn=nn.relu))), (784, 1), 11_210,
        "100 + 100² + 100 + 101 · 10",
        linen(lambda: others.Recurrent(nn.SimpleCell(4, activation_fn=nn.relu, param_dtype=jnp.float64), 3)), (5, 1)),
    "MNIST example of Linen": Entry(
        "Flax Linen", linen(others.MnistConvNet), (28, 28, 1), 824_458, "Flax's documentation",
        linen(lambda: others.MnistConvNet((4, 4, 6))), (8, 8, 1)),
    "MNIST tutorial of NNX": Entry(
        "Flax NNX", nnx_module(lambda rngs: others.NnxConvNet((32, 64, 256), 784, rngs)), (28, 28, 1), 824_650,
        "the same and 2 · (32 + 64) of BatchNorm",
        nnx_module(lambda rngs: others.NnxConvNet((4, 4, 6), 64, rngs)), (8, 8, 1)),
    "hk.nets.ResNet18": Entry(
        "Haiku", haiku(lambda: hk.nets.ResNet18(1000)), PHOTO, 11_689_512, TORCHVISION,
        haiku(_slim_haiku(False, False)), (32, 32, 3), "logits"),
    "hk.nets.ResNet50": Entry(
        "Haiku", haiku(lambda: hk.nets.ResNet50(1000)), PHOTO, 25_557_032, TORCHVISION,
        haiku(_slim_haiku(True, False)), (32, 32, 3), "logits"),
    "hk.nets.ResNet50, version 2": Entry(
        "Haiku", haiku(lambda: hk.nets.ResNet50(1000, resnet_v2=True)), PHOTO, 25_549_352, "timm",
        haiku(_slim_haiku(True, True)), (32, 32, 3), "logits"),
    "hk.nets.MobileNetV1": Entry(
        "Haiku", haiku(lambda: hk.nets.MobileNetV1(num_classes=1000)), PHOTO, 4_231_976, "Keras, what trains",
        haiku(lambda: hk.nets.MobileNetV1((1, 2, 1), (4, 6, 6), 3)), (16, 16, 3), "logits"),
    "hk.nets.MLP, LeNet-300-100": Entry(
        "Haiku", haiku(flat((300, 100, 10)), False), (28, 28, 1), 266_610, "785 · 300 + 301 · 100 + 101 · 10",
        haiku(flat((6, 5, 3)), False), (4, 4, 1), "linear_2"),
    "eqx.nn.MLP, 784-128-128-10": Entry(
        "Equinox", equinox(_perceptron(128)), (784,), 118_282, "785 · 128 + 129 · 128 + 129 · 10",
        equinox(lambda key: eqx.nn.MLP(6, 3, 5, 2, key=key)), (6,), "layers[2]"),
    "MNIST tutorial of Equinox with ReLU": Entry(
        "Equinox", equinox(lambda key: others.EquinoxConvNet(key, (jax.nn.relu, jax.nn.relu))), (1, 28, 28), 918_781,
        "17 · 3 + 1729 · 512 + 513 · 64 + 65 · 10",
        equinox(lambda key: others.EquinoxConvNet(key, (jax.nn.relu, jax.nn.relu), 8, (5, 4))), (1, 8, 8)),
}

REFUSED = {
    "MobileNetV2": Entry("Flax Linen", linen(lambda: mobilenet_v2(nn.relu6)), PHOTO, 3_504_872, TORCHVISION),
    "MobileNetV3-Large": Entry("Flax Linen", linen(mobilenet_v3), PHOTO, 5_483_032, TORCHVISION),
    "EfficientNet-B0": Entry("Flax Linen", linen(efficientnet_b0), PHOTO, 5_288_548, TORCHVISION),
    "MLP-Mixer B/16": Entry("Flax Linen", linen(others.Mixer), PHOTO, 59_880_472, "timm"),
    "MLP-Mixer B/16 without LayerNorm": Entry(
        "Flax Linen", linen(lambda: others.Mixer(normal=False)), PHOTO, 59_842_072, "timm, less 25 LayerNorms"),
    "ViT-B/16": Entry("Flax Linen", linen(others.ViT), PHOTO, 86_567_656, TORCHVISION),
    "LSTM of 128": Entry(
        "Flax Linen", linen(lambda: others.Recurrent(nn.OptimizedLSTMCell(128))), (28, 28), 81_674,
        "4 · 128 · (28 + 128 + 1) + 129 · 10"),
    "hk.nets.MLP with tanh": Entry(
        "Haiku", haiku(flat((300, 100, 10), jnp.tanh), False), (28, 28, 1), 266_610,
        "785 · 300 + 301 · 100 + 101 · 10"),
    "MNIST tutorial of Equinox": Entry(
        "Equinox", equinox(lambda key: others.EquinoxConvNet(key, (jax.nn.sigmoid, jax.nn.relu))), (1, 28, 28),
        918_781, "17 · 3 + 1729 · 512 + 513 · 64 + 65 · 10"),
    "eqx.nn.MultiheadAttention": Entry("Equinox", equinox(Attention), (16, 512), 1_048_576, "4 · 512²"),
}

ENTRIES = ACCEPTED | REFUSED
