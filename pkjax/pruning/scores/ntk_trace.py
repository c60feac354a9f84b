"""Scores from the derivative of the tangent kernel's trace."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.scores.batches import Inputs, Sums, fold, in_chunks, scored_network, whole_number, zeros
from pkjax.pruning.scores.leaves import finite
from pkjax.trees import ApplyFn, Choice, apply_masks, is_floating, trainable_masks

__all__ = ["ntk_trace_saliency"]


@automatic_axes
def ntk_trace_saliency(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, masks: PyTree | None = None,
                       trainable: Choice = None, batch_size: int = 16) -> PyTree:
    """Score weights by the derivative of the tangent kernel's trace, exactly.

        S = θ ∘ ∂ Tr Θ/∂θ = 2 θ ∘ Σ_x Σ_k H_k(x) g_k(x),   g_k = ∂f_k/∂θ over what trains,   H_k = ∂²f_k/∂θ²

    Scores have both signs; they add up over the examples. K Hessian-vector products for each example, of which
    ``batch_size`` are taken at once: memory for that many gradients. Differentiation is JAX's, so the network needs no
    paths.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters θ.
        X: examples (N, *input), or an iterable of such arrays.
        masks: booleans like ``params``: False means that the weight is absent (0, does not train, scores 0).
        trainable: which parameters Θ differentiates, as in ``ntk``; all floating-point ones are scored.
        batch_size: how many examples to take at once; changes no score.

    Returns:
        Scores like ``params``.

    Raises:
        ValueError: masks or trainable have another structure, params or X hold NaN or infinity, X is empty, its inputs
            differ in shape, or ``batch_size`` is not a whole number of 1 or more.
        FloatingPointError: a score is not finite.

    Source: equation 2 of Jacot et al. 2018 for Θ; its trace as a measure of saliency, Iurada et al. 2024.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda p, x: x @ p["a"] @ p["b"]                     # Tr Θ = x² (a² + b²)
        >>> scores = ntk_trace_saliency(net, {"a": jnp.array([[3.0]]), "b": jnp.array([[-1.0]])}, jnp.array([[2.0]]))
        >>> scores["a"].tolist(), scores["b"].tolist()
        ([[72.0]], [[8.0]])
    """
    size = whole_number(batch_size, "batch_size")
    network, leaves, rebuild, stream = scored_network(apply_fn, params, X, masks)
    fn, out = network.fn, network.fn.out
    chosen = jax.tree.leaves(trainable_masks(params, trainable, masks))
    trains = [c for c, leaf in zip(chosen, jax.tree.leaves(params), strict=True) if is_floating(leaf)]

    def slopes(leaves: list[Array], trains: list[Array], X: Array) -> list[Array]:
        def of_output(total: list[Array], e: Array) -> tuple[list[Array], None]:
            def one(x: Array) -> list[Array]:
                gradient_fn = jax.grad(lambda t: jnp.vdot(fn(rebuild(t, params), x[None])[0], e))
                gradient = apply_masks(gradient_fn(leaves), trains)
                return jax.jvp(gradient_fn, (leaves,), (gradient,))[1]

            return [t + h.astype(t.dtype).sum(0) for t, h in zip(total, jax.vmap(one)(X), strict=True)], None

        return jax.lax.scan(of_output, zeros(leaves)[0], jnp.eye(out.shape[1], dtype=out.dtype))[0]

    def step(sums: Sums, X: Array, leaves: list[Array], trains: list[Array]) -> Sums:
        return in_chunks(lambda chunk: slopes(leaves, trains, chunk), sums, X, size)

    with jax.default_matmul_precision("highest"):
        (total, _), _ = fold(step, zeros(leaves), stream, leaves, trains)
    scores = [(2 * t.astype(h.dtype) * h).astype(t.dtype) for t, h in zip(leaves, total, strict=True)]
    return finite(rebuild(scores), "ntk_trace_saliency")
