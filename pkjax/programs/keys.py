"""Comparing programs: jaxprs written as nested tuples, which are equal where the operations are.

A custom derivative rule is written by the operations of the derivative that it gives, whatever closure it comes from.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pkjax.programs.equations import closed, equation_function, live_equations, opened

__all__ = ["equation_key", "is_custom", "is_own_rule", "origin", "program_key"]

# Custom derivative rules may contain others; those nested deeper make a program equal to itself alone.
_DEEPEST = 4


def program_key(jaxpr: Any, consts: Sequence[Any]) -> tuple[Any, ...]:
    """Write a jaxpr with what its ``constvars`` hold.

    Examples:
        >>> one, two = (jax.make_jaxpr(lambda x, c=c: c * x)(1.0) for c in (2.0, 3.0))
        >>> program_key(one.jaxpr, one.consts) == program_key(two.jaxpr, two.consts)
        False
    """
    return Keys().of(jaxpr, consts)


def equation_key(eqn: Any) -> tuple[Any, ...]:
    """Write one equation: its operation, its parameters, and the types of its operands."""
    return eqn.primitive.name, Keys().parameters(eqn), tuple(_kind(a.aval) for a in eqn.invars)


def is_custom(eqn: Any) -> bool:
    """Whether an equation has a derivative rule of its own: ``custom_jvp`` or ``custom_vjp``."""
    return eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call"))


def origin(eqn: Any) -> str:
    """Where the function with a custom derivative rule is defined: "name at file:line", "" where JAX does not say."""
    return str(getattr(getattr(eqn.params["call_jaxpr"].jaxpr, "debug_info", None), "func_src_info", None) or "")


def is_own_rule(eqn: Any) -> bool:
    """Whether the rule is JAX's own, as that of ``jax.nn.relu``: it changes with nothing.

    A user's rule around a function of JAX contains that function's own, if it has one.
    """
    own = getattr(jax.nn, origin(eqn).partition(" at ")[0], None)
    return (isinstance(own, jax.custom_jvp | jax.custom_vjp) and os.path.dirname(jax.__file__) in origin(eqn)
            and not any(map(is_custom, _within(eqn))))


def _within(eqn: Any) -> list[Any]:
    inner = [e for part in closed(eqn.params) for e in opened(part)[0].eqns]
    return [*inner, *(deeper for e in inner for deeper in _within(e))]


class Keys:
    """Writes jaxprs as nested tuples that are equal where the operations are."""

    def __init__(self) -> None:
        self.depth = 0

    def of(self, jaxpr: Any, consts: Sequence[Any] = ()) -> tuple[Any, ...]:
        """Write a jaxpr, its variables numbered in the order of their appearance."""
        number: dict[Any, int] = {}

        def named(variable: Any) -> tuple[Any, ...]:
            number[variable] = len(number)
            return _kind(variable.aval)

        def read(atom: Any) -> Any:
            return self.value(atom.val) if isinstance(atom, jex.Literal) else number[atom]

        head = tuple(map(named, (*jaxpr.constvars, *jaxpr.invars)))
        body = tuple((eqn.primitive.name, tuple(map(read, eqn.invars)), self.parameters(eqn),
                      tuple(map(named, eqn.outvars))) for eqn in jaxpr.eqns)
        return head, tuple(map(self.value, consts)), body, tuple(map(read, jaxpr.outvars))

    def parameters(self, eqn: Any) -> tuple[Any, ...]:
        """Write an operation's parameters; a custom derivative rule by the operations that it consists of."""
        if not is_custom(eqn):
            return tuple((name, self.value(value)) for name, value in eqn.params.items() if name != "computation")
        plain = tuple((name, self.value(value)) for name, value in eqn.params.items()
                      if not callable(value) and name not in ("out_trees", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"))
        return (*plain, origin(eqn) if is_own_rule(eqn) else self.rule(eqn))

    def rule(self, eqn: Any) -> Any:
        """Write the derivative that a custom rule gives, whatever function it comes from."""
        fn = equation_function(eqn)
        values = tuple(_shape(v) for v in eqn.invars)

        def derivative(values: Any, directions: Any) -> Any:
            if "jvp_jaxpr_fun" in eqn.params:      # of its value, which may take the operation itself, nothing is kept
                tangents = tuple(jnp.ones(v.shape, jax.dtypes.float0) if not jnp.issubdtype(v.dtype, jnp.inexact)
                                 else d for v, d in zip(values, directions, strict=True))
                return jax.jvp(fn, values, tangents)[1]
            return jax.vjp(fn, *values)[1](directions)

        if self.depth == _DEEPEST:
            return object()
        self.depth += 1
        try:
            directions = values if "jvp_jaxpr_fun" in eqn.params else jax.eval_shape(fn, *values)
            traced = jax.make_jaxpr(derivative)(values, directions)
            return self.of(traced.jaxpr.replace(eqns=live_equations(traced.jaxpr)), traced.consts)
        except Exception:   # a rule may raise anything: such a program equals no other
            return object()
        finally:
            self.depth -= 1

    def value(self, value: Any) -> Any:
        """Write anything else that stands in a jaxpr."""
        if isinstance(value, jex.ClosedJaxpr):
            return self.of(value.jaxpr, value.consts)
        if isinstance(value, jex.Jaxpr):
            return self.of(value)
        if isinstance(value, tuple | list):
            return tuple(map(self.value, value))
        if isinstance(value, dict):
            return tuple((name, self.value(part)) for name, part in value.items())
        if isinstance(value, bool | int | float | complex):
            return type(value).__name__, repr(value)       # 0.0 and -0.0 differ, NaN equals itself
        if isinstance(value, jax.core.Tracer):
            return object()
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            array = np.asarray(value) if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else (
                np.asarray(jax.random.key_data(value)))
            return str(value.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()
        try:
            hash(value)
        except TypeError:
            return object()
        return value


def _shape(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _kind(aval: Any) -> tuple[Any, ...]:
    return tuple(getattr(aval, "shape", ())), str(getattr(aval, "dtype", aval)), bool(getattr(aval, "weak_type", False))
