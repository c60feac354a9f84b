"""A network's program: its operations, shapes and static parameters, apart from every array.

Tracing a function gives a jaxpr, in which the arrays that the function closes over stand as constants. A ``Program``
is the jaxpr without them: they become arguments. Two programs with the same operations are equal and hash equal,
whatever Python function they were traced from, so that what is compiled for one serves the other.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

__all__ = ["CALLS", "BoundProgram", "Hoisted", "Program", "closed", "equation_function", "live_equations", "trace"]

# Calls that pass their arguments through: the arrays inside them are hoisted too.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
# Operations that ask what a constant holds (a threshold of 0, a branch to take): such constants stay in the program.
_ASKS = ("max", "min", "clamp", "select_n", "cond", "pow")
_JAX = os.path.dirname(jax.__file__)
# Custom derivative rules may contain others; those nested deeper make a program equal to itself alone.
_DEEPEST = 4


@dataclass(frozen=True)
class Hoisted:
    """Stands in a program where an array was: the index of the argument that takes its place."""

    index: int


@dataclass(frozen=True, eq=False)
class Program:
    """The operations of a function of flat arguments: constants first, then what the function was traced on.

    Programs are equal where their operations, shapes and static parameters are.

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
    key = (arguments_tree, results_tree, _Keys().of(jaxpr, consts))
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


def closed(value: Any) -> Iterator[Any]:
    """The closed and open jaxprs among an operation's parameters.

    >>> list(closed({"length": 3}))
    []
    """
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, jex.ClosedJaxpr | jex.Jaxpr):
            yield part
        elif isinstance(part, tuple | list):
            yield from closed(part)


def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that the results need; the others may hold anything.

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
            if eqn.primitive.name in _ASKS:
                asked.update(*(ids for ids in ins if ids))
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


# -- comparing -------------------------------------------------------------------------------------------------------


class _Keys:
    """Writes jaxprs as nested tuples that are equal where the operations are."""

    def __init__(self) -> None:
        self.rules: dict[Any, Any] = {}
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
        if not eqn.primitive.name.startswith("custom_"):
            return tuple((name, self.value(value)) for name, value in eqn.params.items())
        plain = tuple((name, self.value(value)) for name, value in eqn.params.items()
                      if not callable(value) and name not in ("out_trees", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"))
        origin = str(getattr(getattr(eqn.params["call_jaxpr"].jaxpr, "debug_info", None), "func_src_info", ""))
        if _JAX in origin:        # JAX's own rules, as of relu, change with nothing
            return (*plain, origin)
        rule = eqn.params.get("jvp_jaxpr_fun", eqn.params.get("bwd"))
        avals = tuple(_kind(v.aval) for v in eqn.invars)
        if (rule, avals) not in self.rules:
            self.rules[rule, avals] = self.rule(eqn)
        return (*plain, self.rules[rule, avals])

    def rule(self, eqn: Any) -> Any:
        """Write the derivative that a custom rule gives, whatever function it comes from."""
        fn = equation_function(eqn)
        values = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]

        def derivative(*values: Any) -> Any:
            if "jvp_jaxpr_fun" in eqn.params:      # of its value, which may take the operation itself, nothing is kept
                tangents = tuple(jnp.ones(v.shape, jax.dtypes.float0) if not jnp.issubdtype(v.dtype, jnp.inexact)
                                 else jnp.ones_like(v) for v in values)
                return jax.jvp(fn, values, tangents)[1]
            out, pull = jax.vjp(fn, *values)
            return pull(jax.tree.map(jnp.ones_like, out))

        if self.depth == _DEEPEST:
            return object()
        self.depth += 1
        try:
            traced = jax.make_jaxpr(derivative)(*values)
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


def _kind(aval: Any) -> tuple[Any, ...]:
    return tuple(getattr(aval, "shape", ())), str(getattr(aval, "dtype", aval)), bool(getattr(aval, "weak_type", False))


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


def equation_function(eqn: Any) -> Callable[..., Any]:
    """One operation as a function of its operands, custom derivative rules included.

    >>> (eqn,) = jax.make_jaxpr(jnp.sin)(1.0).eqns
    >>> float(equation_function(eqn)(0.0))
    0.0
    """
    if not eqn.primitive.name.startswith("custom_"):
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
