"""The Vision Transformer as a Flax NNX module."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pkjax.models.blocks import (
    Block,
    Patches,
    check_divides,
    check_images,
    check_positive,
    layer_norm,
    linear,
    weights,
)

__all__ = ["ViT", "vit_tiny"]


class ViT(nnx.Module):
    """A Vision Transformer with a class token and learned positions; build it with `vit_tiny`."""

    def __init__(self, classes: int, *, image: int, channels: int, patch: int, depth: int, width: int, heads: int,
                 rngs: nnx.Rngs, param_dtype: Any) -> None:
        """Create the embedding of patches, the blocks and the classifier."""
        self.image, self.channels = image, channels
        tokens = 1 + (image // patch) ** 2
        self.patches = Patches(channels, width, patch=patch, param_dtype=param_dtype, rngs=rngs)
        self.class_token = nnx.Param(weights(rngs.params(), (1, 1, width), param_dtype))
        self.positions = nnx.Param(weights(rngs.params(), (1, tokens, width), param_dtype))
        self.blocks = nnx.List([Block(width, heads, param_dtype=param_dtype, rngs=rngs) for _ in range(depth)])
        self.norm = layer_norm(width, param_dtype=param_dtype, rngs=rngs)
        self.head = linear(width, classes, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Any, "n h w c"]) -> Float[Array, "n k"]:
        """Map a batch of images to logits."""
        x = self.patches(check_images(x, image=self.image, channels=self.channels))
        start = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([start, x], axis=1) + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def vit_tiny(classes: int = 1000, *, image: int = 224, channels: int = 3, patch: int = 16, depth: int = 12,
             width: int = 192, heads: int = 3, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> ViT:
    """Build ViT-Ti, also known as DeiT-Ti: 5,717,416 parameters for 1000 classes of 224×224 pixels.

        x = [class token, patches W + b] + positions
        x = x + attention(norm(x)), x = x + W₂ GELU(W₁ norm(x) + b₁) + b₂, `depth` times
        logits = W norm(x)₀ + b

    Maps (N, image, image, channels) to (N, classes). GELU is exact, without dropout. Weights, positions and the
    class token are truncated normals of standard deviation 0.02, biases zero, LayerNorm's scales one.

    For 32×32 pixels take ``vit_tiny(10, image=32, patch=4)``, without an accelerator
    ``vit_tiny(10, image=32, patch=8, depth=6, width=96)``: 692,458 parameters, and 30 times as fast.

    Args:
        classes: number of outputs.
        image: height and width of an image, in pixels.
        channels: channels of an image.
        patch: height and width of a patch, in pixels.
        depth: number of blocks.
        width: size of a token; the MLPs are four times as wide.
        heads: number of attention heads.
        rngs: random streams of the initialisation.
        param_dtype: type of the parameters.

    Raises:
        ValueError: a size is not positive, `patch` does not divide `image`, or `heads` does not divide `width`; when
            the network is called, the images have another size.

    Source: Dosovitskiy et al. (2021), section 3.1; Touvron et al. (2021), table 1 and section 6 (initialisation).

    Examples:
        >>> model = vit_tiny(10, image=8, patch=4, depth=1, width=6, heads=2, rngs=nnx.Rngs(0))
        >>> model.positions.shape, model(jnp.ones((2, 8, 8, 3), jnp.float32)).shape
        ((1, 5, 6), (2, 10))
    """
    check_positive(classes=classes, image=image, channels=channels, patch=patch, depth=depth, width=width, heads=heads)
    check_divides(patch=patch, image=image)
    check_divides(heads=heads, width=width)
    return ViT(classes, image=image, channels=channels, patch=patch, depth=depth, width=width, heads=heads, rngs=rngs,
               param_dtype=param_dtype)
