"""NTK-SAP: the derivative of the tangent kernel's trace at weights and inputs that are drawn anew in every step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Key, PyTree

from pkjax.pruning.baselines import Initializer, reinitialize
from pkjax.pruning.scores.batches import whole_number
from pkjax.pruning.scores.ntk_trace import ntk_trace_saliency
from pkjax.trees import ApplyFn, Choice, accumulator, is_floating, kernels

__all__ = ["ntk_sap"]

_KAIMING = initializers.variance_scaling(2.0, "fan_in", "normal")


def ntk_sap(apply_fn: ApplyFn, params: PyTree, shape: Sequence[int], *, key: Key[Array, ""],
            masks: PyTree | None = None, initializer: Initializer = _KAIMING, prunable: Choice = kernels,
            samples: int = 32, batch_size: int = 16) -> PyTree:
    """Score weights by the derivative of the tangent kernel's trace at random weights and inputs, exactly.

        S = |θ' ∘ ∂ Tr Θ(X, θ')/∂θ'|,   θ' = m ∘ draw from the initializer,   X ~ N(0, 1)

    Of a step of pruning only the masks carry over: the prunable weights and the inputs are drawn anew, from a key that
    ``key`` and the number of weights kept determine. Every step of ``prune`` so gets a key of its own, also under
    ``jit`` and ``vmap``, and the same key gives the same masks:

        score = lambda p, masks: pk.ntk_sap(apply_fn, p, (28, 28, 1), key=key, masks=masks)
        result = pk.prune(score, params, compression=1, steps=20)

    The authors estimate the trace by one Gaussian perturbation of the weights for each draw, and differentiate with
    respect to the masks of the network and of the perturbed one: their score tends to
    |θ' ∘ ∂ Tr Θ/∂θ' + 2 Σ_x Σ_k (∂f_k(x)/∂θ')²| as perturbations get small and many. They add gradients over batches,
    each with new weights; here all samples of a step see the same weights. Their BatchNorm layers take averages of the
    random inputs; here they have those of ``apply_fn``.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters, of which the prunable leaves give shapes and types alone; others (biases, scales) are used.
        shape: the shape of one input, without N.
        key: a typed key, ``jax.random.key(seed)``.
        masks: booleans like ``params``: False means that the weight is absent (0, does not train, scores 0).
        initializer: draws a leaf from (key, shape, dtype); N(0, 2 / fan_in) by default.
        prunable: which leaves to draw anew, as in ``prune``.
        samples: how many inputs to draw.
        batch_size: how many inputs to take at once; changes no score.

    Returns:
        Scores like ``params``.

    Raises:
        TypeError: ``key`` is not a typed key.
        ValueError: ``samples`` or ``batch_size`` is not a whole number of 1 or more, or as ``ntk_trace_saliency`` and
            ``reinitialize``.
        FloatingPointError: a score is not finite.

    Source: NTK-SAP, Wang, Li and Sun 2023, section 4; what their code does otherwise is said above.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> net = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> from pkjax.pruning.prune import prune
        >>> result = prune(lambda p, masks: ntk_sap(net, p, (3,), key=jax.random.key(0), masks=masks), params,
        ...                density=0.5, steps=4)
        >>> result.kept
        10
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(f"ntk_sap needs a typed key, jax.random.key(seed), but got {key!r}")
    samples = whole_number(samples, "samples")
    kept = sum(jnp.sum(mask, dtype=jnp.uint32) for mask in jax.tree.leaves(masks))
    weights, inputs = jax.random.split(jax.random.fold_in(key, kept))
    drawn = reinitialize(params, key=weights, prunable=prunable, initializer=initializer)
    types = [accumulator(leaf.dtype) for leaf in jax.tree.leaves(drawn) if is_floating(leaf)]
    X = jax.random.normal(inputs, (samples, *shape), jnp.result_type(*types))
    return jax.tree.map(jnp.abs, ntk_trace_saliency(apply_fn, drawn, X, masks=masks, batch_size=batch_size))
