"""Convolution as one matrix product over patches, which suits a batch of one on a processor.

There, XLA's own convolution spends most of a backward pass on the kernel's derivative, and several times more within
a loop; the same derivative of a matrix product is a matrix product.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from pkjax.paths.activations import window_entries

__all__ = ["prefers_products", "products"]


def prefers_products(params: dict[str, Any], images: int) -> bool:
    """Whether to write a convolution of so many images as a product: ungrouped, of one image, not on an accelerator."""
    return (images == 1 and params["feature_group_count"] == 1 and params["batch_group_count"] == 1
            and jax.default_backend() == "cpu")


def products(params: dict[str, Any]) -> Callable[[Array, Array], Array]:
    """Return an ungrouped ``conv_general_dilated`` with these parameters as patches times the kernel."""
    lhs, rhs, out = params["dimension_numbers"]

    def convolve(x: Array, kernel: Array) -> Array:
        images = lax.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
        weights = lax.transpose(kernel, (*rhs[2:], rhs[1], rhs[0]))
        entries = window_entries(
            images, 0.0, window_dimensions=(1, *weights.shape[:-2], 1),
            window_strides=(1, *params["window_strides"], 1), padding=((0, 0), *params["padding"], (0, 0)),
            base_dilation=(1, *params["lhs_dilation"], 1), window_dilation=(1, *params["rhs_dilation"], 1))
        places = entries[0].shape[:-1]
        rows = lax.reshape(lax.concatenate(entries, len(places)), (prod(places), prod(weights.shape[:-1])))
        y = lax.dot(rows, lax.reshape(weights, (prod(weights.shape[:-1]), weights.shape[-1])),
                    precision=params["precision"], preferred_element_type=params["preferred_element_type"])
        y = lax.reshape(y, (*places, weights.shape[-1]))
        order = (out[0], *out[2:], out[1])   # where each axis of y goes
        return lax.transpose(y, tuple(order.index(i) for i in range(y.ndim)))

    return convolve
