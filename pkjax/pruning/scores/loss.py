"""SNIP and GraSP: scores from the derivatives of a loss.

Data come with the loss, or as a stream of batches of which one at a time is on the device. Both run under ``jit``,
which reads the whole stream while it traces.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from pkjax.pruning.scores.batches import mean
from pkjax.pruning.scores.leaves import finite, split
from pkjax.trees import Choice, kernels

__all__ = ["Loss", "grasp", "snip"]

Loss = Callable[..., Float[Array, ""]]
"""A scalar loss: of (params), with the batch inside, or of (params, batch), the mean over the batch's examples."""


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
    leaves, rebuild = split(params)
    if batches is None:
        gradient = jax.grad(lambda part: loss_fn(rebuild(part, params)))(leaves)
    else:
        gradient, _ = mean(lambda part, batch: jax.grad(lambda t: loss_fn(rebuild(t, params), batch))(part),
                           batches, leaves)
    return finite(rebuild([jnp.abs(t * g) for t, g in zip(leaves, gradient, strict=True)]), "snip")


def grasp(loss_fn: Loss, params: PyTree, batches: Iterable[PyTree] | None = None, *,
          prunable: Choice = kernels) -> PyTree:
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
