"""Residual networks for small images, with projection shortcuts (option B)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pkjax.models.dense import kaiming_normal
from pkjax.models.vgg import batch_norm

__all__ = ["ResNet", "resnet18", "resnet20", "wide_resnet18", "wide_resnet20"]


class ResNet(nn.Module):
    """A residual network of basic blocks; build it with `resnet20` and its siblings.

    A stem convolution, stages of basic blocks (the first of every later stage halves the image), a global
    average and one dense layer. Convolutions are 3×3 without bias, followed by BatchNorm; shortcuts that
    change the shape are 1×1 convolutions, followed by BatchNorm (option B). `plain` replaces BatchNorm by a
    bias on every convolution.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    classes: int = 10
    plain: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Any, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Map a batch of images to logits; BatchNorm uses running averages unless `train`."""
        y = nn.relu(self._conv(jnp.asarray(x), self.widths[0], 3, 1, train, "stem"))
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                y = self._block(y, width, stride, train, f"stage{stage}_block{block}")
        y = jnp.mean(y, axis=(1, 2))
        return nn.Dense(self.classes, kernel_init=kaiming_normal, param_dtype=self.param_dtype,
                        name="head")(y)

    def _block(self, x: Array, width: int, stride: int, train: bool, name: str) -> Array:
        out = nn.relu(self._conv(x, width, 3, stride, train, f"{name}_conv0"))
        out = self._conv(out, width, 3, 1, train, f"{name}_conv1")
        if stride != 1 or x.shape[-1] != width:
            x = self._conv(x, width, 1, stride, train, f"{name}_shortcut")
        return nn.relu(out + x)

    def _conv(self, x: Array, width: int, size: int, stride: int, train: bool, name: str) -> Array:
        x = nn.Conv(width, (size, size), (stride, stride), padding=size // 2, use_bias=self.plain,
                    kernel_init=kaiming_normal, param_dtype=self.param_dtype, name=name)(x)
        if self.plain:
            return x
        norm = batch_norm(train, self.param_dtype)
        return norm.clone(name=f"{name}_norm", parent=self)(x)


def resnet20(classes: int = 10, *, plain: bool = False, param_dtype: Any = jnp.float32) -> ResNet:
    """Build ResNet-20 for CIFAR: stages of 3 blocks of 16, 32 and 64 channels, 272,474 parameters.

    Weights are N(0, 2 / fan_in), BatchNorm's scales one.

    Maps (N, H, W, C) to (N, classes).

    Source: He et al. (2016), section 4.2, with shortcuts of option B; Gebhart et al. (2021), section 5.

    Examples:
        >>> resnet20().widths
        (16, 32, 64)
    """
    return ResNet((16, 32, 64), (3, 3, 3), classes, plain, param_dtype)


def wide_resnet20(classes: int = 10, *, plain: bool = False, param_dtype: Any = jnp.float32) -> ResNet:
    """Build `resnet20` with twice the channels: 32, 64 and 128.

    Maps (N, H, W, C) to (N, classes).

    Source: Zagoruyko and Komodakis (2016), with a widening factor of 2.

    Examples:
        >>> wide_resnet20().widths
        (32, 64, 128)
    """
    return ResNet((32, 64, 128), (3, 3, 3), classes, plain, param_dtype)


def resnet18(classes: int = 10, *, plain: bool = False, param_dtype: Any = jnp.float32) -> ResNet:
    """Build ResNet-18 for small images: a 3×3 stem and 2 blocks of 64, 128, 256 and 512 channels each.

    The stem has stride 1 and no max-pool follows it, as is usual for CIFAR and Tiny ImageNet: 11,173,962
    parameters for 10 classes.

    Maps (N, H, W, C) to (N, classes).

    Source: He et al. (2016), table 1, with the stem for small images.

    Examples:
        >>> resnet18(classes=200).classes
        200
    """
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), classes, plain, param_dtype)


def wide_resnet18(classes: int = 10, *, plain: bool = False, param_dtype: Any = jnp.float32) -> ResNet:
    """Build `resnet18` with twice the channels: 128, 256, 512 and 1024.

    Maps (N, H, W, C) to (N, classes).

    Source: Zagoruyko and Komodakis (2016), with a widening factor of 2.

    Examples:
        >>> wide_resnet18().widths
        (128, 256, 512, 1024)
    """
    return ResNet((128, 256, 512, 1024), (2, 2, 2, 2), classes, plain, param_dtype)
