"""A network's program: its operations, shapes and static parameters, apart from every array.

Tracing a function gives a jaxpr, in which the arrays that the function closes over stand as constants. A ``Program``
is the jaxpr without them: they become arguments. Two programs with the same operations are equal and hash equal,
whatever Python function they were traced from, so that what is compiled for one serves the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pkjax.programs.equations import CALLS, closed, equation_function
from pkjax.programs.keys import is_custom, program_key

__all__ = ["BoundProgram", "Hoisted", "Program", "trace"]

# Operations that ask what a constant holds (a threshold of 0, a branch to take): such constants stay in the program.
_ASKS = ("max", "min", "clamp", "select_n", "cond", "pow", "reduce", "reduce_window", "scatter-max", "scatter-min")


@dataclass(frozen=True)
class Hoisted:
    """Stands in a program where an array was: the index of the argument that takes its place."""

    index: int


@dataclass(frozen=True, eq=False)
class Program:
    """The operations of a function of flat arguments: constants first, then what the function was traced on.

    Programs are equal where their operations, shapes and static parameters are.

    Examples:
        >>> import jax.numpy as jnp
        >>> one, _ = trace(lambda w, x: 2.0 * (x @ w), jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> two, _ = trace(lambda w, x: (x @ w) * 2.0, jnp.zeros((3, 2)), jnp.zeros((1, 3)))
        >>> one == two, hash(one) == hash(two)
        (False, False)
        >>> one == trace(lambda v, z: 2.0 * (z @ v), jnp.zeros((3, 2)), jnp.zeros((1, 3)))[0]
        True
    """

    jaxpr: Any
    """The open jaxpr; its ``constvars`` are the first constants."""
    consts: tuple[Any, ...]
    """What its ``constvars`` hold: ``Hoisted``, or an array that the operations must know."""
    constants: tuple[jax.ShapeDtypeStruct, ...]
    """Shapes and types of the hoisted constants."""
    arguments: Any
    """The tree structure of the arguments."""
    results: Any
    """The tree structure of the results."""
    key: tuple[Any, ...]
    """What is compared."""

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Program) and self._hash == other._hash and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    @property
    def shapes(self) -> "BoundProgram":
        """The program bound to the shapes of its constants, for ``jax.eval_shape``."""
        return BoundProgram(self, self.constants)

    def __call__(self, constants: Sequence[Any], *arguments: Any) -> Any:
        """Evaluate the program."""
        leaves, structure = jax.tree.flatten(arguments)
        if structure != self.arguments:
            raise ValueError(f"the program takes {self.arguments}, but got {structure}")
        outs = _evaluate(self.jaxpr, [_value(c, constants) for c in self.consts], leaves, constants)
        return jax.tree.unflatten(self.results, outs)


@partial(jax.tree_util.register_dataclass, data_fields=["constants"], meta_fields=["program"])
@dataclass(frozen=True, eq=False)
class BoundProgram:
    """A program with the arrays that its function closed over: a pytree, and a function of the same arguments.

    Examples:
        >>> import jax.numpy as jnp
        >>> scale = jnp.array([2.0, 3.0])
        >>> program, constants = trace(lambda w, x: (x @ w) * scale, jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> BoundProgram(program, constants)(jnp.ones((3, 2)), jnp.ones((1, 3)))
        Array([[6., 9.]], ...)
    """

    program: Program
    constants: tuple[Any, ...]

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """Shape and type of the first result."""
        return _shape(self.program.jaxpr.outvars[0].aval)

    def __call__(self, *arguments: Any) -> Any:
        """Evaluate the program."""
        return self.program(self.constants, *arguments)


def trace(fn: Callable[..., Any], *arguments: Any, opaque: bool = False) -> tuple[Program, tuple[Any, ...]]:
    """Trace a function on the shapes of its arguments: its program, and the arrays that it closes over.

    Args:
        fn: a function of pytrees of arrays.
        *arguments: the pytrees, or their shapes.
        opaque: take out every array, for a program that is evaluated and never read as a sum over paths.

    Returns:
        The program, without any array but those that its operations must know, and the constants, in order.

    Raises:
        Exception: whatever ``fn`` raises while it is traced.
    """
    shapes = jax.tree.map(_shape, arguments)
    # A new function at each call: JAX would give back what it traced of an old one, whatever has changed since.
    traced, out = jax.make_jaxpr(lambda *given: fn(*given), return_shape=True)(*shapes)
    hoist = _Hoist(set() if opaque else _asked(traced))
    consts = tuple(hoist.constant(c) for c in traced.consts)
    jaxpr = hoist.jaxpr(traced.jaxpr)
    arguments_tree, results_tree = jax.tree.structure(arguments), jax.tree.structure(out)
    key = (arguments_tree, results_tree, program_key(jaxpr, consts))
    program = Program(jaxpr, consts, tuple(map(_shape, hoist.found)), arguments_tree, results_tree, key)
    return _interned(program), tuple(hoist.found)


@lru_cache(maxsize=256)
def _interned(program: Program) -> Program:
    """The first of equal programs, whose jaxpr the caches of JAX know."""
    return program


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    weak = bool(getattr(getattr(leaf, "aval", leaf), "weak_type", False))
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf),
                                weak_type=weak)


# -- hoisting --------------------------------------------------------------------------------------------------------


class _Hoist:
    """Takes the arrays out of a jaxpr and of the calls in it."""

    def __init__(self, asked: set[int]):
        self.asked = asked
        self.found: list[Any] = []
        self.index: dict[int, Hoisted] = {}

    def constant(self, value: Any) -> Any:
        """Put a constant aside, once, unless the program must know what it holds."""
        if isinstance(value, Hoisted):
            return value
        if id(value) in self.asked and not isinstance(value, jax.core.Tracer):
            return np.asarray(value)
        if not isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            return value
        if id(value) not in self.index:
            self.index[id(value)] = Hoisted(len(self.found))
            self.found.append(value)
        return self.index[id(value)]

    def jaxpr(self, jaxpr: Any) -> Any:
        """Hoist from the calls that hold constants of their own; a jaxpr without any stays the object that it is."""
        eqns = [self.equation(eqn) for eqn in jaxpr.eqns]
        return jaxpr if all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True)) else (
            jaxpr.replace(eqns=eqns))

    def equation(self, eqn: Any) -> Any:
        """Hoist from one call."""
        if eqn.primitive.name not in CALLS:
            return eqn
        new = {}
        for name, value in eqn.params.items():
            if isinstance(value, jex.ClosedJaxpr):
                inner = self.jaxpr(value.jaxpr)
                if value.consts or inner is not value.jaxpr:
                    new[name] = jex.ClosedJaxpr(inner, [self.constant(c) for c in value.consts])
            elif isinstance(value, jex.Jaxpr) and (inner := self.jaxpr(value)) is not value:
                new[name] = inner
        return eqn.replace(params=eqn.params | new) if new else eqn


def _asked(traced: Any) -> set[int]:
    """The ids of the constants whose values operations ask for."""
    asked: set[int] = set()

    def walk(jaxpr: Any, held: dict[Any, frozenset[int] | None]) -> list[frozenset[int] | None]:
        # For each variable the constants that it is made of, None where it depends on an argument.
        def read(atom: Any) -> frozenset[int] | None:
            return frozenset() if isinstance(atom, jex.Literal) else held.get(atom)

        for eqn in jaxpr.eqns:
            ins = [read(a) for a in eqn.invars]
            # A custom derivative rule is compared at the values that its function closes over.
            asking = ins if eqn.primitive.name in _ASKS else ins[:eqn.params["num_consts"]] if is_custom(eqn) else ()
            asked.update(*(ids for ids in asking if ids))
            known = [ids for ids in ins if ids is not None]
            outs = [frozenset().union(*known) if len(known) == len(ins) else None] * len(eqn.outvars)
            for inner in closed(eqn.params):
                body = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
                taken = ins[len(ins) - len(body.invars):] if len(ins) >= len(body.invars) else [None] * len(body.invars)
                entry = dict(zip(body.invars, taken, strict=True))
                consts = inner.consts if isinstance(inner, jex.ClosedJaxpr) else ()
                entry |= {v: frozenset((id(c),)) for v, c in zip(body.constvars, consts, strict=True)}
                inside = walk(body, entry)
                if eqn.primitive.name in CALLS and len(inside) == len(outs):
                    outs = inside
            held.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    walk(traced.jaxpr, {v: frozenset((id(c),)) for v, c in zip(traced.jaxpr.constvars, traced.consts, strict=True)})
    return asked


# -- evaluating ------------------------------------------------------------------------------------------------------


def _value(const: Any, constants: Sequence[Any]) -> Any:
    return constants[const.index] if isinstance(const, Hoisted) else const


def _holds(jaxpr: Any) -> bool:
    """Whether calls in a jaxpr hold hoisted constants."""
    return any(any(isinstance(c, Hoisted) for c in getattr(inner, "consts", ())) or
               _holds(inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner)
               for eqn in jaxpr.eqns if eqn.primitive.name in CALLS for inner in closed(eqn.params))


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
    if not _holds(jaxpr):
        whole = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(whole, ()))(*consts, *arguments)
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for eqn in jaxpr.eqns:
        values = [a.val if isinstance(a, jex.Literal) else env[a] for a in eqn.invars]
        inner = next(closed(eqn.params), None) if eqn.primitive.name in CALLS else None
        if isinstance(inner, jex.ClosedJaxpr):
            outs = _evaluate(inner.jaxpr, [_value(c, constants) for c in inner.consts], values, constants)
        else:
            result = equation_function(eqn)(*values)
            outs = list(result) if eqn.primitive.multiple_results else [result]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [a.val if isinstance(a, jex.Literal) else env[a] for a in jaxpr.outvars]
