"""How far the tangent kernel moves while a network trains, as a measure for `fit`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax.tangent_kernel import ntk
from pkjax.training.fit import Measure
from pkjax.training.flax_modules import split_module
from pkjax.trees import Choice, apply_masks

__all__ = ["kernel_change"]


def kernel_change(module: Any, X: Shaped[Array | np.ndarray, "N ..."], *, variables: PyTree | None = None,
                  masks: PyTree | None = None, seed: int = 0, trainable: Choice = None) -> Measure:
    """Build the measure of `fit` that compares the tangent kernel with that of the beginning.

        ntk_change = ‖Θ_t − Θ_0‖_F,   ntk_norm = ‖Θ_t‖_F,   ntk_distance = 1 − ⟨Θ_t, Θ_0⟩ / (‖Θ_t‖_F ‖Θ_0‖_F)

    on a few inputs, in evaluation mode: BatchNorm's averages are those of the time t. The distance is the one that a
    change of scale alone leaves at 0; it is 1 where one of the two kernels is 0, and 0 where both are. Θ_0 is computed
    here, and Θ_t before training and after each epoch; both hold (N K)² numbers.

    Args:
        module: the module that `fit` trains.
        X: (N, *input), inputs as the network takes them, such as `test.images[:16]`.
        variables: those that `fit` starts from.
        masks: those that `fit` trains under.
        seed: that of `fit`; without variables it says where training begins.
        trainable: which parameters Θ differentiates, as in `pk.ntk`.

    Returns:
        A function of (params, state) for the argument `measure` of `fit`.

    Raises:
        TypeError: `module` is not a Flax module.
        ValueError: as for `pk.ntk`.

    Source: Fort et al. (2020), section 3, for the distance; Jacot, Gabriel and Hongler (2018), theorem 2, for networks
    so wide that Θ does not change.

    Examples:
        >>> import pkjax as pk
        >>> digits, module = pk.data.load("digits", samples=64), pk.models.fc(8, 1)
        >>> measure = kernel_change(module, digits.images[:4])
        >>> steps = pk.training.Recipe(learning_rate=0.01, epochs=1, batch_size=32)
        >>> history = pk.training.fit(module, digits, digits, recipe=steps, measure=measure).history
        >>> history[0]["ntk_change"] < 1e-3 < history[1]["ntk_change"]
        True
    """
    X = jnp.asarray(X)
    net = split_module(module, variables, X[:1], seed)

    def theta(params: PyTree, state: PyTree) -> Array:
        return ntk(lambda p, x: net.forward(p, state, x, None)[0], params, X, masks=masks, trainable=trainable)

    first = theta(apply_masks(net.params, masks), net.state)

    def measure(params: PyTree, state: PyTree) -> dict[str, Array]:
        return _compare(theta(params, state), first)

    return measure


@jax.jit
def _compare(now: Array, first: Array) -> dict[str, Array]:
    """Norms and cosine, over the largest entry so that squares stay in range."""
    size = jnp.maximum(jnp.abs(now).max(), jnp.abs(first).max())
    a, b = (theta / jnp.where(size > 0, size, 1) for theta in (now, first))
    norm, start = jnp.linalg.norm(a), jnp.linalg.norm(b)
    u, v = (theta / jnp.where(length > 0, length, 1) for theta, length in ((a, norm), (b, start)))
    # 1 − cos of unit vectors u and v is ‖u − v‖² / 2, without cancellation; of one of them and 0 that is 1/2.
    distance = jnp.sum((u - v) ** 2) / 2 * jnp.where((norm > 0) != (start > 0), 2, 1)
    return {"ntk_change": jnp.linalg.norm(a - b) * size, "ntk_norm": norm * size, "ntk_distance": distance}
