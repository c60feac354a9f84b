"""Transformers over windows of an image and over tokens of a text, in Flax Linen, from what their papers describe."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Swin(nn.Module):
    """Swin transformer (Liu et al. 2021): attention within windows, shifted in every second block; default Swin-T."""

    patch: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, padding="VALID")(x))
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if stage:
                x = nn.Dense(2 * x.shape[-1], use_bias=False)(nn.LayerNorm()(cut(x, 2).reshape(merged(x))))
            for block in range(depth):
                shift = self.window // 2 if block % 2 and x.shape[1] > self.window else 0
                x += self.attend(nn.LayerNorm()(x), heads, shift, f"{stage}_{block}")
                y = nn.LayerNorm()(x)
                x += nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(y), approximate=False))
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean((1, 2)))

    def attend(self, x, heads, shift, name):
        """Attention within each window, after a cyclic shift; pixels that were far apart do not see each other."""
        w, size, width = self.window, x.shape[1], x.shape[-1]
        parts = cut(jnp.roll(x, (-shift, -shift), (1, 2)), w).reshape(-1, w * w, width)
        q, k, v = (nn.DenseGeneral((heads, width // heads), name=f"{part}_{name}")(parts)
                   for part in ("query", "key", "value"))
        where = np.stack(np.meshgrid(range(w), range(w), indexing="ij"), -1).reshape(-1, 2)
        apart = (where[:, None] - where[None] + w - 1) @ np.array([2 * w - 1, 1])
        table = self.param(f"position_{name}", nn.initializers.normal(0.02), ((2 * w - 1)**2, heads))
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(width // heads) + table[apart].transpose(2, 0, 1)
        side = np.digitize(np.arange(size), [size - w, size - shift]) if shift else np.zeros(size, int)
        region = (3 * side[:, None] + side)[None, :, :, None]
        region = np.asarray(cut(region, w)).reshape(-1, w * w)
        seen = np.tile(region[:, :, None] == region[:, None], (len(x), 1, 1))[:, None]
        mix = jax.nn.softmax(jnp.where(seen, logits, -1e9))
        y = nn.Dense(width, name=f"out_{name}")(jnp.einsum("nhqk,nkhd->nqhd", mix, v).reshape(-1, w * w, width))
        y = y.reshape(len(x), size // w, size // w, w, w, width).swapaxes(2, 3).reshape(x.shape)
        return jnp.roll(y, (shift, shift), (1, 2))


def cut(x, size):
    """Cut images (N, H, W, C) into squares: (N, H / size, W / size, size, size, C)."""
    n, h, w, c = x.shape
    return x.reshape(n, h // size, size, w // size, size, c).swapaxes(2, 3)


def merged(x):
    """The shape of an image whose 2×2 pixels have become one."""
    n, h, w, c = x.shape
    return n, h // 2, w // 2, 4 * c


class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023) with grouped queries and one embedding for both ends; default SmolLM-135M.

    RMSNorm in front of each layer, rotary positions (Su et al. 2021), grouped queries (Ainslie et al. 2023), SwiGLU
    (Shazeer 2020). Maps tokens (N, T) to logits (N, vocabulary) of the token that follows.
    """

    vocabulary: int = 49152
    width: int = 576
    inner: int = 1536
    depth: int = 30
    heads: int = 9
    shared: int = 3                         # heads of keys and values

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(self.vocabulary, self.width, name="tokens")
        x = embedding(tokens)
        for layer in range(self.depth):
            x += self.attend(nn.RMSNorm(1e-5)(x), layer)
            y = nn.RMSNorm(1e-5)(x)
            y = nn.silu(dense(self.inner, f"gate_{layer}")(y)) * dense(self.inner, f"up_{layer}")(y)
            x += dense(self.width, f"down_{layer}")(y)
        return embedding.attend(nn.RMSNorm(1e-5, name="last")(x[:, -1]))

    def attend(self, x, layer):
        """Causal attention; several queries share a key and a value."""
        n, length, size = *x.shape[:2], self.width // self.heads
        q, k, v = (dense(heads * size, f"{part}_{layer}")(x).reshape(n, length, heads, size) for part, heads in
                   (("query", self.heads), ("key", self.shared), ("value", self.shared)))
        q, k = rotated(q), rotated(k)
        k, v = (jnp.repeat(part, self.heads // self.shared, 2) for part in (k, v))
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(size)
        mix = jax.nn.softmax(jnp.where(np.tri(length, dtype=bool), logits, -1e9))
        return dense(self.width, f"out_{layer}")(jnp.einsum("nhqk,nkhd->nqhd", mix, v).reshape(x.shape))


def dense(width, name):
    """A dense layer without a bias."""
    return nn.Dense(width, use_bias=False, name=name)


def rotated(x):
    """Turn pairs of entries of (N, T, heads, size) by angles that grow with the position."""
    length, half = x.shape[1], x.shape[-1] // 2
    angles = np.arange(length)[:, None] * 1e4 ** (-np.arange(half) / half)
    cos, sin = (fn(angles)[:, None].astype(x.dtype) for fn in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
