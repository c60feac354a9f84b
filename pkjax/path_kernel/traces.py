"""Traces of the path kernel and of its gated parts as mantissas and exponents, in range at any depth.

With φ = θ² the trace is a derivative of the path polynomial along what trains, t ∈ {0, 1}^m:

    Tr Π = d/dε R_2(φ + ε t),   and over parameters that may lie twice on a path also Σ_j φ_j ∂²R_2/∂φ_j²

So the polynomial is evaluated on truncated power series in ε. Each of their coefficients is a scaled array with its own
exponent, and all terms are positive: nothing overflows, and nothing vanishes beside what does not belong to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pkjax.network import Network
from pkjax.path_kernel.gram import floating_leaves, make_problem
from pkjax.paths.evaluation import evaluate_paths, unit_weights
from pkjax.paths.exponents import (
    NOTHING,
    Scaled,
    Scaling,
    added,
    beyond,
    log_of,
    nothing,
    plain,
    raised,
)
from pkjax.paths.interpreter import PathSum
from pkjax.paths.magnitudes import Magnitudes, magnitudes
from pkjax.paths.polynomial import checked_gates, network_tied
from pkjax.paths.scaled import ScaledPolynomial
from pkjax.programs.checks import HOLDS, REMEDY, check_result
from pkjax.programs.compilation import compiled_for_few_calls
from pkjax.trees import is_floating

__all__ = ["Number", "check_range", "check_size", "gated_measured", "measured", "trace_number"]

Series = tuple[Scaled | None, ...]
"""Coefficients of 1, ε, ε² …; None where one is 0 whatever the numbers."""


class Number(NamedTuple):
    """A number mantissa · 2^exponent, of which the mantissa lies between 1 and 2, or is 0."""

    mantissa: Array
    exponent: Array

    @property
    def value(self) -> Array:
        """The number in its type: infinity or 0 where it is outside of that type's range."""
        return plain(self.mantissa, self.exponent)


class SeriesPolynomial(ScaledPolynomial):
    """The path polynomial on truncated power series."""

    def __init__(self, gates: Sequence[Any] | None, natural_max: bool, scaling: Scaling):
        super().__init__(2, gates, natural_max, scaling)

    def lift(self, constant: Any) -> Any:
        """Return |c|²."""
        return (super().lift(constant),)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply the operation, coefficient by coefficient."""
        orders = range(max(len(s.value) for s in operands))

        def of_order(n: int) -> Scaled | None:
            terms = [s.value[n] if n < len(s.value) else None for s in operands]
            if all(t is None for t in terms):
                return None
            return self.scaling.combined(op, fn, [_zero(s) if t is None else t
                                                for s, t in zip(operands, terms, strict=True)])

        return tuple(map(of_order, orders))

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Multiply the two series, up to the degree of the longer one."""
        degree = max(len(a.value), len(b.value)) - 1

        def of_order(n: int) -> Scaled | None:
            pairs = [(x, y) for i, x in enumerate(a.value) for j, y in enumerate(b.value)
                     if i + j == n and x is not None and y is not None]
            if len(pairs) < 2:
                return self.scaling.multiplied(op, fn, *pairs[0]) if pairs else None
            products = [self.scaling.multiplied(op, fn, x, y) for x, y in pairs] if self.scaling.enough else [
                # All are brought to the largest exponent that they may have, and their sum to its own.
                Scaled(fn(x.mantissa, y.mantissa), x.exponent + y.exponent, 1.0) for x, y in pairs]
            whole = self.scaling.combined("add", lambda *vs: sum(vs[1:], vs[0]), products)
            return whole if self.scaling.enough else self.scaling.back(whole)

        return tuple(map(of_order, range(degree + 1)))

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Multiply every coefficient by the next of the given gates."""
        used, coefficients = self.used, []
        for held in operand.value if any(v is not None for v in operand.value) else (_zero(operand),):
            if held is not None:
                self.used = used
                held = super().gated(replace(operand, value=held), gate)
            coefficients.append(held)
        return tuple(coefficients)

    def coefficient(self, value: None, shape: tuple[int, ...], dtype: Any) -> Any:
        """Hold the next of the given gates."""
        held = super().coefficient(value, shape, dtype)
        return (held,) if isinstance(held, Scaled) else held


def _zero(like: PathSum) -> Scaled:
    return Scaled(jnp.zeros(like.shape, like.dtype), NOTHING, 1.0)


def trace_number(network: Network, z: Array) -> Number:
    """Tr Π of a network that has been read, with start values z."""
    return _trace(network, z, magnitudes(network, z, 2).careful)[0]


@compiled_for_few_calls(static_argnames=("known", "batch_size", "frozen"))
def _gated(network: Network, X: Array, known: Magnitudes, batch_size: int, frozen: bool
           ) -> tuple[tuple[Number, Array], Array]:
    def trace_over(examples: Array) -> tuple[Number, Array]:
        settled = known.settled(network)
        _, gates, sure = checked_gates(settled, examples, known, frozen)
        # An index or a boolean chooses; it does not multiply.
        number, too = _trace(network, examples, known, tuple(g**2 if is_floating(g) else g for g in gates), frozen)
        return number, sure & too

    size = max(1, min(batch_size, len(X)))
    whole = len(X) - len(X) % size
    parts, sure = jax.lax.map(trace_over, X[:whole].reshape(-1, size, *X.shape[1:]))
    if whole < len(X):
        parts, sure = jax.tree.map(lambda many, one: jnp.append(many, one[None]), (parts, sure), trace_over(X[whole:]))
    number = Number(*added(*parts))
    return (number, number.value), sure.all()


def _trace(network: Network, x: Array, known: Magnitudes, gates: Sequence[Array] | None = None,
           frozen: bool = False) -> tuple[Number, Array]:
    """The trace, and whether it is sure; with the gates of x the gated one, of which x is taken by its square."""
    units = jax.tree.leaves(unit_weights(network.params))       # not ones that the compiler knows of
    network = known.settled(network)
    leaves = jax.tree.leaves(network.params)
    phi = [known.held(i, leaf, 2, apart=True) if is_floating(leaf) else None for i, leaf in enumerate(leaves)]

    def signal(value: Array) -> Series:
        if gates is None:
            return (known.input(value),)
        return (known.input(value).squared if known.lean else raised(value, 2),)

    def coefficient(order: int, directions: Sequence[Array | None], lean: bool) -> tuple[Number, Array]:
        """Sum over examples and outputs of the coefficient of ε^order of R_2(φ + ε · directions)."""
        scalings: list[Scaling] = []

        def make(gates: Sequence[Any] | None, natural: bool) -> SeriesPolynomial:
            scalings.append((known if lean else known.careful).scaling(True, x.dtype))
            return SeriesPolynomial(gates, natural, scalings[-1])

        def source(i: int, leaf: Any) -> Series:
            at, along = phi[i], directions[i]
            return (None if at is None or nothing(at) else at, None if along is None else Scaled(along, 0, 0.0),
                    *(None,) * (order - 1))

        def release(series: Series) -> tuple[Number, Array]:
            held = series[order] if order < len(series) else None
            if held is None:
                return Number(jnp.zeros(network.size, network.fn.out.dtype), jnp.asarray(NOTHING)), jnp.asarray(True)
            held = scalings[-1].back(held)
            return (Number(held.mantissa[0], jnp.asarray(held.exponent, jnp.int32)),
                    scalings[-1].sure() if lean else jnp.asarray(True))

        each, sure = evaluate_paths(make, network, x, gates, "sum", signal, release, source)
        return Number(*added(each.mantissa.sum(1), each.exponent)), sure.all()

    train = [None if entries is None or not is_floating(leaf) else
             jnp.where(entries, unit, 0).astype(leaf.dtype)
             for entries, leaf, unit in zip(network.entries, leaves, units, strict=True)]
    whole, sure = coefficient(1, train, known.lean)
    parts = [whole]
    for n, (twice, along) in enumerate(zip(network_tied(network, frozen), train, strict=True)):
        if twice and along is not None and along.size:
            def curvature(j: Array, n: int = n, along: Array = along) -> Number:
                unit = jnp.zeros_like(along).ravel().at[j].set(along.ravel()[j]).reshape(along.shape)
                second, _ = coefficient(2, [unit if i == n else None for i in range(len(leaves))], False)
                at = phi[n]
                assert at is not None
                return Number(2 * second.mantissa * at.mantissa.ravel()[j].astype(second.mantissa.dtype),
                              second.exponent + (0 if nothing(at) else at.exponent))
            parts.append(Number(*added(*jax.lax.map(curvature, jnp.arange(along.size), batch_size=64))))
    dtype = jnp.result_type(*floating_leaves(network))
    mantissa, exponent = added(*(jnp.stack(each) for each in zip(*parts, strict=True)))
    return Number(mantissa.astype(dtype), exponent), sure


@compiled_for_few_calls(static_argnames="known")
def _measured(network: Network, z: Array, known: Magnitudes) -> tuple[Any, Array]:
    number, sure = _trace(network, z, known)
    return (number, number.value, log_of(*number)), sure


@compiled_for_few_calls(static_argnames="known")
def _compared(network: Network, z: Array, known: Magnitudes) -> tuple[Any, Array]:
    """Tr Π, and that part of it which comes from a gradient in the parameters' type."""
    problem = make_problem(network, z)
    slopes = jax.grad(problem.objective)([leaf**2 for leaf in problem.leaves])
    number, sure = _trace(network, z, known)
    dtype = number.mantissa.dtype
    parts = [jnp.where(t, g, 0).sum().astype(dtype) for t, g in zip(problem.train, slopes, strict=True)]
    return (number, number.value, sum(parts, jnp.zeros((), dtype))), sure


def _surely(fn: Callable[..., tuple[Any, Array]], network: Network, z: Array, **options: Any) -> Any:
    """Evaluate by the small program, and by that in which every mantissa is brought back where it is not sure."""
    known = magnitudes(network, z, 2)
    result, sure = fn(network, z, known, **options)
    return result if not known.lean or bool(sure) else fn(network, z, known.careful, **options)[0]


def measured(network: Network, z: Array) -> tuple[Number, Array, Array]:
    """Tr Π as mantissa and exponent, as a plain number, and its natural logarithm."""
    number, value, logarithm = _surely(_measured, network, z)
    return Number(*number), value, logarithm


def gated_measured(network: Network, X: Array, batch_size: int = 16, frozen: bool = False) -> tuple[Number, Array]:
    """The gated path trace as mantissa and exponent and as a plain number; ``batch_size`` examples at a time."""
    number, value = _surely(_gated, network, X, batch_size=batch_size, frozen=frozen)
    return Number(*number), value


def check_size(network: Network, z: Array) -> Number | None:
    """Raise FloatingPointError where products with G are outside of their type's range; else return Tr Π.

    They are where Tr Π is, or where numbers on the way to it overflow or vanish. Traced networks pass, with None.
    """
    if any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((network, z))):
        return None
    number, value, plainly = _surely(_compared, network, z)
    number = Number(*number)
    check_range(number, value.dtype, "Tr Π")
    if not float(value) / 100 <= float(plainly) < np.inf:      # a part alone, where weights are tied
        raise FloatingPointError(f"numbers on the way to Π are outside of what {value.dtype} holds: {REMEDY}")
    return number


def check_range(number: Number, dtype: Any, what: str) -> None:
    """Raise FloatingPointError where a number is outside of the normal numbers of a type (traced ones pass)."""
    check_result(number.mantissa, what, HOLDS)
    decades = beyond(number.mantissa, number.exponent, dtype)
    if decades is not None:
        raise FloatingPointError(
            f"{what} is 10^{decades:.4g}, {'above' if decades > 0 else 'below'} what {jnp.dtype(dtype)} holds: "
            f"{REMEDY}; path_kernel.trace with log=True gives the logarithm of Tr Π at any size")
