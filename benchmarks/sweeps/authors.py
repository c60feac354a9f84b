"""FC-100 and its scores as the authors' code has them (uditsaxena/Synaptic-Flow), where it differs from their text.

Six linear layers with PyTorch's default initialisation. `-dist` takes the mean of ten raw training images for each
class. The L2 variants multiply the derivative of the sum of |values of paths| by squared weights.
"""

import flax.linen as nn
import jax
import pkjax as pk
from jax.nn import initializers

MEAN, STD = 0.1307, 0.3081      # by which MNIST is normalised


class Network(nn.Module):
    """Five hidden layers of 100 units; weights and biases are uniform in ±1/√fan_in."""

    classes: int

    @nn.compact
    def __call__(self, x):
        """Map a batch to logits."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((*[100] * 5, self.classes)):
            kernel = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            bound = x.shape[-1] ** -0.5
            x = nn.Dense(width, kernel_init=kernel, bias_init=lambda key, shape, dtype, bound=bound: jax.random.uniform(
                key, shape, dtype, -bound, bound))(nn.relu(x) if i else x)
        return x


def make(classes):
    """Build FC-100."""
    return Network(classes)


def synflow_l2(params, apply_fn, images):
    """Score by |∂R₁/∂θ| θ² on ones."""
    return pk.synflow_l2(apply_fn, params, pk.ones_input(images.shape[1:]), variant="released")


def synflow_dist(params, apply_fn, images):
    """Score by SynFlow on the mean raw image."""
    return pk.synflow(apply_fn, params, pk.mean_input(images * STD + MEAN))


def synflow_l2_dist(params, apply_fn, images):
    """Score by |∂R₁/∂θ| θ² on the mean raw image."""
    return pk.synflow_l2(apply_fn, params, pk.mean_input(images * STD + MEAN), variant="released")


for score in (synflow_l2, synflow_dist, synflow_l2_dist):
    score.steps = 100
