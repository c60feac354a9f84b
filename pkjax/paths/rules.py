"""The rules for linear, bilinear and structural operations, as a table from primitive names."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from pkjax.paths.activations import ACTIVATIONS, broadcast_to, require
from pkjax.paths.algebras import Polynomial
from pkjax.paths.convolution import prefers_products, products
from pkjax.paths.custom_rules import disagreement
from pkjax.paths.indexing import INDEXING
from pkjax.paths.interpreter import ACTIVATION, Const, Gate, Interpreter, PathSum, Rule, Value
from pkjax.paths.sorting import SORTING
from pkjax.programs.equations import closed, live_equations, opened

__all__ = ["RULES"]


def bind(eqn: Any) -> Callable[..., Any]:
    """Return the operation as a function of its operands."""
    return partial(eqn.primitive.bind, **eqn.params)


def join(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Operations that are jointly linear in all their operands."""
    name = eqn.primitive.name
    return [interp.linear(LIKE.get(name, name), bind(eqn), ins, like=eqn.outvars[0].aval)]


def recast(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Identities, such as casts between floating types: the multiple 1 of the operand."""
    (x,) = ins
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        raise interp.error(f"a signal is cast to {eqn.outvars[0].aval.dtype}, which rounds it")
    return [interp.linear(eqn.primitive.name, bind(eqn), ins, parent=(x, 1), like=eqn.outvars[0].aval)]


def neg(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Negation: a sign on a constant, which the path polynomial drops."""
    fn = lax.neg if interp.algebra.signed else (lambda v: v)
    return [interp.linear("neg", fn, ins, parent=(ins[0], -1), like=eqn.outvars[0].aval)]


def sub(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Subtraction; the path polynomial adds."""
    return [interp.linear("sub", lax.sub if interp.algebra.signed else lax.add, ins, like=eqn.outvars[0].aval)]


def mul(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Elementwise product: by a constant, by a gate, or of a parameter and a signal."""
    a, b = ins
    if isinstance(a, Gate) or isinstance(b, Gate):
        gate, x = (a, b) if isinstance(a, Gate) else (b, a)
        shape = eqn.outvars[0].aval.shape
        return [interp.gated(broadcast_to(interp, x, shape), lambda: jnp.broadcast_to(gate.value, shape))]
    const, x = (a, b) if isinstance(a, Const) else (b, a)
    same = isinstance(const, Const) and x.shape == eqn.outvars[0].aval.shape
    return [interp.bilinear("mul", bind(eqn), a, b, parent=(x, const.value) if same else None,
                            like=eqn.outvars[0].aval)]


def div(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Division by a constant, or by a gate (how many entries are positive, say)."""
    x, c = ins
    if isinstance(c, Gate):
        shape = eqn.outvars[0].aval.shape
        return [interp.gated(broadcast_to(interp, x, shape), lambda: jnp.broadcast_to(1 / c.value, shape))]
    if not isinstance(c, Const):
        raise interp.error("division by a signal or by a parameter")
    with_inverse = Const(1 / jnp.asarray(c.value))
    same = x.shape == eqn.outvars[0].aval.shape
    return [interp.bilinear("mul", lax.mul, x, with_inverse, parent=(x, with_inverse.value) if same else None,
                            like=eqn.outvars[0].aval)]


def product(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Contractions: linear in each of two operands."""
    if any(isinstance(v, Gate) for v in ins):
        if eqn.primitive.name != "dot_general":
            raise interp.error(f"'{eqn.primitive.name}' contracts a signal with a piecewise constant value")
        return [_gated_product(interp, eqn, ins)]
    return [interp.bilinear(eqn.primitive.name, bind(eqn), *ins, like=eqn.outvars[0].aval)]


def _gated_product(interp: Interpreter, eqn: Any, ins: list[Any]) -> PathSum:
    """A contraction with a gate: entries times their gates, summed."""
    contracted, batch = eqn.params["dimension_numbers"]
    ranks = [len(a.aval.shape) for a in eqn.invars]
    free = [[d for d in range(rank) if d not in c and d not in b]
            for rank, c, b in zip(ranks, contracted, batch, strict=True)]

    def spread(v: Any, side: int) -> Any:
        """Axes in the order batch, free of the one, free of the other, contracted."""
        moved = lax.transpose(v, (*batch[side], *free[side], *contracted[side]))
        at = len(batch[0]) + (0 if side else len(free[0]))
        return lax.expand_dims(moved, range(at, at + len(free[1 - side])))
    gate = 0 if isinstance(ins[0], Gate) else 1
    x = interp.lifted(ins[1 - gate])
    shape = (*eqn.outvars[0].aval.shape, *(eqn.invars[0].aval.shape[d] for d in contracted[0]))
    candidates = interp.linear("windows", lambda v: jnp.broadcast_to(spread(v, 1 - gate), shape), [x])
    gated = interp.gated(candidates, lambda: jnp.broadcast_to(spread(ins[gate].value, gate), shape))
    axes = tuple(range(len(shape) - len(contracted[0]), len(shape)))
    return interp.linear("reduce_sum", lambda v: v.sum(axes), [gated])


def convolution(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Convolutions: a contraction, sometimes written as matrix products."""
    image, kernel = (v.aval.shape for v in eqn.invars)
    if prefers_products(eqn.params, image, kernel, isinstance(interp.algebra, Polynomial)):
        return [interp.bilinear(eqn.primitive.name, partial(products, **eqn.params), *ins, like=eqn.outvars[0].aval)]
    return product(interp, eqn, ins)


def power(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Positive whole powers of parameters: one parameter lies several times on a path."""
    n = eqn.params.get("y", 2)
    if n < 1:
        raise interp.error(f"a signal or parameter is raised to the power {n}")
    if n > 1 and ins[0].on_input:
        # The tanh of GELU takes a cube; a square is a normalisation's.
        raise interp.error(f"a signal is raised to the power {n}", ACTIVATION + interp.way_out if n > 2 else "")
    out = ins[0]
    for _ in range(n - 1):
        out = interp.bilinear("mul", lax.mul, out, ins[0])
    return [out]


def reduction(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Reductions by a function of the user's: sums, maxima and minima, from an initial value that changes nothing."""
    if len(ins) != 2:
        raise interp.error(f"'{eqn.primitive.name}' reduces several arrays jointly")
    (x, start), (operation, neutral, over) = ins, _monoid(interp, eqn)
    if not isinstance(x, PathSum):
        raise interp.error("a reduction starts from a signal")
    require(interp, start, (neutral,), "the initial value of a reduction")
    aval = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if eqn.primitive.name == "reduce":
        return interp.run_closed(jax.make_jaxpr(lambda v: over(v, eqn.params["dimensions"]))(aval), [x])
    window = {name: eqn.params[name] for name in ("window_dimensions", "window_strides", "padding", "base_dilation",
                                                  "window_dilation")}
    first = np.asarray(neutral, x.dtype)
    return interp.run_closed(jax.make_jaxpr(lambda v: lax.reduce_window(v, first, operation, **window))(aval), [x])


def _monoid(interp: Interpreter, eqn: Any) -> tuple[Callable[..., Any], float, Callable[..., Any]]:
    """What a reduction computes of two values, what changes none, and the same over axes."""
    jaxpr, _ = opened(eqn.params["jaxpr"])
    while len(jaxpr.eqns) == 1 and (inner := next(closed(jaxpr.eqns[0].params), None)) is not None:
        jaxpr, _ = opened(inner)
    names = [e.primitive.name for e in live_equations(jaxpr)]
    whole = len(names) == 1 and set(map(id, jaxpr.eqns[-1].invars)) == set(map(id, jaxpr.invars))
    known: dict[str, Any] = {"add": (lax.add, 0.0, jnp.sum), "max": (lax.max, -np.inf, jnp.max),
                             "min": (lax.min, np.inf, jnp.min)}
    if not whole or names[0] not in known:
        raise interp.error(f"'{eqn.primitive.name}' combines entries by {' and '.join(names) or 'taking one of them'}, "
                           "not by add, max or min")
    return known[names[0]]


def unchanged(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Names, barriers and devices: nothing that paths know of."""
    return ins


def split(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Pieces of one array."""
    return [interp.linear("split", lambda v, i=i: bind(eqn)(v)[i], ins, like=out.aval)
            for i, out in enumerate(eqn.outvars)]


def structural(rule: Rule) -> Rule:
    """Mark a rule that must see its operands whatever kinds they are."""
    rule.structural = True  # type: ignore[attr-defined]
    return rule


def call(name: str) -> Rule:
    """Calls: recurse."""
    @structural
    def rule(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
        return interp.run_closed(eqn.params[name], ins)
    return rule


@structural
def custom(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Calls with a derivative rule of their own, which must give the derivative of what they compute."""
    if any(isinstance(v, PathSum) for v in ins):
        reason = disagreement(eqn, [v.value if isinstance(v, Const) else None for v in ins])
        if reason:
            raise interp.error(reason, "take paths of a network whose derivative rules are derivatives; the tangent "
                               "kernel follows any rule (ntk)")
    outs = interp.run_closed(eqn.params["call_jaxpr"], ins)
    refine = getattr(interp.algebra, "refine", None)
    return outs if refine is None else refine(eqn, ins, outs)


@structural
def cond(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Take the branch that a known index picks."""
    index, *operands = ins
    if not isinstance(index, Const) or isinstance(index.value, jax.core.Tracer):
        raise interp.error("a branch is chosen by a value that is not known while tracing")
    branches = eqn.params["branches"]
    return interp.run_closed(branches[min(max(int(index.value), 0), len(branches) - 1)], operands)


@structural
def scan(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Unroll. A slice of stacked parameters is a parameter of its own: it ties nothing."""
    if all(isinstance(v, Const) for v in ins):
        return [Const(v) for v in eqn.primitive.bind(*(v.value for v in ins), **eqn.params)]
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    inner = body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body
    # What is scanned and what is stacked has one axis less within the loop. JAX's own counts changed their names.
    n_carry = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, inner.outvars, strict=True))
    n_consts = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.invars, inner.invars, strict=True)) - n_carry
    consts, carry, stacks = ins[:n_consts], ins[n_consts:n_consts + n_carry], ins[n_consts + n_carry:]
    steps: list[list[Value]] = [[] for _ in range(length)]
    order = range(length)[::-1] if eqn.params["reverse"] else range(length)
    for i in order:
        outs = interp.run_closed(body, [*consts, *carry, *(_slice(interp, s, i) for s in stacks)])
        carry, steps[i] = list(outs[:n_carry]), list(outs[n_carry:])
    if length == 0:
        return [*carry, *(Const(jnp.zeros(o.aval.shape, o.aval.dtype)) for o in eqn.outvars[n_carry:])]
    return [*carry, *(_stack(interp, ys) for ys in zip(*steps, strict=True))]


def _slice(interp: Interpreter, stack: Value, i: int) -> Value:
    if isinstance(stack, Const):
        return Const(stack.value[i])
    if isinstance(stack, Gate):
        return Gate(None if stack.value is None else stack.value[i], stack.shape[1:])
    out = interp.linear("slice", lambda v: lax.index_in_dim(v, i, keepdims=False), [stack])
    own = {(*label, i): n for label, n in out.degree.items()}
    return replace(out, degree=own)


def _stack(interp: Interpreter, pieces: Sequence[Any]) -> Value:
    if all(isinstance(p, Const) for p in pieces):
        return Const(jnp.stack([p.value for p in pieces]))
    if any(isinstance(p, Gate) for p in pieces):
        known = all(p.value is not None for p in pieces)
        return Gate(jnp.stack([p.value for p in pieces]) if known else None, (len(pieces), *pieces[0].shape))
    return interp.linear("concatenate", lambda *vs: jnp.stack(vs), pieces)


LINEAR = ("reshape", "transpose", "broadcast_in_dim", "slice", "rev", "squeeze", "expand_dims", "concatenate", "pad",
          "reduce_sum", "cumsum", "reduce_window_sum", "add", "add_any", "stack", "tile")
LIKE = {"stack": "concatenate", "tile": "broadcast_in_dim"}
"""Names under which algebras know an operation's kind."""
IDENTITIES = ("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "reshard",
              "mesh_cast", "layout_constraint")

RULES: dict[str, Rule] = {
    **dict.fromkeys(LINEAR, join),
    **dict.fromkeys(IDENTITIES, recast),
    **dict.fromkeys(("name", "optimization_barrier", "device_put"), structural(unchanged)),
    "dot_general": product, "conv_general_dilated": convolution,
    **dict.fromkeys(("integer_pow", "square"), power),
    **dict.fromkeys(("reduce", "reduce_window"), reduction),
    **dict.fromkeys(("split", "unstack"), split),
    "neg": neg, "sub": sub, "mul": mul, "div": div, "scan": scan, "cond": cond,
    **{name: call("jaxpr") for name in ("jit", "pjit", "checkpoint", "remat2", "composite")},
    **{name: call("call_jaxpr") for name in ("closed_call", "core_call", "core_closed_call")},
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), custom),
    **ACTIVATIONS, **INDEXING, **SORTING,
}
"""Name of a primitive → what to do where one of its operands is a path sum."""
