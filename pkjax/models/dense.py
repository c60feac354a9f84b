"""Fully connected ReLU networks."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float

__all__ = ["FC", "fc", "kaiming_normal"]

kaiming_normal = initializers.variance_scaling(2.0, "fan_in", "normal")
"""He's initialisation as in PyTorch: N(0, 2 / fan_in), not truncated."""


class FC(nn.Module):
    """A fully connected ReLU network that flattens its input; build it with `fc`."""

    width: int = 100
    depth: int = 6
    classes: int = 10
    use_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Any, "n ..."], train: bool = False) -> Float[Array, "n k"]:
        """Map a batch to logits; `train` has no effect, as there is no BatchNorm."""
        x = x.reshape(x.shape[0], -1)
        for width in (self.width,) * self.depth:
            x = nn.relu(self._dense(width)(x))
        return self._dense(self.classes)(x)

    def _dense(self, width: int) -> nn.Dense:
        return nn.Dense(width, use_bias=self.use_bias, kernel_init=kaiming_normal,
                        param_dtype=self.param_dtype)


def fc(width: int = 100, depth: int = 6, classes: int = 10, *, use_bias: bool = True,
       param_dtype: Any = jnp.float32) -> FC:
    """Build a fully connected ReLU network: `depth` hidden layers of `width` units and a linear output.

        f = W_d relu(… relu(W_0 x + b_0) …) + b_d

    Weights are N(0, 2 / fan_in), biases zero. The network has
    (inputs + 1) width + (depth − 1)(width + 1) width + (width + 1) classes parameters: 130,010 for FC-100
    on MNIST.

    Maps (N, *input) to (N, classes).

    Raises:
        ValueError: width, depth or classes is not positive.

    Source: FC-100 to FC-2000 in section 5 of Gebhart et al. (2021).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> variables = fc(width=5, depth=2).init(jax.random.key(0), jnp.ones((1, 8, 8, 1), jnp.float32))
        >>> {name: layer["kernel"].shape for name, layer in variables["params"].items()}
        {'Dense_0': (64, 5), 'Dense_1': (5, 5), 'Dense_2': (5, 10)}
    """
    for name, value in (("width", width), ("depth", depth), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    return FC(width, depth, classes, use_bias, param_dtype)
