"""VGG networks for images of 32×32 pixels, as OpenLTH and the SynFlow code build them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pkjax.models.dense import kaiming_normal

__all__ = ["VGG", "vgg11", "vgg16"]

# Channels of the 3×3 convolutions; "M" is a 2×2 max-pool of stride 2.
_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512)
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


class VGG(nn.Module):
    """Convolutions with BatchNorm and max-pooling, an average pool and a dense layer; see `vgg11` and `vgg16`."""

    plan: tuple[int | str, ...]
    classes: int = 10
    plain: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Any, "n h w c"], train: bool = False) -> Float[Array, "n k"]:
        """Map a batch of images to logits; BatchNorm uses running averages unless `train`."""
        if min(x.shape[1:3]) < 16:
            raise ValueError("a VGG halves its images four times and needs at least 16×16 pixels, "
                             f"got a batch of shape {x.shape}")
        for step in self.plan:
            if isinstance(step, str):
                x = nn.max_pool(x, (2, 2), (2, 2))
                continue
            x = nn.Conv(step, (3, 3), padding=1, kernel_init=kaiming_normal, param_dtype=self.param_dtype)(x)
            if not self.plain:
                x = batch_norm(train, self.param_dtype)(x)
            x = nn.relu(x)
        # OpenLTH averages over 2×2 here, which at 32×32 pixels is the average over all positions.
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, kernel_init=kaiming_normal, param_dtype=self.param_dtype)(x)


def batch_norm(train: bool, param_dtype: Any) -> nn.BatchNorm:
    """Build BatchNorm with PyTorch's constants, and statistics in the parameters' precision."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, param_dtype=param_dtype,
                        force_float32_reductions=jnp.dtype(param_dtype).itemsize < 8)


def vgg11(classes: int = 10, *, plain: bool = False, param_dtype: Any = jnp.float32) -> VGG:
    """Build VGG-11 for 32×32 images: 8 convolutions with bias and BatchNorm, 9,231,114 parameters.

    `plain` leaves out BatchNorm. Weights are N(0, 2 / fan_in), biases zero, BatchNorm's scales one.

    Maps (N, H, W, C) with H, W ≥ 16 to (N, classes); the module raises a ValueError for smaller images.

    Source: OpenLTH's `cifar_vgg_11`, whose average pool replaces the fifth max-pool.

    Examples:
        >>> vgg11().classes
        10
    """
    return VGG(_VGG11, classes, plain, param_dtype)


def vgg16(classes: int = 10, *, plain: bool = False, param_dtype: Any = jnp.float32) -> VGG:
    """Build VGG-16 for 32×32 images: 13 convolutions with bias and BatchNorm, 14,728,266 parameters.

    `plain` leaves out BatchNorm. Weights are N(0, 2 / fan_in), biases zero, BatchNorm's scales one.

    Maps (N, H, W, C) with H, W ≥ 16 to (N, classes); the module raises a ValueError for smaller images.

    Source: OpenLTH's `cifar_vgg_16`; a network of Gebhart et al. (2021), section 5.

    Examples:
        >>> sum(isinstance(step, int) for step in vgg16().plan)
        13
    """
    return VGG(_VGG16, classes, plain, param_dtype)
