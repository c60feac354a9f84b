"""Whether each row of a network's output depends on its own example alone, read off the program for two examples.

Every value is followed by where its examples lie, into calls, branches and loops. An operation that joins examples
makes the network one that pkjax refuses. What the rules do not know is uncertain, and the caller compares numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pkjax.programs.batch_axes import ELEMENTWISE, OPERATIONS, elementwise
from pkjax.programs.equations import closed, live_equations, opened
from pkjax.programs.examples import EXAMPLES, Free, Joined, Rows, Rule, Uncertain, Value, moved, shape, uniform

__all__ = ["RULES", "follow"]


def follow(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """Follow the examples through a jaxpr from its inputs to its outputs.

    Args:
        jaxpr: an open jaxpr, traced on ``EXAMPLES`` examples.
        consts: what its ``constvars`` hold.
        inputs: where the examples lie in its arguments.

    Returns:
        Where they lie in its results.

    Raises:
        Joined: an operation joins examples.
        Uncertain: an operation has no rule for where they lie.
    """
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return Free(frozenset(range(np.ndim(atom.val)))) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in live_equations(jaxpr):
        ins = [read(a) for a in eqn.invars]
        name = eqn.primitive.name
        if all(isinstance(v, Free) for v in ins) and RULES.get(name) is not _call:
            outs: Sequence[Value] = _free(eqn, ins)
        elif name in ELEMENTWISE:
            outs = elementwise(eqn, ins)
        elif name in RULES:
            try:
                outs = RULES[name](eqn, ins)
            except Joined as error:
                if eqn in error.args:
                    raise
                raise Joined(eqn, *error.args) from None      # a call around it, whose line the user wrote
        else:
            raise Uncertain(eqn)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _constant(value: Any) -> Free:
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "shape"):
        return Free()
    array = np.asarray(value) if not jnp.issubdtype(value.dtype, jax.dtypes.extended) else np.zeros(0)
    return Free(frozenset(d for d, n in enumerate(array.shape) if n == EXAMPLES and
                          (np.take(array, 0, d) == np.take(array, 1, d)).all()))


def _free(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """Along which axes the results are uniform where no example has a part in the operands."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return [Free(frozenset(range(len(shape(eqn.outvars[0])))) - {
            d for i, d in enumerate(eqn.params["broadcast_dimensions"])
            if shape(eqn.invars[0])[i] != 1 and i not in uniform(ins[0])})]
    if name == "transpose":
        return [Free(frozenset(i for i, d in enumerate(eqn.params["permutation"]) if d in uniform(ins[0])))]
    if name in ("split", "slice", "rev"):
        return [Free(uniform(ins[0], eqn.invars[0]))] * len(eqn.outvars)
    if name == "concatenate":
        return [Free(frozenset.intersection(*map(uniform, ins, eqn.invars)) - {eqn.params["dimension"]})]
    if name == "iota":
        return [Free(frozenset(range(len(shape(eqn.outvars[0])))) - {eqn.params["dimension"]})]
    if name == "dot_general":
        contracted, batch = eqn.params["dimension_numbers"]
        kept = [[d in uniform(v) for d in range(len(shape(a))) if d not in (*c, *b)]
                for v, a, c, b in zip(ins, eqn.invars, contracted, batch, strict=True)]
        pairs = [all(d in uniform(v) for v, d in zip(ins, pair, strict=True)) for pair in zip(*batch, strict=True)]
        return [Free(frozenset(i for i, same in enumerate([*pairs, *kept[0], *kept[1]]) if same))]
    if name in ELEMENTWISE and len(eqn.outvars) == 1:
        axes = frozenset(range(len(shape(eqn.outvars[0]))))
        for variable, value in zip(eqn.invars, ins, strict=True):
            axes &= uniform(value, variable) if len(shape(variable)) else axes
        return [Free(axes)]
    return [Free()] * len(eqn.outvars)


def _inside(inner: Any, ins: Sequence[Value]) -> list[Value]:
    return follow(*opened(inner), ins)


def _call(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    return _inside(next(closed(eqn.params)), ins)


def _cond(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    index, *operands = ins
    if isinstance(index, Rows):
        raise Joined(eqn)
    return [_either(eqn, values) for values in zip(*(_inside(b, operands) for b in eqn.params["branches"]),
                                                   strict=True)]


def _either(eqn: Any, values: Sequence[Value]) -> Value:
    places = {v for v in values if isinstance(v, Rows)}
    if not places:
        return Free(frozenset.intersection(*(uniform(v) for v in values)))
    (place, *others) = places
    if others or any(isinstance(v, Free) and place.axis not in v.uniform for v in values):
        raise Uncertain(eqn)
    return place


def _settled(eqn: Any, carry: list[Value], step: Callable[[list[Value]], list[Value]]) -> list[Value]:
    """Where the examples lie in what a loop carries, once another turn moves nothing."""
    for _ in range(len(carry) + 2):
        after = [_either(eqn, pair) for pair in zip(carry, step(carry), strict=True)]
        if after == carry:
            return carry
        carry = after
    raise Uncertain(eqn)


def _scan(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    body = eqn.params["jaxpr"]
    inner, _ = opened(body)
    n_carry = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, inner.outvars, strict=True))
    n_consts = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.invars, inner.invars, strict=True)) - n_carry
    consts, carry, stacks = ins[:n_consts], list(ins[n_consts:n_consts + n_carry]), ins[n_consts + n_carry:]
    if any(isinstance(value, Rows) and value.axis == 0 for value in stacks):
        return _over_examples(eqn, n_carry, consts, stacks)
    slices = [moved(v, v.axis - 1) if isinstance(v, Rows) else Free(frozenset(d - 1 for d in v.uniform if d))
              for v in stacks]
    carry = _settled(eqn, carry, lambda now: _inside(body, [*consts, *now, *slices])[:n_carry])
    outs = _inside(body, [*consts, *carry, *slices])[n_carry:]
    return [*carry, *(moved(v, v.axis + 1) if isinstance(v, Rows) else Free(frozenset(d + 1 for d in v.uniform))
                      for v in outs)]


def _over_examples(eqn: Any, n_carry: int, consts: Sequence[Value], stacks: Sequence[Value]) -> list[Value]:
    """A loop over the examples that carries nothing from one to the next."""
    alike = all(v == Rows(0) if isinstance(v, Rows) else 0 in v.uniform for v in stacks)
    if n_carry or not alike or any(isinstance(v, Rows) for v in consts):
        raise Uncertain(eqn)
    return [Rows(0)] * len(eqn.outvars)


def _while(eqn: Any, ins: Sequence[Value]) -> list[Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    known, consts, carry = ins[:first], ins[first:first + second], list(ins[first + second:])
    carry = _settled(eqn, carry, lambda now: _inside(eqn.params["body_jaxpr"], [*consts, *now]))
    (goes_on,) = _inside(eqn.params["cond_jaxpr"], [*known, *carry])
    if isinstance(goes_on, Rows):
        raise Uncertain(eqn)      # a loop for each example
    return carry


RULES: dict[str, Rule] = {
    **OPERATIONS,
    **{name: _call for name in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "composite",
                                "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")},
    "cond": _cond, "scan": _scan, "while": _while,
}
"""Name of an operation → where it leaves the examples; beside those that take every entry by itself."""
