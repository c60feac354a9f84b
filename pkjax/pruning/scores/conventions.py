"""Scores of path norms that fold or subtract a frozen BatchNorm's mean: by derivatives in θ, which has signs there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pkjax.network import Network
from pkjax.paths.batch_norm import power_values
from pkjax.paths.exponents import power_of_two
from pkjax.paths.magnitudes import Magnitudes
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.trees import is_floating

__all__ = ["convention_scores"]


@compiled_for_few_calls(static_argnames=("known", "power", "q", "pool", "batch_norm"))
def convention_scores(network: Network, z: Array, *, known: Magnitudes, power: int, q: int, pool: str, batch_norm: str
                      ) -> tuple[list[Array], Array]:
    """|θ|^power ∘ |∂R_q/∂φ| at φ = |θ|^q, and the exponent of the power of two that it is over.

    Since θ ∂/∂θ = q φ ∂/∂φ, it is |θ|^(power − q) ∘ |θ ∘ ∂R_q/∂θ| / q, also where R_q is no function of φ alone.
    """
    every, structure = jax.tree.flatten(network.params)
    moving = [i for i, leaf in enumerate(every) if is_floating(leaf)]

    def objective(theta: list[Array]) -> tuple[Array, Array]:
        leaves = dict(zip(moving, theta, strict=True))
        params = jax.tree.unflatten(structure, [leaves.get(i, leaf) for i, leaf in enumerate(every)])
        mantissa, exponent, _ = power_values(replace(network, params=params), z, q, batch_norm, pool, known)
        return mantissa.sum(), exponent

    theta = [jnp.asarray(every[i]) for i in moving]
    total, pull, exponent = jax.vjp(objective, theta, has_aux=True)
    (slopes,) = pull(jnp.ones_like(total))
    largest = jnp.finfo(total.dtype).maxexp // 2
    kept = jnp.clip(exponent, -largest // 2, largest)
    scores = [jnp.where(t == 0, 0, jnp.abs(t) ** (power - q) * jnp.abs(t * g) / q) * power_of_two(kept, t.dtype)
              for t, g in zip(theta, slopes, strict=True)]
    return scores, exponent - kept
