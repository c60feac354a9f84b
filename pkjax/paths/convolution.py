"""Convolution of one image as matrix products: patches times the kernel.

Path polynomials on a processor are computed so: there, XLA's own convolution takes ten times as long within a loop, and
elsewhere where kernels are larger than images. The patches are one gather, which compiles as fast as the convolution.
Of a large image one block of its places after the other is multiplied: all patches at once would take more memory than
everything else.
"""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

__all__ = ["as_columns", "as_matrix", "patches", "prefers_products", "products"]

Params = dict[str, Any]
"""Of a ``conv_general_dilated``."""
AT_ONCE = 1 << 22
"""Entries of the patches that are formed at a time."""


def prefers_products(params: Params, image: tuple[int, ...], kernel: tuple[int, ...], polynomial: bool) -> bool:
    """Whether to write a convolution as products: ungrouped, of one image, not on an accelerator.

    In path polynomials always; elsewhere where the image is smaller than the window, for which XLA's own convolution
    takes a hundred times as long as otherwise (jaxlib 0.10).
    """
    lhs, rhs, _ = params["dimension_numbers"]
    small = any(image[i] < kernel[j] for i, j in zip(lhs[2:], rhs[2:], strict=True))
    return ((polynomial or small) and image[lhs[0]] == 1 and jax.default_backend() == "cpu"
            and params["feature_group_count"] == 1 and params["batch_group_count"] == 1)


def products(x: Array, kernel: Array, **params: Any) -> Array:
    """An ungrouped ``conv_general_dilated`` of one image as matrix products."""
    names = ("dimension_numbers", "window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision",
             "preferred_element_type")
    return _convolve(x, kernel, tuple((name, params[name]) for name in names))


def as_matrix(params: Params, kernel: Array) -> Array:
    """The kernel of a convolution as (window · features, outputs)."""
    spec = params["dimension_numbers"].rhs_spec
    weights = lax.transpose(kernel, (*spec[2:], spec[1], spec[0]))
    return lax.reshape(weights, (prod(weights.shape[:-1]), weights.shape[-1]))


def as_columns(params: Params, signal: Array) -> Array:
    """What is shaped like the convolution's output as (places, outputs), one image after the other."""
    spec = params["dimension_numbers"].out_spec
    placed = lax.transpose(signal, (spec[0], *spec[2:], spec[1]))
    return lax.reshape(placed, (prod(placed.shape[:-1]), placed.shape[-1]))


def patches(params: Params, kernel: tuple[int, ...], x: Array) -> Array:
    """What a kernel of that shape meets at each place, (places, window · features), one image after the other."""
    spec = params["dimension_numbers"].lhs_spec
    places = _places(params, kernel, x.shape)
    rows = lax.transpose(x, (spec[0], *spec[2:], spec[1]))
    rows = lax.reshape(rows, (x.shape[spec[0]], prod(x.shape[i] for i in spec[2:]), x.shape[spec[1]]))
    met = jax.vmap(lambda image: _met(image, places))(rows)
    return lax.reshape(met, (met.shape[0] * met.shape[1], met.shape[2]))


@partial(jax.jit, static_argnames="layout")  # traced once a shape: networks repeat their blocks
def _convolve(x: Array, kernel: Array, layout: tuple[tuple[str, Any], ...]) -> Array:
    params = dict(layout)
    lhs, _, out = params["dimension_numbers"]
    places = _places(params, kernel.shape, x.shape)
    image = lax.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    rows = lax.reshape(image, (prod(image.shape[1:-1]), image.shape[-1]))
    weights = as_matrix(params, kernel)

    def block(places: Any) -> Array:
        return lax.dot(_met(rows, places), weights, precision=params["precision"],
                       preferred_element_type=params["preferred_element_type"])

    count = len(places)
    blocks = -(-count * weights.shape[0] // AT_ONCE)
    if blocks > 1:
        size = -(-count // blocks)
        filled = np.pad(places, [(0, blocks * size - count), (0, 0)]).reshape(blocks, size, -1)
        y = lax.collapse(lax.map(jax.checkpoint(block), jnp.asarray(filled)), 0, 2)[:count]
    else:
        y = block(places)
    y = lax.reshape(y, (1, *_sizes(params, kernel.shape, x.shape), weights.shape[1]))
    order = (out[0], *out[2:], out[1])   # where each axis of y goes
    return lax.transpose(y, tuple(order.index(i) for i in range(y.ndim)))


def _met(rows: Array, places: Any) -> Array:
    """What the window meets at each place, of an image's rows of features: a gather, with 0 outside of the image."""
    rows = lax.pad(rows, jnp.zeros((), rows.dtype), [(0, 1, 0), (0, 0, 0)])
    met = rows.at[jnp.asarray(places)].get(mode="promise_in_bounds")
    return lax.reshape(met, (met.shape[0], met.shape[1] * met.shape[2]))


def _sizes(params: Params, kernel: tuple[int, ...], image: tuple[int, ...]) -> list[int]:
    """How many places a window has along each axis of an image."""
    return [((image[i] - 1) * grid + low + high - (kernel[j] - 1) * apart) // stride + 1
            for i, j, (low, high), grid, apart, stride in _axes(params)]


def _axes(params: Params) -> Iterator[tuple[Any, ...]]:
    lhs, rhs, _ = params["dimension_numbers"]
    return zip(lhs[2:], rhs[2:], params["padding"], params["lhs_dilation"], params["rhs_dilation"],
               params["window_strides"], strict=True)


def _places(params: Params, kernel: tuple[int, ...], image: tuple[int, ...]) -> np.ndarray:
    """For each place and each entry of the window the row of the image that is met, the last one for none."""
    rows = np.zeros((1, 1), np.int32)
    inside = np.ones((1, 1), bool)
    for n, (i, j, (low, _), grid, apart, stride) in zip(_sizes(params, kernel, image), _axes(params), strict=True):
        at = np.arange(n)[:, None] * stride + np.arange(kernel[j]) * apart - low
        within = (at >= 0) & (at <= (image[i] - 1) * grid) & (at % grid == 0)
        rows = (rows[:, None, :, None] * image[i] + (at // grid)[None, :, None, :]).reshape(len(rows) * n, -1)
        inside = (inside[:, None, :, None] & within[None, :, None, :]).reshape(rows.shape)
    outside = prod(image[i] for i in params["dimension_numbers"].lhs_spec[2:])
    return np.where(inside, rows, outside).astype(np.int32)
