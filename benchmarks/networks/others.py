"""U-Net, perceptrons over patches, transformers, recurrent networks and small networks of tutorials."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Activation = Callable[[Any], Any]


class UNet(nn.Module):
    """U-Net with unpadded convolutions, crops and transposed convolutions (Ronneberger et al. 2015)."""

    width: int = 64
    depth: int = 4
    classes: int = 2

    @nn.compact
    def __call__(self, x):
        skipped = []
        for level in range(self.depth):
            x = self.twice(x, self.width * 2**level)
            skipped.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = self.twice(x, self.width * 2**self.depth)
        for level in reversed(range(self.depth)):
            x = nn.ConvTranspose(self.width * 2**level, (2, 2), (2, 2), padding="VALID")(x)
            low = (skipped[level].shape[1] - x.shape[1]) // 2
            kept = skipped[level][:, low:low + x.shape[1], low:low + x.shape[2]]
            x = self.twice(jnp.concatenate([kept, x], -1), self.width * 2**level)
        return nn.Conv(self.classes, (1, 1), name="head")(x)

    def twice(self, x, features):
        """Two convolutions."""
        for _ in range(2):
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID")(x))
        return x


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021); the default is B/16. `normal=False` leaves LayerNorm out."""

    activation: Activation = nn.gelu
    normal: bool = True
    patch: int = 16
    width: int = 768
    inner: tuple[int, int] = (384, 3072)
    depth: int = 12
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.depth):
            x += self.two(self.norm(x).swapaxes(1, 2), self.inner[0]).swapaxes(1, 2)
            x += self.two(self.norm(x), self.inner[1])
        return nn.Dense(self.classes, name="head")(self.norm(x).mean(1))

    def norm(self, x):
        """LayerNorm, or nothing."""
        return nn.LayerNorm()(x) if self.normal else x

    def two(self, x, inner):
        """Two dense layers."""
        return nn.Dense(x.shape[-1])(self.activation(nn.Dense(inner)(x)))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021); the default is B/16."""

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        first = self.param("class", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)), x], 1)
        x += self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for _ in range(self.depth):
            x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])


class Recurrent(nn.Module):
    """A cell over a sequence (N, T, features), and a dense layer on what it holds at the end."""

    cell: nn.Module
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes, name="head")(nn.RNN(self.cell)(x)[:, -1])


class MnistConvNet(nn.Module):
    """The network of Flax's first example: two convolutions with average pooling, two dense layers."""

    features: tuple[int, int, int] = (32, 64, 256)

    @nn.compact
    def __call__(self, x):
        for n in self.features[:2]:
            x = nn.avg_pool(nn.relu(nn.Conv(n, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.features[2])(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="head")(x)


class NnxConvNet(nnx.Module):
    """The same in NNX, with BatchNorm and Dropout, as the tutorial of NNX has it."""

    def __init__(self, features: tuple[int, int, int], pixels: int, rngs: nnx.Rngs):
        a, b, c = features
        self.conv1, self.norm1 = nnx.Conv(1, a, (3, 3), rngs=rngs), nnx.BatchNorm(a, rngs=rngs)
        self.conv2, self.norm2 = nnx.Conv(a, b, (3, 3), rngs=rngs), nnx.BatchNorm(b, rngs=rngs)
        self.linear, self.dropout = nnx.Linear(b * pixels // 16, c, rngs=rngs), nnx.Dropout(0.025, rngs=rngs)
        self.head = nnx.Linear(c, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        x = self.dropout(nnx.relu(self.linear(x.reshape(x.shape[0], -1))))
        return self.head(x)


class NnxBlock(nnx.Module):
    """A basic block of ResNet in NNX."""

    def __init__(self, before: int, width: int, stride: int, rngs: nnx.Rngs):
        def conv(n, size, stride):
            return nnx.Conv(n, width, (size, size), stride, padding=size // 2, use_bias=False, rngs=rngs)

        self.conv1, self.norm1 = conv(before, 3, stride), nnx.BatchNorm(width, rngs=rngs)
        self.conv2, self.norm2 = conv(width, 3, 1), nnx.BatchNorm(width, rngs=rngs)
        self.shortcut = nnx.Sequential(conv(before, 1, stride), nnx.BatchNorm(width, rngs=rngs)) \
            if before != width else None

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NnxResNet(nnx.Module):
    """ResNet of basic blocks in NNX; the default is ResNet-18."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64, blocks: tuple[int, ...] = (2, 2, 2, 2), classes: int = 1000):
        self.stem = nnx.Conv(3, width, (7, 7), 2, padding=3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        made, before = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                made.append(NnxBlock(before, width * 2**stage, 2 if stage and not block else 1, rngs))
                before = width * 2**stage
        self.blocks = nnx.List(made)
        self.head = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.stem(x))), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class EquinoxConvNet(eqx.Module):
    """The network of Equinox's tutorial on MNIST; its two activations, and logits in place of their softmax."""

    conv: eqx.nn.Conv2d
    dense: list
    head: eqx.nn.Linear
    activations: tuple[Activation, Activation] = eqx.field(static=True)

    def __init__(self, key, activations: tuple[Activation, Activation], size: int = 28, dense=(512, 64)):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(1, 3, 4, key=keys[0])
        self.dense = [eqx.nn.Linear(3 * (size - 4)**2, dense[0], key=keys[1]),
                      eqx.nn.Linear(*dense, key=keys[2])]
        self.head = eqx.nn.Linear(dense[1], 10, key=keys[3])
        self.activations = activations

    def __call__(self, x):
        x = jnp.ravel(jax.nn.relu(eqx.nn.MaxPool2d(2)(self.conv(x))))
        for layer, activation in zip(self.dense, self.activations, strict=True):
            x = activation(layer(x))
        return self.head(x)
