"""What masks take away, as sums over exactly the paths that are lost: nothing is subtracted."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.algebras import TrueValues
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.exponents import NOTHING, Scaled, Scaling, normalized, raised
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.paths.scaled import ScaledPolynomial, widest
from pkjax.programs.checks import HOLDS, check_parameters, check_result
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, apply_masks, check_masks

__all__ = ["ChangeBound", "change_bound", "changed_leaves", "lost_paths", "masked_leaves"]


class Parts(NamedTuple):
    """The paths of a sum that both maskings keep, and those that the smaller one loses; None where there are none."""

    kept: Scaled | None
    lost: Scaled | None
    whole: Scaled | None = None
    """Both, of a parameter."""


class PartedPolynomial(ScaledPolynomial):
    """The path polynomial in two parts: a path is lost where one of its edges is."""

    def lift(self, constant: Any) -> Any:
        """Keep |c|^q."""
        return Parts(super().lift(constant), None)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply the operation to each part."""
        def of_part(n: int) -> Scaled | None:
            terms = [s.value[n] for s in operands]
            if all(t is None for t in terms):
                return None
            return self.scaling.combined(op, fn, [
                Scaled(jnp.zeros(s.shape, s.dtype), NOTHING, 1.0) if t is None else t
                for s, t in zip(operands, terms, strict=True)])

        return Parts(of_part(0), of_part(1), of_part(2) if all(s.value.whole is not None for s in operands) else None)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Join paths: those are kept of which both halves are."""
        x, y = a.value, b.value

        def times(one: Scaled | None, other: Scaled | None) -> Scaled | None:
            return None if one is None or other is None else self.scaling.multiplied(op, fn, one, other)

        # One factor is lost and the other anything, or the one is kept and the other lost.
        if y.whole is not None or x.whole is None:
            terms = [times(x.lost, self._whole(y)), times(x.kept, y.lost)]
        else:
            terms = [times(x.whole, y.lost), times(x.lost, y.kept)]
        return Parts(times(x.kept, y.kept), self._sum(terms))

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Open the gate."""
        return operand.value

    def _whole(self, parts: Parts) -> Scaled | None:
        return parts.whole if parts.whole is not None else self._sum([parts.kept, parts.lost])

    def _sum(self, terms: Sequence[Scaled | None]) -> Scaled | None:
        held = [t for t in terms if t is not None]
        return self.scaling.combined("add", lambda *vs: sum(vs[1:], vs[0]), held) if held else None


def masked_leaves(masks: PyTree | None, params: PyTree) -> list[Array]:
    """Which entries of each leaf a masking keeps."""
    every = [None] * len(jax.tree.leaves(params)) if masks is None else jax.tree.leaves(masks)
    return [jnp.broadcast_to(jnp.asarray(True if mask is None else mask), jnp.shape(leaf))
            for mask, leaf in zip(every, jax.tree.leaves(params), strict=True)]


def changed_leaves(*maskings: PyTree | None) -> tuple[bool, ...]:
    """Whether each leaf may lose an entry under one of the maskings (traced masks may)."""
    def may(mask: Any) -> bool:
        return isinstance(mask, jax.core.Tracer) or not bool(np.asarray(mask).all())

    every = [[may(mask) for mask in jax.tree.leaves(masks)] for masks in maskings if masks is not None]
    return tuple(map(any, zip(*every, strict=True)))


def lost_paths(network: Network, z: Array, q: int, kept: Sequence[Array], alive: Sequence[Array],
               changed: Sequence[bool]) -> tuple[Float[Array, "..."], Array]:
    """R_q over the paths of one example that one masking keeps and a smaller one does not, for each output.

    Args:
        network: the network, without masks.
        z: the start values, of shape (*input).
        q: the power of the values.
        kept: for each leaf what the smaller masking keeps.
        alive: for each leaf what the larger one keeps.
        changed: for each leaf whether it may differ between the network and either masking.

    Returns:
        (K,), and the exponent of the power of two that it is over.
    """
    scalings: list[Scaling] = []

    def make(gates: None, natural: bool) -> PartedPolynomial:
        scalings.append(Scaling(True))
        return PartedPolynomial(q, gates, natural, scalings[-1])

    def source(i: int, leaf: Any) -> Parts:
        held = raised(leaf, q)

        def part(mask: Array) -> Scaled:
            return normalized(held._replace(mantissa=jnp.where(mask, held.mantissa, 0)), True)
        if not changed[i]:
            return Parts(held, None, held)
        return Parts(part(kept[i]), part(alive[i] & ~kept[i]), part(alive[i]))

    def release(out: Parts) -> tuple[Array, Array]:
        if out.lost is None:
            return jnp.zeros(network.size, network.fn.out.dtype), jnp.asarray(NOTHING, jnp.int32)
        held = scalings[-1].back(out.lost)
        return held.mantissa[0], jnp.asarray(held.exponent, jnp.int32)

    mantissa, exponent = evaluate_paths(make, network, z[None], None, "sum",
                                        lambda value: Parts(Scaled(value, 0), None), release, source)
    return mantissa[0], exponent[0]


class ChangeBound(NamedTuple):
    """What masks change of a network's outputs, example by example, beside the most that they can change.

    Returned by ``change_bound``, in float64 (in the network's type under jit).

    Examples:
        >>> masks = jnp.array([[True], [False]])
        >>> change_bound(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((1, 2)), masks).ratio.tolist()
        [[1.0]]
    """

    change: Float[Array | np.ndarray, "N K"]
    """|f_k(x, θ) − f_k(x, θ∘m)|."""
    bound: Float[Array | np.ndarray, "N K"]
    """The sum of |v_p| |x_s| over the paths that the masks take away."""
    log10_bound: Float[Array | np.ndarray, "N K"]
    """Its decimal logarithm; −∞ where the masks take away no path."""
    ratio: Float[Array | np.ndarray, "N K"]
    """change / bound, from 0 to 1 up to rounding of the outputs; 0 where the bound is."""


@automatic_axes
def change_bound(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[ArrayLike, "N ..."]], masks: PyTree, *,
                 batch_size: int = 32) -> ChangeBound:
    """Bound what masks can change of each output of each example, and report it beside what they do change.

        |f_k(x, θ) − f_k(x, θ∘m)| ≤ R_1(|θ|, |x|)_k − R_1(|θ∘m|, |x|)_k

    The right side is the sum over the paths that the masks take away. It is computed as that sum, so that nothing
    cancels, and says most where few paths are lost. In deep networks it is vacuous (on an untrained ResNet-20 more
    than 10²⁰ times the change): the ratio says by how much. The change itself is a difference of outputs, as exact as
    these are.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the examples.
        masks: booleans like ``params``; a masked weight carries no path.
        batch_size: how many examples are taken at a time.

    Returns:
        Four arrays (N, *out). A bound beyond float64 is infinite; its logarithm is not.

    Raises:
        ValueError: mismatched masks, numbers that are not finite, or an activation with a slope beyond [−1, 1], for
            which the bound does not hold (not checked under jit).
        NotPathNetworkError: an operation has no paths.
        FloatingPointError: an output of the network is not finite.

    Source: along θ∘(1 − t (1 − m)) the derivative of f_k is at most Σ_p |x_s| |dv_p/dt|, and each |v_p| falls.

    Examples:
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [2.]])}
        >>> masks = {"a": jnp.array([[False, False]]), "b": jnp.array([[True], [True]])}
        >>> result = change_bound(net, w, jnp.array([[1.], [-1.]]), masks)
        >>> result.change.tolist(), result.bound.tolist()
        ([[3.0], [4.0]], [[7.0], [7.0]])
    """
    check_parameters(params)
    check_masks(masks, params)
    traced = any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((params, X, masks)))

    def evaluate(params: PyTree, X: PyTree) -> tuple[Network, tuple[Array, ...]]:
        network = read(apply_fn, params, X, paths=True)
        masked = apply_masks(params, masks)
        return network, _changed(network, masked, network.batch(X), masked_leaves(masks, params),
                                 changed=changed_leaves(masks), batch_size=batch_size)

    if traced:
        network, values = evaluate(params, X)
        fields = _compared(jnp, *values[:3])
        return ChangeBound(*(network.shaped(field, 1) for field in fields))
    with widest(apply_fn, (params, X)) as (params, X):
        network, values = evaluate(params, X)
    check_result(values[:2], "an output of the network", HOLDS)
    change, mantissa, exponent, steepest = map(np.asarray, values)
    if steepest > 1 + 1e-6:
        raise ValueError(f"an activation has a slope of {float(steepest):.4g}, but the bound holds where slopes lie "
                         "between -1 and 1: move the slope into a weight behind the activation")
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        fields = _compared(np, np.float64(change), np.float64(mantissa), exponent)
    return ChangeBound(*(np.reshape(field, (len(change), *network.outputs)) for field in fields))


@compiled_for_few_calls(static_argnames=("changed", "batch_size"))
def _changed(network: Network, masked: PyTree, X: Array, kept: Sequence[Array], *, changed: tuple[bool, ...],
             batch_size: int) -> tuple[Array, Array, Array, Array]:
    """For each example the change, the bound as mantissas and an exponent; and the steepest slope of an activation."""
    alive = [jnp.ones_like(mask) for mask in kept]

    def one(x: Array) -> tuple[Array, Array, Array, Array]:
        algebras = TrueValues(), TrueValues()
        before, after = (interpret(algebra, network.fn, params, x[None], lambda _, leaf: leaf, lambda z: z).value
                         for algebra, params in zip(algebras, (network.params, masked), strict=True))
        slopes = [jnp.abs(gate).max(initial=0).astype(before.dtype) for a in algebras for gate in a.recorded]
        bound, exponent = lost_paths(network, jnp.abs(x), 1, kept, alive, changed)
        return jnp.abs(before - after)[0], bound, exponent, jnp.stack([jnp.zeros((), before.dtype), *slopes]).max()

    change, bound, exponent, slopes = lax.map(one, X, batch_size=max(1, min(batch_size, len(X))))
    return change, bound, exponent, slopes.max()


def _compared(xp: Any, change: Any, mantissa: Any, exponent: Any) -> tuple[Any, Any, Any, Any]:
    """The fields of the result."""
    exponent = xp.where(mantissa > 0, exponent[:, None], 0)
    bound = xp.ldexp(mantissa, exponent)
    logarithm = xp.log10(mantissa) + exponent.astype(mantissa.dtype) * math.log10(2)
    safe = xp.where(mantissa > 0, mantissa, 1)
    return change, bound, logarithm, xp.where(mantissa > 0, xp.ldexp(change / safe, -exponent), 0)
