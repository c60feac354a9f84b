"""Elementwise functions as signals where gates are frozen: σ(z) = σ(0) + a z."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pkjax.paths.elementwise import along, constants
from pkjax.paths.values import Coefficient, Const, PathSum

__all__ = ["secant"]


def secant(interp: Any, value: Coefficient) -> PathSum:
    """Read σ(z) that is made entry by entry as σ(0) + a z, of the nearest z where σ(0) is finite."""
    assert value.made is not None
    for root in value.made.roots:
        if (out := _secant(interp, value, root)) is not None:
            return out
    raise value.reason


def _secant(interp: Any, value: Coefficient, root: Any) -> PathSum | None:
    """Read σ(z) so, for one z; None where σ(0) is infinite."""
    z, fn = interp.lifted(root), along(value, root)
    tracers, shaped = constants(value, root)
    with contextlib.nullcontext() if tracers else jax.ensure_compile_time_eval():
        # Compiled, as custom rules under a vmap leave compile-time evaluation otherwise.
        read = partial(_at_zero, fn)
        start, slope = (jax.jit(read) if shaped and not tracers else read)(
            jnp.zeros(z.shape if shaped else (), z.dtype))
        if not tracers and not np.isfinite(start).all():
            return None
    (true,) = interp.exact([root])
    held = None if true is None else jnp.where(
        true == 0, slope, (fn(true) - start) / jnp.where(true == 0, jnp.ones_like(true), true))
    factor = interp.factor(Coefficient(held, z.shape, start.dtype, value.through, value.reason))
    out = interp.bilinear("mul", lax.mul, z, factor)
    if not tracers and not np.asarray(start).any():
        return out
    return interp.linear("add", lax.add, [out, Const(jnp.broadcast_to(start, z.shape))])


def _at_zero(fn: Callable[[Any], Any], zero: Any) -> tuple[Any, Any]:
    """Value and slope of an elementwise function; an infinite slope is 0."""
    start, pull = jax.vjp(fn, zero)
    (slope,) = pull(jnp.ones_like(start))
    return start, jnp.where(jnp.isfinite(slope), slope, 0)
