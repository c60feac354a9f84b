"""Convolution of one image as matrix products: patches times the kernel.

Path polynomials on a processor are computed so: there, XLA's own convolution spends most of a backward pass on the
kernel's derivative, and several times more within a loop; the same derivative of a matrix product is a matrix product.
Where the kernel is the larger part, one product of all patches does it. Where the image is, one product after the
other does, each of the entries at one place of the window: patches would take more memory than everything else.
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
    """What is shaped like the convolution's output, for one image, as (places, outputs)."""
    spec = params["dimension_numbers"].out_spec
    placed = lax.transpose(signal, (spec[0], *spec[2:], spec[1]))
    return lax.reshape(placed, (prod(placed.shape[:-1]), placed.shape[-1]))


def patches(params: Params, kernel: tuple[int, ...], x: Array) -> Array:
    """What a kernel of that shape meets at each place of one image, (places, window · features)."""
    window = [kernel[i] for i in params["dimension_numbers"].rhs_spec[2:]]
    entries, _ = _unfolded(params, window, x)
    return lax.concatenate([entries(start) for start in _starts(params, window)], 1)


@partial(jax.jit, static_argnames="layout")  # traced once a shape: networks repeat their blocks
def _convolve(x: Array, kernel: Array, layout: tuple[tuple[str, Any], ...]) -> Array:
    params = dict(layout)
    _, rhs, out = params["dimension_numbers"]
    window, outputs = [kernel.shape[i] for i in rhs[2:]], kernel.shape[rhs[0]]
    weights = as_matrix(params, kernel)

    def times(rows: Array, weights: Array) -> Array:
        return lax.dot(rows, weights, precision=params["precision"],
                       preferred_element_type=params["preferred_element_type"])

    entries, places = _unfolded(params, window, x)
    if prod(window) > 1 and prod(places) > outputs:
        def add(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            start, weight = entry
            return total + times(entries(list(start)), weight), None
        starts = _starts(params, window)
        pieces = lax.reshape(weights, (prod(window), kernel.shape[rhs[1]], outputs))
        like = jax.eval_shape(times, entries(starts[0]), pieces[0])
        y, _ = lax.scan(jax.checkpoint(add), jnp.zeros(like.shape, like.dtype), (starts, pieces))
    else:
        y = times(patches(params, kernel.shape, x), weights)
    y = lax.reshape(y, (1, *places, outputs))
    order = (out[0], *out[2:], out[1])   # where each axis of y goes
    return lax.transpose(y, tuple(order.index(i) for i in range(y.ndim)))


def _starts(params: Params, window: Sequence[int]) -> np.ndarray:
    """Where the entries of the window lie."""
    index = np.stack(np.unravel_index(np.arange(prod(window)), window), -1).astype(np.int32)
    return index * np.asarray(params["rhs_dilation"], np.int32)


def _unfolded(params: Params, window: Sequence[int], x: Array) -> tuple[Callable[[Any], Array], list[int]]:
    """Entry of the window → what it meets at each place, (places, features); and the places along each axis."""
    lhs = params["dimension_numbers"].lhs_spec
    strides = params["window_strides"]
    image = lax.transpose(x, (*lhs[2:], lhs[1], lhs[0]))[..., 0]
    image = lax.pad(image, jnp.zeros((), x.dtype),
                    [*((low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"],
                                                                    strict=True)), (0, 0, 0)])
    places = [(n - (w - 1) * d - 1) // s + 1
              for n, w, d, s in zip(image.shape[:-1], window, params["rhs_dilation"], strides, strict=True)]
    span = [(n - 1) * s + 1 for n, s in zip(places, strides, strict=True)]

    def entries(start: Sequence[Any] | np.ndarray) -> Array:
        block = lax.dynamic_slice(image, (*start, np.int32(0)), (*span, image.shape[-1]))
        return lax.reshape(lax.slice(block, [0] * block.ndim, block.shape, (*strides, 1)),
                           (prod(places), image.shape[-1]))

    return entries, places
