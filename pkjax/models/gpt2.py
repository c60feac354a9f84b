"""The language model GPT-2 as a Flax NNX module."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Integer

from pkjax.models.blocks import Block, check_divides, check_positive, layer_norm, weights

__all__ = ["GPT", "gpt"]


class GPT(nnx.Module):
    """A causal transformer whose embedding of tokens is also its output layer; build it with `gpt`."""

    def __init__(self, vocabulary: int, *, context: int, depth: int, width: int, heads: int, last: bool,
                 rngs: nnx.Rngs, param_dtype: Any) -> None:
        """Create the embeddings of tokens and positions, and the blocks."""
        self.context, self.last = context, last
        residual = initializers.truncated_normal(0.02 / (2 * depth) ** 0.5)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=weights, param_dtype=param_dtype, rngs=rngs)
        self.positions = nnx.Param(weights(rngs.params(), (context, width), param_dtype))
        self.blocks = nnx.List([Block(width, heads, causal=True, epsilon=1e-5, approximate=True, out_init=residual,
                                      param_dtype=param_dtype, rngs=rngs) for _ in range(depth)])
        self.norm = layer_norm(width, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, tokens: Integer[Any, "n t"]) -> Float[Array, "n ... v"]:
        """Map a batch of tokens to the logits of the tokens that follow."""
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context:
            raise ValueError(f"the network takes tokens (N, T) with T from 1 to its context of {self.context}, got "
                             f"shape {tokens.shape}")
        embedding = self.tokens.embedding[...]      # in the type that it has now: `nnx.Embed` keeps that of its making
        x = jnp.take(embedding, tokens, axis=0) + self.positions[: tokens.shape[1]][None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, -1] if self.last else x)
        return x @ embedding.T


def gpt(vocabulary: int = 65, *, context: int = 64, depth: int = 4, width: int = 128, heads: int = 4,
        last: bool = False, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> GPT:
    """Build a language model with GPT-2's architecture, by default a small one of characters (809,856 parameters).

        x_t = E[token_t] + position_t
        x = x + causal attention(norm(x)), x = x + W₂ GELU(W₁ norm(x) + b₁) + b₂, `depth` times
        logits_t = E norm(x)_t

    Maps integers (N, T), T ≤ `context`, to (N, T, vocabulary): the logits of the token that follows each. With `last`
    the output is (N, vocabulary), the logits of what follows the last token. A token of `vocabulary` or more makes all
    logits of its example NaN.
    GPT-2 small is ``gpt(50257, context=1024, depth=12, width=768, heads=12)``: 124,439,808 parameters.

    GELU is the approximation with tanh, as in GPT-2, and LayerNorm's ε is 1e-5; there is no dropout. Weights are
    truncated normals of standard deviation 0.02, divided by √(2 depth) where a layer adds to x; biases are zero,
    LayerNorm's scales one.

    Args:
        vocabulary: number of different tokens.
        context: the largest number of tokens.
        depth: number of blocks.
        width: size of a token's embedding; the MLPs are four times as wide.
        heads: number of attention heads.
        last: return the logits after the last token only.
        rngs: random streams of the initialisation.
        param_dtype: type of the parameters.

    Raises:
        ValueError: a size is not positive, or `heads` does not divide `width`; when the network is called, there are
            more tokens than `context`, or they are not integers (N, T).

    Source: Radford et al. (2019), section 2.3 and table 2; the architecture is that of Radford et al. (2018).

    Examples:
        >>> model = gpt(7, context=5, depth=1, width=6, heads=2, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[1, 2, 0], [6, 6, 3]])
        >>> model(tokens).shape
        (2, 3, 7)
        >>> gpt(7, context=5, depth=1, width=6, heads=2, last=True, rngs=nnx.Rngs(0))(tokens).shape
        (2, 7)
    """
    check_positive(vocabulary=vocabulary, context=context, depth=depth, width=width, heads=heads)
    check_divides(heads=heads, width=width)
    return GPT(vocabulary, context=context, depth=depth, width=width, heads=heads, last=last, rngs=rngs,
               param_dtype=param_dtype)
