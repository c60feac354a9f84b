"""Path polynomials at powers of θ, in the three conventions that exist for a frozen BatchNorm's mean.

A frozen BatchNorm maps x to (x − μ) c γ + β with c = 1/√(σ² + ε), and γ and β train. What of it starts paths:

- "paths": the mean and β each start one, of values |μ c γ| and |β|, as every constant and every parameter does;
- "folded": both are one bias of value |β − μ c γ|, as if BatchNorm had been folded into the layer before it;
- "signed": the mean is subtracted, and activations act on what that leaves: the network itself at |θ|.

Where the mean is 0, as at initialisation, all three agree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pkjax.network import Network
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.exponents import KEPT, NOTHING, Scaled, Scaling, normalized, nothing, shifted
from pkjax.paths.interpreter import PathSum
from pkjax.paths.magnitudes import Magnitudes
from pkjax.paths.scaled import ScaledPolynomial, Values, held_as_is, scaled_values
from pkjax.paths.scaled_signals import ScaledSignals
from pkjax.trees import is_floating

__all__ = ["CONVENTIONS", "FoldedPolynomial", "SignedPolynomial", "check_convention", "power_values"]

CONVENTIONS = ("paths", "folded", "signed")
"""The names of the conventions."""
SIGNED: dict[str, Callable[..., Any]] = {"sub": lax.sub, "neg": lax.neg}
"""Operations of which the path polynomial drops the sign."""


class Folding(NamedTuple):
    """Paths, and what has been added to them since, with its sign."""

    paths: Scaled | None
    """The polynomial of a signal; None of what the network computes of parameters and constants alone."""
    shift: Scaled | None = None
    """What starts paths where it is settled: the value of such a thing, or what a signal was shifted by."""


class FoldedPolynomial(ScaledPolynomial):
    """The path polynomial at |θ|^q of the network whose constant shifts are folded into the biases behind them.

    A constant that is added to a signal waits, with its sign and through scales, for the parameter that is added next,
    and joins the paths with it. So does what parameters and constants make of each other before they meet a signal.
    """

    def lift(self, constant: Any) -> Any:
        """Hold the constant itself."""
        return Folding(None, held_as_is(jnp.asarray(constant), self.scaling.skip_zeros))

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply the operation; a shift of a signal waits where it may be folded."""
        held = [self._met(s) for s in operands]
        signals = [h.paths is not None for h in held]
        signed = SIGNED.get(op, fn)
        if not any(signals) and not getattr(fn, "of_input", False):
            return Folding(None, self.scaling.combined(op, signed, [h.shift for h in held if h.shift is not None]))
        if op in ("add", "sub", "add_any") and len(held) == 2 and sum(signals) == 1:
            paths = held[signals.index(True)].paths
            shifts = [Scaled(jnp.zeros(s.shape, s.dtype), NOTHING, 0.0) if h.shift is None else h.shift
                      for s, h in zip(operands, held, strict=True)]
            shifted_paths = Folding(paths, self.scaling.combined(op, signed, shifts))
            # A constant waits for what trains.
            trains = operands[signals.index(False)].degree
            return Folding(self.settled(shifted_paths)) if trains else shifted_paths
        if op in KEPT and held[0].paths is not None and held[0].shift is not None:
            return Folding(self.scaling.combined(op, fn, [held[0].paths]),
                           self.scaling.combined(op, signed, [held[0].shift]))
        return Folding(self.scaling.combined(op, fn, [self.settled(h) for h in held]))

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Multiply; a shift that waits is scaled with its signal."""
        x, y = self._met(a), self._met(b)
        signals = sum(h.paths is not None for h in (x, y))
        if x.shift is None or y.shift is None or signals == 2 or (signals == 1 and op != "mul"):
            return Folding(self.scaling.multiplied(op, fn, self.settled(x), self.settled(y)))
        shift = self.scaling.multiplied(op, fn, x.shift, y.shift)
        if signals == 0:
            return Folding(None, shift)
        paths = [self._raised(h.shift) if h.paths is None else h.paths for h in (x, y) if h.shift is not None]
        return Folding(self.scaling.multiplied(op, fn, *paths), shift)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Open the gate."""
        return Folding(super().gated(replace(operand, value=self.settled(operand.value)), gate))

    def settled(self, held: Folding) -> Scaled:
        """The paths of a value, with those that start at a shift that waits."""
        terms = [t for t in (held.paths, None if held.shift is None else self._raised(held.shift)) if t is not None]
        return terms[0] if len(terms) == 1 else self.scaling.combined("add", lax.add, terms)

    def _met(self, operand: PathSum) -> Folding:
        """What an operand holds; constants that depend on an integer input are a signal."""
        held: Folding = operand.value
        return Folding(self.settled(held)) if operand.of_input and held.paths is None else held

    def _raised(self, held: Scaled) -> Scaled:
        """|value|^q."""
        if nothing(held) or not jnp.issubdtype(held.mantissa.dtype, jnp.floating):
            return held._replace(mantissa=jnp.abs(held.mantissa))
        base = self.scaling.back(held)
        exponent = jnp.where(base.exponent == NOTHING, NOTHING, self.q * base.exponent)
        return Scaled(jnp.abs(base.mantissa) ** self.q, exponent, float(self.q))


class SignedPolynomial(ScaledSignals):
    """The network itself in scaled values, with every fixed constant c replaced by sign(c) |c|^q."""

    gates = None

    def __init__(self, q: int):
        super().__init__()
        self.q = q

    def lift(self, constant: Any) -> Scaled:
        """Return sign(c) |c|^q."""
        held: Scaled = super().lift(constant)
        if self.q == 1 or not jnp.issubdtype(held.mantissa.dtype, jnp.floating):
            return held
        exponent = jnp.where(held.exponent == NOTHING, NOTHING, self.q * held.exponent)
        return Scaled(jnp.sign(held.mantissa) * jnp.abs(held.mantissa) ** self.q, exponent)


def check_convention(batch_norm: str, pool: str) -> None:
    """Raise ValueError unless a convention exists and knows such pooling."""
    if batch_norm not in CONVENTIONS:
        raise ValueError(f"batch_norm must be one of {', '.join(map(repr, CONVENTIONS))}, but got {batch_norm!r}")
    if batch_norm == "signed" and pool != "max":
        raise ValueError('batch_norm="signed" evaluates the network itself at |θ|, whose max-pools stay: pass '
                         'pool="max"')


def power_values(network: Network, x: Array, q: int, batch_norm: str, pool: str, known: Magnitudes,
                 parameters: Mapping[int, Scaled] | None = None) -> Values:
    """R_q(|θ|^q, x) for each output.

    Derivatives of the mantissa in the parameters θ are those of the polynomial over 2^exponent. With "folded" and
    "signed" the ``parameters`` may be given by the index of their leaves, normalized, in whose mantissas to derive.
    """
    if batch_norm == "paths":
        network = known.settled(network)
        held = {i: known.held(i, leaf, q, apart=True) for i, leaf in enumerate(jax.tree.leaves(network.params))
                if is_floating(leaf)}
        return scaled_values(network, x, q, None, pool, True, held, known=known)

    def hold(value: Any) -> Any:
        held = held_as_is(value, True)
        return Folding(held) if batch_norm == "folded" else held

    def source(i: int, leaf: Any) -> Any:
        base = normalized(Scaled(leaf, 0), True) if parameters is None or i not in parameters else parameters[i]
        if batch_norm == "folded":
            return Folding(None, base)
        return Scaled(jnp.abs(base.mantissa) ** q, jnp.maximum(base.exponent * q, NOTHING), float(q))

    algebras: list[Any] = []

    def make(gates: None, natural: bool) -> Any:
        algebras.append(FoldedPolynomial(q, gates, natural, Scaling(True)) if batch_norm == "folded"
                        else SignedPolynomial(q))
        return algebras[-1]

    def release(out: Any) -> tuple[Array, Array]:
        held = normalized(algebras[-1].settled(out) if batch_norm == "folded" else out, True)
        return held.mantissa[0], jnp.asarray(held.exponent, jnp.int32)

    mantissa, exponents = evaluate_paths(make, network, x, None, pool, hold, release, source)
    top = exponents.max()
    return Values(shifted(mantissa, (exponents - top)[:, None]), top, jnp.asarray(True))
