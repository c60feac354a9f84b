"""The jaxpr interpreter: walks a network's operations and hands each to a rule.

Every value met on the way is of one of few kinds (``pkjax.paths.values``): a constant, a sum over paths, a gate.

What a path sum *holds* is the business of the algebra (``pkjax.paths.algebras``): the network's own value, the value
of a path polynomial, a table of paths, a chain of layers. The interpreter decides what is a path; the algebra, what
to compute about it.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pkjax.paths.errors import NotPathNetworkError
from pkjax.paths.refusals import REFUSED
from pkjax.paths.values import Const, Gate, PathSum, Value
from pkjax.programs.equations import equation_function, live_equations
from pkjax.programs.program import Hoisted
from pkjax.programs.source import module_scope, source_line

__all__ = ["ACTIVATION", "Algebra", "Const", "Gate", "Interpreter", "PathSum", "Rule", "Value"]


@runtime_checkable
class Algebra(Protocol):
    """What to compute about path sums. Methods take path sums and return the value held by the result."""

    signed: bool     # subtraction stays subtraction (else the path polynomial adds)
    known: bool      # gates are computed from the network's true values
    natural_max: bool  # max-pooling stays a maximum of the held values (pool="max")

    def lift(self, constant: Any) -> Any:
        """Hold a constant that joins a path."""

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply ``fn``, jointly linear in all operands."""

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Apply ``fn``, linear in each of two operands."""

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Multiply a path sum by a gate; ``gate()`` computes it where the true values are known."""

    def true_value(self, operand: PathSum) -> Any:
        """Return the network's own value, where this algebra knows it."""


Rule = Callable[["Interpreter", Any, list[Any]], Sequence[Value]]


class Interpreter:
    """Walks jaxprs under one algebra, with a table of rules from primitive names."""

    way_out = "; or freeze what is not linear at its values for an input (gates=\"frozen\", pkjax.paths.frozen)"
    """What errors add to the advice."""

    def __init__(self, algebra: Algebra, rules: dict[str, Rule], constants: Sequence[Any] = ()):
        self.algebra = algebra
        self.rules = rules
        self.constants = constants
        self.enclosing: list[Any] = []
        self.operands: Sequence[Value] = ()      # of the present operation

    # -- walking -----------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """Interpret an open jaxpr."""
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return Const(atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in live_equations(jaxpr):
            self.enclosing.append(eqn)
            outs = self.equation(eqn, [read(a) for a in eqn.invars])
            self.enclosing.pop()
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def run_closed(self, closed: Any, args: Sequence[Value]) -> list[Value]:
        """Interpret a closed jaxpr, or an open one without constants."""
        if isinstance(closed, jex.ClosedJaxpr):
            return self.run(closed.jaxpr, [Const(self.constant(c)) for c in closed.consts], args)
        return self.run(closed, [], args)

    def constant(self, held: Any) -> Any:
        """What a program's constant holds: an array that was hoisted out of it comes back."""
        return self.constants[held.index] if isinstance(held, Hoisted) else held

    def equation(self, eqn: Any, ins: list[Value]) -> Sequence[Value]:
        """Interpret one operation: calls recurse, constants are evaluated, gates stay gates, the rest has a rule."""
        name, self.operands = eqn.primitive.name, ins
        rule = self.rules.get(name)
        if getattr(rule, "structural", False):
            assert rule is not None
            return rule(self, eqn, ins)
        if not any(isinstance(v, PathSum) for v in ins):
            if not any(isinstance(v, Gate) for v in ins):
                of_input = any(v.of_input for v in ins if isinstance(v, Const))
                return [Const(v, of_input) for v in evaluate(eqn, [v.value for v in ins])]
            known = all(v.value is not None for v in ins)
            outs = evaluate(eqn, [v.value for v in ins]) if known else [None] * len(eqn.outvars)
            return [Gate(v, tuple(o.aval.shape)) for v, o in zip(outs, eqn.outvars, strict=True)]
        if rule is None:
            reason = f": it {REFUSED[name]}" if name in REFUSED else ""
            raise self.error(f"the operation '{name}' has no paths{reason}")
        return rule(self, eqn, ins)

    # -- building path sums ------------------------------------------------------------------------------------------

    def lifted(self, value: Value) -> PathSum:
        """Let a constant join a path: it becomes a source of paths, or a factor on them."""
        if isinstance(value, PathSum):
            return value
        if isinstance(value, Gate):
            raise self.error("a piecewise constant value is added to a signal, which is not positively homogeneous")
        assert isinstance(value, Const)
        with contextlib.nullcontext() if isinstance(value.value, jax.core.Tracer) else jax.ensure_compile_time_eval():
            constant = jnp.asarray(value.value)
            return PathSum(self.algebra.lift(constant), constant.shape, constant.dtype, False, of_input=value.of_input)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[Value], *,
               parent: tuple[PathSum, Any] | None = None, like: Any = None) -> PathSum:
        """Apply an operation that is jointly linear in all its operands.

        ``like`` has the result's shape and type, where the network's own operation tells: to trace ``fn`` for them
        takes as long as all else.
        """
        sums = [self.lifted(v) for v in operands]
        degree: dict[tuple[int, ...], int] = {}
        for s in sums:
            for label, n in s.degree.items():
                degree[label] = max(n, degree.get(label, 0))
        out = _formed(fn, sums) if like is None else like
        of_input = any(s.of_input for s in sums) or getattr(fn, "of_input", False)
        return PathSum(self.algebra.linear(op, fn, sums), out.shape, out.dtype, any(s.on_input for s in sums),
                       degree, parent, of_input)

    def bilinear(self, op: str, fn: Callable[..., Any], a: Value, b: Value, *,
                 parent: tuple[PathSum, Any] | None = None, like: Any = None) -> PathSum:
        """Apply an operation that is linear in each of two operands, of which one at most depends on the input."""
        x, y = self.lifted(a), self.lifted(b)
        if x.on_input and y.on_input:
            raise self.error(f"'{op}' multiplies two signals that both depend on the input")
        degree = _met(x.degree, y.degree)
        out = _formed(fn, (x, y)) if like is None else like
        return PathSum(self.algebra.bilinear(op, fn, x, y), out.shape, out.dtype, x.on_input or y.on_input,
                       degree, parent, x.of_input or y.of_input)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> PathSum:
        """Multiply a path sum entrywise by a gate of its shape."""
        return PathSum(self.algebra.gated(operand, gate), operand.shape, operand.dtype, operand.on_input,
                       operand.degree, of_input=operand.of_input)

    def true(self, value: Value) -> Any:
        """Return the network's own value of an operand (only where the algebra knows it)."""
        return self.algebra.true_value(value) if isinstance(value, PathSum) else value.value

    def trues(self, values: Sequence[Value]) -> list[Any]:
        """Return the network's own values of operands that are compared with each other."""
        together = getattr(self.algebra, "true_values", None)
        if together is None:
            return [self.true(v) for v in values]
        sums = iter(together([v for v in values if isinstance(v, PathSum)], any(map(_sized, values))))
        return [next(sums) if isinstance(v, PathSum) else v.value for v in values]

    # -- errors ------------------------------------------------------------------------------------------------------

    def error(self, what: str, remedy: str = "") -> NotPathNetworkError:
        """Describe why the present operation has no paths: the reason, where it stands, what to do."""
        scope = module_scope(self.enclosing)
        names = [str(e.params.get("name", "")) for e in self.enclosing] + [self.enclosing[-1].primitive.name]
        where = source_line(self.enclosing)
        return NotPathNetworkError(
            f"{what}\n  operation: {self.enclosing[-1].primitive.name}"
            + (f" in {'/'.join(n for n in names[:-1] if n)}" if any(names[:-1]) else "")
            + f"\n  source: {where}" + (f"\n  module: {scope}" if scope else "")
            + f"\n  what to do: {remedy or advice(scope, names, self.operands) + self.way_out}")


def _sized(value: Value) -> bool:
    """Whether a comparison with a value asks for more than a sign: a constant that is neither 0 nor infinite."""
    if not isinstance(value, Const):
        return False
    if isinstance(value.value, jax.core.Tracer):
        return True
    entries = np.asarray(value.value)
    return bool(((entries != 0) & np.isfinite(entries.astype(np.float64))).any())


Degree = dict[tuple[int, ...], int]


def _met(one: Degree, other: Degree) -> Degree:
    """How often parameters lie on the paths of a product. A slice of stacked parameters is a part of the stack."""
    def by_leaf(degree: Degree) -> dict[int, list[tuple[tuple[int, ...], int]]]:
        leaves: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for label, n in degree.items():
            leaves.setdefault(label[0], []).append((label, n))
        return leaves

    def most(label: tuple[int, ...], leaves: dict[int, list[tuple[tuple[int, ...], int]]]) -> int:
        return max((n for other, n in leaves.get(label[0], ()) if label[:len(other)] == other[:len(label)]), default=0)

    ones, others = by_leaf(one), by_leaf(other)
    return {label: max(one.get(label, 0) + most(label, others), other.get(label, 0) + most(label, ones))
            for label in one | other}


def _formed(fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
    """Shape and type of the network's own value behind ``fn`` of these operands."""
    return jax.eval_shape(fn, *(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in operands))


ACTIVATION = "use a positively homogeneous activation: relu, leaky_relu, PReLU, abs or max"


def advice(scope: str, names: Sequence[str], operands: Sequence[Value] = ()) -> str:
    """Say what to do about an operation that has no paths, from the names around it and what it acts on."""
    sums = [v for v in operands if isinstance(v, PathSum)]
    of_parameters = bool(sums) and not any(s.on_input for s in sums)
    if "BatchNorm" in scope or "batch_norm" in scope:
        return ("keep BatchNorm's running averages out of the parameters: let apply_fn close over them" if of_parameters
                else "freeze BatchNorm: use running averages (train=False, use_running_average=True, or module.eval())")
    if any(n in scope for n in ("LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")):
        return "this normalisation divides by the signal; use BatchNorm with running averages, or none"
    if of_parameters:
        return ("this acts on parameters before they meet a signal (weight normalisation, a function of the weights): "
                "compute it once and pass its result as the parameters; the tangent kernel takes the network as it is")
    if any(n in names for n in ("var", "_var", "std", "_std", "standardize")) or names[-1] in ("square", "integer_pow"):
        return ("the signal is squared, as in a normalisation by its own variance (LayerNorm, RMSNorm): use BatchNorm "
                "with running averages, or none; the tangent kernel takes the network as it is")
    if any(n in names for n in ("tanh", "gelu", "silu", "swish", "elu", "celu", "selu", "logistic", "sigmoid", "erf",
                                "softplus", "relu6", "hard_tanh", "erfc", "mish", "hard_sigmoid", "hard_swish")):
        return ACTIVATION
    if any(n in names for n in ("softmax", "log_softmax", "_softmax", "logsumexp", "exp", "exp2", "log", "log1p",
                                "stop_gradient")):
        return "return the logits: leave softmax and other readouts to the loss (and stop no gradient on the way)"
    if names[-1] in ("mul", "dot_general", "conv_general_dilated"):
        return ("replace what multiplies signals (attention, gated units, a normalisation by the signal); the tangent "
                "kernel takes the network as it is")
    return ("build the network from linear maps (dense, convolution, frozen BatchNorm, pooling, sums) and positively "
            "homogeneous activations (relu, leaky_relu, PReLU, abs, max)")


def evaluate(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run one operation on plain values, at once where none is traced (a threshold must be a number, not a tracer)."""
    traced = any(isinstance(v, jax.core.Tracer) for v in values)
    with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
        outs = equation_function(eqn)(*values)
    return list(outs) if eqn.primitive.multiple_results else [outs]
