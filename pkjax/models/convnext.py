"""ConvNeXt as a Flax NNX module."""

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pkjax.models.blocks import MLP, check_positive, layer_norm, linear, weights

__all__ = ["ConvNeXt", "convnext_tiny"]


class ConvNeXtBlock(nnx.Module):
    """A depthwise 7×7 convolution, LayerNorm and an MLP, scaled by channel, beside a shortcut."""

    def __init__(self, width: int, *, layer_scale: float, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Create the layers; the scales of channels start at `layer_scale`."""
        self.depthwise = nnx.Conv(width, width, (7, 7), feature_group_count=width, kernel_init=weights,
                                  param_dtype=param_dtype, rngs=rngs)
        self.norm = layer_norm(width, param_dtype=param_dtype, rngs=rngs)
        self.mlp = MLP(width, 4 * width, param_dtype=param_dtype, rngs=rngs)
        self.scale = nnx.Param(jnp.full(width, layer_scale, param_dtype))

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n h w d"]:
        """Map an image of features to one of the same shape."""
        y = self.mlp(self.norm(self.depthwise(x)))
        return x + y * self.scale[...].astype(y.dtype)[None, None, None]


class Reduction(nnx.Module):
    """LayerNorm and a 2×2 convolution that halves the image, between two stages."""

    def __init__(self, inputs: int, outputs: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Create both layers."""
        self.norm = layer_norm(inputs, param_dtype=param_dtype, rngs=rngs)
        self.conv = nnx.Conv(inputs, outputs, (2, 2), strides=2, padding="VALID", kernel_init=weights,
                             param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n k l e"]:
        """Map an image of features to one of half its height and width."""
        return self.conv(self.norm(x))


class ConvNeXt(nnx.Module):
    """A convolutional network built like a transformer; build it with `convnext_tiny`."""

    def __init__(self, classes: int, *, channels: int, patch: int, depths: tuple[int, ...], widths: tuple[int, ...],
                 layer_scale: float, rngs: nnx.Rngs, param_dtype: Any) -> None:
        """Create the stem, the stages and the classifier."""
        self.channels, self.least = channels, patch * 2 ** (len(widths) - 1)
        self.stem = nnx.Conv(channels, widths[0], (patch, patch), strides=patch, padding="VALID", kernel_init=weights,
                             param_dtype=param_dtype, rngs=rngs)
        self.stem_norm = layer_norm(widths[0], param_dtype=param_dtype, rngs=rngs)
        self.reductions = nnx.List([Reduction(a, b, param_dtype=param_dtype, rngs=rngs) for a, b in pairwise(widths)])
        self.stages = nnx.List([
            nnx.List([ConvNeXtBlock(width, layer_scale=layer_scale, param_dtype=param_dtype, rngs=rngs)
                      for _ in range(depth)]) for width, depth in zip(widths, depths, strict=True)])
        self.norm = layer_norm(widths[-1], param_dtype=param_dtype, rngs=rngs)
        self.head = linear(widths[-1], classes, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Any, "n h w c"]) -> Float[Array, "n k"]:
        """Map a batch of images to logits."""
        x = jnp.asarray(x)
        if x.ndim != 4 or min(x.shape[1:3]) < self.least or x.shape[3] != self.channels:
            raise ValueError(f"the network takes images of at least {self.least}×{self.least} pixels and "
                             f"{self.channels} channels, got a batch of shape {x.shape}: build it with a smaller "
                             "patch= or other channels=")
        x = self.stem_norm(self.stem(x))
        for reduction, stage in zip((None, *self.reductions), self.stages, strict=True):
            x = x if reduction is None else reduction(x)
            for block in stage:
                x = block(x)
        return self.head(self.norm(x.mean(axis=(1, 2))))


def convnext_tiny(classes: int = 1000, *, channels: int = 3, patch: int = 4, depths: tuple[int, ...] = (3, 3, 9, 3),
                  widths: tuple[int, ...] = (96, 192, 384, 768), layer_scale: float = 1e-6, rngs: nnx.Rngs,
                  param_dtype: Any = jnp.float32) -> ConvNeXt:
    """Build ConvNeXt-T: 28,589,128 parameters for 1000 classes.

        x = norm(patches W + b)
        x = x + s ⊙ MLP(norm(depthwise 7×7 convolution(x))), `depths[i]` times in stage i
        x = 2×2 convolution of stride 2(norm(x)), between two stages
        logits = W norm(mean over pixels(x)) + b

    Maps (N, H, W, channels) to (N, classes); what `patch` · 2^(stages − 1) leaves over at the right and lower edges is
    not seen. For 32×32 pixels take ``convnext_tiny(10, patch=2, depths=(1, 1, 2, 1), widths=(24, 48, 96, 192))``,
    without an accelerator with ``patch=4``.

    GELU is exact, without stochastic depth. Weights are truncated normals of standard deviation 0.02, biases zero,
    LayerNorm's scales one, the scales s of a block `layer_scale`.

    Args:
        classes: number of outputs.
        channels: channels of an image.
        patch: height and width of a patch of the stem, in pixels.
        depths: number of blocks in each stage.
        widths: number of channels in each stage; the MLPs are four times as wide.
        layer_scale: what s starts at.
        rngs: random streams of the initialisation.
        param_dtype: type of the parameters.

    Raises:
        ValueError: a size is not positive, or `depths` and `widths` are not of the same length; when the network is
            called, the images are too small or have another number of channels.

    Source: Liu et al. (2022), section 2, figure 4 and table 9.

    Examples:
        >>> model = convnext_tiny(10, patch=2, depths=(1, 2), widths=(4, 6), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 8, 8, 3), jnp.float32)).shape
        (2, 10)
    """
    if len(depths) != len(widths) or not depths:
        raise ValueError(f"depths and widths hold one size for each stage, got depths {depths} and widths {widths}")
    check_positive(classes=classes, channels=channels, patch=patch, **{f"depths[{i}]": n for i, n in enumerate(depths)},
                   **{f"widths[{i}]": n for i, n in enumerate(widths)})
    if not layer_scale > 0:
        raise ValueError(f"layer_scale must be positive, got {layer_scale}")
    return ConvNeXt(classes, channels=channels, patch=patch, depths=depths, widths=widths, layer_scale=layer_scale,
                    rngs=rngs, param_dtype=param_dtype)
