"""Random shifts and reflections of images, on the device."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, Shaped

__all__ = ["crop_and_flip"]


@partial(jax.jit, static_argnames="padding")
def crop_and_flip(key: PRNGKeyArray, images: Shaped[Array, "n h w c"], *, padding: int = 4
                  ) -> Shaped[Array, "n h w c"]:
    """Shift every image by up to `padding` pixels each way, filling with black, and mirror half of the images.

    Each image draws its own shift, uniform over the (2 · padding + 1)² possible ones, and its own coin.

    Args:
        key: randomness.
        images: (N, H, W, C) of any type.
        padding: the largest shift in pixels.

    Returns:
        images of the same shape and type.

    Source: the augmentation of CIFAR in He et al. (2016), section 4.2.

    Examples:
        >>> crop_and_flip(jax.random.key(0), jnp.ones((2, 8, 8, 1), jnp.uint8)).shape
        (2, 8, 8, 1)
    """
    n, height, width, channels = images.shape
    shift, coin = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(shift, (n, 2), 0, 2 * padding + 1)

    def crop(image: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], jnp.zeros_like(start[0])), (height, width, channels))

    cropped = jax.vmap(crop)(padded, starts)
    mirrored = jax.random.bernoulli(coin, shape=(n, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)
