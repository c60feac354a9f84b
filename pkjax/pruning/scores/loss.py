"""Saliencies of data: how much each weight matters for the loss, the paths or the tangent kernel of given examples.

Every function takes parameters and returns scores, a tree like the parameters in which a higher score is
kept. Data come as one array, or as a stream of batches of which one at a time is on the device. All run under
``jit``, which reads the whole stream while it traces.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pkjax import paths
from pkjax.pruning.masks import apply_masks
from pkjax.paths.scaled import NOTHING, Scaled, exponent_of, normalized, shifted
from pkjax.pruning.scores.leaves import finite, split
from pkjax.pruning.scores.batches import Sums, add, fold, inputs, mean, zeros
from pkjax.trees import (
    ApplyFn,
    Predicate,
    Trainable,
    check_finite,
    check_masks,
    check_network,
    is_floating,
    kernels,
    trainable_masks,
)

__all__ = ["Loss", "grasp", "ntk_trace_saliency", "path_exclusion", "snip"]

Loss = Callable[..., Float[Array, ""]]
"""A scalar loss: of (params), with the batch inside, or of (params, batch), the mean over the batch's examples."""

Inputs = Array | np.ndarray | Iterable[Array | np.ndarray]
"""Examples (N, *input), or a stream of such arrays."""

AT_ONCE = 16
"""How many examples' gates ``path_exclusion`` holds at once."""


def snip(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree] | None = None) -> PyTree:
    """Score weights by how strongly the loss reacts to their removal, to first order.

        S = |θ ∘ ∂L/∂θ|

    ``loss_fn(params)`` is the loss of one labelled batch, a scalar. With ``batches``, an iterable of trees of arrays
    whose leading axes run over the examples, ``loss_fn(params, batch)`` is the mean loss of one, and L the mean over
    the examples of all: batches of any sizes give the same scores. Source: SNIP, Lee et al. 2019, without the
    normalisation, which changes no order; Gebhart et al. 2021, section 4.1.

    Raises TypeError where the loss is no scalar or ``batches`` no iterable of batches, ValueError where it is empty or
    a batch is empty, has leaves of different lengths, or holds NaN, and FloatingPointError where a score is not finite.

    >>> import jax.numpy as jnp
    >>> snip(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[8.0, 2.0]]
    """
    leaves, rebuild = split(params, None)
    if batches is None:
        gradient = jax.grad(lambda part: loss_fn(rebuild(part, params)))(leaves)
    else:
        gradient, _ = mean(lambda part, batch: jax.grad(lambda t: loss_fn(rebuild(t, params), batch))(part),
                           batches, leaves)
    return finite(rebuild([jnp.abs(t * g) for t, g in zip(leaves, gradient, strict=True)]), "snip")


def grasp(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree] | None = None, *,
          prunable: Predicate = kernels) -> PyTree:
    """Score weights by how much they help the gradient flow, to first order.

        S = θ ∘ (H g),   g = ∂L/∂θ,   H = ∂²L/∂θ²

    over the prunable weights alone; the others score 0. Scores have both signs. The lowest are pruned: the
    order of the original authors' code (the papers write −(H g) ∘ θ, of which that code prunes the
    highest). The published code divides the logits by a temperature of 200 inside the loss. Costs one
    Hessian-vector product, forward over reverse. ``batches`` as in ``snip``, but read twice, for g and for H g; both
    are exact. Source: GraSP, Wang et al. 2020; Gebhart et al. 2021, section 4.3.

    Raises what ``snip`` does, and ValueError where no leaf is prunable or the second reading gives another number of
    examples, TypeError where a prunable leaf holds no floating-point numbers or ``batches`` can be read only once.

    >>> import jax.numpy as jnp
    >>> grasp(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[16.0, 4.0]]
    """
    leaves, rebuild = split(params, prunable)

    def gradient_fn(*batch: PyTree) -> Callable[[list[Array]], list[Array]]:
        return jax.grad(lambda part: loss_fn(rebuild(part, params), *batch))

    if batches is None:
        gradient = gradient_fn()(leaves)
        _, product = jax.jvp(gradient_fn(), (leaves,), (gradient,))
    else:
        if isinstance(batches, Iterator):
            raise TypeError(f"grasp reads batches twice, but a {type(batches).__name__} can be read only once: pass a "
                            "list, or an object whose __iter__ starts anew each time")
        gradient, first = mean(lambda part, batch: gradient_fn(batch)(part), batches, leaves)
        product, second = mean(lambda part, batch, g: jax.jvp(gradient_fn(batch), (part,), (g,))[1],
                               batches, leaves, gradient)
        if first != second:
            raise ValueError(f"batches gave {first} examples when read first and {second} when read again; grasp needs "
                             "the same examples twice")
    return finite(rebuild([t * h for t, h in zip(leaves, product, strict=True)]), "grasp")


def path_exclusion(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, pool: str = "sum",
                   masks: PyTree | None = None) -> PyTree:
    """Score weights by the paths through them and the data that flow along these: Path eXclusion (PX).

        S = θ² ∘ ∂/∂θ² Σ_x Σ_k z₁(x)_k z₂_k,   z₁(x)_k = Σ_{p→k} a_p(x)² x_s²,   z₂_k = R_2(θ², 1)_k

    z₁ has the gates a_p of each example, every weight and constant 1, and is held fixed; z₂ has every gate open. Over
    θ_j² it bounds weight by weight what Tr Θ sums (Cauchy-Schwarz, if no weight lies twice on a path and pool is
    "sum"): S_j ≥ θ_j² Σ_x Σ_k (∂f_k(x)/∂θ_j)². One forward pass for each example, one backward pass for all.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: parameters θ.
        X: examples (N, *input), or an iterable of such arrays; scores add up over them.
        pool: "sum" (z₂ counts every path) or "max" (it leaves max-pooling in place, as in ``synflow``).
        masks: booleans like ``params``; a weight that is False carries no path. A weight that is merely 0 does in z₁.

    Returns:
        Scores like ``params``. Where Σ_x Σ_k z₁ z₂, which bounds them, would leave the middle of its type's range
        (1e±28 in float32), all are divided by one power of two.

    Raises:
        ValueError: for masks of another structure, NaN or infinity in params or X, an empty X, inputs that differ in
            shape or are no floating-point numbers.
        NotPathNetworkError: where the network is no sum over paths.
        FloatingPointError: where a score is not finite.

    Source: Iurada et al. 2024, whose code also squares the derivative and leaves biases out of z₁.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
    >>> path_exclusion(lambda p, x: x @ p["kernel"], params, jnp.array([[1.0, 2.0]]))["kernel"].tolist()
    [[20.0], [5.0]]
    """
    if pool not in ("sum", "max"):
        raise ValueError(f'pool must be "sum" or "max", but is {pool!r}')
    leaves, rebuild, first, stream, out = _network(apply_fn, params, X, masks)
    if not is_floating(first):
        raise ValueError(f"X must hold floating-point numbers, which start the paths, but has dtype {first.dtype}")

    def energy(state: tuple[Sums, Array], X: Array, leaves: list[Array], masks: PyTree | None) -> tuple[Sums, Array]:
        theta = rebuild(leaves, params)
        unit = paths.unit_weights(theta)

        def one(x: Array) -> tuple[Array, Array]:
            gates = tuple(g * g for g in paths.gates(apply_fn, theta, x[None], masks=masks))
            z1, exponent = paths.scaled_polynomial(apply_fn, unit, (x * x)[None], q=0, gates=gates, masks=masks,
                                                   skip_zeros=True)
            return z1[0], exponent

        z1, exponents = jax.lax.map(one, X, batch_size=min(len(X), AT_ONCE))
        ((total,), (lost,)), exponent = state
        top = jnp.maximum(exponent, exponents.max())
        by = exponent - top
        term = shifted(z1, (exponents - top)[:, None]).sum(0)
        return add(([shifted(total, by)], [shifted(lost, by)]), [term]), top

    def score(state: tuple[Sums, Array], leaves: list[Array], masks: PyTree | None) -> list[Array]:
        ((total,), _), exponent = state
        weights, exponent, _ = normalized(Scaled(total, exponent), skip_zeros=True)
        ones = jnp.ones(first.shape, first.dtype)

        def objective(phi: list[Array]) -> tuple[Array, Array]:
            z2, exponent = paths.scaled_polynomial(apply_fn, rebuild(phi, params), ones, q=2, pool=pool, masks=masks,
                                                   skip_zeros=True)
            return jnp.sum(weights * z2[0].astype(weights.dtype)), exponent

        squares = [t * t for t in leaves]
        (whole, more), slopes = jax.value_and_grad(objective, has_aux=True)(squares)
        # No score exceeds the whole. The exponent is applied as far as that stays in the middle of its type's range.
        types = [jnp.finfo(t.dtype) for t in [whole, *leaves]]
        low, high = max(3 * int(t.minexp) // 4 for t in types), min(3 * int(t.maxexp) // 4 for t in types)
        by = jnp.clip(exponent + more, low - exponent_of(whole), high - exponent_of(whole))
        return [shifted(t * g, by) for t, g in zip(squares, slopes, strict=True)]

    with jax.default_matmul_precision("highest"):
        start = (zeros([jnp.zeros(out.shape[1:], out.dtype)]), jnp.asarray(NOTHING, jnp.int32))
        state, _ = fold(energy, start, stream, leaves, masks)
        return finite(rebuild(jax.jit(score)(state, leaves, masks)), "path_exclusion")


def ntk_trace_saliency(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, masks: PyTree | None = None,
                       trainable: Trainable = None, batch_size: int = 16) -> PyTree:
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
        trainable: which parameters Θ differentiates, as in ``ntk``; the scores are of all floating ones.
        batch_size: how many examples to take at once; changes no score.

    Raises:
        ValueError: for masks or trainable of another structure, NaN or infinity in params or X, an empty X, inputs that
            differ in shape, ``batch_size`` below 1.
        FloatingPointError: where a score is not finite.

    Source: equation 2 of Jacot et al. 2018 for Θ; its trace as a measure of saliency, Iurada et al. 2024.

    >>> import jax.numpy as jnp
    >>> net = lambda p, x: x @ p["a"] @ p["b"]                     # Tr Θ = x² (a² + b²)
    >>> scores = ntk_trace_saliency(net, {"a": jnp.array([[3.0]]), "b": jnp.array([[-1.0]])}, jnp.array([[2.0]]))
    >>> scores["a"].tolist(), scores["b"].tolist()
    ([[72.0]], [[8.0]])
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of examples, 1 or more, got {batch_size!r}")
    leaves, rebuild, _, stream, out = _network(apply_fn, params, X, masks)
    chosen = jax.tree.leaves(trainable_masks(params, trainable, masks))
    trains = [c for c, leaf in zip(chosen, jax.tree.leaves(params), strict=True) if is_floating(leaf)]

    def slopes(leaves: list[Array], trains: list[Array], X: Array) -> list[Array]:
        def of_output(total: list[Array], e: Array) -> tuple[list[Array], None]:
            def one(x: Array) -> list[Array]:
                gradient_fn = jax.grad(lambda t: jnp.vdot(apply_fn(rebuild(t, params), x[None])[0], e))
                gradient = [jnp.where(m, g, 0) for m, g in zip(trains, gradient_fn(leaves), strict=True)]
                return jax.jvp(gradient_fn, (leaves,), (gradient,))[1]

            return [t + h.astype(t.dtype).sum(0) for t, h in zip(total, jax.vmap(one)(X), strict=True)], None

        return jax.lax.scan(of_output, zeros(leaves)[0], jnp.eye(out.shape[1], dtype=out.dtype))[0]

    def step(sums: Sums, X: Array, leaves: list[Array], trains: list[Array]) -> Sums:
        size = min(int(batch_size), len(X))
        whole = len(X) // size * size
        chunks = X[:whole].reshape(-1, size, *X.shape[1:])
        sums, _ = jax.lax.scan(lambda s, chunk: (add(s, slopes(leaves, trains, chunk)), None), sums, chunks)
        return sums if whole == len(X) else add(sums, slopes(leaves, trains, X[whole:]))

    with jax.default_matmul_precision("highest"):
        (total, _), _ = fold(step, zeros(leaves), stream, leaves, trains)
    scores = [(2 * t.astype(h.dtype) * h).astype(t.dtype) for t, h in zip(leaves, total, strict=True)]
    return finite(rebuild(scores), "ntk_trace_saliency")


def _network(apply_fn: ApplyFn, params: PyTree, X: Inputs, masks: PyTree | None) -> tuple[
        list[Array], Callable[..., PyTree], Array, Iterator[tuple[int, Array]], jax.ShapeDtypeStruct]:
    """Check network and data; return masked leaves, how to rebuild, a first example, the stream, its output."""
    check_masks(masks, params)
    check_finite(params, "params")
    leaves, rebuild = split(params if masks is None else apply_masks(params, masks), None)
    first, stream = inputs(X)
    return leaves, rebuild, first, stream, check_network(apply_fn, params, first)
