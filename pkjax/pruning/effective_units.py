"""How many units of each layer carry the paths of a network."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax import tables
from pkjax.paths.scaled import widest
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.prunable import prunable_leaves
from pkjax.pruning.scores.data_free import synflow_l2
from pkjax.trees import ApplyFn, Choice, apply_masks, kernels, leaf_names

__all__ = ["EffectiveUnits", "effective_units"]


@partial(jax.tree_util.register_dataclass, data_fields=[],
         meta_fields=["name", "units", "live", "participation", "perplexity"])
@dataclass(frozen=True)
class EffectiveUnits:
    """How many units behind one layer's weights carry its flow.

    Returned by ``effective_units``.

    Examples:
        >>> EffectiveUnits("Dense_0/kernel", units=4, live=2, participation=1.6, perplexity=1.75)
        EffectiveUnits(
            name='Dense_0/kernel', units=4, live=2, participation=1.6, perplexity=1.75
        )
    """

    name: str
    """The leaf's key path."""
    units: int
    """Units that the layer's weights lead to: neurons, or channels."""
    live: int
    """Units through which some flow goes."""
    participation: float
    """(Σ_u F_u)² / Σ_u F_u²: how many equal units would spread the flow as much; 0 where none flows."""
    perplexity: float
    """exp(−Σ_u p_u ln p_u) with p = F / Σ F: the same by entropy, at least as large; 0 where none flows."""

    __repr__ = tables.brief


@automatic_axes
def effective_units(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[Array | np.ndarray, "N ..."]], *,
                    masks: PyTree | None = None, prunable: Choice = kernels, axis: int = -1
                    ) -> tuple[EffectiveUnits, ...]:
    """Count the units of each layer that carry the path norm, as ``connectivity`` counts paths.

        F_u = Σ_{p through a weight into u} v_p² z_s = Σ_{j into u} θ_j² ∂R_2(θ², z)/∂θ_j²

    the sum over paths through the layer's weights (not through the unit's own bias). From F two effective numbers
    follow, the participation ratio (as R_2² / R_4 is that of the paths) and the exponential of the entropy. Equal units
    count fully, a unit without flow not at all. Computed in float64, outside of ``jit``.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: its parameters θ.
        x: z of shape ``(1, *input)``, not negative: ``pk.ones_input(shape)`` weighs all paths alike, the square of an
            input weighs them by what they carry of it.
        masks: booleans like ``params``; None keeps every weight.
        prunable: which leaves to report on, as in ``prune``.
        axis: the output axis of these leaves: −1, the default, of kernels (…, in, out); 0 of weights (out, in).

    Returns:
        A report for each prunable leaf, in flattening order.

    Raises:
        ValueError: the masks have another structure or shape than the parameters; x is negative or not finite; a leaf
            lacks the axis.
        NotPathNetworkError: the network is not a sum over paths.
        FloatingPointError: the flows are not finite.

    Source: Gebhart et al. 2021, equation 15 for R_2; Tanaka et al. 2020, theorem 1, for flows through units.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda p, x: jnp.maximum(x @ p["a"], 0.0) @ p["b"]
        >>> params = {"a": jnp.array([[1.0, 1.0, 0.0]]), "b": jnp.array([[1.0], [1.0], [1.0]])}
        >>> layer = effective_units(net, params, jnp.ones((1, 1)))[0]
        >>> layer.units, layer.live, round(layer.participation, 6), round(layer.perplexity, 6)
        (3, 2, 2.0, 2.0)
    """
    chosen = prunable_leaves(params, prunable, required=False)
    with widest(apply_fn, (apply_masks(params, masks), x)) as (theta, z):
        scores = jax.device_get(synflow_l2(apply_fn, theta, z, variant="conserved"))
    reports = []
    for name, leaf, chosen_leaf in zip(leaf_names(params), jax.tree.leaves(scores), chosen, strict=True):
        if not chosen_leaf:
            continue
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"axis={axis} is not an axis of leaf {name!r} of shape {leaf.shape}: choose another axis, "
                             "or leave the leaf out by prunable")
        flow = np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1).sum(1)
        reports.append(EffectiveUnits(name, len(flow), int((flow > 0).sum()), *_effective(flow)))
    return tuple(reports)


def _effective(flow: np.ndarray) -> tuple[float, float]:
    """Participation ratio and perplexity of the shares of a flow."""
    if not flow.max(initial=0.0) > 0:
        return 0.0, 0.0
    shares = flow / flow.max()
    shares = shares[shares > 0] / shares.sum()
    return float(1 / (shares**2).sum()), float(np.exp(-(shares * np.log(shares)).sum()))
