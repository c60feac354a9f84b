"""Convolution of one image as matrix products, which suits a processor.

There, XLA's own convolution spends most of a backward pass on the kernel's derivative, and several times more within
a loop; the same derivative of a matrix product is a matrix product. Where the kernel is the larger part, one product
of all patches does it. Where the image is, one product after the other does, each of the entries at one place of the
window: patches would take more memory than everything else together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

__all__ = ["prefers_products", "products"]


def prefers_products(params: dict[str, Any], images: int) -> bool:
    """Whether to write a convolution of so many images as products: ungrouped, of one image, not on an accelerator."""
    return (images == 1 and params["feature_group_count"] == 1 and params["batch_group_count"] == 1
            and jax.default_backend() == "cpu")


def products(params: dict[str, Any]) -> Callable[[Array, Array], Array]:
    """Return an ungrouped ``conv_general_dilated`` of one image with these parameters as matrix products."""
    names = ("dimension_numbers", "window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision",
             "preferred_element_type")
    return partial(_convolve, layout=tuple(params[name] for name in names))


@partial(jax.jit, static_argnames="layout")  # traced once a shape: networks repeat their blocks
def _convolve(x: Array, kernel: Array, layout: tuple[Any, ...]) -> Array:
    (lhs, rhs, out), strides, padding, base, dilation, precision, dtype = layout
    image = lax.transpose(x, (*lhs[2:], lhs[1], lhs[0]))[..., 0]
    image = lax.pad(image, jnp.zeros((), x.dtype),
                    [*((low, high, d - 1) for (low, high), d in zip(padding, base, strict=True)), (0, 0, 0)])
    weights = lax.transpose(kernel, (*rhs[2:], rhs[1], rhs[0]))
    *window, features, outputs = weights.shape
    places = [(n - (w - 1) * d - 1) // s + 1
              for n, w, d, s in zip(image.shape[:-1], window, dilation, strides, strict=True)]
    span = [(n - 1) * s + 1 for n, s in zip(places, strides, strict=True)]
    starts = np.stack(np.unravel_index(np.arange(prod(window)), window), -1).astype(np.int32)
    starts = starts * np.asarray(dilation, np.int32)

    def rows(start: Sequence[Any]) -> Array:
        """The entries under one place of the window, (places, features)."""
        block = lax.dynamic_slice(image, (*start, np.int32(0)), (*span, features))
        return lax.reshape(lax.slice(block, [0] * block.ndim, block.shape, (*strides, 1)), (prod(places), features))

    def times(rows: Array, weights: Array) -> Array:
        return lax.dot(rows, weights, precision=precision, preferred_element_type=dtype)

    if prod(window) > 1 and prod(places) > outputs:
        def add(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            start, weight = entry
            return total + times(rows(list(start)), weight), None
        kernels = lax.reshape(weights, (prod(window), features, outputs))
        like = jax.eval_shape(times, rows(starts[0]), kernels[0])
        y, _ = lax.scan(jax.checkpoint(add), jnp.zeros(like.shape, like.dtype), (starts, kernels))
    else:
        patches = lax.concatenate([rows(start) for start in starts], 1)
        y = times(patches, lax.reshape(weights, (prod(window) * features, outputs)))
    y = lax.reshape(y, (1, *places, outputs))
    order = (out[0], *out[2:], out[1])   # where each axis of y goes
    return lax.transpose(y, tuple(order.index(i) for i in range(y.ndim)))
