"""Frozen gates: the interpreter that lets whatever is not linear in the signal multiply paths.

A fourth kind of value, a ``Coefficient``, depends on the signal in a way that is not linear. It multiplies paths and is
none itself: the probabilities of attention, the scale of a normalisation, the gate of a gated unit. Four sentences
decide everything, and none knows a layer by name:

- an operation that no rule reads makes a coefficient, and so does an operation of coefficients, which is a signal
  where it is used as one, if its rule can read them as signals;
- a product of a coefficient and a signal is a path sum, on which the coefficient is a factor;
- of two signals multiplied, the one that came through more coefficients is the factor; where neither did, or each came
  through some that the other did not, their product is a coefficient that cannot become a signal;
- an elementwise function that is used as a signal is σ(z) = σ(0) + a z, whatever its formula, with a = (σ(z) − σ(0))/z
  the coefficient, at z = 0 the derivative, and σ(0) a constant that starts paths.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from pkjax.paths.activations import broadcast_to
from pkjax.paths.elementwise import COMPARISONS, CUSTOM, made
from pkjax.paths.errors import NotPathNetworkError
from pkjax.paths.interpreter import Interpreter, evaluate
from pkjax.paths.refusals import UNLIKE_SIGNALS
from pkjax.paths.secants import secant
from pkjax.paths.values import Coefficient, Const, Gate, PathSum, Value, joined, moves, passed_on
from pkjax.trees import is_floating

__all__ = ["FrozenInterpreter"]

PRODUCTS = ("mul", "dot_general", "conv_general_dilated", "div")
NONLINEAR = ("integer_pow", "square")
"""Operations that have a rule for parameters, and are not linear."""
MULTIPLES = ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "slice", "convert_element_type",
             "copy", "neg", "mul")
"""Operations that leave the entries of one operand as they are, or multiply them by constants."""


class UndecidedError(NotPathNetworkError):
    """Of two signals multiplied, either might be the gate."""


class FrozenInterpreter(Interpreter):
    """Walks jaxprs with the table of rules, and makes coefficients of what has none."""

    algebra: Any
    way_out = ""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.made = 0

    def equation(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """Interpret one operation; an algebra that replays a network evaluates it wherever no coefficient matters."""
        replay = getattr(self.algebra, "replay", None)
        if replay is None:
            return self.read(eqn, ins)
        used = self.algebra.used
        outs = self.read(eqn, ins)
        frozen = self.algebra.used != used or any(isinstance(v, Coefficient) for v in (*ins, *outs))
        known = all(isinstance(v, Const) for v in outs)
        return outs if frozen or known else replay(eqn, ins, outs)

    def read(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """Apply the operation's rule where it has one for such operands; else the result is a coefficient."""
        outs = self.ruled(eqn, ins)
        return [replace(v, made=how) if not isinstance(v, Const) and (how := made(eqn, ins, v)) is not None else v
                for v in outs]

    def ruled(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """The results of an operation."""
        name = eqn.primitive.name
        rule = self.rules.get(name)
        coefficients = [v for v in ins if isinstance(v, Coefficient)]
        undecided = [v for v in coefficients if v.weights is not None]
        if undecided and name in MULTIPLES and sum(not isinstance(v, Const) for v in ins) == 1:
            return [self.undecided(eqn, ins, undecided[0])]
        structural = getattr(rule, "structural", False)
        if undecided and name not in PRODUCTS and (name in CUSTOM or not (structural or rule is None)):
            signals = None
            with contextlib.suppress(NotPathNetworkError):
                signals = [self.lifted(v) if v in undecided else v for v in ins]
            if signals is not None:
                return self.equation(eqn, signals)
        if structural:
            return super().equation(eqn, ins)
        if not coefficients and name in COMPARISONS:
            return super().equation(eqn, ins)
        if not any(isinstance(v, PathSum) for v in ins):
            return self.evaluated(eqn, ins) if coefficients else [
                self.lifted(v) if _counts(v) else v for v in super().equation(eqn, ins)]
        self.operands, depth = ins, len(self.enclosing)
        try:
            if name in PRODUCTS:
                return self.product(eqn, ins)
            if coefficients and made(eqn, ins) is not None:
                return self.evaluated(eqn, ins)
            if any(not _real(c) for c in coefficients):      # a predicate, or an index
                chosen = [Const(self.frozen(v)) if isinstance(v, Coefficient) and not _real(v) else v
                          for v in ins]
                return self.read(eqn, chosen)
            if coefficients and not _real(eqn.outvars[0].aval):       # a comparison
                return self.evaluated(eqn, ins)
            if coefficients:
                return self.equation(eqn, self.signals(ins))
            return super().equation(eqn, ins)
        except NotPathNetworkError as error:
            del self.enclosing[depth:]
            return self.evaluated(eqn, ins, error)

    # -- products ----------------------------------------------------------------------------------------------------

    def product(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """Interpret a product or a quotient, at least one operand of which is a path sum."""
        a, b = ins
        if eqn.primitive.name == "div":
            return self.quotient(eqn, a, b)
        if isinstance(a, PathSum) and isinstance(b, PathSum) and moves(a) and moves(b):
            return self.of_signals(eqn, [a, b], [a, b])
        coefficient = next((v for v in ins if isinstance(v, Coefficient)), None)
        if coefficient is None:
            return super().equation(eqn, ins)
        if not moves(b if coefficient is a else a):        # with a parameter: it is the signal, where it can be
            if coefficient.readable and eqn.primitive.name == "mul":
                return [self.undecided(eqn, ins, coefficient)]
            try:
                signal = self.lifted(coefficient)
                return self.equation(eqn, [signal if v is coefficient else v for v in ins])
            except NotPathNetworkError as error:
                if not coefficient.settled or (coefficient.readable and isinstance(error, UndecidedError)):
                    raise
        return super().equation(eqn, [self.factor(v) if v is coefficient else v for v in ins])

    def of_signals(self, eqn: Any, ins: list[Any], sums: list[PathSum]) -> Sequence[Any]:
        """Multiply two values that are both signals: one is the factor, if it came through more coefficients."""
        a, b = sums
        if not (a.through < b.through or b.through < a.through):
            among = "both came through coefficients that the other did not" if a.through != b.through else (
                "neither is a gate")
            raise UndecidedError(str(self.error(
                f"'{eqn.primitive.name}' multiplies two signals of which {among}",
                "mark the one that is a gate with jax.lax.stop_gradient, or use the product in a nonlinear function")))
        gate = 0 if b.through < a.through else 1
        value = ins[gate]
        factor = self.factor(value) if isinstance(value, Coefficient) else self.factor_of(value)
        return super().equation(eqn, [factor, b] if gate == 0 else [a, factor])

    def undecided(self, eqn: Any, ins: list[Any], coefficient: Coefficient) -> Coefficient:
        """Multiply a coefficient by parameters, and leave open whether it is a factor on them or a signal."""
        (value,), aval = self.computed(eqn, ins), eqn.outvars[0].aval
        stack = list(self.enclosing)

        def read(part: Callable[[], PathSum]) -> Callable[[], PathSum]:
            def result() -> PathSum:
                with self.within(stack):
                    operand = part()
                    return self.lifted(self.equation(eqn, [operand if v is coefficient else v for v in ins])[0])
            return result
        return Coefficient(value, tuple(aval.shape), aval.dtype, joined(ins), coefficient.reason, coefficient.settled,
                           signal=read(lambda: self.lifted(coefficient)),
                           weights=read(lambda: self.factor(coefficient)))

    @contextlib.contextmanager
    def within(self, stack: list[Any]) -> Iterator[None]:
        """Interpret as if at another operation."""
        here, self.enclosing = self.enclosing, list(stack)
        try:
            yield
        finally:
            self.enclosing = here

    def quotient(self, eqn: Any, a: Any, b: Any) -> Sequence[Any]:
        """Divide a path sum by what is not constant: one over that is a factor."""
        if isinstance(b, Const | Gate):
            return super().equation(eqn, [a, b])
        shape = tuple(eqn.outvars[0].aval.shape)
        if not isinstance(a, PathSum):
            raise self.error("division by a signal or by a parameter")
        (below,) = self.exact([b])
        inverse = None if below is None else jnp.broadcast_to(1 / below, shape)
        factor = self.factor(Coefficient(inverse, shape, a.dtype, self.numbered([b]), NotPathNetworkError("1/x")))
        return [self.bilinear("mul", lax.mul, broadcast_to(self, a, shape), factor, like=eqn.outvars[0].aval)]

    def factor(self, coefficient: Coefficient) -> PathSum:
        """Let a coefficient multiply paths."""
        if coefficient.weights is not None:
            return coefficient.weights()
        return replace(PathSum(self.frozen(coefficient), coefficient.shape, coefficient.dtype, False),
                       through=coefficient.through)

    def factor_of(self, gate: PathSum) -> PathSum:
        """Let the true value of a path sum multiply paths."""
        (value,) = self.exact([gate])
        return self.factor(Coefficient(value, gate.shape, gate.dtype, gate.through, NotPathNetworkError("a gate")))

    def frozen(self, coefficient: Coefficient) -> Any:
        """What the algebra holds of a coefficient that it uses."""
        return self.algebra.coefficient(coefficient.value, coefficient.shape, coefficient.dtype)

    # -- coefficients ------------------------------------------------------------------------------------------------

    def numbered(self, ins: Sequence[Any]) -> frozenset[int]:
        """Number a new coefficient, and join the coefficients that its operands came through."""
        self.made += 1
        return joined(ins) | {self.made}

    def computed(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """The network's own results of an operation, None where the algebra does not know them."""
        values = self.exact(ins)
        return evaluate(eqn, values) if all(v is not None for v in values) else [None] * len(eqn.outvars)

    def evaluated(self, eqn: Any, ins: list[Any], error: NotPathNetworkError | None = None) -> list[Any]:
        """Make a coefficient of an operation's result."""
        name = eqn.primitive.name
        rule, how = self.rules.get(name), made(eqn, ins)
        coefficients = [v for v in ins if isinstance(v, Coefficient)]
        decisive = coefficients
        if name == "div" and not isinstance(ins[1], Const | Gate):      # linear in what stands above
            decisive = [v for v in ins[:1] if isinstance(v, Coefficient)]
            linear = bool(decisive)
        else:
            linear = rule is not None and name not in NONLINEAR
        bends = name in NONLINEAR or name in UNLIKE_SIGNALS
        settled = bends or (error is None and all(v.settled for v in decisive))
        several = any if name in PRODUCTS else all
        readable = linear and error is None and several(v.readable for v in decisive)
        reason = error or next((v.reason for v in coefficients if not v.readable), None) or self.error(
            f"the operation '{name}' has no paths")
        stack = list(self.enclosing)
        whole: list[Sequence[Any]] = []      # all results as signals

        def signal(i: int) -> Callable[[], PathSum]:
            def result() -> PathSum:
                with self.within(stack):
                    if not whole:
                        whole.append(self.multiplied(eqn, ins) if name in PRODUCTS else
                                     self.equation(eqn, self.signals(ins)))
                    return self.lifted(whole[0][i])
            return result

        through = joined(ins) if linear and error is None else self.numbered(ins)
        return [Coefficient(value, tuple(out.aval.shape), out.aval.dtype, through, reason, settled, made=how,
                            signal=signal(i) if readable and how is None else None)
                for i, (value, out) in enumerate(zip(self.computed(eqn, ins), eqn.outvars, strict=True))]

    def multiplied(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """Read a product of coefficients as a signal: of one that can be a signal, or of two as of other signals."""
        sums = list(ins)
        for i, v in enumerate(ins):
            if isinstance(v, Coefficient) and v.readable and not (i and eqn.primitive.name == "div"):
                try:
                    sums[i] = self.lifted(v)
                except UndecidedError:
                    raise
                except NotPathNetworkError:
                    continue        # a function that is infinite at 0
        if not any(isinstance(v, PathSum) for v in sums):
            raise next(v.reason for v in ins if isinstance(v, Coefficient))
        if all(isinstance(v, PathSum) and moves(v) for v in sums):
            return self.of_signals(eqn, ins, sums)
        return self.equation(eqn, sums)

    # -- what the rules see ------------------------------------------------------------------------------------------

    def exact(self, values: Sequence[Any]) -> list[Any]:
        """The network's own values of operands, at any size; None where the algebra does not know them."""
        exact = getattr(self.algebra, "exact_value", self.algebra.true_value)
        return [exact(v) if isinstance(v, PathSum) else v.value for v in values]

    def lifted(self, value: Any) -> PathSum:
        """Let a value join a path; a coefficient does so as a signal."""
        if not isinstance(value, Coefficient):
            return super().lifted(value)
        if not value.signals:
            if not value.readable:
                raise value.reason
            value.signals.append(secant(self, value) if value.signal is None else value.signal())
        return value.signals[0]

    def signals(self, values: Sequence[Any]) -> list[Any]:
        """Operands with every coefficient as a signal."""
        return [self.lifted(v) if isinstance(v, Coefficient) else v for v in values]

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[Value], **options: Any) -> PathSum:
        """Apply an operation that is jointly linear in all its operands."""
        sums = [self.lifted(v) for v in operands]
        return passed_on(super().linear(op, fn, sums, **options), sums)

    def bilinear(self, op: str, fn: Callable[..., Any], a: Value, b: Value, **options: Any) -> PathSum:
        """Apply an operation that is linear in each of two operands."""
        sums = [self.lifted(a), self.lifted(b)]
        return passed_on(super().bilinear(op, fn, *sums, **options), sums)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> PathSum:
        """Multiply a path sum entrywise by a gate of its shape."""
        return passed_on(super().gated(operand, gate), [operand])


def _counts(value: Any) -> bool:
    """Whether a value is numbers that the network makes of an integer input, and so a signal."""
    return isinstance(value, Const) and value.of_input and is_floating(value.value)


def _real(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
