"""Custom derivative rules: whether a rule gives the derivative of what its function computes.

A function of paths reads what a function computes, and Θ differentiates by its rule: where they differ (a surrogate
slope, a straight-through estimator, a clipped gradient) the network is not a sum over paths. The two are compared once
for each rule, at random points of several sizes, away from ties: a rule may settle those as it likes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pkjax.programs.equations import equation_function
from pkjax.programs.keys import equation_key, is_own_rule, origin

__all__ = ["disagreement", "slope"]

SIZES = (1e-3, 0.1, 1.0, 10.0, 1e3)
"""Of the points and of the tangents or cotangents: rules that clip are linear only in small ones."""
_VERDICTS: dict[Any, str] = {}
_MOST = 512     # verdicts that are kept


def disagreement(eqn: Any, operands: Sequence[Any]) -> str:
    """Say how a custom rule differs from the derivative of its function; "" where it does not.

    Args:
        eqn: a ``custom_jvp_call`` or ``custom_vjp_call``.
        operands: what is known of its operands, None for the others.
    """
    if is_own_rule(eqn):
        return ""
    with jax.ensure_compile_time_eval():
        held = [None if v is None or isinstance(v, jax.core.Tracer) else np.asarray(v) for v in operands]
        key = equation_key(eqn), tuple(None if v is None else (v.shape, str(v.dtype), v.tobytes()) for v in held)
        if key not in _VERDICTS:
            if len(_VERDICTS) == _MOST:
                _VERDICTS.clear()
            _VERDICTS[key] = _compared(eqn, held)
    name = f"'{origin(eqn) or eqn.primitive.name}'"
    if "custom_derivatives.py" in name:
        name = "a function with jax.custom_gradient"
    return _VERDICTS[key] and f"the derivative rule of {name} {_VERDICTS[key]}"


def slope(eqn: Any, value: Any) -> Any:
    """The slope that the rule of an elementwise function of one operand gives."""
    fn = equation_function(eqn)

    def single(v: Any) -> Any:
        return fn(v)[0] if eqn.primitive.multiple_results else fn(v)
    if "jvp_jaxpr_fun" in eqn.params:
        return jax.jvp(single, (value,), (jnp.ones_like(value),))[1]
    out, pull = jax.vjp(single, value)
    return pull(jnp.ones_like(out))[0]


def _compared(eqn: Any, held: Sequence[np.ndarray | None]) -> str:
    with_rule = equation_function(eqn)
    inner = eqn.params["call_jaxpr"]
    plain: Callable[..., Any] = jex.jaxpr_as_fun(inner)
    forward = "jvp_jaxpr_fun" in eqn.params
    draw = np.random.default_rng(0)

    def random(aval: Any, size: float) -> np.ndarray:
        if jnp.issubdtype(aval.dtype, jnp.inexact):
            return (size * draw.normal(size=aval.shape)).astype(aval.dtype)
        return draw.integers(0, 2, aval.shape).astype(aval.dtype)

    closed_over = eqn.params.get("num_consts", 0)      # first among the operands; JAX does not differentiate in them
    moving = [i for i, a in enumerate(eqn.invars)
              if i >= closed_over and held[i] is None and jnp.issubdtype(a.aval.dtype, jnp.inexact)]
    results = [v.aval for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    directed = [eqn.invars[i].aval for i in moving] if forward else results

    @jax.jit
    def derivatives(points: Any, directions: Any) -> Any:
        def of(fn: Callable[..., Any]) -> Any:
            def moved(*parts: Any) -> tuple[Any, ...]:
                full = list(points)
                for i, part in zip(moving, parts, strict=True):
                    full[i] = part
                outs = fn(*full)
                outs = tuple(outs) if isinstance(outs, tuple | list) else (outs,)
                return tuple(o for o in outs if jnp.issubdtype(o.dtype, jnp.inexact))
            at = tuple(points[i] for i in moving)
            return jax.jvp(moved, at, directions)[1] if forward else jax.vjp(moved, *at)[1](directions)
        return of(with_rule), of(plain)

    compared = False
    for size in SIZES:
        for of_points in dict.fromkeys((size, 1.0)):
            points = [random(a.aval, of_points) if v is None else v for a, v in zip(eqn.invars, held, strict=True)]
            along = tuple(random(aval, size) for aval in directed)
            for sign in (1, -1):
                here = [sign * p if i in moving else p for i, p in enumerate(points)]
                try:
                    by_rule, true = derivatives(here, along)
                except Exception as error:      # a user's rule may raise anything
                    return f"cannot be evaluated: {error}"
                for got, want in zip(by_rule, true, strict=True):
                    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
                    finite = np.isfinite(want)
                    compared |= bool(finite.any())
                    top = np.abs(want[finite]).max(initial=0.0)
                    if not np.allclose(got[finite], want[finite], rtol=0.02, atol=0.02 * top):
                        return "is not the derivative of what it computes"
    return "" if compared or not moving else "cannot be compared with the derivative of what it computes"
