"""Frozen gates: the interpreter that lets whatever is not linear in the signal multiply paths.

A fourth kind of value, a ``Coefficient``, depends on the signal in a way that is not linear. It multiplies paths and is
none itself: the probabilities of attention, the scale of a normalisation, the gate of a gated unit. Four sentences
decide everything, and none knows a layer by name:

- an operation that no rule reads makes a coefficient, and so does an operation of coefficients;
- a product of a coefficient and a signal is a path sum, on which the coefficient is a factor;
- of two signals multiplied, the one that came through more coefficients is the factor; where neither did, or each came
  through some that the other did not, their product is a coefficient that cannot become a signal;
- an elementwise function that is used as a signal is σ(z) = σ(0) + a z, with a = (σ(z) − σ(0))/z the coefficient, at
  z = 0 the derivative, and σ(0) a constant that starts paths.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pkjax.paths.activations import broadcast_to
from pkjax.paths.errors import NotPathNetworkError
from pkjax.paths.interpreter import Interpreter, evaluate
from pkjax.paths.refusals import HOMOGENEITY, REFUSED
from pkjax.paths.values import Coefficient, Const, Elementwise, Gate, PathSum, Value
from pkjax.programs.equations import equation_function

__all__ = ["FrozenInterpreter"]

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "is_finite")
ELEMENTWISE = {name for name, reason in REFUSED.items() if reason == HOMOGENEITY and name != "cumlogsumexp"} | {
    "add", "sub", "mul", "div", "neg", "max", "min", "abs", "clamp", "select_n", "integer_pow", "square",
    "convert_element_type", "copy", *COMPARISONS}
"""Operations that act entry by entry and have a derivative."""
PRODUCTS = ("mul", "dot_general", "conv_general_dilated", "div")
NONLINEAR = ("integer_pow", "square")
"""Operations that have a rule for parameters, and are not linear."""


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
        return outs if frozen else replay(eqn, ins, outs)

    def read(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """Apply the operation's rule where it has one for such operands; else the result is a coefficient."""
        rule = self.rules.get(eqn.primitive.name)
        coefficients = [v for v in ins if isinstance(v, Coefficient)]
        if getattr(rule, "structural", False):
            return super().equation(eqn, ins)
        if not coefficients and eqn.primitive.name in COMPARISONS:
            source = _composed(eqn, ins)
            return [replace(v, source=source) if isinstance(v, Gate) else v for v in super().equation(eqn, ins)]
        if not any(isinstance(v, PathSum) for v in ins):
            return self.evaluated(eqn, ins) if coefficients else super().equation(eqn, ins)
        self.operands, depth = ins, len(self.enclosing)
        try:
            if any(not _floating(c.dtype) for c in coefficients):      # a predicate, or an index
                chosen = [Const(self.frozen(v)) if isinstance(v, Coefficient) and not _floating(v.dtype) else v
                          for v in ins]
                return self.read(eqn, chosen)
            if eqn.primitive.name in PRODUCTS:
                return self.product(eqn, ins)
            if coefficients and not _floating(eqn.outvars[0].aval.dtype):       # a comparison
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
        if isinstance(a, PathSum) and isinstance(b, PathSum) and _moves(a) and _moves(b):
            if a.through < b.through:
                return super().equation(eqn, [a, self.factor_of(b)])
            if b.through < a.through:
                return super().equation(eqn, [self.factor_of(a), b])
            among = "both came through coefficients that the other did not" if a.through != b.through else (
                "neither is a gate")
            raise self.error(f"'{eqn.primitive.name}' multiplies two signals of which {among}",
                             "gated units pass one of them through a nonlinear function; else use the product in one")
        coefficient = next((v for v in ins if isinstance(v, Coefficient)), None)
        if coefficient is None:
            return super().equation(eqn, ins)
        if not _moves(b if coefficient is a else a):        # with a parameter: it is the signal, where it can be
            with contextlib.suppress(NotPathNetworkError):
                signal = self.lifted(coefficient)
                return self.equation(eqn, [signal if v is coefficient else v for v in ins])
            if not coefficient.settled:
                raise coefficient.reason
        return super().equation(eqn, [self.factor(v) if v is coefficient else v for v in ins])

    def quotient(self, eqn: Any, a: Any, b: Any) -> Sequence[Any]:
        """Divide a path sum by what is not constant: one over that is a factor."""
        if isinstance(b, Const | Gate):
            return super().equation(eqn, [a, b])
        shape = tuple(eqn.outvars[0].aval.shape)
        if not isinstance(a, PathSum):
            raise self.error("division by a signal or by a parameter")
        (below,) = self.exact([b])
        inverse = None if below is None else jnp.broadcast_to(1 / below, shape)
        factor = self.factor(self.coefficient(inverse, shape, a.dtype, NotPathNetworkError("1/x"), True))
        return [self.bilinear("mul", lax.mul, broadcast_to(self, a, shape), factor, like=eqn.outvars[0].aval)]

    def factor(self, coefficient: Coefficient) -> PathSum:
        """Let a coefficient multiply paths."""
        return replace(PathSum(self.frozen(coefficient), coefficient.shape, coefficient.dtype, False),
                       through=frozenset((coefficient.number,)))

    def factor_of(self, gate: PathSum) -> PathSum:
        """Let the true value of a path sum multiply paths."""
        (value,) = self.exact([gate])
        coefficient = self.coefficient(value, gate.shape, gate.dtype, NotPathNetworkError("a gate"), True)
        return replace(self.factor(coefficient), through=gate.through)

    def frozen(self, coefficient: Coefficient) -> Any:
        """What the algebra holds of a coefficient that it uses."""
        return self.algebra.coefficient(coefficient.value, coefficient.shape, coefficient.dtype)

    # -- coefficients ------------------------------------------------------------------------------------------------

    def coefficient(self, value: Any, shape: tuple[int, ...], dtype: Any, reason: NotPathNetworkError, settled: bool,
                    **options: Any) -> Coefficient:
        """Number a new coefficient."""
        self.made += 1
        return Coefficient(value, shape, dtype, self.made, reason, settled, **options)

    def evaluated(self, eqn: Any, ins: list[Any], error: NotPathNetworkError | None = None) -> list[Any]:
        """Make a coefficient of an operation's result."""
        name = eqn.primitive.name
        rule = self.rules.get(name)
        values = self.exact(ins)
        known = all(v is not None for v in values)
        outs = evaluate(eqn, values) if known else [None] * len(eqn.outvars)
        coefficients = [v for v in ins if isinstance(v, Coefficient)]
        dividing = name == "div" and not isinstance(ins[1], Const | Gate)
        settled = rule is None or name in NONLINEAR or dividing or (
            error is None and all(v.settled for v in coefficients))
        reason = error or next((v.reason for v in coefficients if v.signal is None), None) or self.error(
            f"the operation '{name}' has no paths")
        source = _composed(eqn, ins)
        stack = list(self.enclosing)
        whole: list[Sequence[Any]] = []      # all results as signals

        def signal(i: int) -> PathSum:
            here, self.enclosing = self.enclosing, list(stack)
            try:
                if source is not None:
                    return self.secant(source, reason)
                if not whole:
                    whole.append(self.equation(eqn, self.signals(ins)))
                return self.lifted(whole[0][i])
            finally:
                self.enclosing = here

        readable = source is not None or (error is None and rule is not None and not dividing
                                          and all(v.signal is not None for v in coefficients))
        return [self.coefficient(value, tuple(out.aval.shape), out.aval.dtype, reason, settled, source=source,
                                 signal=(lambda i=i: signal(i)) if readable else None)
                for i, (value, out) in enumerate(zip(outs, eqn.outvars, strict=True))]

    def secant(self, source: Elementwise, reason: NotPathNetworkError) -> PathSum:
        """Read σ(z) as σ(0) + a z."""
        z, fn, constants = source
        traced = any(isinstance(c, jax.core.Tracer) for c in constants)
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            zero = jnp.zeros(z.shape if any(map(np.ndim, constants)) else (), z.dtype)
            start, slope = jax.jvp(fn, (zero,), (jnp.ones_like(zero),))
            if not traced and not np.isfinite(start).all():
                raise reason
            slope = jnp.where(jnp.isfinite(slope), slope, 0)
        (true,) = self.exact([z])
        value = None if true is None else jnp.where(
            true == 0, slope, (fn(true) - start) / jnp.where(true == 0, jnp.ones_like(true), true))
        factor = self.factor(self.coefficient(value, z.shape, start.dtype, reason, True))
        out = self.bilinear("mul", lax.mul, z, factor)
        if not traced and not np.asarray(start).any():
            return out
        return self.linear("add", lax.add, [out, Const(jnp.broadcast_to(start, z.shape))])

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
            if value.signal is None:
                raise value.reason
            value.signals.append(value.signal())
        return value.signals[0]

    def signals(self, values: Sequence[Any]) -> list[Any]:
        """Operands with every coefficient as a signal."""
        return [self.lifted(v) if isinstance(v, Coefficient) else v for v in values]

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[Value], **options: Any) -> PathSum:
        """Apply an operation that is jointly linear in all its operands."""
        sums = [self.lifted(v) for v in operands]
        return _through(super().linear(op, fn, sums, **options), sums)

    def bilinear(self, op: str, fn: Callable[..., Any], a: Value, b: Value, **options: Any) -> PathSum:
        """Apply an operation that is linear in each of two operands."""
        sums = [self.lifted(a), self.lifted(b)]
        return _through(super().bilinear(op, fn, *sums, **options), sums)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> PathSum:
        """Multiply a path sum entrywise by a gate of its shape."""
        return _through(super().gated(operand, gate), [operand])


def _floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _moves(value: Any) -> bool:
    """Whether a path sum is a signal, and not made of parameters alone."""
    return isinstance(value, PathSum) and (value.on_input or value.of_input)


def _through(out: PathSum, operands: Sequence[PathSum]) -> PathSum:
    """Note through which coefficients the paths of a result lead."""
    through = frozenset().union(*(s.through for s in operands))
    return replace(out, through=through) if through != out.through else out


def _composed(eqn: Any, ins: list[Any]) -> Elementwise | None:
    """The one path sum that an operation's result is an elementwise function of, and that function."""
    parts: list[Any] = [v.source if isinstance(v, Coefficient | Gate) else Elementwise(v, lambda z: z, ())
                        if isinstance(v, PathSum) else v for v in ins]
    if eqn.primitive.name not in ELEMENTWISE or not all(isinstance(p, Const | Elementwise) for p in parts):
        return None
    inner = [p for p in parts if isinstance(p, Elementwise)]
    root = inner[0].root if inner else None
    if root is None or any(p.root is not root for p in inner) or tuple(eqn.outvars[0].aval.shape) != root.shape:
        return None
    apply = equation_function(eqn)

    def fn(z: Any) -> Any:
        return apply(*(p.value if isinstance(p, Const) else p.fn(z) for p in parts))
    constants = tuple(p.value for p in parts if isinstance(p, Const))
    return Elementwise(root, fn, sum((p.constants for p in inner), constants))
