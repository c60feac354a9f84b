"""SNIP, GraSP and the Fisher diagonal: scores from the derivatives of a loss.

Data come with the loss, or as a stream of batches of which one at a time is on the device. Both run under ``jit``,
which reads the whole stream while it traces. The loss is traced at each call; what is compiled serves every loss of the
same operations.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from pkjax.programs.checks import empty_constants, unfit_constants
from pkjax.programs.evaluate import evaluate_program
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram, trace
from pkjax.pruning.scores.batches import Sums, checked, fold, in_chunks, mean, spent, whole_number, zeros
from pkjax.pruning.scores.leaves import finite, split
from pkjax.trees import Choice, apply_masks, kernels

__all__ = ["Loss", "fisher", "grasp", "snip"]

Loss = Callable[..., Float[Array, ""]]
"""A scalar loss: of (params), with the batch inside, or of (params, batch), the mean over the batch's examples."""


@automatic_axes
def snip(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree] | None = None, *, masks: PyTree | None = None
         ) -> PyTree:
    """Score weights by how strongly the loss reacts to their removal, to first order.

        S = |θ ∘ ∂L/∂θ|,   with masks m:   S = |θ ∘ g|,   g = ∂L/∂θ at θ ∘ m

    Iterative SNIP is this score in several steps of ``prune``, which hands over parameters whose pruned weights are 0:
    ``prune(lambda p: snip(loss_fn, p, batches), params, compression=2, steps=100, jit=False)``. With ``masks`` and the
    parameters before pruning it is the score of FORCE: pruned weights score too, as much as they would matter if they
    came back.

    Args:
        loss_fn: with ``batches`` None, the loss of one labelled batch, a scalar, of (params). Otherwise of (params,
            batch), the mean loss of the batch's examples; L is then the mean over the examples of all batches, so that
            batches of any sizes give the same scores.
        params: parameters θ.
        batches: an iterable of trees of arrays whose leading axes run over the examples. PyTorch's DataLoader will do.
        masks: booleans like ``params``, where the gradient is taken; None takes it at the parameters themselves.

    Returns:
        Scores like ``params``.

    Raises:
        TypeError: the loss is not a scalar, ``batches`` is not an iterable, or a field of a batch does not hold numbers
            (the message names both); the masks are not booleans.
        ValueError: parameters are NaN or infinite; the masks have another structure; ``batches`` is empty, or a batch
            (of ``batches``, or held by the loss) is empty, has leaves of different lengths, or holds NaN.
        FloatingPointError: a score is not finite.

    Source: SNIP, Lee et al. 2019, without the normalisation, which changes no order; Gebhart et al. 2021, section 4.1.
    Iterative SNIP and FORCE: de Jorge et al. 2021, section 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> snip(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[8.0, 2.0]]
    """
    leaves, rebuild = split(params)
    present = leaves if masks is None else split(apply_masks(params, masks))[0]
    if batches is None:
        gradient = _derivative(jax.grad(lambda part: loss_fn(rebuild(part, params))), present)
    else:
        gradient, _ = mean(lambda part, batch: jax.grad(lambda t: loss_fn(rebuild(t, params), batch))(part),
                           batches, present)
    return finite(rebuild([jnp.abs(t * g) for t, g in zip(leaves, gradient, strict=True)]), "snip")


@automatic_axes
def grasp(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree] | None = None, *,
          prunable: Choice = kernels) -> PyTree:
    """Score weights by how much they help the gradient flow, to first order.

        S = θ ∘ (H g),   g = ∂L/∂θ,   H = ∂²L/∂θ²

    over the prunable weights alone; the others score 0. Scores have both signs. The lowest are pruned: the
    order of the original authors' code (the papers write −(H g) ∘ θ, of which that code prunes the
    highest). The published code divides the logits by a temperature of 200 inside the loss. Costs one
    Hessian-vector product, forward over reverse.

    Args:
        loss_fn: the loss, as in ``snip``.
        params: parameters θ.
        batches: batches, as in ``snip``, but read twice, for g and for H g; both are exact.
        prunable: which leaves to score, as in ``prune``.

    Returns:
        Scores like ``params``.

    Raises:
        TypeError: as ``snip``; a prunable leaf does not hold floating-point numbers; ``batches`` can be read only once.
        ValueError: as ``snip``; no leaf is prunable; the second reading gives another number of examples.
        FloatingPointError: a score is not finite.

    Source: GraSP, Wang et al. 2020; Gebhart et al. 2021, section 4.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> grasp(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[16.0, 4.0]]
    """
    leaves, rebuild = split(params, prunable)

    def gradient_fn(*batch: PyTree) -> Callable[[list[Array]], list[Array]]:
        return jax.grad(lambda part: loss_fn(rebuild(part, params), *batch))

    if batches is None:
        def hessian_gradient(leaves: list[Array]) -> list[Array]:
            return jax.jvp(gradient_fn(), (leaves,), (gradient_fn()(leaves),))[1]

        product = _derivative(hessian_gradient, leaves)
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


@automatic_axes
def fisher(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree], *, batch_size: int = 16) -> PyTree:
    """Score weights by the diagonal of the empirical Fisher information.

        S = θ² ∘ Σ_x (∂ℓ(x)/∂θ)² = Σ_x (θ ∘ ∂ℓ(x)/∂θ)²

    with the loss ℓ(x) of one labelled example: the squares are of each example's gradient, not of the mean's. Removing
    a weight of a trained network changes the loss by about half of its score over the number of examples (optimal brain
    damage with the Fisher information for the Hessian).

    Args:
        loss_fn: (params, batch) → the mean loss of the batch's examples; it is called with batches of one.
        params: parameters θ.
        batches: an iterable of trees of arrays whose leading axes run over the examples, as for ``snip``; scores add up
            over all of them, so that batches of any sizes give the same scores.
        batch_size: how many examples' gradients to hold at once; changes no score.

    Returns:
        Scores like ``params``. In float32 a term with |θ ∂ℓ/∂θ| below 1e-19 counts as 0.

    Raises:
        TypeError: the loss is not a scalar, ``batches`` is not an iterable, or a field of a batch does not hold
            numbers.
        ValueError: parameters are NaN or infinite; ``batches`` is empty, or a batch is empty, has leaves of different
            lengths, or holds NaN; ``batch_size`` is not a whole number of 1 or more.
        FloatingPointError: a score is not finite.

    Source: Fisher pruning, Theis et al. 2018, without the factor 1/(2N), which changes no order.

    Examples:
        >>> import jax.numpy as jnp
        >>> half_square = lambda p, x: (0.5 * (x @ p["kernel"]) ** 2).mean()
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])                       # gradients (−2, 0) and (−1, −1)
        >>> fisher(half_square, {"kernel": jnp.array([[-2.0], [1.0]])}, [x])["kernel"].tolist()
        [[20.0], [1.0]]
    """
    leaves, rebuild = split(params)
    size = whole_number(batch_size, "batch_size")

    def squares(leaves: list[Array], chunk: PyTree) -> list[Array]:
        def one(example: PyTree) -> list[Array]:
            single = jax.tree.map(lambda v: v[None], example)
            gradient = jax.grad(lambda part: loss_fn(rebuild(part, params), single))(leaves)
            return [(t * g) ** 2 for t, g in zip(leaves, gradient, strict=True)]

        return [each.sum(0) for each in jax.vmap(one)(chunk)]

    def step(sums: Sums, batch: PyTree, leaves: list[Array]) -> Sums:
        return in_chunks(lambda chunk: squares(leaves, chunk), sums, jax.tree.map(jnp.asarray, batch), size)

    with jax.default_matmul_precision("highest"):
        (total, _), count = fold(step, zeros(leaves), checked(batches, "batches"), leaves)
    if count == 0:
        raise ValueError(f"batches holds no batch{spent(batches)}")
    return finite(rebuild([t.astype(leaf.dtype) for t, leaf in zip(total, leaves, strict=True)]), "fisher")


def _derivative(fn: Callable[[list[Array]], list[Array]], leaves: list[Array]) -> list[Array]:
    """Evaluate a derivative of a loss that holds its batch; ValueError where that is empty, or the cause of NaN.

    Products are taken at JAX's highest precision, as by `mean`.
    """
    with jax.default_matmul_precision("highest"):      # which JAX fixes while it traces
        program = BoundProgram(*trace(fn, leaves, opaque=True))
    if empty := empty_constants(program):
        raise ValueError(f"loss_fn closes over an array {empty[0]}, a batch that holds no example")
    values: list[Array] = evaluate_program(program, leaves)
    unfit = unfit_constants(program)
    if unfit and not all(isinstance(v, jax.core.Tracer) or bool(jnp.isfinite(v).all()) for v in values):
        raise ValueError(f"loss_fn closes over {unfit[0]}, and its derivatives are not finite")
    return values
