"""Integer inputs (tokens, bytes) as the signals that a network makes of them.

What a program computes from integers alone is data. Where it turns data into numbers, a signal starts: a byte cast to
a float is that float, an index into a table is a one-hot vector, whose product with the table is the lookup, a boolean
that selects is 1 or 0. The program that is left takes these signals, as one floating vector, in place of the integers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from pkjax.programs.equations import CALLS, closed, equation_function
from pkjax.programs.program import BoundProgram, Hoisted, Program, trace
from pkjax.programs.source import in_place

__all__ = ["encode", "encoded"]


CONSTANT, DATA, SIGNAL = range(3)
"""Kinds of value: the same for all examples, made of integer inputs alone, anything else."""

Kinded = tuple[int, Any]
"""A kind, and the value; None where only data are computed and it is a signal."""


class _Walk:
    """Walks a program, and asks ``signal`` for what stands where data turn into numbers."""

    def __init__(self, constants: Sequence[Any], signal: Callable[[Any, Callable[[], Any]], Any], compute: bool):
        self.constants = constants
        self.signal = signal
        self.compute = compute      # signals too, not data alone

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Kinded]) -> list[Kinded]:
        """Evaluate a jaxpr."""
        values = [self.constants[c.index] if isinstance(c, Hoisted) else c for c in consts]
        env: dict[Any, Kinded] = dict(zip(jaxpr.constvars, ((CONSTANT, v) for v in values), strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            ins = [(CONSTANT, a.val) if isinstance(a, jex.Literal) else env[a] for a in eqn.invars]
            with in_place(eqn):
                env.update(zip(eqn.outvars, self.equation(eqn, ins), strict=True))
        return [(CONSTANT, a.val) if isinstance(a, jex.Literal) else env[a] for a in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[Kinded]) -> list[Kinded]:
        """Evaluate one operation."""
        kinds, values = {kind for kind, _ in ins}, [value for _, value in ins]
        inner = next(closed(eqn.params), None) if eqn.primitive.name in CALLS else None
        if inner is not None:
            body, consts = (inner.jaxpr, inner.consts) if isinstance(inner, jex.ClosedJaxpr) else (inner, ())
            return self.run(body, consts, ins)
        if DATA not in kinds:
            kind = SIGNAL if SIGNAL in kinds else CONSTANT
            skipped = kind == SIGNAL and not self.compute
            return [(kind, v) for v in ([None] * len(eqn.outvars) if skipped else self._results(eqn, values))]
        avals = [v.aval for v in eqn.outvars]
        if SIGNAL not in kinds and not any(jnp.issubdtype(a.dtype, jnp.floating) for a in avals):
            return [(DATA, v) for v in self._results(eqn, values)]
        if SIGNAL not in kinds and len(avals) == 1:
            return [(SIGNAL, self.signal(avals[0], lambda: self._results(eqn, values)[0]))]
        if eqn.primitive.name == "gather" and ins[0][0] == SIGNAL and _looks_up(eqn):
            return [(SIGNAL, self._lookup(eqn, values))]
        if eqn.primitive.name == "select_n" and _masks(eqn, ins):
            return [(SIGNAL, self._select(eqn, values))]
        raise ValueError(
            f"the operation '{eqn.primitive.name}' joins the integer input with a signal, which is not a sum over "
            "paths: integers may be cast to floating point, look up rows of a table, or choose in jnp.where")

    def _results(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        out = equation_function(eqn)(*values)
        return list(out) if eqn.primitive.multiple_results else [out]

    def _lookup(self, eqn: Any, values: Sequence[Any]) -> Any:
        """A gather of whole rows as the product of one-hot vectors with the table."""
        table, indices = values
        d = eqn.params["dimension_numbers"]
        (axis,) = d.start_index_map
        aval = eqn.invars[0].aval
        size, places = aval.shape[axis], eqn.invars[1].aval.shape[:-1]
        rows = self.signal(jax.ShapeDtypeStruct((*places, size), aval.dtype), partial(_one_hot, eqn, indices, size))
        if not self.compute:
            return None
        out = jnp.tensordot(rows, table, ((len(places),), (axis,)), precision=lax.Precision.HIGHEST)
        rank = len(eqn.outvars[0].aval.shape)
        order = [*(i for i in range(rank) if i not in d.offset_dims), *d.offset_dims]
        return lax.transpose(out, tuple(order.index(i) for i in range(rank)))

    def _select(self, eqn: Any, values: Sequence[Any]) -> Any:
        """A selection by booleans as one by the sign of a signal: 1 where they hold, else 0."""
        which, *cases = values
        aval = eqn.outvars[0].aval
        signs = jax.ShapeDtypeStruct(eqn.invars[0].aval.shape, aval.dtype)
        taken = self.signal(signs, lambda: which.astype(aval.dtype))
        return lax.select_n(taken > 0, *cases) if self.compute else None


def _masks(eqn: Any, ins: Sequence[Kinded]) -> bool:
    """Whether booleans of the integer input select between floating-point values that are made of it nowhere."""
    which, *cases = ins
    return (which[0] == DATA and eqn.invars[0].aval.dtype == bool and all(kind != DATA for kind, _ in cases)
            and bool(jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)))


def _looks_up(eqn: Any) -> bool:
    """Whether a gather takes whole rows along one axis."""
    d, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    return (len(d.start_index_map) == 1 and tuple(d.collapsed_slice_dims) == tuple(d.start_index_map)
            and not d.operand_batching_dims
            and all(sizes[i] == (1 if i in d.collapsed_slice_dims else n) for i, n in enumerate(shape)))


def _one_hot(eqn: Any, indices: Any, size: int) -> Any:
    places = indices[..., 0]
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        places = jnp.clip(places, 0, size - 1)
    return jax.nn.one_hot(places, size, dtype=eqn.invars[0].aval.dtype)


def _arguments(params: Any, x: Any) -> list[Kinded]:
    """The arguments of a walk: integers among the parameters are constants, among the inputs data."""
    def kind(leaf: Any, integer: int) -> int:
        return SIGNAL if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else integer

    return [*((kind(leaf, CONSTANT), leaf) for leaf in jax.tree.leaves(params)),
            *((kind(leaf, DATA), leaf) for leaf in jax.tree.leaves(x))]


@partial(jax.jit, static_argnames="program")
def encode(program: Program, constants: Sequence[Any], params: Any, X: Any) -> Any:
    """The signals that a program for one example makes of each of a batch, (N, D)."""
    def one(x: Any) -> Any:
        x = jax.tree.map(lambda leaf: leaf[None], x)
        signals: list[Any] = [leaf for leaf in jax.tree.leaves(x) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def keep(aval: Any, value: Callable[[], Any]) -> None:
            signals.append(value())

        _Walk(constants, keep, False).run(program.jaxpr, program.consts, _arguments(params, x))
        dtype = jnp.result_type(*(s.dtype for s in signals)) if signals else jnp.float32
        return jnp.concatenate([jnp.ravel(s).astype(dtype) for s in signals]) if signals else jnp.zeros(0, dtype)

    return jax.vmap(one)(X)


def encoded(bound: BoundProgram, params: Any, x: Any, dtype: Any, size: int) -> tuple[Program, tuple[Any, ...]]:
    """The program of the same network on the signals (1, D) that ``encode`` gives."""
    def network(params: Any, z: Any) -> Any:
        position = 0

        def take(aval: Any, value: Any = None) -> Any:
            nonlocal position
            count = prod(aval.shape)
            piece = lax.slice_in_dim(z, position, position + count, axis=1)
            position += count
            return lax.reshape(piece, aval.shape).astype(aval.dtype)

        filled = [take(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.zeros(leaf.shape, leaf.dtype)
                  for leaf in jax.tree.leaves(x)]
        args = _arguments(params, jax.tree.unflatten(jax.tree.structure(x), filled))
        (out,) = _Walk(bound.constants, take, True).run(bound.program.jaxpr, bound.program.consts, args)
        return out[1]

    return trace(network, params, jax.ShapeDtypeStruct((1, size), dtype))
