"""The path polynomial as a mantissa and a power of two, which leaves the range of its type at no depth.

Every value on the way is held as m · 2^e, with an array m whose largest entry lies between 1 and 2 and one exponent e.
Sums bring their terms to the largest of their exponents; everything else multiplies mantissas and adds exponents.
Multiplying by a power of two rounds nothing. Exponents are constants to differentiation, so that derivatives of the
mantissa are those of the polynomial, over 2^e.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.algebras import Polynomial
from pkjax.paths.interpreter import PathSum
from pkjax.paths.polynomial import evaluate_paths, unit_weights
from pkjax.programs.checks import check_parameters
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram
from pkjax.trees import ApplyFn, is_floating

__all__ = ["NOTHING", "Scaled", "exponent_of", "log_count", "normalized", "power_of_two", "scaled_polynomial",
           "shifted"]

class Scaled(NamedTuple):
    """m · 2^e. ``growth`` bounds log2 of m's largest entry, which is 1 or more; NaN where neither is known."""

    mantissa: Array
    exponent: Array
    growth: float = math.nan


NOTHING = -(1 << 24)  # the exponent of zero: below any other, so that sums pass over it
ENOUGH = 40.0  # the growth at which a mantissa is brought back
REARRANGED = frozenset(("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "copy", "neg"))
SUMMED = frozenset(("add", "add_any", "sub", "concatenate"))


class ScaledPolynomial(Polynomial):
    """The path polynomial in scaled values. Parameters and input come in as they are, with exponent 0."""

    def __init__(self, q: int, gates: Sequence[Any] | None, natural_max: bool, skip_zeros: bool):
        super().__init__(q, gates, natural_max)
        self.normalized = partial(normalized, skip_zeros=skip_zeros)

    def lift(self, constant: Any) -> Scaled:
        """Return |c|^q."""
        assert self.q is not None
        base = self.normalized(Scaled(jnp.asarray(constant), jnp.zeros((), jnp.int32)))
        return self.normalized(Scaled(super().lift(base.mantissa), base.exponent * int(self.q)))

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Scaled:
        """Apply the operation to operands of one exponent."""
        if len(operands) == 1:
            held: Scaled = operands[0].value
            out = held._replace(mantissa=fn(held.mantissa))
            return out if op in REARRANGED else self.normalized(out)
        terms = [self.normalized(s.value) if math.isnan(s.value.growth) else s.value for s in operands]
        mantissas, top = _aligned([t.mantissa for t in terms], [t.exponent for t in terms])
        joined = fn(*mantissas)
        growth = max(t.growth for t in terms) + math.log2(len(terms))
        out = Scaled(joined, top, growth)
        return out if op in SUMMED and growth <= ENOUGH else self.normalized(out)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Scaled:
        """Apply the operation to the mantissas and add the exponents."""
        x, y = a.value, b.value
        return self.normalized(Scaled(fn(x.mantissa, y.mantissa), x.exponent + y.exponent))

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Scaled:
        """Multiply by the next of the given gates."""
        held: Scaled = operand.value
        opened = held._replace(mantissa=self.opened(held.mantissa, operand.shape))
        return held if self.gates is None else self.normalized(opened)


@automatic_axes
def scaled_polynomial(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, q: float | int,
                      gates: Sequence[Shaped[ArrayLike, "..."]] | None = None, pool: str = "sum",
                      masks: PyTree | None = None, skip_zeros: bool = False
                      ) -> tuple[Float[Array, "N ..."], Int[Array, ""]]:
    """Evaluate ``polynomial`` for networks of any depth: as a mantissa and the power of two that it is over.

        R_q(φ, z) = mantissa · 2^exponent

    Args:
        apply_fn: a network of linear maps and positively homogeneous activations.
        params: φ, exactly as it enters.
        x: z, of shape (N, *input).
        q: exponent of the fixed constants, a whole number of at least 0.
        gates: factors on the path sums, as in ``polynomial``.
        pool: "sum" or "max", as in ``polynomial``.
        masks: booleans like ``params``; a masked weight carries no path.
        skip_zeros: let arrays of nothing but zeros (biases, emptied layers) have no say in the exponent of a sum. For
            values, and for scores φ ∘ ∂R/∂φ, which are 0 there: the derivatives along such arrays are lost.

    Returns:
        (N, K), whose largest entry lies between 1 and 2 unless all are 0, and a whole number. The exponent is a
        constant to ``jax.grad`` and ``jax.jvp``: derivatives of the mantissa are those of the polynomial over
        2^exponent.

    Raises:
        NotPathNetworkError: an operation has no paths.
        ValueError: q is not a whole number of at least 0; otherwise as ``polynomial``.

    Source: Gebhart, Saxena and Schrater (2021), equations 15 and 16.

    Examples:
        >>> import math, jax.numpy as jnp
        >>> layers = [jnp.full((10, 10), 10.0)] * 60   # 10^60 paths of 10^60 each, from every input to every output
        >>> def net(w, x):
        ...     for kernel in w:
        ...         x = jnp.maximum(x @ kernel, 0.)
        ...     return x
        >>> mantissa, exponent = scaled_polynomial(net, layers, jnp.ones((1, 10)), q=1)
        >>> round(float(jnp.log10(mantissa[0, 0])) + int(exponent) * math.log10(2), 2)
        120.0
    """
    if q != int(q) or q < 0:
        raise ValueError(f"q must be a whole number of at least 0, but is {q}: see polynomial for others")
    network = read(apply_fn, params, x, masks=masks, paths=True)
    mantissa, exponent = scaled_values(network, network.batch(x, "x"), int(q), gates, pool, skip_zeros)
    return network.shaped(mantissa, 1), exponent


def scaled_values(network: Network, x: Array, q: int, gates: Sequence[Any] | None = None, pool: str = "sum",
                  skip_zeros: bool = False) -> tuple[Float[Array, "N ..."], Int[Array, ""]]:
    """The scaled polynomial of a batch that the network took in."""
    zero = jnp.zeros((), jnp.int32)
    mantissa, exponents = evaluate_paths(
        lambda gates, natural: ScaledPolynomial(q, gates, natural, skip_zeros), network, x, gates, pool,
        lambda value: Scaled(value, zero), lambda held: (held.mantissa[0], held.exponent))
    top = exponents.max()
    return normalized(Scaled(shifted(mantissa, (exponents - top)[:, None]) if len(x) > 1 else mantissa, top),
                      skip_zeros)[:2]


@automatic_axes
def log_count(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: PyTree | None = None
              ) -> Float[Array, ""]:
    """Count the live paths: log10 of R_0 with every weight 1, or 0 where masked (-inf when no path is left).

        log10 P,   P = Σ_k R_0(mask, x)_k

    A zero weight is a path, a masked one is not. Counted in float64 (in the type of x under jit, and for a
    network that has been read), however many.

    Args:
      apply_fn: the network.
      params: its parameters, finite numbers of which the shapes decide.
      x: (1, *input); zero entries start no path.
      masks: booleans like ``params``.

    Returns:
      A scalar, in decades.

    Raises:
      NotPathNetworkError: an operation has no paths.
      ValueError: masks that do not match or keep nothing; numbers that are not finite.

    Source: P of Gebhart, Saxena and Schrater (2021), section 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.ones((5, 4)), "b": jnp.ones((4, 5))}
        >>> float(log_count(net, w, jnp.ones((1, 5))))   # 5·4·5 paths
        2.0
    """
    check_parameters(params)
    if any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((params, x, masks))):
        network = read(apply_fn, unit_weights(params), x, masks=masks, paths=True)
        count, exponent = path_total(network, network.batch(x, "x"))
        return jnp.log10(count) + exponent.astype(count.dtype) * jnp.log10(jnp.asarray(2, count.dtype))
    double = not isinstance(apply_fn, BoundProgram)     # a program says what types it takes
    wide = double or jax.dtypes.canonicalize_dtype(float) == jnp.float64
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"):
        params, x = in_double((params, x)) if double else (params, x)
        network = read(apply_fn, unit_weights(params), x, masks=masks, paths=True)
        number, power = map(float, _counted(network, network.batch(x, "x")))
    return jnp.asarray(np.log10(number) + power * np.log10(2) if number else -np.inf)


def in_double(tree: PyTree) -> PyTree:
    """Floating-point leaves in float64, which must be enabled; the others as they are."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) if is_floating(leaf) else leaf, tree)


def path_total(network: Network, x: Array) -> tuple[Array, Array]:
    """R_0 of a network with unit weights, as a mantissa and its power of two."""
    mantissa, exponent = scaled_values(network, jnp.where(x == 0, jnp.zeros_like(x), jnp.ones_like(x)), 0,
                                       skip_zeros=True)
    return mantissa.sum(), exponent


_counted = jax.jit(path_total)


def normalized(held: Scaled, skip_zeros: bool) -> Scaled:
    """Bring the largest entry between 1 and 2, by a power of two (whole numbers stay as they are)."""
    if not jnp.issubdtype(held.mantissa.dtype, jnp.floating):
        return held._replace(growth=0.0)
    mantissa, exponent = _normalized(held.mantissa, held.exponent, skip_zeros)
    return Scaled(mantissa, exponent, 1.0)


@partial(jax.jit, static_argnames="skip_zeros")  # traced once a shape
def _normalized(value: Array, exponent: Array, skip_zeros: bool) -> tuple[Array, Array]:
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(value), initial=0))
    shift = exponent_of(peak)
    nothing = NOTHING if skip_zeros else exponent
    return value * power_of_two(-shift, value.dtype), jnp.where(peak > 0, exponent + shift, nothing)


def exponent_of(peak: Array) -> Array:
    """The e with 2^e ≤ peak < 2^(e+1) within the exponents of normal numbers, and 0 for 0."""
    whole, digits, bias = layout(peak.dtype)
    field = (jax.lax.bitcast_convert_type(peak, whole) >> digits).astype(jnp.int32)
    # Both this power of two and its inverse are normal numbers.
    return jnp.where(peak > 0, jnp.clip(field - bias, 1 - bias, bias - 1), 0)


def shifted(value: Array, by: Array) -> Array:
    """Multiply by 2^by, in two steps: the power itself may lie outside of the type's range."""
    half = by // 2
    return value * power_of_two(half, value.dtype) * power_of_two(by - half, value.dtype)


@jax.jit
def _aligned(mantissas: list[Array], exponents: list[Array]) -> tuple[list[Array], Array]:
    top = jnp.stack(exponents).max()
    return [m * power_of_two(e - top, m.dtype) for m, e in zip(mantissas, exponents, strict=True)], top


def power_of_two(exponent: Any, dtype: Any) -> Float[Array, "..."]:
    """2^exponent in a floating type, 0 below its normal numbers, infinity above: its bits, written down.

    Raises:
        ValueError: the type is not floating.

    Source: IEEE 754, section 3.4.

    Examples:
        >>> power_of_two(jnp.array([-3, 0, 2000]), jnp.float32).tolist()
        [0.125, 1.0, inf]
    """
    whole, digits, bias = layout(dtype)
    field = jnp.clip(jnp.asarray(exponent) + bias, 0, 2 * bias + 1).astype(whole)
    return jax.lax.bitcast_convert_type(field << digits, dtype)


def layout(dtype: Any) -> tuple[Any, Any, int]:
    """Integer type, length of the fraction and bias of the exponent of a floating type."""
    info = jnp.finfo(dtype)
    whole = jnp.dtype(f"int{info.bits}")
    return whole, whole.type(info.nmant), int(info.maxexp) - 1
