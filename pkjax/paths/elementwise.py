"""Elementwise functions: which value's entries, one by one, determine those of a result."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pkjax.paths.refusals import HOMOGENEITY, REFUSED
from pkjax.paths.values import Coefficient, Const, Gate, Made, PathSum
from pkjax.programs.equations import equation_function

__all__ = ["COMPARISONS", "CUSTOM", "along", "constants", "made"]

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "is_finite")
ELEMENTWISE = {name for name, reason in REFUSED.items() if reason == HOMOGENEITY and name != "cumlogsumexp"} | {
    "add", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "clamp", "select_n", "integer_pow", "square",
    "convert_element_type", "copy", *COMPARISONS}
"""Operations that act entry by entry and have a derivative."""
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def made(eqn: Any, ins: Sequence[Any], out: Any = None) -> Made | None:
    """How an operation makes its result of the entries of one value; None where it does not.

    Args:
        eqn: the operation.
        ins: its operands.
        out: the result, of a call with a derivative rule of its own: where its body acts entry by entry, so does it.
    """
    name, within = eqn.primitive.name, getattr(out, "made", None)
    if not (name in ELEMENTWISE or (name in CUSTOM and within is not None and len(eqn.outvars) == 1)):
        return None
    first, *others = ([*map(_roots, (v for v in ins if not isinstance(v, Const)))] or [()])
    shape = tuple(eqn.outvars[0].aval.shape)
    roots = tuple(r for r in first if r.shape == shape and all(any(r is s for s in other) for other in others))
    if within is not None:
        roots = tuple(r for r in roots if any(r is s for s in within.roots))
    if not roots:
        return None
    apply = equation_function(eqn)
    if name in CUSTOM:
        return Made(lambda *values: apply(*values)[0], tuple(ins), roots, True)
    return Made(apply, tuple(ins), roots, False)


def _roots(value: PathSum | Gate | Coefficient) -> tuple[Any, ...]:
    """The values of whose entries a value is a function, itself among them where it can be a path sum."""
    of = () if value.made is None else value.made.roots
    itself = isinstance(value, PathSum) or (isinstance(value, Coefficient) and value.made is None and value.readable)
    return (value, *of) if itself else of


def along(value: Any, root: Any) -> Callable[[Any], Any]:
    """The function that a value is of a root of it."""
    def fn(z: Any) -> Any:
        known = {id(root): z}

        def at(v: Any) -> Any:
            if isinstance(v, Const):
                return v.value
            if id(v) not in known:
                known[id(v)] = v.made.apply(*map(at, v.made.operands))
            return known[id(v)]
        return at(value)
    return fn


def constants(value: Any, root: Any) -> tuple[bool, bool]:
    """Whether constants on the way from a root to a value are traced, and whether the way is of one shape."""
    tracers = shaped = False
    seen, waiting = {id(root)}, [value]
    while waiting:
        v = waiting.pop()
        if id(v) in seen:
            continue
        seen.add(id(v))
        if isinstance(v, Const):
            tracers |= isinstance(v.value, jax.core.Tracer)
            shaped |= jnp.ndim(v.value) > 0
        else:
            shaped |= v.made.shaped
            waiting.extend(v.made.operands)
    return tracers, shaped
