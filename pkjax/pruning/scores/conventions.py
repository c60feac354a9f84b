"""Scores of path norms that fold or subtract a frozen BatchNorm's mean: by derivatives in θ, which has signs there."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pkjax.network import Network
from pkjax.paths.batch_norm import power_values
from pkjax.paths.exponents import NOTHING, Scaled, exponent_of, normalized, plain, power_of_two
from pkjax.paths.magnitudes import Magnitudes
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.trees import is_floating

__all__ = ["convention_scores", "in_range"]


@compiled_for_few_calls(static_argnames=("known", "power", "q", "pool", "batch_norm"))
def convention_scores(network: Network, z: Array, *, known: Magnitudes, power: int, q: int, pool: str, batch_norm: str
                      ) -> tuple[list[Array], Array]:
    """|θ|^power ∘ |∂R_q/∂φ| at φ = |θ|^q, and the exponent of the power of two that it is over.

    Since θ ∂/∂θ = q φ ∂/∂φ, it is |θ|^(power − q) ∘ |θ ∘ ∂R_q/∂θ| / q, also where R_q is no function of φ alone.
    """
    moving = {i: normalized(Scaled(leaf, 0), True) for i, leaf in enumerate(jax.tree.leaves(network.params))
              if is_floating(leaf)}

    def objective(theta: list[Array]) -> tuple[Array, Array]:
        held = {i: each._replace(mantissa=t) for (i, each), t in zip(moving.items(), theta, strict=True)}
        mantissa, exponent, _ = power_values(network, z, q, batch_norm, pool, known, held)
        return mantissa.sum(), exponent

    theta = [each.mantissa for each in moving.values()]
    total, pull, exponent = jax.vjp(objective, theta, has_aux=True)
    (slopes,) = pull(jnp.ones_like(total))
    scores = [jnp.where(t == 0, 0, jnp.abs(t) ** (power - q) * jnp.abs(t * g) / q)
              for t, g in zip(theta, slopes, strict=True)]
    own = None if power == q else [(power - q) * jnp.where(each.exponent == NOTHING, 0, each.exponent)
                                   for each in moving.values()]
    return in_range(scores, exponent, own, total.dtype)


def in_range(scores: Sequence[Array], exponent: Array, own: Sequence[Array] | None, dtype: Any
             ) -> tuple[list[Array], Array]:
    """Multiply scores by as much of 2^exponent as their type holds well, and return the exponent that is left.

    Args:
        scores: of each leaf, over 2^exponent.
        exponent: that of the path polynomial.
        own: what to add to the exponent of each leaf, where the leaves differ in that; the largest score then decides.
        dtype: the type of the path polynomial.
    """
    largest = jnp.finfo(dtype).maxexp // 2
    kept = jnp.clip(exponent, -largest // 2, largest)
    if own is None:
        return [s * power_of_two(kept, s.dtype) for s in scores], exponent - kept
    tops = [jnp.where((s > 0).any(), kept + each + exponent_of(s.max(initial=0)), NOTHING)
            for s, each in zip(scores, own, strict=True)]
    top = jnp.stack(tops).max()
    extra = jnp.where(top == NOTHING, 0, jnp.clip(top, -largest, 2 * largest - 2) - top)
    return [plain(s, kept + each + extra) for s, each in zip(scores, own, strict=True)], exponent - kept - extra
