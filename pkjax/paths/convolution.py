"""Convolution of one image as matrix products: patches times the kernel.

Path polynomials on a processor are computed so: there, XLA's own convolution spends most of a backward pass on the
kernel's derivative, and several times more within a loop; the same derivative of a matrix product is a matrix product.
Where the kernel is the larger part, one product of all patches does it. Where the image is, one block of its places
after the other is multiplied: all patches at once would take more memory than everything else.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
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
    window = [kernel[i] for i in params["dimension_numbers"].rhs_spec[2:]]
    axis = params["dimension_numbers"].lhs_spec[0]

    def one(image: Array) -> Array:
        return _met(params, window, *_padded(params, window, lax.expand_dims(image, [axis])))
    met = jax.vmap(one, axis)(x)
    return lax.reshape(met, (met.shape[0] * met.shape[1], met.shape[2]))


@partial(jax.jit, static_argnames="layout")  # traced once a shape: networks repeat their blocks
def _convolve(x: Array, kernel: Array, layout: tuple[tuple[str, Any], ...]) -> Array:
    params = dict(layout)
    _, rhs, out = params["dimension_numbers"]
    window, outputs = [kernel.shape[i] for i in rhs[2:]], kernel.shape[rhs[0]]
    weights = as_matrix(params, kernel)
    image, places = _padded(params, window, x)
    blocks = min(window[0], places[0]) if prod(places) > outputs else 1
    height = -(-places[0] // blocks)
    (stride, *_), (dilation, *_) = params["window_strides"], params["rhs_dilation"]

    def block(_: None, first: Any) -> tuple[None, Array]:
        rows = lax.dynamic_slice_in_dim(image, first, (height - 1) * stride + (window[0] - 1) * dilation + 1)
        return None, lax.dot(_met(params, window, rows, [height, *places[1:]]), weights, precision=params["precision"],
                             preferred_element_type=params["preferred_element_type"])

    if blocks > 1:
        image = lax.pad(image, jnp.zeros((), x.dtype),
                        [(0, (blocks * height - places[0]) * stride, 0), *[(0, 0, 0)] * len(places)])
        starts = np.arange(blocks, dtype=np.int32) * np.int32(height * stride)
        y = lax.slice_in_dim(lax.collapse(lax.scan(jax.checkpoint(block), None, starts)[1], 0, 2), 0, prod(places))
    else:
        y = block(None, 0)[1]
    y = lax.reshape(y, (1, *places, outputs))
    order = (out[0], *out[2:], out[1])   # where each axis of y goes
    return lax.transpose(y, tuple(order.index(i) for i in range(y.ndim)))


def _padded(params: Params, window: Sequence[int], x: Array) -> tuple[Array, list[int]]:
    """One image with its padding, (…, features), and how many places a window has along each axis."""
    lhs = params["dimension_numbers"].lhs_spec
    image = lax.transpose(x, (*lhs[2:], lhs[1], lhs[0]))[..., 0]
    image = lax.pad(image, jnp.zeros((), x.dtype),
                    [*((low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"],
                                                                    strict=True)), (0, 0, 0)])
    return image, [(n - (w - 1) * d - 1) // s + 1
                   for n, w, d, s in zip(image.shape[:-1], window, params["rhs_dilation"], params["window_strides"],
                                         strict=True)]


def _met(params: Params, window: Sequence[int], image: Array, places: Sequence[int]) -> Array:
    """What the window meets at each place of a padded image."""
    strides, features = params["window_strides"], image.shape[-1]
    span = [(n - 1) * s + 1 for n, s in zip(places, strides, strict=True)]
    met = []
    for entry in product(*map(range, window)):
        start = [i * d for i, d in zip(entry, params["rhs_dilation"], strict=True)]
        block = lax.slice(image, (*start, 0), (*(i + n for i, n in zip(start, span, strict=True)), features),
                          (*strides, 1))
        met.append(lax.reshape(block, (prod(places), features)))
    return lax.concatenate(met, 1)
