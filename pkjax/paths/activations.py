"""The rules for gates: activations, maxima and pooling.

Branches of a maximum or a selection that are constant multiples of one value are one activation: a slope gate on that
value (ReLU, leaky ReLU, abs). Any other branches are alternatives: the sum of all, each with its own gate (PReLU,
maxout). Ties go as JAX differentiates them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pkjax.paths.interpreter import Const, Gate, Interpreter, PathSum, Value

if TYPE_CHECKING:
    from pkjax.paths.interpreter import Rule

__all__ = ["ACTIVATIONS", "broadcast_to", "pooled", "require", "window_entries"]


def broadcast_to(interp: Interpreter, x: Value, shape: tuple[int, ...]) -> PathSum:
    """Broadcast a path sum (a value of that shape already keeps its ancestry)."""
    x = interp.lifted(x)
    return x if x.shape == shape else interp.linear("broadcast_in_dim", lambda v: jnp.broadcast_to(v, shape), [x])


def ancestor(branches: Sequence[PathSum]) -> tuple[PathSum, list[Any]] | None:
    """Find the nearest value of which every branch is a constant multiple, and the multiples."""
    lines: list[list[tuple[PathSum, Any]]] = []
    for branch in branches:
        line: list[tuple[PathSum, Any]] = [(branch, 1)]
        while (parent := line[-1][0].parent) is not None:
            line.append((parent[0], line[-1][1] * parent[1]))
        lines.append(line)
    for node, _ in lines[0]:
        factors = [next((f for n, f in line if n is node), None) for line in lines]
        if all(f is not None for f in factors):
            return node, factors
    return None


def choose(interp: Interpreter, eqn: Any, branches: Sequence[Value], weights: Callable[[], list[Any]]) -> PathSum:
    """Combine the branches of an activation, of which ``weights()`` gives the share that each takes (0, 1, or a tie's).

    A constant branch stands for zero: its callers have refused any other.
    """
    shape, dtype = tuple(eqn.outvars[0].aval.shape), eqn.outvars[0].aval.dtype
    live = [i for i, b in enumerate(branches) if not isinstance(b, Const)]
    sums = [broadcast_to(interp, branches[i], shape) for i in live]
    common = ancestor(sums)
    if common is not None and common[0].shape == shape:
        base, factors = common

        def slope() -> Array:
            shares = weights()
            return sum((jnp.asarray(f, dtype) * jnp.asarray(shares[i], dtype)
                        for i, f in zip(live, factors, strict=True)), jnp.zeros(shape, dtype))
        return interp.gated(base, slope)

    def share(i: int) -> Array:
        return jnp.broadcast_to(jnp.asarray(weights()[i], dtype), shape)
    parts = [interp.gated(s, partial(share, i)) for i, s in zip(live, sums, strict=True)]
    return interp.linear("add", lambda *vs: sum(vs[1:], vs[0]), parts)


def require(interp: Interpreter, value: Value, allowed: Sequence[float], where: str) -> None:
    """Refuse a constant operand that breaks positive homogeneity, or that is not known while tracing."""
    if isinstance(value, Gate):
        raise interp.error(f"{where} is piecewise constant, which is not positively homogeneous")
    if not isinstance(value, Const):
        return
    if isinstance(value.value, jax.core.Tracer):
        raise interp.error(f"{where} is not known while tracing; make it a plain number")
    entries = np.asarray(value.value)
    if not np.isin(entries, allowed).all():
        shown = entries[~np.isin(entries, allowed)].flat[0]
        raise interp.error(f"{where} is the constant {shown}, not 0: the function is not positively homogeneous")


def extremum(first_larger: bool) -> "Rule":
    """Rule for max and min of two values."""
    def rule(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
        neutral = -np.inf if first_larger else np.inf
        for v in ins:
            require(interp, v, (0.0, neutral), f"one side of '{eqn.primitive.name}'")
        if interp.algebra.natural_max and all(isinstance(v, PathSum) for v in ins):
            return [interp.linear("max", partial(eqn.primitive.bind, **eqn.params), ins)]

        def weights() -> list[Any]:
            a, b = map(jnp.asarray, interp.trues(ins))
            ahead = a > b if first_larger else a < b
            share = jnp.where(ahead, 1.0, jnp.where(a == b, 0.5, 0.0))
            return [share, 1 - share]
        return [choose(interp, eqn, ins, weights)]
    return rule


def select(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Rule for select_n (where): a constant predicate rearranges, a gate chooses a branch."""
    which, *cases = ins
    if isinstance(which, Const):
        if not isinstance(which.value, jax.core.Tracer) and len(taken := np.unique(np.asarray(which.value))) == 1:
            case = cases[int(taken[0])]    # the others may hold anything, such as NaN for what is not a number
            return [case if isinstance(case, PathSum) else interp.lifted(case)]
        return [interp.linear("select_n", lambda *vs: lax.select_n(which.value, *vs), cases)]
    for case in cases:
        require(interp, case, (0.0,), "a branch of 'where'")
    return [choose(interp, eqn, cases, lambda: [jnp.equal(which.value, jnp.asarray(i, which.value.dtype))
                                               for i in range(len(cases))])]


def absolute(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Rule for abs: the slope is JAX's own derivative (the sign, which its releases give differently at 0)."""
    (x,) = ins

    def slope() -> Array:
        v = interp.true(x)
        return jax.jvp(lax.abs, (v,), (jnp.ones_like(v),))[1]
    return [interp.gated(x, slope)]


def clamp(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Rule for clamp between bounds that are 0 or infinite."""
    low, x, high = ins
    if not isinstance(x, PathSum):
        raise interp.error("a constant is clamped by a signal")
    for bound in (low, high):
        if isinstance(bound, PathSum):
            raise interp.error("'clamp' has bounds that depend on the signal")
        require(interp, bound, (0.0, -np.inf, np.inf), "a bound of 'clamp'")

    def slope() -> Array:
        v = interp.true(x)
        return ((v > low.value) & (v < high.value)).astype(x.dtype)
    return [interp.gated(x, slope)]


def gate(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
    """Rule for comparisons, signs and positions: piecewise constant.

    Signals are numbers: one that is compared with itself or with infinity, as ``jnp.isnan`` and ``nan_to_num`` do, is a
    constant.
    """
    shape, name = tuple(eqn.outvars[0].aval.shape), eqn.primitive.name
    if name == "is_finite" or (name in ("eq", "ne") and (ins[0] is ins[1] or any(map(_infinite, ins)))):
        return [Const(np.full(shape, name == "is_finite" or (name == "eq") == (ins[0] is ins[1])))]
    values = interp.trues(ins) if interp.algebra.known else [None]
    known = all(v is not None for v in values)
    return [Gate(eqn.primitive.bind(*values, **eqn.params) if known else None, shape)]


def _infinite(value: Value) -> bool:
    return (isinstance(value, Const) and not isinstance(value.value, jax.core.Tracer)
            and bool(np.isinf(np.asarray(value.value, np.float64)).all()))


def reduced_last(v: Array, axes: tuple[int, ...]) -> Array:
    """Move the reduced axes to the end and merge them."""
    kept = [d for d in range(v.ndim) if d not in axes]
    return lax.reshape(lax.transpose(v, (*kept, *axes)), (*(v.shape[d] for d in kept), prod(v.shape[a] for a in axes)))


def window_entries(v: Array, fill: float, *, window_dimensions: Sequence[int], window_strides: Sequence[int],
                   padding: Sequence[tuple[int, int]], base_dilation: Sequence[int],
                   window_dilation: Sequence[int]) -> list[Array]:
    """Return the first entries of all windows, the second ones, and so on: each an array over the windows."""
    padded = lax.pad(v, jnp.asarray(fill, v.dtype),
                     [(lo, hi, d - 1) for (lo, hi), d in zip(padding, base_dilation, strict=True)])
    spans = [(n - (w - 1) * d - 1) // s + 1 for n, w, d, s in
             zip(padded.shape, window_dimensions, window_dilation, window_strides, strict=True)]
    pieces = []
    for offset in product(*(range(w) for w in window_dimensions)):
        start = [o * d for o, d in zip(offset, window_dilation, strict=True)]
        limit = [b + (n - 1) * s + 1 for b, n, s in zip(start, spans, window_strides, strict=True)]
        pieces.append(lax.slice(padded, start, limit, window_strides))
    return pieces


def pooled(v: Array, params: Any, largest: bool = True) -> Array:
    """The maximum or minimum over windows as a one-hot gate times the windows' entries.

    The derivative is JAX's, whose own takes several times as long on a CPU: it scatters.
    """
    return (jnp.stack(window_entries(v, 0.0, **params), -1) * lax.stop_gradient(_first(v, params, largest))).sum(-1)


def _first(v: Array, params: Any, largest: bool) -> Array:
    """The place of each window's first maximum or minimum, one-hot."""
    entries = jnp.stack(window_entries(v, -np.inf if largest else np.inf, **params), -1)
    return jax.nn.one_hot(jnp.argmax(entries if largest else -entries, -1), entries.shape[-1], dtype=v.dtype)


def maximum_over(largest: bool, windows: bool) -> "Rule":
    """Rule for maxima and minima over axes or windows: a one-hot gate over the candidates.

    JAX gives a pooling window's gradient to its first maximum, and shares a reduction's among equal ones.
    """
    def rule(interp: Interpreter, eqn: Any, ins: list[Any]) -> Sequence[Value]:
        (x,) = ins
        if interp.algebra.natural_max:
            return [interp.linear("max", partial(eqn.primitive.bind, **eqn.params), ins)]

        def candidates(v: Array) -> Array:
            return jnp.stack(window_entries(v, 0.0, **eqn.params), -1) if windows else (
                reduced_last(v, eqn.params["axes"]))

        def one_hot() -> Array:
            if windows:
                return _first(interp.true(x), eqn.params, largest)
            v = candidates(interp.true(x))
            equal = (v == (v.max if largest else v.min)(-1, keepdims=True)).astype(x.dtype)
            return equal / equal.sum(-1, keepdims=True)
        gated = interp.gated(interp.linear("windows", candidates, [x]), one_hot)
        return [interp.linear("reduce_sum", lambda v: v.sum(-1), [gated])]
    return rule


ACTIVATIONS: "dict[str, Rule]" = {
    "max": extremum(True), "min": extremum(False), "select_n": select, "abs": absolute, "clamp": clamp,
    "reduce_max": maximum_over(True, False), "reduce_min": maximum_over(False, False),
    "reduce_window_max": maximum_over(True, True), "reduce_window_min": maximum_over(False, True),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "sign", "argmax", "argmin", "is_finite"), gate),
}
