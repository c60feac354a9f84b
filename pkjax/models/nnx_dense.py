"""The fully connected network as a Flax NNX module."""

import itertools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pkjax.models.dense import kaiming_normal

__all__ = ["NNXFC", "nnx_fc"]


class NNXFC(nnx.Module):
    """A fully connected ReLU network that flattens its input; build it with `nnx_fc`."""

    def __init__(self, sizes: tuple[int, ...], *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Create a layer between every two consecutive sizes."""
        self.layers = nnx.List([nnx.Linear(a, b, kernel_init=kaiming_normal, param_dtype=param_dtype, rngs=rngs)
                                for a, b in itertools.pairwise(sizes)])

    def __call__(self, x: Float[Any, "n ..."]) -> Float[Array, "n k"]:
        """Map a batch to logits."""
        x = jnp.asarray(x).reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def nnx_fc(inputs: int, width: int = 100, depth: int = 6, classes: int = 10, *, param_dtype: Any = jnp.float32,
           rngs: nnx.Rngs) -> NNXFC:
    """Build `fc` as an NNX module, which needs the number of inputs in advance.

    Maps (N, *input), where an input has `inputs` entries, to (N, classes).

    Raises:
        ValueError: a size is not positive.

    Source: FC-100 to FC-2000 in section 5 of Gebhart et al. (2021).

    Examples:
        >>> model = nnx_fc(64, width=5, depth=2, rngs=nnx.Rngs(0))
        >>> [layer.kernel.shape for layer in model.layers]
        [(64, 5), (5, 5), (5, 10)]
    """
    for name, value in (("inputs", inputs), ("width", width), ("depth", depth), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    return NNXFC((inputs, *(width,) * depth, classes), param_dtype=param_dtype, rngs=rngs)
