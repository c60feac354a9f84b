"""Whether a pruned network still connects its inputs to its outputs, and by how many paths."""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax import tables
from pkjax.network import Network, read
from pkjax.paths.exponents import NEAR, Scaled, log_of, nothing
from pkjax.paths.frozen import with_gates
from pkjax.paths.magnitudes import Magnitudes, magnitudes
from pkjax.paths.scaled import scaled_values, widest
from pkjax.programs.checks import HOLDS
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.prunable import prunable_leaves
from pkjax.pruning.result import DisconnectedWarning, LayerReport, layer_report, layers_table
from pkjax.pruning.scores.leaves import widened
from pkjax.trees import ApplyFn, Choice, check_masks, is_floating, kernels, leaf_names

__all__ = ["Connectivity", "connectivity"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["connected", "log10_paths", "log10_effective_paths", "layers"],
)
@dataclass(frozen=True)
class Connectivity:
    """What is left of the paths of a masked network.

    Returned by ``connectivity``. Prints as a short text and, in a notebook, as a table of its layers.

    Examples:
        >>> import jax.numpy as jnp
        >>> connectivity(lambda w, x: x @ w, jnp.ones((5, 2)), jnp.ones((1, 5)))
        Connectivity(
            connected=True, log10_paths=1, log10_effective_paths=1, layers=<1 of LayerReport>
        )
    """

    connected: bool
    """Whether a path leads from any input entry to any output. Paths that start at a bias do not count: a network that
    is not connected is a constant function."""
    log10_paths: float
    """Decimal logarithm of the number of live paths, those from biases included; −inf where there is none."""
    log10_effective_paths: float | None
    """Decimal logarithm of R_2²/R_4, the number of paths that carry the path norm (participation ratio of v_p²); None
    where no path of weights other than 0 is left."""
    layers: tuple[LayerReport, ...]
    """A report for each prunable leaf, in flattening order, with the share of R_1 that flows through it."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        effective = "" if self.log10_effective_paths is None else (
            f", of which 10^{tables.format_number(self.log10_effective_paths)} carry the path norm")
        count = f"10^{tables.format_number(self.log10_paths)} paths{effective}"
        return layers_table(self.layers, count if self.connected
                            else "no path from input to output: a constant function")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (an infinite logarithm becomes None)."""
        return {
            "connected": self.connected,
            "log10_effective_paths": self.log10_effective_paths,
            "log10_paths": self.log10_paths if math.isfinite(self.log10_paths) else None,
            "layers": [layer.to_dict() for layer in self.layers],
        }


@automatic_axes
def connectivity(
    apply_fn: ApplyFn,
    params: PyTree,
    x: PyTree[Shaped[Array | np.ndarray, "N ..."]],
    *,
    masks: PyTree | None = None,
    prunable: Choice = kernels,
    gates: str | None = None,
    reference: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None,
) -> Connectivity:
    """Report layer by layer what masks leave, and whether any path from input to output survives.

        connected ⇔ Σ_p Π_{j∈p} mask_j > 0 over the paths p that start at an input

    The masks decide what is a path, not the weights: a weight that is kept and happens to be 0 lies on one. Runs
    outside of ``jit``. Warns with ``DisconnectedWarning``, naming the layers that nothing flows through, where no path
    is left.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, K).
        params: its parameters.
        x: an input ``(1, *input)``; no path starts where it is 0.
        masks: booleans like ``params``; None keeps every weight.
        prunable: which leaves to report on, as in ``prune``.
        gates: "frozen" takes networks whose activations are not piecewise linear too, as in ``synflow``.
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        The logarithms of the numbers of paths, to base 10, and a report for each prunable leaf.

    Raises:
        ValueError: the masks have another structure or shape than the parameters.
        TypeError: the masks are not booleans.
        FloatingPointError: the network itself makes NaN or infinity.
        NotPathNetworkError: the network has no paths.

    Source: the number of paths is R_0 and the effective number R_2²/R_4 of the path polynomial
    (``pkjax.paths.polynomial``); Gebhart et al. 2021, equation 15 for R_2; a layer's flow is the sum of its SynFlow
    scores, Tanaka et al. 2020, theorem 1, over R_1.

    Examples:
        >>> import warnings, jax.numpy as jnp
        >>> net = lambda p, x: jnp.maximum(x @ p["a"], 0.0) @ p["b"]
        >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 1))}
        >>> one_unit = {"a": jnp.array([[True, False]] * 3), "b": jnp.array([[True], [False]])}
        >>> broken = {"a": jnp.array([[True, False]] * 3), "b": jnp.array([[False], [True]])}
        >>> round(10 ** connectivity(net, params, jnp.ones((1, 3)), masks=one_unit).log10_paths)
        3
        >>> with warnings.catch_warnings(action="ignore"):
        ...     connectivity(net, params, jnp.ones((1, 3)), masks=broken).connected
        False
    """
    check_masks(masks, params)
    chosen = prunable_leaves(params, prunable, required=False)
    apply_fn = with_gates(apply_fn, params, x, gates, reference, masks)
    # Fourth powers of weights of one layer may lie further apart than float32 holds.
    with widest(apply_fn, (params, x)) as wide:
        theta, inputs = widened(wide)
        network = read(apply_fn, theta, inputs, masks=masks, paths=True).fixed
        z = network.batch(inputs, "x")
        z = (z != 0).astype(z.dtype)
        known = magnitudes(network, z, 4)
        from_inputs, logs, flows, sure = jax.device_get(_sums(network, z, known))
        if known.lean and not sure:
            from_inputs, logs, flows, _ = jax.device_get(_sums(network, z, known.careful))
    paths, second, fourth = map(float, logs)
    if not (second < math.inf and fourth < math.inf):
        raise FloatingPointError(f"the path norms R_2 and R_4 are not finite: {HOLDS}")
    kept = [np.ones(jnp.shape(leaf), bool) for leaf in jax.tree.leaves(params)] if masks is None else [
        np.asarray(mask) for mask in jax.tree.leaves(masks)]
    layers = tuple(
        layer_report(name, np.shape(mask), int(mask.sum()), float(flow))
        for name, mask, flow, c in zip(leaf_names(params), kept, flows, chosen, strict=True)
        if c
    )
    if from_inputs <= 0:
        dead = [layer.name for layer in layers if not layer.flow]
        warnings.warn(
            "no path leads from the input to the output: the masked network is constant. "
            + (f"Nothing flows through {', '.join(dead)}. " if dead else "")
            + "Prune less, in more steps, or with min_per_layer=1",
            DisconnectedWarning,
            stacklevel=3,
        )
    return Connectivity(
        connected=bool(from_inputs > 0),
        log10_paths=paths,
        log10_effective_paths=float(2 * second - fourth) if second > -math.inf and fourth > -math.inf else None,
        layers=layers,
    )


@compiled_for_few_calls(static_argnames="known")
def _sums(network: Network, x: Array, known: Magnitudes) -> tuple[Array, Array, list[Array], Array]:
    """Scaled sum over the paths from inputs; log10 of R_0, R_2 and R_4; shares of R_1; whether all is sure.

    The five polynomials are one program over a batch of networks.
    """
    leaves = jax.tree.leaves(network.params)
    masks = [jnp.ones_like(leaf, bool) for leaf in leaves] if network.masks is None else jax.tree.leaves(network.masks)

    # Positive weights of any size leave the same paths: with 1 / (weights kept per output) every layer passes on
    # about what it gets, so that its signal stays near its largest entry.
    def balanced(leaf: Array, mask: Array) -> Array:
        if jnp.ndim(leaf) < 2:
            return mask.astype(leaf.dtype)
        return mask / jnp.maximum(jnp.sum(mask, dtype=leaf.dtype) / leaf.shape[-1], 1)

    def powers(i: int) -> Scaled:
        unit, even = Scaled(masks[i].astype(leaves[i].dtype), 0), Scaled(balanced(leaves[i], masks[i]), 0)
        rows = [even, unit, *(known.held(i, leaves[i], q) for q in (1, 2, 4))]
        exponents = [jnp.asarray(0 if nothing(r) else r.exponent, jnp.int32) for r in rows]
        growth = 4 * NEAR if known.leaves[i] in ("zero", "near") else math.nan
        return Scaled(jnp.stack([r.mantissa for r in rows]), jnp.stack(exponents) if known.apart else 0, growth)

    held = {i: powers(i) for i, leaf in enumerate(leaves) if is_floating(leaf)}

    def totals(mantissas: dict[int, Array]) -> tuple[Array, tuple[Array, Array]]:
        def total(q: Array, sources: Array, mantissas: dict[int, Array], exponents: dict[int, Any]) -> Any:
            phi = {i: held[i]._replace(mantissa=m, exponent=exponents.get(i, 0)) for i, m in mantissas.items()}
            mantissa, exponent, sure = scaled_values(network, x, q, None, "sum", True, phi, sources, known)
            return jnp.sum(mantissa), (exponent, sure)
        return jax.vmap(total)(jnp.array([0, 0, 1, 2, 4], jnp.int32), jnp.array([0, 1, 1, 1, 1], x.dtype), mantissas,
                               {i: h.exponent for i, h in held.items()} if known.apart else {})

    whole, pull, (exponents, sure) = jax.vjp(totals, {i: h.mantissa for i, h in held.items()}, has_aux=True)
    (slopes,) = pull(jnp.zeros_like(whole).at[2].set(1))
    norm = jnp.where(whole[2] > 0, whole[2], 1)
    # Nothing flows through a weight of 0, however much would.
    flows = {i: jnp.sum(jnp.where(h.mantissa[2] == 0, 0, h.mantissa[2] * slopes[i][2])) / norm for i, h in held.items()}
    logs = jnp.stack([log_of(whole[i], exponents[i]) for i in (1, 3, 4)]) / math.log(10)
    return whole[0], logs, [flows.get(i, jnp.zeros(())) for i in range(len(leaves))], sure.all()
