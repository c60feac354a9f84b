"""Whether a pruned network still connects its inputs to its outputs, and by how many paths."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pkjax import paths
from pkjax.prune_result import LayerReport, layer_report
from pkjax.trees import ApplyFn, Predicate, check_masks, is_floating, kernels, leaf_names, select

__all__ = ["Connectivity", "connectivity"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["connected", "log10_paths", "log10_effective_paths", "layers"],
)
@dataclass(frozen=True)
class Connectivity:
    """What is left of the paths of a masked network.

    Attributes:
        connected: whether a path leads from any input entry to any output. Paths that start at a bias do not
            count: a network that is not connected is a constant function.
        log10_paths: decimal logarithm of the number of live paths, those from biases included; −inf where there
            is none, inf (with a warning) beyond 10^308.
        log10_effective_paths: decimal logarithm of R_2²/R_4, the number of paths that carry the path norm
            (participation ratio of v_p²); None where it is beyond the parameters' type or no path is left.
        layers: a report for each prunable leaf, in flattening order.
    """

    connected: bool
    log10_paths: float
    log10_effective_paths: float | None
    layers: tuple[LayerReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (an infinite logarithm becomes None)."""
        return {
            **asdict(self),
            "log10_paths": self.log10_paths if math.isfinite(self.log10_paths) else None,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def connectivity(
    apply_fn: ApplyFn,
    params: PyTree,
    x: Float[Array | np.ndarray, "N *input"],
    *,
    masks: PyTree | None,
    prunable: Predicate = kernels,
) -> Connectivity:
    """Report layer by layer what masks leave, and whether any path from input to output survives.

        connected ⇔ Σ_p Π_{j∈p} mask_j > 0 over the paths p that start at an input

    ``x`` tells the shape of the input, ``(1, *input)``; where it is 0 no path starts. The masks decide what is
    a path, not the weights: a weight that is kept and happens to be 0 is one. Runs outside of ``jit``.

    Raises ValueError or TypeError where the masks do not fit, NotPathNetworkError where the network has no
    paths, and FloatingPointError in the rare case that the test for a connection overflows.

    Source: the number of paths is R_0 and the effective number R_2²/R_4 of the path polynomial
    (``pkjax.paths.polynomial``); Gebhart et al. 2021, equation 15 for R_2.

    >>> import jax.numpy as jnp
    >>> net = lambda p, x: jnp.maximum(x @ p["a"], 0.0) @ p["b"]
    >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 1))}
    >>> one_unit = {"a": jnp.array([[True, False]] * 3), "b": jnp.array([[True], [False]])}
    >>> broken = {"a": jnp.array([[True, False]] * 3), "b": jnp.array([[False], [True]])}
    >>> round(10 ** connectivity(net, params, jnp.ones((1, 3)), masks=one_unit).log10_paths)
    3
    >>> connectivity(net, params, jnp.ones((1, 3)), masks=broken).connected
    False
    """
    check_masks(masks, params)
    if masks is None:
        masks = jax.tree.map(lambda t: jnp.ones(jnp.shape(t), bool), params)
    start = (jnp.asarray(x) != 0).astype(jnp.result_type(x))
    sums = jax.device_get(jax.jit(partial(_sums, apply_fn))(params, start, masks))
    from_inputs, second, fourth = map(float, sums)
    if not math.isfinite(from_inputs):
        raise FloatingPointError(
            f"the test for a connection gives {from_inputs} in {jnp.result_type(x)}: pass float64 parameters and "
            "input (jax_enable_x64)"
        )
    chosen = jax.tree.leaves(select(prunable, params))
    layers = tuple(
        layer_report(name, jnp.shape(mask), int(np.asarray(mask).sum()))
        for name, mask, c in zip(leaf_names(masks), jax.tree.leaves(masks), chosen, strict=True)
        if c
    )
    return Connectivity(
        connected=from_inputs > 0,
        log10_paths=float(paths.log_count(apply_fn, params, x, masks=masks)),
        log10_effective_paths=(
            2 * math.log10(second) - math.log10(fourth) if 0 < second < math.inf and 0 < fourth < math.inf else None
        ),
        layers=layers,
    )


def _sums(apply_fn: ApplyFn, params: PyTree, x: Array, masks: PyTree) -> tuple[Array, ...]:
    """Scaled sum over the paths from inputs; then R_2 and R_4 over all paths."""

    def total(phi: PyTree, z: Array, q: int) -> Array:
        return jnp.sum(paths.polynomial(apply_fn, phi, z, q=q, masks=masks))

    def power(q: int) -> PyTree:
        return jax.tree.map(lambda t: t**q if is_floating(t) else t, params)

    # Positive weights of any size leave the same paths: with 1 / (weights kept per output) every layer passes on
    # about what it gets, and neither a deep network nor a nearly empty one leaves the range of the type.
    def balanced(leaf: Array, mask: Array) -> Array:
        if not is_floating(leaf):
            return leaf
        if jnp.ndim(leaf) < 2:
            return jnp.ones_like(leaf)
        per_output = jnp.maximum(jnp.sum(mask, dtype=leaf.dtype) / leaf.shape[-1], 1)
        return jnp.ones_like(leaf) / per_output

    scaled = jax.tree.map(balanced, params, masks)
    # The path sum is linear in the input: its derivative along the input leaves out what starts at a bias.
    _, from_inputs = jax.jvp(lambda z: total(scaled, z, 0), (x,), (x,))
    return from_inputs, total(power(2), x, 2), total(power(4), x, 4)
