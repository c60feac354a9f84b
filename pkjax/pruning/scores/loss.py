"""SNIP and GraSP: scores from the derivatives of a loss.

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
from pkjax.pruning.scores.batches import mean
from pkjax.pruning.scores.leaves import finite, split
from pkjax.trees import Choice, kernels

__all__ = ["Loss", "grasp", "snip"]

Loss = Callable[..., Float[Array, ""]]
"""A scalar loss: of (params), with the batch inside, or of (params, batch), the mean over the batch's examples."""


@automatic_axes
def snip(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree] | None = None) -> PyTree:
    """Score weights by how strongly the loss reacts to their removal, to first order.

        S = |θ ∘ ∂L/∂θ|

    Args:
        loss_fn: with ``batches`` None, the loss of one labelled batch, a scalar, of (params). Otherwise of (params,
            batch), the mean loss of the batch's examples; L is then the mean over the examples of all batches, so that
            batches of any sizes give the same scores.
        params: parameters θ.
        batches: an iterable of trees of arrays whose leading axes run over the examples. PyTorch's DataLoader will do.

    Returns:
        Scores like ``params``.

    Raises:
        TypeError: the loss is not a scalar, ``batches`` is not an iterable, or a field of a batch does not hold numbers
            (the message names both).
        ValueError: parameters are NaN or infinite; ``batches`` is empty, or a batch (of ``batches``, or held by the
            loss) is empty, has leaves of different lengths, or holds NaN.
        FloatingPointError: a score is not finite.

    Source: SNIP, Lee et al. 2019, without the normalisation, which changes no order; Gebhart et al. 2021, section 4.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> snip(lambda p: (p["kernel"] ** 2).sum(), {"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[8.0, 2.0]]
    """
    leaves, rebuild = split(params)
    if batches is None:
        gradient = _derivative(jax.grad(lambda part: loss_fn(rebuild(part, params))), leaves)
    else:
        gradient, _ = mean(lambda part, batch: jax.grad(lambda t: loss_fn(rebuild(t, params), batch))(part),
                           batches, leaves)
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
