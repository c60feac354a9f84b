"""MLP-Mixer as a Flax NNX module."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pkjax.models.blocks import MLP, Patches, check_divides, check_images, check_positive, layer_norm, linear

__all__ = ["Mixer", "mlp_mixer"]


class MixerBlock(nnx.Module):
    """An MLP across tokens and one across channels, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, tokens: int, width: int, *, token_width: int, channel_width: int, param_dtype: Any,
                 rngs: nnx.Rngs) -> None:
        """Create both MLPs."""
        self.norm1 = layer_norm(width, param_dtype=param_dtype, rngs=rngs)
        self.across_tokens = MLP(tokens, token_width, param_dtype=param_dtype, rngs=rngs)
        self.norm2 = layer_norm(width, param_dtype=param_dtype, rngs=rngs)
        self.across_channels = MLP(width, channel_width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Map tokens to tokens."""
        x = x + self.across_tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.across_channels(self.norm2(x))


class Mixer(nnx.Module):
    """A network of MLPs across patches and across channels; build it with `mlp_mixer`."""

    def __init__(self, classes: int, *, image: int, channels: int, patch: int, depth: int, width: int,
                 token_width: int, channel_width: int, rngs: nnx.Rngs, param_dtype: Any) -> None:
        """Create the embedding of patches, the blocks and the classifier."""
        self.image, self.channels = image, channels
        self.patches = Patches(channels, width, patch=patch, param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List([MixerBlock((image // patch) ** 2, width, token_width=token_width,
                                           channel_width=channel_width, param_dtype=param_dtype, rngs=rngs)
                                for _ in range(depth)])
        self.norm = layer_norm(width, param_dtype=param_dtype, rngs=rngs)
        self.head = linear(width, classes, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Any, "n h w c"]) -> Float[Array, "n k"]:
        """Map a batch of images to logits."""
        x = self.patches(check_images(x, image=self.image, channels=self.channels))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def mlp_mixer(classes: int = 1000, *, image: int = 224, channels: int = 3, patch: int = 16, depth: int = 8,
              width: int = 512, token_width: int | None = None, channel_width: int | None = None, rngs: nnx.Rngs,
              param_dtype: Any = jnp.float32) -> Mixer:
    """Build an MLP-Mixer, by default Mixer-S/16: 18,528,264 parameters for 1000 classes of 224×224 pixels.

        x = patches W + b
        x = x + MLP across tokens(norm(x)), x = x + MLP across channels(norm(x)), `depth` times
        logits = W mean over tokens(norm(x)) + b

    Maps (N, image, image, channels) to (N, classes). Mixer-B/16 is ``mlp_mixer(depth=12, width=768)``: 59,880,472
    parameters. For 32×32 pixels take ``mlp_mixer(10, image=32, patch=4, width=128)``, without an accelerator with
    ``patch=8, depth=4``.

    GELU is exact, without dropout. Weights are truncated normals of standard deviation 0.02, as in DeiT (the paper
    names no distribution), biases zero, LayerNorm's scales one.

    Args:
        classes: number of outputs.
        image: height and width of an image, in pixels.
        channels: channels of an image.
        patch: height and width of a patch, in pixels.
        depth: number of blocks.
        width: size of a token.
        token_width: hidden units of the MLPs across tokens; half of `width` by default, as in all of the paper.
        channel_width: hidden units of the MLPs across channels; four times `width` by default, as there.
        rngs: random streams of the initialisation.
        param_dtype: type of the parameters.

    Raises:
        ValueError: a size is not positive, or `patch` does not divide `image`; when the network is called, the images
            have another size.

    Source: Tolstikhin et al. (2021), section 2 and table 1.

    Examples:
        >>> model = mlp_mixer(10, image=8, patch=4, depth=1, width=6, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 8, 8, 3), jnp.float32)).shape
        (2, 10)
    """
    token_width = max(width // 2, 1) if token_width is None else token_width
    channel_width = 4 * width if channel_width is None else channel_width
    check_positive(classes=classes, image=image, channels=channels, patch=patch, depth=depth, width=width,
                   token_width=token_width, channel_width=channel_width)
    check_divides(patch=patch, image=image)
    return Mixer(classes, image=image, channels=channels, patch=patch, depth=depth, width=width,
                 token_width=token_width, channel_width=channel_width, rngs=rngs, param_dtype=param_dtype)
