"""Path eXclusion: scores from the paths through each weight and the data that flow along them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from pkjax import paths
from pkjax.network import read
from pkjax.paths.exponents import NOTHING, Scaled, exponent_of, normalized, nothing, shifted
from pkjax.paths.frozen import LONE_REFERENCE, with_gates
from pkjax.paths.magnitudes import magnitudes
from pkjax.paths.scaled import scaled_values
from pkjax.programs.evaluate import evaluate
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.scores.batches import Inputs, Sums, add, fold, scored_network, zeros
from pkjax.pruning.scores.leaves import finite
from pkjax.trees import ApplyFn, is_floating

__all__ = ["path_exclusion"]

AT_ONCE = 16
"""How many examples' gates ``path_exclusion`` holds at once."""


@automatic_axes
def path_exclusion(apply_fn: ApplyFn, params: PyTree, X: Inputs, *, pool: str = "sum",
                   masks: PyTree | None = None, gates: str | None = None,
                   reference: PyTree[Shaped[Array | np.ndarray, "M ..."]] | None = None) -> PyTree:
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
        gates: "frozen" takes networks whose activations are not piecewise linear too (``pkjax.paths.frozen``), with the
            coefficients of each example in z₁.
        reference: with "frozen", the input whose coefficients are taken in z₂, averaged over several; ones by default.

    Returns:
        Scores like ``params``. Where Σ_x Σ_k z₁ z₂, which bounds them, would leave the middle of its type's range
        (1e±28 in float32), all are divided by one power of two.

    Raises:
        ValueError: masks have another structure, params or X hold NaN or infinity, X is empty, or its inputs differ in
            shape or are not floating-point numbers.
        NotPathNetworkError: the network is not a sum over paths.
        FloatingPointError: a score is not finite.

    Source: Iurada et al. 2024, whose code also squares the derivative and leaves biases out of z₁.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[-2.0], [1.0]])}
        >>> path_exclusion(lambda p, x: x @ p["kernel"], params, jnp.array([[1.0, 2.0]]))["kernel"].tolist()
        [[20.0], [5.0]]
    """
    if pool not in ("sum", "max"):
        raise ValueError(f'pool must be "sum" or "max", but is {pool!r}')
    if gates is None and reference is not None:
        raise ValueError(LONE_REFERENCE)
    network, leaves, rebuild, stream = scored_network(apply_fn, params, X, masks, paths=True)
    fn, out = network.fn, network.fn.out
    point = jnp.ones(network.example.shape, network.example.dtype) if reference is None else (
        network.batch(reference, "reference"))
    opened = with_gates(fn, network.params, point, gates, None)
    open_network = network if opened is fn else read(opened, network.params, network.example, masks=masks, paths=True)

    def energy(state: tuple[Sums, Array], X: Array, leaves: list[Array], masks: PyTree | None) -> tuple[Sums, Array]:
        theta = rebuild(leaves, params)
        unit = paths.unit_weights(theta)

        def one(x: Array) -> tuple[Array, Array]:
            # An index or a boolean chooses; it does not multiply.
            squared = tuple(g * g if is_floating(g) else g
                            for g in paths.gates(fn, theta, x[None], masks=masks, gates=gates))
            z1, exponent = paths.scaled_polynomial(fn, unit, (x * x)[None], q=0, gates=squared, masks=masks,
                                                   skip_zeros=True)
            return z1[0], exponent

        z1, exponents = jax.lax.map(one, X, batch_size=min(len(X), AT_ONCE))
        ((total,), (lost,)), exponent = state
        top = jnp.maximum(exponent, exponents.max())
        by = exponent - top
        term = shifted(z1, (exponents - top)[:, None]).sum(0)
        return add(([shifted(total, by)], [shifted(lost, by)]), [term]), top

    floating = [i for i, leaf in enumerate(jax.tree.leaves(params)) if is_floating(leaf)]
    known = magnitudes(network, np.ones(network.example.shape, network.example.dtype), 2)

    def score(state: tuple[Sums, Array], leaves: list[Array]) -> list[Array]:
        ((total,), _), exponent = state
        weights, power, *_ = normalized(Scaled(total, exponent), skip_zeros=True)
        ones = jnp.ones(network.example.shape, network.example.dtype)

        def objective(phi: list[Array]) -> tuple[Array, Array]:
            held = {i: s if nothing(s) else s._replace(mantissa=p)
                    for i, s, p in zip(floating, sizes, phi, strict=True)}
            z2, exponent, _ = scaled_values(open_network, ones, 2, None, pool, True, held)
            return jnp.sum(weights * z2[0].astype(weights.dtype)), exponent

        sizes = [known.held(i, t, 2) for i, t in zip(floating, leaves, strict=True)]
        squares = [s.mantissa for s in sizes]
        (whole, more), slopes = jax.value_and_grad(objective, has_aux=True)(squares)
        # No score exceeds the whole. The exponent is applied as far as that stays in the middle of its type's range.
        types = [jnp.finfo(t.dtype) for t in [whole, *leaves]]
        low, high = max(3 * int(t.minexp) // 4 for t in types), min(3 * int(t.maxexp) // 4 for t in types)
        by = jnp.clip(power + more, low - exponent_of(whole), high - exponent_of(whole))
        return [shifted(jnp.where(t == 0, 0, t * g), by) for t, g in zip(squares, slopes, strict=True)]

    with jax.default_matmul_precision("highest"):
        start = (zeros([jnp.zeros(out.shape[1:], out.dtype)]), jnp.asarray(NOTHING, jnp.int32))
        state, _ = fold(energy, start, stream, leaves, masks)
        return finite(rebuild(evaluate(score, state, leaves)), "path_exclusion")
