"""The path polynomial as a mantissa and a power of two, which leaves the range of its type at no depth."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from pkjax.network import Network, own_types, read
from pkjax.paths.algebras import Polynomial
from pkjax.paths.evaluation import evaluate_paths, unit_weights
from pkjax.paths.exponents import NOTHING, Scaled, Scaling, nothing, shifted
from pkjax.paths.frozen import with_gates
from pkjax.paths.interpreter import PathSum
from pkjax.paths.magnitudes import Magnitudes
from pkjax.programs.checks import HOLDS, check_parameters, check_result
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram
from pkjax.trees import ApplyFn, is_floating

__all__ = ["ScaledPolynomial", "Values", "held_as_is", "log_count", "path_total", "scaled_polynomial",
           "scaled_values", "widest"]


class Values(NamedTuple):
    """A batch's values over a power of two, whose largest entry lies between 1 and 2, or all of which are 0."""

    mantissa: Float[Array, "N ..."]
    exponent: Int[Array, ""]
    sure: Array
    """Whether every mantissa on the way had the size that was expected of it."""


class ScaledPolynomial(Polynomial):
    """The path polynomial in scaled values. Parameters and input come in as they are, with exponent 0.

    ``q`` may be an array, one of the exponents 0 to 4 for each network of a batch under ``vmap``; with ``sources``, a
    factor on all that joins the signal elsewhere than at the input, so that 0 leaves the paths from the input alone.
    """

    def __init__(self, q: Any, gates: Sequence[Any] | None, natural_max: bool, scaling: Scaling,
                 sources: Array | None = None):
        super().__init__(q, gates, natural_max)
        self.scaling, self.sources = scaling, sources

    def lift(self, constant: Any) -> Scaled:
        """Return |c|^q."""
        assert self.q is not None
        q = self.q
        held = held_as_is(jnp.asarray(constant), self.scaling.skip_zeros)
        if nothing(held) or not jnp.issubdtype(held.mantissa.dtype, jnp.floating):
            return held
        if self.scaling.enough:
            return self.scaling.constant(held.mantissa, self.power(held.mantissa), q if isinstance(q, int) else 4)
        if isinstance(q, int) and q < 2:
            return held._replace(mantissa=self.power(held.mantissa))
        base = self.scaling.back(held)
        exponent = jnp.where(base.exponent == NOTHING, NOTHING, q * base.exponent)
        return Scaled(self.power(base.mantissa), exponent, float(q) if isinstance(q, int) else 4.0)

    def power(self, constant: Array) -> Array:
        """|c|^q."""
        if isinstance(self.q, int):
            return super().lift(constant)
        return jnp.where(constant == 0, 0, jnp.abs(constant) ** self.q.astype(constant.dtype))

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Scaled:
        """Apply the operation to operands of one exponent."""
        terms = [s.value for s in operands]
        if self.sources is not None and any(s.on_input for s in operands):
            terms = [t if s.on_input else t._replace(mantissa=t.mantissa * self.sources.astype(t.mantissa.dtype))
                     for s, t in zip(operands, terms, strict=True)]
        return self.scaling.combined(op, fn, terms)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Scaled:
        """Apply the operation to the mantissas and add the exponents."""
        return self.scaling.multiplied(op, fn, a.value, b.value)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Scaled:
        """Multiply by the next of the given gates."""
        held: Scaled = operand.value
        opened = held._replace(mantissa=self.opened(held.mantissa, operand.shape))
        return held if self.gates is None else self.scaling.kept(opened, held.growth)

    def coefficient(self, value: None, shape: tuple[int, ...], dtype: Any) -> Any:
        """Hold the next of the given gates."""
        given = super().coefficient(value, shape, dtype)
        return self.scaling.back(Scaled(given, 0)) if jnp.issubdtype(dtype, jnp.floating) else given


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
    mantissa, exponent, _ = scaled_values(network, z, int(q), gates, pool, skip_zeros)
    check_result(mantissa, "R_q", HOLDS)
    vanished = not skip_zeros and not isinstance(mantissa, jax.core.Tracer) and not bool(mantissa.any())
    if vanished and bool(scaled_values(network, z, int(q), gates, pool, True)[0].any()):
        raise FloatingPointError("R_q vanishes beside arrays of zeros, such as biases, whose derivatives it keeps: "
                                 "pass skip_zeros=True for its value")
    return network.shaped(mantissa, 1), exponent


def scaled_values(network: Network, x: Array, q: Any, gates: Sequence[Any] | None = None, pool: str = "sum",
                  skip_zeros: bool = False, held: Mapping[int, Scaled] | None = None, sources: Array | None = None,
                  known: Magnitudes | None = None) -> Values:
    """The scaled polynomial of a batch that the network took in.

    Args:
        network: the network, whose parameters are φ.
        x: the batch.
        q: exponent of the fixed constants, or an array as in ``ScaledPolynomial``.
        gates: factors on the path sums, as in ``polynomial``.
        pool: "sum" or "max", as in ``polynomial``.
        skip_zeros: let arrays of nothing but zeros have no say in the exponent of a sum.
        held: φ by the index of its leaf, where it may leave the range of its type; the network's own parameters by
            default.
        sources: a factor on the paths that start elsewhere than at the input.
        known: what is known of the network's arrays, the zeros among which are ``settled``.
    """
    scalings: list[Scaling] = []

    def make(gates: Sequence[Any] | None, natural: bool) -> ScaledPolynomial:
        scalings.append(Scaling(skip_zeros) if known is None else known.scaling(skip_zeros, x.dtype))
        return ScaledPolynomial(q, gates, natural, scalings[-1], sources)

    def release(out: Scaled) -> Values:
        out = scalings[-1].back(out)
        sure = scalings[-1].sure() if scalings[-1].enough else jnp.asarray(True)
        return Values(out.mantissa[0], jnp.asarray(out.exponent, jnp.int32), sure)

    hold = partial(held_as_is, skip_zeros=skip_zeros) if known is None else known.input
    mantissa, exponents, sure = evaluate_paths(make, network, x, gates, pool, hold, release,
                                               None if held is None else lambda i, _: held[i])
    top = exponents.max()
    if len(x) > 1:
        mantissa = shifted(mantissa, (exponents - top)[:, None])
    return Values(mantissa, top, sure.all())


def held_as_is(value: Any, skip_zeros: bool = False) -> Scaled:
    """Hold an array as it stands: its squares may leave the range of its type, it itself does not."""
    zero = skip_zeros and not isinstance(value, jax.core.Tracer) and not np.asarray(value).any()
    return Scaled(value, NOTHING, 1.0) if zero else Scaled(value, 0)


@automatic_axes
def log_count(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: PyTree | None = None,
              gates: str | None = None, reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None
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
      gates: "frozen" takes networks whose activations are not piecewise linear too (``pkjax.paths.frozen``): a path is
        one on which no coefficient is 0.
      reference: with "frozen", the input whose coefficients are taken; x by default.

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
    apply_fn = with_gates(apply_fn, params, x, gates, reference, masks)
    if any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((params, x, masks))):
        network = read(apply_fn, unit_weights(params), x, masks=masks, paths=True)
        count, exponent = path_total(network, network.batch(x, "x"))
        return jnp.log10(count) + exponent.astype(count.dtype) * jnp.log10(jnp.asarray(2, count.dtype))
    with widest(apply_fn, (params, x)) as (params, x):
        # Ones from NumPy: nothing is compiled for them, and as arguments no compiler knows of them.
        ones = jax.tree.map(lambda leaf: np.ones(np.shape(leaf), leaf.dtype) if is_floating(leaf) else leaf, params)
        network = read(apply_fn, ones, x, masks=masks, paths=True)
        number, power = map(float, _counted(network, network.batch(x, "x")))
    return jnp.asarray(np.log10(number) + power * np.log10(2) if number else -np.inf)


@contextlib.contextmanager
def widest(apply_fn: ApplyFn, tree: PyTree) -> Iterator[PyTree]:
    """Compute in float64 within the block, to which it brings the floating-point leaves of a concrete (params, x).

    A program that has been read says itself what types it takes, and so does a function that float64 numbers cannot go
    through.
    """
    double = not isinstance(apply_fn, BoundProgram)
    wide = double or jax.dtypes.canonicalize_dtype(float) == jnp.float64
    types = own_types(tree) if double else contextlib.nullcontext()
    with types, jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"):
        yield _in_double(tree) if double else tree


def _in_double(tree: PyTree) -> PyTree:
    """Floating-point leaves in float64, which must be enabled; the others as they are."""
    def wide(leaf: Any) -> Any:
        if not is_floating(leaf):
            return leaf
        # NumPy casts without compiling anything.
        return jnp.asarray(leaf if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf, np.float64), jnp.float64)

    return jax.tree.map(wide, tree)


def path_total(network: Network, x: Array) -> tuple[Array, Array]:
    """R_0 of a network with unit weights, as a mantissa and its power of two."""
    mantissa, exponent, _ = scaled_values(network, jnp.where(x == 0, jnp.zeros_like(x), jnp.ones_like(x)), 0,
                                          skip_zeros=True)
    return mantissa.sum(), exponent


_counted = jax.jit(path_total)


