"""Saliencies: how much each weight matters, before training.

Every function takes parameters and returns scores, a tree like the parameters in which a higher score is
kept. All are pure and run under ``jit``. Leaves without a score of their own (integers, keys) score 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from pkjax import paths
from pkjax.pruning.scores.leaves import finite, split
from pkjax.trees import ApplyFn

__all__ = ["magnitude", "random", "synflow", "synflow_l2"]

def random(params: PyTree, *, key: Key[Array, ""]) -> PyTree:
    """Score weights at random, uniformly in [0, 1): the baseline of pruning without information.

    The same key gives the same scores, so pruning in several steps ranks the weights alike in every step.

        S_j ~ U[0, 1)

    Raises TypeError where ``key`` is no typed key.

    Source: the pruner "Random" of Gebhart, Saxena and Schrater (2021), appendix A.4.1.

    >>> import jax, jax.numpy as jnp
    >>> scores = random({"kernel": jnp.ones((3, 2))}, key=jax.random.key(0))
    >>> scores["kernel"].shape
    (3, 2)
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(f"random needs a typed key, jax.random.key(seed), but got {key!r}")
    leaves, rebuild = split(params)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.uniform(k, t.shape, t.dtype) for k, t in zip(keys, leaves, strict=True)]
    return rebuild(draws)


def magnitude(params: PyTree) -> PyTree:
    """Score weights by their size.

        S = |θ|

    Raises nothing.

    Source: Han et al. 2015, section 3.

    >>> import jax.numpy as jnp
    >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[2.0, 1.0]]
    """
    leaves, rebuild = split(params)
    return rebuild([jnp.abs(leaf) for leaf in leaves])


def synflow(apply_fn: ApplyFn, params: PyTree, x: Float[Array | np.ndarray, "N *input"], *,
            pool: str = "sum", return_exponent: bool = False) -> PyTree:
    """Score weights by the ℓ1 path norm that flows through them: SynFlow.

        S = |θ| ∘ ∂R_1/∂|θ|,   R_1 = Σ_k R_1(|θ|, x)_k

    with the path polynomial R_q of the network (``pkjax.paths.polynomial``): every activation linear, every
    constant by its absolute value. With x of ones it needs no data; with x the mean of the inputs
    (``pkjax.mean_input``) it is SynFlow-Dist. ``pool="max"`` leaves max-pooling in place as the published
    code does, where "sum" counts every path. Source: Tanaka et al. 2020; Gebhart et al. 2021, equation 16.

    Scores are computed as multiples of a power of two, so that no depth makes them overflow or vanish. They come out
    as they are where R_1 lies between 2^−32 and 2^64 (float32; between 2^−256 and 2^512 in float64), and divided by the
    power of two 2^exponent that brings it there elsewhere; ``return_exponent=True`` returns (scores, exponent).

    Raises ValueError where x is negative or not finite, and FloatingPointError where a score is not finite.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
    >>> synflow(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)))["kernel"].tolist()
    [[2.0], [1.0]]
    """
    return _path_scores(apply_fn, params, x, 1, 1, pool, return_exponent, "synflow")


def synflow_l2(
    apply_fn: ApplyFn,
    params: PyTree,
    x: Float[Array | np.ndarray, "N *input"],
    *,
    variant: str = "paper",
    pool: str = "sum",
    return_exponent: bool = False,
) -> PyTree:
    """Score weights by the squared ℓ2 path norm that flows through them: SynFlow-L2.

        S = |θ| ∘ ∂R_2/∂θ²     variant "paper"
        S = θ² ∘ ∂R_2/∂θ²      variant "conserved": the saliency of R_2, conserved from layer to layer
        S = θ² ∘ ∂R_1/∂|θ|     variant "released": the authors' code

    with R_2 = Σ_k R_2(θ², x)_k, the squared ℓ2 path norm. x, ``pool`` and ``return_exponent`` as in ``synflow``;
    with x the mean of the inputs it is SynFlow-L2-Dist. Source: Gebhart et al. 2021, section 4.2 and equation 15.

    Raises ValueError where the variant is unknown or x is negative or not finite, and FloatingPointError
    where a score is not finite.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
    >>> scores = synflow_l2(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)), variant="conserved")
    >>> scores["kernel"].tolist()
    [[4.0], [1.0]]
    """
    weights = {"paper": (1, 2), "conserved": (2, 2), "released": (2, 1)}
    if variant not in weights:
        raise ValueError(f"variant must be one of {', '.join(map(repr, weights))}, but got {variant!r}")
    power, q = weights[variant]
    return _path_scores(apply_fn, params, x, power, q, pool, return_exponent, f"synflow_l2(variant={variant!r})")


def _path_scores(apply_fn: ApplyFn, params: PyTree, x: Array | np.ndarray, power: int, q: int, pool: str,
                 return_exponent: bool, name: str) -> PyTree:
    """|θ|^power ∘ ∂R_q/∂φ at φ = |θ|^q, and the power of two that it is over."""
    x = _checked_input(x)
    leaves, rebuild = split(params)
    sizes = [jnp.abs(leaf) for leaf in leaves]

    def objective(phi: list[Array]) -> tuple[Array, Array]:
        mantissa, exponent = paths.scaled_polynomial(apply_fn, rebuild(phi, params), x, q=q, pool=pool,
                                                       skip_zeros=True)
        return jnp.sum(mantissa), exponent

    total, pull, exponent = jax.vjp(objective, [t * t if q == 2 else t for t in sizes], has_aux=True)
    largest = jnp.finfo(total.dtype).maxexp // 2
    kept = jnp.clip(exponent, -largest // 2, largest)
    (slopes,) = pull(paths.power_of_two(kept, total.dtype))
    scores = [(t * t if power == 2 else t) * g for t, g in zip(sizes, slopes, strict=True)]
    tree = finite(rebuild(scores), name)
    return (tree, exponent - kept) if return_exponent else tree


def _checked_input(x: Array | np.ndarray) -> Array:
    if isinstance(x, jax.core.Tracer):
        return x
    values = np.asarray(x)
    if not np.isfinite(values).all():
        raise ValueError("x holds NaN or infinity: the input of a path norm is finite and not negative")
    if (values < 0).any():
        raise ValueError(
            f"x must not be negative, but its smallest entry is {values.min()}: a path norm weighs "
            "each path by its input. Pass ones, the mean of the raw inputs, or absolute values "
            "(pk.mean_input)"
        )
    return jnp.asarray(x)
