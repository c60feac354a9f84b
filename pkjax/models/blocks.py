"""What Vision Transformer, Mixer, ConvNeXt and GPT share: patches, perceptrons and transformer blocks, in Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float

__all__ = ["MLP", "Block", "Patches", "check_divides", "check_images", "check_positive", "layer_norm", "linear",
           "weights"]

weights = initializers.truncated_normal(0.02)
"""A normal distribution of standard deviation 0.02, cut off at two of them, as in DeiT and ConvNeXt."""


def check_positive(**sizes: int) -> None:
    """Raise ValueError, with its name, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


def check_divides(**sizes: int) -> None:
    """Raise ValueError unless the first of two named sizes divides the second."""
    (part, divisor), (whole, size) = sizes.items()
    if size % divisor:
        raise ValueError(f"{part} must divide {whole}, but got {part} {divisor} and {whole} {size}")


def check_images(x: Any, *, image: int, channels: int) -> Array:
    """Return a batch of images as an array; raise ValueError unless they are square and of the given size."""
    x = jnp.asarray(x)
    if x.shape[1:] != (image, image, channels):
        raise ValueError(f"the network takes images ({image}, {image}, {channels}), got a batch of shape {x.shape}: "
                         "build it with image= and channels= of your data")
    return x


def layer_norm(width: int, *, epsilon: float = 1e-6, param_dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Build a LayerNorm over channels that computes its variance from centred values."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)


def linear(inputs: int, outputs: int, *, kernel_init: Any = weights, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Build a dense layer of truncated normal weights and zero biases."""
    return nnx.Linear(inputs, outputs, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)


def attention(query: Float[Array, "n q h d"], key: Float[Array, "n k h d"], value: Float[Array, "n k h d"], *,
              mask: Bool[Array, "1 1 q k"] | None = None, **_: Any) -> Float[Array, "n q h d"]:
    """Mix values by softmax(q kᵀ / √d), where the mask allows it.

    JAX's and Flax's functions take the softmax in float32, even of float64.
    """
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits).astype(value.dtype), value)


class Patches(nnx.Module):
    """Cut images into square patches that do not overlap, and embed each by one and the same linear map."""

    def __init__(self, channels: int, width: int, *, patch: int, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Create the convolution whose stride is the size of its kernel."""
        self.conv = nnx.Conv(channels, width, (patch, patch), strides=patch, padding="VALID", kernel_init=weights,
                             param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n t d"]:
        """Map images to tokens, row by row."""
        x = self.conv(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class MLP(nnx.Module):
    """A dense layer, GELU and a dense layer back to the width of the input, acting on the last axis."""

    def __init__(self, width: int, hidden: int, *, approximate: bool = False, out_init: Any = weights,
                 param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Create both layers; `approximate` takes GELU with tanh."""
        self.up = linear(width, hidden, param_dtype=param_dtype, rngs=rngs)
        self.down = linear(hidden, width, kernel_init=out_init, param_dtype=param_dtype, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Map features to features."""
        return self.down(nnx.gelu(self.up(x), approximate=self.approximate))


class Block(nnx.Module):
    """A transformer block with normalisation in front: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, epsilon: float = 1e-6,
                 approximate: bool = False, out_init: Any = weights, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Create attention of queries, keys and values as wide as the input, and an MLP four times as wide."""
        self.causal = causal
        self.norm1 = layer_norm(width, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, attention_fn=attention, kernel_init=weights,
                                                out_kernel_init=out_init, param_dtype=param_dtype, rngs=rngs)
        self.norm2 = layer_norm(width, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)
        self.mlp = MLP(width, 4 * width, approximate=approximate, out_init=out_init, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Map tokens to tokens; if causal, each sees itself and those before it."""
        mask = jnp.tri(x.shape[1], dtype=bool)[None, None] if self.causal else None
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))
