"""Networks for images in Flax Linen, from what their papers describe: (N, H, W, 3) to (N, classes)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

Activation = Callable[[Any], Any]


def conv(x: Any, features: int, size: int = 3, stride: int = 1, *, groups: int = 1, bias: bool = False) -> Any:
    """Convolve, padded so that a stride of 1 keeps the image."""
    return nn.Conv(features, (size, size), (stride, stride), padding=size // 2, feature_group_count=groups,
                   use_bias=bias)(x)


def norm(x: Any) -> Any:
    """BatchNorm by its running averages."""
    return nn.BatchNorm(use_running_average=True, epsilon=1e-5)(x)


def pooled(x: Any, size: int = 3, stride: int = 2, padding: int = 0) -> Any:
    """The maximum over windows."""
    return nn.max_pool(x, (size, size), (stride, stride), ((padding, padding),) * 2)


class AlexNet(nn.Module):
    """AlexNet for one device, without normalisation of responses (Krizhevsky 2014, arXiv 1404.5997)."""

    features: tuple[int, ...] = (64, 192, 384, 256, 256)
    dense: int = 4096
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        a, b, *rest = self.features
        x = pooled(nn.relu(nn.Conv(a, (11, 11), (4, 4), padding=2)(x)))
        x = pooled(nn.relu(conv(x, b, 5, bias=True)))
        for n in rest:
            x = nn.relu(conv(x, n, bias=True))
        x = pooled(x).reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.dense)(x))
        return nn.Dense(self.classes, name="head")(x)


class VGG(nn.Module):
    """VGG without BatchNorm; the default is VGG-19 (Simonyan and Zisserman 2015, configuration E)."""

    stages: tuple[tuple[int, int], ...] = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
    dense: int = 4096
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        for features, layers in self.stages:
            for _ in range(layers):
                x = nn.relu(conv(x, features, bias=True))
            x = pooled(x, 2)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.dense)(x))
        return nn.Dense(self.classes, name="head")(x)


class ResNet(nn.Module):
    """ResNet of basic blocks or of bottlenecks with shortcuts of option B (He et al. 2016).

    `groups` and `inner`, the width of a bottleneck for 64 channels of a stage, give ResNeXt (Xie et al. 2017) and wide
    networks (Zagoruyko and Komodakis 2016). The second convolution of a bottleneck has the stride.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    groups: int = 1
    inner: int = 64
    classes: int = 1000
    activation: Activation = nn.relu

    @nn.compact
    def __call__(self, x):
        x = pooled(self.activation(norm(conv(x, self.width, 7, 2))), padding=1)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = self.block(x, self.width * 2**stage, 2 if stage and not block else 1)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))

    def block(self, x, width, stride):
        """A residual sum of two or three convolutions."""
        if self.bottleneck:
            inner, out = width * self.inner // 64 * self.groups, 4 * width
            y = self.activation(norm(conv(x, inner, 1)))
            y = self.activation(norm(conv(y, inner, 3, stride, groups=self.groups)))
            y = norm(conv(y, out, 1))
        else:
            out = width
            y = norm(conv(self.activation(norm(conv(x, out, 3, stride))), out))
        if stride > 1 or x.shape[-1] != out:
            x = norm(conv(x, out, 1, stride))
        return self.activation(x + y)


class DenseNet(nn.Module):
    """DenseNet with bottlenecks and compression; the default is DenseNet-121 (Huang et al. 2017)."""

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = pooled(nn.relu(norm(conv(x, 2 * self.growth, 7, 2))), padding=1)
        for i, layers in enumerate(self.blocks):
            if i:
                x = nn.avg_pool(conv(nn.relu(norm(x)), x.shape[-1] // 2, 1), (2, 2), (2, 2))
            for _ in range(layers):
                y = conv(nn.relu(norm(x)), 4 * self.growth, 1)
                x = jnp.concatenate([x, conv(nn.relu(norm(y)), self.growth)], -1)
        return nn.Dense(self.classes, name="head")(nn.relu(norm(x)).mean((1, 2)))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1, whose last layer is a convolution (Iandola et al. 2016)."""

    stem: int = 64
    fires: tuple[tuple[int, ...], ...] = ((16, 16), (32, 32), (48, 48, 64, 64))
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.stem, (3, 3), (2, 2), padding="VALID")(x))
        for stage in self.fires:
            x = nn.max_pool(x, (3, 3), (2, 2), ((0, x.shape[1] % 2 ^ 1), (0, x.shape[2] % 2 ^ 1)))
            for squeezed in stage:
                y = nn.relu(conv(x, squeezed, 1, bias=True))
                x = jnp.concatenate([nn.relu(conv(y, 4 * squeezed, size, bias=True)) for size in (1, 3)], -1)
        return nn.relu(nn.Conv(self.classes, (1, 1), name="head")(x)).mean((1, 2))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of width 1 (Ma et al. 2018): channels are split, and shuffled after each unit."""

    stem: int = 24
    widths: tuple[int, ...] = (116, 232, 464)
    repeats: tuple[int, ...] = (4, 8, 4)
    last: int = 1024
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = pooled(nn.relu(norm(conv(x, self.stem, 3, 2))), padding=1)
        for width, repeats in zip(self.widths, self.repeats, strict=True):
            for i in range(repeats):
                x = self.unit(x, width // 2, 1 if i else 2)
        x = nn.relu(norm(conv(x, self.last, 1)))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))

    def unit(self, x, half, stride):
        """Two branches, one of which is the identity where the image keeps its size."""
        if stride == 1:
            kept, y = jnp.split(x, 2, -1)
        else:
            kept, y = norm(conv(x, x.shape[-1], 3, 2, groups=x.shape[-1])), x
            kept = nn.relu(norm(conv(kept, half, 1)))
        y = nn.relu(norm(conv(y, half, 1)))
        y = nn.relu(norm(conv(norm(conv(y, half, 3, stride, groups=half)), half, 1)))
        pair = jnp.stack([kept, y], -1)
        return pair.reshape(*pair.shape[:-2], -1)


class MobileNet(nn.Module):
    """Networks of inverted residuals; the default is MobileNetV2 (Sandler et al. 2018).

    Each block is (expanded channels, channels, size, stride, activation, channels of squeeze-and-excitation), as in
    MobileNetV3 (Howard et al. 2019) and EfficientNet (Tan and Le 2019).
    """

    blocks: tuple[tuple[int, int, int, int, Activation, int], ...]
    stem: tuple[int, Activation]
    last: tuple[int, ...]                   # a convolution, then dense layers
    gate: Activation = nn.sigmoid
    excited: Activation = nn.relu
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        stem, activation = self.stem
        x = activation(norm(conv(x, stem, 3, 2)))
        for block in self.blocks:
            x = self.block(x, *block)
        x = activation(norm(conv(x, self.last[0], 1))).mean((1, 2))
        for n in self.last[1:]:
            x = activation(nn.Dense(n)(x))
        return nn.Dense(self.classes, name="head")(x)

    def block(self, x, inner, out, size, stride, activation, squeezed):
        """Expand, convolve each channel by itself, weigh the channels, and project linearly."""
        y = activation(norm(conv(x, inner, 1))) if inner != x.shape[-1] else x
        y = activation(norm(conv(y, inner, size, stride, groups=inner)))
        if squeezed:
            z = self.excited(nn.Dense(squeezed)(y.mean((1, 2), keepdims=True)))
            y = y * self.gate(nn.Dense(inner)(z))
        y = norm(conv(y, out, 1))
        return x + y if x.shape == y.shape else y
