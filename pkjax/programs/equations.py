"""Reading jaxprs: the equations that matter, the jaxprs within them, and one equation as a function."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

__all__ = ["CALLS", "closed", "equation_function", "floating_types", "live_equations", "opened"]

CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
"""Calls that pass their arguments through."""


def closed(value: Any) -> Iterator[Any]:
    """The closed and open jaxprs among an operation's parameters.

    Examples:
        >>> list(closed({"length": 3}))
        []
    """
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, jex.ClosedJaxpr | jex.Jaxpr):
            yield part
        elif isinstance(part, tuple | list):
            yield from closed(part)


def opened(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """A closed or open jaxpr as an open one and its constants.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> jaxpr, consts = opened(jax.make_jaxpr(jnp.sin)(1.0))
        >>> len(jaxpr.eqns), consts
        (1, ())
    """
    return (value.jaxpr, tuple(value.consts)) if isinstance(value, jex.ClosedJaxpr) else (value, ())


def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that the results need; the others may hold anything.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> closed = jax.make_jaxpr(lambda x: (jnp.tanh(x), 2.0 * x)[1])(1.0)
        >>> [eqn.primitive.name for eqn in live_equations(closed.jaxpr)]
        ['mul']
    """
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return live[::-1]


def floating_types(jaxpr: Any) -> set[Any]:
    """The floating-point types in which a program computes.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> sorted(map(str, floating_types(jax.make_jaxpr(lambda x: x.astype(jnp.float16) + 1)(jnp.float32(1)).jaxpr)))
        ['float16']
    """
    found: set[Any] = set()
    for eqn in live_equations(jaxpr):
        found |= {v.aval.dtype for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
        for inner in closed(eqn.params):
            found |= floating_types(opened(inner)[0])
    return found


def equation_function(eqn: Any) -> Callable[..., Any]:
    """One operation as a function of its operands, custom derivative rules included.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> (eqn,) = jax.make_jaxpr(jnp.sin)(1.0).eqns
        >>> float(equation_function(eqn)(0.0))
        0.0
    """
    if not eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call")):
        return partial(eqn.primitive.bind, **eqn.params)
    like = eqn.params["call_jaxpr"]
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))
    jaxpr = like.jaxpr.replace(constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn])
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))

    def fn(*operands: Any) -> Any:
        given = {v: o for v, o in zip(eqn.invars, operands, strict=True) if not isinstance(v, jex.Literal)}
        outs = run(*(given[v] for v in variables))
        return tuple(outs) if eqn.primitive.multiple_results else outs[0]
    return fn
