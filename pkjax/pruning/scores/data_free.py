"""Scores without data: random, by magnitude, and by the paths through each weight.

Every function takes parameters and returns scores, a tree like the parameters in which a higher score is
kept. All are pure and run under ``jit``. Leaves without a score of their own (integers, keys) score 0. Scores of
parameters narrower than float32 are computed and returned in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.batch_norm import check_convention
from pkjax.paths.exponents import NOTHING, Scaled, nothing
from pkjax.paths.frozen import with_gates
from pkjax.paths.magnitudes import Magnitudes, magnitudes
from pkjax.paths.scaled import scaled_values
from pkjax.programs.checks import all_finite
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.scores.conventions import convention_scores, in_range
from pkjax.pruning.scores.leaves import finite, split, widened
from pkjax.trees import ApplyFn, is_floating

__all__ = ["ScaledScores", "magnitude", "path_scores", "random", "synflow", "synflow_l2", "synflow_l2_scaled",
           "synflow_scaled"]


class ScaledScores(NamedTuple):
    """Scores over a power of two: those of a network of any depth are scores · 2^exponent.

    Returned by ``synflow_scaled`` and ``synflow_l2_scaled``.
    """

    scores: PyTree
    """A tree like the parameters."""
    exponent: Int[Array, ""]
    """A whole number: 0 where the scores need no scale."""


def random(params: PyTree, *, key: Key[Array, ""]) -> PyTree:
    """Score weights at random, uniformly in [0, 1): the baseline of pruning without information.

    The same key gives the same scores, so pruning in several steps ranks the weights alike in every step.

        S_j ~ U[0, 1)

    Args:
        params: parameters θ, for their shapes.
        key: a typed key, ``jax.random.key(seed)``.

    Returns:
        Scores like ``params``.

    Raises:
        TypeError: ``key`` is not a typed key.

    Source: the pruner "Random" of Gebhart, Saxena and Schrater (2021), appendix A.4.1.

    Examples:
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

    Args:
        params: parameters θ.

    Returns:
        Scores like ``params``.

    Source: Han et al. 2015, section 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[2.0, 1.0]]
    """
    leaves, rebuild = split(params)
    return rebuild([jnp.abs(leaf) for leaf in leaves])


def synflow(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
            pool: str = "sum", batch_norm: str = "paths", gates: str | None = None,
            reference: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None) -> PyTree:
    """Score weights by the ℓ1 path norm that flows through them: SynFlow.

        S = |θ| ∘ ∂R_1/∂|θ|,   R_1 = Σ_k R_1(|θ|, x)_k

    with the path polynomial R_q of the network (``pkjax.paths.polynomial``): every activation linear, every
    constant by its absolute value. With x of ones it needs no data; with x the mean of the inputs
    (``pkjax.mean_input``) it is SynFlow-Dist.

    Scores are computed as multiples of a power of two, so that no depth makes them overflow or vanish. They come out
    as they are where R_1 lies between 2^−32 and 2^64 (float32; between 2^−256 and 2^512 in float64), and divided
    elsewhere by the power of two that brings it there, which ``synflow_scaled`` returns too.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters θ.
        x: an input ``(1, *input)`` of numbers that are not negative.
        pool: "sum" counts every path through max-pooling; "max" leaves it in place as the published code does.
        batch_norm: what becomes of a frozen BatchNorm's mean, as in ``pkjax.paths.norm``: it starts "paths", is
            "folded" into the bias, or "signed", subtracted as in the published code (with pool="max"); then R_1 may
            fall where a weight grows, and scores are the magnitudes |θ ∘ ∂R_1/∂θ|. They agree where means are 0.
        gates: "frozen" takes networks whose activations are not piecewise linear too (``pkjax.paths.frozen``), with
            coefficients as factors on paths. Weights of what only makes coefficients, as of queries and keys, lie on
            no path and score 0.
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        Scores like ``params``.

    Raises:
        ValueError: x is negative or not finite; the convention is unknown, or "signed" with another pool than "max".
        NotPathNetworkError: the network is not a sum over paths.
        FloatingPointError: a score is not finite.

    Source: Tanaka et al. 2020; Gebhart et al. 2021, equation 16.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
        >>> synflow(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)))["kernel"].tolist()
        [[2.0], [1.0]]
    """
    return synflow_scaled(apply_fn, params, x, pool=pool, batch_norm=batch_norm, gates=gates,
                          reference=reference).scores


@automatic_axes
def synflow_scaled(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
                   pool: str = "sum", batch_norm: str = "paths", gates: str | None = None,
                   reference: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None) -> ScaledScores:
    """Score weights by SynFlow, with the power of two that the scores are over.

        S = scores · 2^exponent

    Arguments and errors are those of ``synflow``.

    Examples:
        >>> import jax.numpy as jnp
        >>> layers = [jnp.full((10, 10), 10.0, jnp.float32)] * 60    # scores of 10^120, which float32 does not hold
        >>> def net(kernels, x):
        ...     for kernel in kernels:
        ...         x = x @ kernel
        ...     return x
        >>> scores, exponent = synflow_scaled(net, layers, jnp.ones((1, 10), jnp.float32))
        >>> bool(jnp.isfinite(scores[0]).all()), int(exponent) > 300
        (True, True)
    """
    apply_fn = with_gates(apply_fn, params, x, gates, reference)
    return path_scores(apply_fn, params, x, 1, 1, pool, batch_norm, "synflow")


def synflow_l2(
    apply_fn: ApplyFn,
    params: PyTree,
    x: PyTree[Shaped[Array | np.ndarray, "N ..."]],
    *,
    variant: str = "paper",
    pool: str = "sum",
    batch_norm: str = "paths",
    gates: str | None = None,
    reference: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None,
) -> PyTree:
    """Score weights by the squared ℓ2 path norm that flows through them: SynFlow-L2.

        S = |θ| ∘ ∂R_2/∂θ²     variant "paper"
        S = θ² ∘ ∂R_2/∂θ²      variant "conserved": the saliency of R_2, conserved from layer to layer
        S = θ² ∘ ∂R_1/∂|θ|     variant "released": the authors' code

    with R_2 = Σ_k R_2(θ², x)_k, the squared ℓ2 path norm. With x the mean of the inputs it is SynFlow-L2-Dist. Scores
    are scaled as those of ``synflow`` are, and further where squares of weights are outside of their type's range
    (under jit such scores are infinite or 0, which ``prune`` says); ``synflow_l2_scaled`` returns the power of two.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters θ.
        x: an input ``(1, *input)`` of numbers that are not negative.
        variant: "paper", "conserved" or "released".
        pool: "sum" or "max", as in ``synflow``.
        batch_norm: "paths", "folded" or "signed", as in ``synflow``.
        gates: None or "frozen", as in ``synflow``.
        reference: with "frozen", the input whose coefficients are taken.

    Returns:
        Scores like ``params``.

    Raises:
        ValueError: the variant or the convention is unknown, or x is negative or not finite.
        NotPathNetworkError: the network is not a sum over paths.
        FloatingPointError: a score is not finite.

    Source: Gebhart et al. 2021, section 4.2 and equation 15.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
        >>> scores = synflow_l2(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)), variant="conserved")
        >>> scores["kernel"].tolist()
        [[4.0], [1.0]]
    """
    return synflow_l2_scaled(apply_fn, params, x, variant=variant, pool=pool, batch_norm=batch_norm, gates=gates,
                             reference=reference).scores


@automatic_axes
def synflow_l2_scaled(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
                      variant: str = "paper", pool: str = "sum", batch_norm: str = "paths", gates: str | None = None,
                      reference: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None) -> ScaledScores:
    """Score weights by SynFlow-L2, with the power of two that the scores are over.

        S = scores · 2^exponent

    Arguments and errors are those of ``synflow_l2``.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
        >>> int(synflow_l2_scaled(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2))).exponent)
        0
    """
    weights = {"paper": (1, 2), "conserved": (2, 2), "released": (2, 1)}
    if variant not in weights:
        raise ValueError(f"variant must be one of {', '.join(map(repr, weights))}, but got {variant!r}")
    power, q = weights[variant]
    apply_fn = with_gates(apply_fn, params, x, gates, reference)
    return path_scores(apply_fn, params, x, power, q, pool, batch_norm, f"synflow_l2(variant={variant!r})")


def path_scores(apply_fn: ApplyFn, params: PyTree, x: PyTree, power: int, q: int, pool: str, batch_norm: str,
                name: str) -> ScaledScores:
    """|θ|^power ∘ ∂R_q/∂φ at φ = |θ|^q, and the power of two that it is over."""
    check_convention(batch_norm, pool)
    _, rebuild = split(params)
    _check_input(x)
    network = read(apply_fn, widened(params), x := widened(x), paths=True)
    z = network.batch(x, "x")
    known = magnitudes(network, z, max(power, q))
    if batch_norm != "paths":
        scores, exponent = convention_scores(network, z, known=known.careful, power=power, q=q, pool=pool,
                                             batch_norm=batch_norm)
        return ScaledScores(finite(rebuild(scores), name), exponent)
    scores, exponent, sure = _scaled_scores(network, z, known=known, power=power, q=q, pool=pool)
    if isinstance(sure, jax.core.Tracer):
        scores = [jnp.where(sure, s, jnp.nan) for s in scores] if known.lean else scores      # and prune begins anew
    elif known.lean and not (bool(sure) and all(map(all_finite, scores))):
        scores, exponent, _ = _scaled_scores(network, z, known=known.careful, power=power, q=q, pool=pool)
    return ScaledScores(finite(rebuild(scores), name), exponent)


@compiled_for_few_calls(static_argnames=("known", "power", "q", "pool"))
def _scaled_scores(network: Network, z: Array, *, known: Magnitudes, power: int, q: int, pool: str
                   ) -> tuple[list[Array], Array, Array]:
    """Scores of the floating-point leaves over a power of two, its exponent, and whether they are sure."""
    network = known.settled(network)
    every = jax.tree.leaves(network.params)
    sizes = {i: known.held(i, leaf, 1) for i, leaf in enumerate(every) if is_floating(leaf)}
    live = [i for i, held in sizes.items() if not nothing(held)]     # the others score 0

    def objective(phi: list[Array]) -> tuple[Array, tuple[Array, Array]]:
        held = sizes | {i: Scaled(p, jnp.maximum(q * sizes[i].exponent, NOTHING) if known.apart else 0,
                                  q * sizes[i].growth) for i, p in zip(live, phi, strict=True)}
        mantissa, exponent, sure = scaled_values(network, z, q, None, pool, True, held, known=known)
        return jnp.sum(mantissa), (exponent, sure)

    total, pull, (exponent, sure) = jax.vjp(objective, [sizes[i].mantissa**q for i in live], has_aux=True)
    (slopes,) = pull(jnp.ones_like(total))
    # A weight of 0 scores 0, however much would flow through it.
    scores = {i: jnp.where(sizes[i].mantissa == 0, 0, sizes[i].mantissa**power * g)
              for i, g in zip(live, slopes, strict=True)}
    # Where the leaves' own scales remain, the largest score must fit, too.
    own = [(power - q) * jnp.where(sizes[i].exponent == NOTHING, 0, sizes[i].exponent) for i in live]
    placed, left = in_range([scores[i] for i in live], exponent, own if known.apart else None, total.dtype)
    whole = dict(zip(live, placed, strict=True))
    return [whole.get(i, jnp.zeros_like(every[i])) for i in sizes], left, sure


def _check_input(x: PyTree) -> None:
    """Raise ValueError where an input is negative or not finite (traced ones pass)."""
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, jax.core.Tracer):
            continue
        values = np.asarray(leaf)
        if is_floating(values) and not np.isfinite(values).all():
            raise ValueError("x holds NaN or infinity: the input of a path norm is finite and not negative")
        if (values < 0).any():
            raise ValueError(
                f"x must not be negative, but its smallest entry is {values.min()}: a path norm weighs "
                "each path by its input. Pass ones, the mean of the raw inputs, or absolute values "
                "(pk.mean_input)"
            )
