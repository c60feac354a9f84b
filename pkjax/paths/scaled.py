"""The path polynomial as a mantissa and a power of two, which leaves the range of its type at no depth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.algebras import Polynomial
from pkjax.paths.evaluation import evaluate_paths, unit_weights
from pkjax.paths.exponents import NOTHING, Scaled, combined, multiplied, normalized, shifted
from pkjax.paths.interpreter import PathSum
from pkjax.programs.checks import HOLDS, check_parameters, check_result
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram
from pkjax.trees import ApplyFn, is_floating

__all__ = ["ScaledPolynomial", "held_as_is", "in_double", "log_count", "path_total", "scaled_polynomial",
           "scaled_values"]


class ScaledPolynomial(Polynomial):
    """The path polynomial in scaled values. Parameters and input come in as they are, with exponent 0."""

    def __init__(self, q: int, gates: Sequence[Any] | None, natural_max: bool, skip_zeros: bool):
        super().__init__(q, gates, natural_max)
        self.skip_zeros = skip_zeros

    def lift(self, constant: Any) -> Scaled:
        """Return |c|^q."""
        assert self.q is not None
        base, q = normalized(held_as_is(jnp.asarray(constant)), self.skip_zeros), int(self.q)
        exponent = jnp.where(base.exponent == NOTHING, NOTHING, q * base.exponent)
        return Scaled(super().lift(base.mantissa), exponent, float(q))

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Scaled:
        """Apply the operation to operands of one exponent."""
        return combined(op, fn, [s.value for s in operands], self.skip_zeros)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Scaled:
        """Apply the operation to the mantissas and add the exponents."""
        return multiplied(fn, a.value, b.value, self.skip_zeros)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Scaled:
        """Multiply by the next of the given gates."""
        held: Scaled = operand.value
        opened = held._replace(mantissa=self.opened(held.mantissa, operand.shape))
        return held if self.gates is None else normalized(opened, self.skip_zeros)


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
        FloatingPointError: the network itself makes NaN or infinity.
        FloatingPointError: without ``skip_zeros`` all values vanish beside arrays of zeros (not checked under jit).

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
    z = network.batch(x, "x")
    mantissa, exponent = scaled_values(network, z, int(q), gates, pool, skip_zeros)
    check_result(mantissa, "R_q", HOLDS)
    vanished = not skip_zeros and not isinstance(mantissa, jax.core.Tracer) and not bool(mantissa.any())
    if vanished and bool(scaled_values(network, z, int(q), gates, pool, True)[0].any()):
        raise FloatingPointError("R_q vanishes beside arrays of zeros, such as biases, whose derivatives it keeps: "
                                 "pass skip_zeros=True for its value")
    return network.shaped(mantissa, 1), exponent


def scaled_values(network: Network, x: Array, q: int, gates: Sequence[Any] | None = None, pool: str = "sum",
                  skip_zeros: bool = False, held: Mapping[int, Scaled] | None = None
                  ) -> tuple[Float[Array, "N ..."], Int[Array, ""]]:
    """The scaled polynomial of a batch that the network took in.

    Args:
        network: the network, whose parameters are φ.
        x: the batch.
        q: exponent of the fixed constants.
        gates: factors on the path sums, as in ``polynomial``.
        pool: "sum" or "max", as in ``polynomial``.
        skip_zeros: let arrays of nothing but zeros have no say in the exponent of a sum.
        held: φ by the index of its leaf, where it may leave the range of its type; the network's own parameters by
            default.
    """
    mantissa, exponents = evaluate_paths(
        lambda gates, natural: ScaledPolynomial(q, gates, natural, skip_zeros), network, x, gates, pool, held_as_is,
        lambda out: (out.mantissa[0], out.exponent), None if held is None else lambda i, _: held[i])
    top = exponents.max()
    return normalized(Scaled(shifted(mantissa, (exponents - top)[:, None]) if len(x) > 1 else mantissa, top),
                      skip_zeros)[:2]


def held_as_is(value: Any) -> Scaled:
    """Hold an array as it stands: its squares may leave the range of its type, it itself does not."""
    return Scaled(value, jnp.zeros((), jnp.int32))


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


