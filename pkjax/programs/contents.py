"""What a module computes with: a value that is equal where nothing has changed that its code can read.

An object of Python may hold a list that somebody writes to, and its methods may read global variables. So the walk
goes through fields, functions, the variables that these close over and the globals that they name. Where it meets what
it cannot judge it gives up, and the module is traced again.
"""

import dis
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Hashable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np

__all__ = ["contents"]

# Libraries whose functions, classes and modules stay as they are.
_FIXED = frozenset({
    "builtins", "abc", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "inspect", "itertools",
    "logging", "math", "numbers", "operator", "types", "typing", "typing_extensions", "warnings", "_thread",
    "absl", "chex", "einops", "flax", "jax", "jaxlib", "jaxtyping", "ml_dtypes", "numpy", "optax", "pkjax"})
# Names by which code reads what the walk cannot follow.
_ELUSIVE = frozenset({"eval", "exec", "globals", "__import__", "import_module"})
# Fields of Flax's objects that record where they stand, not what they are.
_STANDING = frozenset({"_parent_ref", "_id", "_state", "scope", "_pytree__state", "_trace_state"})
_BY_IDENTITY: tuple[Any, ...] = (None, object.__hash__)
_MOST = 50_000        # values that are looked at
_LARGEST = 2**22      # bytes of a NumPy array that are compared at each call
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "IMPORT_NAME")


def contents(value: Any) -> Hashable | None:
    """Write down what an object computes with, or None where that cannot be told.

    Args:
        value: an object.

    Returns:
        A value that is equal for objects of equal classes, fields, code and read variables. Arrays of JAX, which
        cannot change, are compared by identity, and it holds on to them.

    Examples:
        >>> contents([1, (2.0, "a")]) == contents([1, (2.0, "a")]), contents([0.0]) == contents([-0.0])
        (True, False)
        >>> contents(iter([1])) is None
        True
    """
    try:
        return _Walk().of(value)
    except Exception:        # a user's object may raise anything when it is asked
        return None


class _UnknownError(Exception):
    """The walk met a value that it cannot judge."""


class _Identical:
    """An array, equal to itself alone."""

    def __init__(self, array: Any):
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


class _Walk:
    def __init__(self) -> None:
        self.left = _MOST
        self.number: dict[int, int] = {}
        self.alive: list[Any] = []           # whatever has a number, so that no other object gets its id

    def of(self, value: Any) -> Hashable:
        self.left -= 1
        if self.left < 0 or isinstance(value, jax.core.Tracer):
            raise _UnknownError
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum | np.generic):
            return type(value), repr(value)
        if isinstance(value, jax.Array):
            return _Identical(value)
        if isinstance(value, np.ndarray):
            if value.dtype == object or value.nbytes > _LARGEST:
                raise _UnknownError
            return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
        if id(value) in self.number:
            return "above", self.number[id(value)]
        self.number[id(value)] = len(self.number)
        self.alive.append(value)
        if isinstance(value, tuple | list):
            return type(value), tuple(map(self.of, value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(self.of, value))
        if isinstance(value, Mapping):
            return type(value), tuple((self.of(k), self.of(v)) for k, v in value.items())
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, types.MethodType):
            return self.of(value.__self__), self.of(value.__func__)
        if isinstance(value, functools.partial):
            return self.of((value.func, value.args, value.keywords))
        if isinstance(value, type):
            return self.type(value)
        return self.object(value)

    def function(self, fn: types.FunctionType) -> Hashable:
        cells = tuple(cell.cell_contents for cell in fn.__closure__ or () if _filled(cell))
        if _fixed(fn.__globals__.get("__name__", "")):          # a library's, perhaps around a user's
            return (fn,) if _fixed(fn.__module__) else (fn.__code__, self.of(cells), self.of(vars(fn)))
        held = (cells, fn.__defaults__, fn.__kwdefaults__, getattr(fn, "__wrapped__", None))
        return fn.__code__, self.of(held), tuple(self.globals(fn))

    def globals(self, fn: types.FunctionType) -> Iterator[Hashable]:
        names, attributes = _read_by(fn.__code__)
        if names & _ELUSIVE:
            raise _UnknownError
        for name in sorted(names):
            value = fn.__globals__.get(name, sys.modules.get(name))
            yield name, self.module(value, attributes) if isinstance(value, types.ModuleType) else self.of(value)

    def module(self, module: types.ModuleType, attributes: frozenset[str]) -> Hashable:
        if _fixed(module.__name__):
            return module.__name__
        read = sorted(name for name in attributes if hasattr(module, name))
        return module.__name__, tuple((name, self.module(value, attributes) if isinstance(value, types.ModuleType) else
                                       self.of(value)) for name in read for value in (getattr(module, name),))

    def type(self, cls: type) -> Hashable:
        if _fixed(cls.__module__):
            return cls
        written: list[Hashable] = []
        for base in cls.__mro__:
            if _fixed(base.__module__):
                written.append((base,))
                continue
            for name, value in vars(base).items():
                value = _behind(value)
                if isinstance(value, types.FunctionType) or not (
                        name.startswith(("__", "_abc_")) or inspect.isdatadescriptor(value)):
                    written.append((name, self.of(value)))
        return cls, tuple(written)

    def object(self, value: Any) -> Hashable:
        kind = type(value)
        if hasattr(value, "__name__") and _fixed(getattr(value, "__module__", "")):   # a library's function, wrapped
            return (value,)
        if hasattr(value, "__wrapped__"):
            return kind, self.of(value.__wrapped__)
        slots = [name for base in kind.__mro__ for name in _listed(vars(base).get("__slots__", ()))]
        if hasattr(value, "__dict__") or slots:
            fields = {name: getattr(value, name) for name in slots if hasattr(value, name)}
            fields |= getattr(value, "__dict__", {})
            return self.of(kind), tuple((k, self.of(v)) for k, v in fields.items() if k not in _STANDING)
        if kind is object or (_fixed(kind.__module__) and kind.__hash__ not in _BY_IDENTITY):
            return kind, value
        raise _UnknownError


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [name for name in names if name not in ("__dict__", "__weakref__")]


def _fixed(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FIXED


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _behind(value: Any) -> Any:
    """The function in a method's wrapper."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else getattr(value, "func", value)


@lru_cache(maxsize=4096)
def _read_by(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the globals that code reads, and all names in it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in _LOADS}
    attributes = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner = _read_by(const)
            names |= inner[0]
            attributes |= inner[1]
    return frozenset(names), frozenset(attributes)
