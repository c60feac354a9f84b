"""What makes a training the same training: its data, module, beginning, recipe and program, by their contents.

Everything is written down so that another process, on another machine, writes the same: no object's address, no order
that a hash decides, no folder's name.
"""

import dataclasses
import enum
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.data.dataset import Dataset
from pkjax.programs.keys import program_key
from pkjax.training.epochs import scale_of
from pkjax.training.flax_modules import Forward
from pkjax.training.recipes import Recipe

__all__ = ["Identities", "Identity", "data_identity", "differences", "digest", "measured_differences",
           "module_fields", "program_digest"]

_ROWS = 4096        # examples that are hashed at a time
_LONGEST = 100      # characters of a value that is written as it is


class Identity(NamedTuple):
    """A training by what it consists of: plain values, which errors show, and digests of all else."""

    values: Mapping[str, Any]
    """Values of JSON's types, by name."""
    contents: Mapping[str, str]
    """Digests, by the name of what was digested."""
    programs: Mapping[str, str]
    """Digests of what is computed, which also follow from the values and contents."""


class Identities:
    """The identities of trainings of one module by one recipe: what they share is found once."""

    def __init__(self, module: Any, forward: Forward, recipe: Recipe, step: Callable[..., Any]) -> None:
        self._forward, self._batch_size, self._step = forward, recipe.batch_size, step
        self._values = {**dataclasses.asdict(recipe), "drops": list(recipe.drops),
                        "recipe": type(recipe).__qualname__, **module_fields(module), "jax": jax.__version__}
        self._data: dict[tuple[int, str], tuple[Dataset, Identity]] = {}
        self._programs: dict[str, str] = {}

    def of(self, train: Dataset, test: Dataset, seed: int, begin: Mapping[str, PyTree]) -> Identity:
        """Describe a training by whatever decides how it goes on."""
        seen, held = self._described(train, "training"), self._described(test, "test")
        names = {"params": "initial parameters", "state": "initial state",
                 "optimizer": "initial state of the optimizer"}
        contents = {names.get(name, name): digest(tree) for name, tree in begin.items()}
        if not self._programs:
            few, labels = train.pixels[:1], np.asarray(train.labels[:1], np.int32)
            batch = jnp.zeros(min(self._batch_size, len(train)), int), jax.random.key(0)
            now = {name: tree for name, tree in begin.items() if name != "masks"}
            with jax.numpy_dtype_promotion("standard"):
                trains = program_digest(self._step, now, batch, begin["masks"], few, labels)
            evaluates = program_digest(lambda params, state, x: self._forward(params, state, x, None)[0],
                                       begin["params"], begin["state"], scale_of(test)(jnp.asarray(few)))
            self._programs = {"operations of a training step (its module, rates, loss, optimizer)": trains,
                              "operations of the evaluation": evaluates}
        return Identity({**self._values, "seed": seed, **seen.values, **held.values},
                        {**seen.contents, **held.contents, **contents}, self._programs)

    def _described(self, data: Dataset, split: str) -> Identity:
        if (id(data), split) not in self._data:
            self._data[id(data), split] = data, data_identity(data, split)      # `data` lives as long as its id
        return self._data[id(data), split][1]


def differences(mine: Identity, other: Identity) -> list[str]:
    """Name what differs, as in `seed 1, not 0` and `other test images`; programs where nothing else does.

    Examples:
        >>> differences(Identity({"seed": 0}, {"masks": "a1"}, {}), Identity({"seed": 1}, {"masks": "b2"}, {}))
        ['seed 1, not 0', 'other masks']
    """
    def text(values: Mapping[str, Any], name: str) -> str:
        value = values.get(name, "nothing")
        return value if isinstance(value, str) else repr(value)

    values = [f"{name} {text(other.values, name)}, not {text(mine.values, name)}"
              for name in dict.fromkeys([*mine.values, *other.values])
              if name not in mine.values or name not in other.values or mine.values[name] != other.values[name]]
    contents, programs = ([f"other {name}" for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
                          for one, two in ((mine.contents, other.contents), (mine.programs, other.programs)))
    return values + contents or programs


def measured_differences(mine: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """Name where a history begins with other measurements than `mine`, but for rounding, as on another machine.

    Examples:
        >>> measured_differences({"norm": 2.0}, {"epoch": 0, "norm": 1.0})
        ['norm 1.0, not 2.0']
    """
    def alike(one: Any, two: Any) -> bool:
        numbers = isinstance(one, int | float) and isinstance(two, int | float)
        return bool(np.isclose(one, two, rtol=1e-3, atol=1e-6, equal_nan=True) if numbers else one == two)

    other = {name: value for name, value in first.items()
             if name in mine or name not in ("epoch", "test_loss", "test_accuracy")}
    return [f"{name} {other.get(name, 'nothing')}, not {mine.get(name, 'nothing')}"
            for name in dict.fromkeys([*mine, *other])
            if name not in mine or name not in other or not alike(mine[name], other[name])]


def digest(tree: PyTree) -> str:
    """Fingerprint a tree by its names, types, shapes and numbers; containers of equal keys are alike.

    Examples:
        >>> digest([jnp.ones(2)]) == digest({"0": jnp.ones(2)}), digest(jnp.ones(2)) == digest(jnp.ones(3))
        (True, False)
    """
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "\0".join(jax.tree_util.keystr((key,), simple=True) for key in path)
        leaves.append(f"{name}\0{_array(leaf)}")
    return _hashed("\n".join(sorted(leaves)).encode("utf-8", "surrogatepass"))


def _array(value: Any) -> str:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{jax.random.key_impl(value)} {_array(jax.random.key_data(value))}"
    value = np.asarray(value)
    total = hashlib.sha256()
    for first in range(0, len(value) if value.ndim else 1, _ROWS):     # a part at a time needs no copy of the whole
        part = np.ascontiguousarray(value[first:first + _ROWS] if value.ndim else value)
        total.update(part.reshape(-1).view(np.uint8).data)
    return f"{value.dtype} {value.shape} {total.hexdigest()[:32]}"


def _hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def data_identity(data: Dataset, split: str) -> Identity:
    """Describe the images as they are stored, their labels and how they are normalised."""
    values = {"data": data.name, "examples": len(data), "classes": int(data.classes), "levels": int(data.levels),
              "mean": np.ravel(data.mean).tolist(), "std": np.ravel(data.std).tolist()}
    return Identity({f"{split} {name}": value for name, value in values.items()},
                    {f"{split} images": _hashed(_array(data.pixels).encode()),
                     f"{split} labels": _hashed(_array(np.asarray(data.labels, np.int64)).encode())}, {})


def module_fields(module: Any) -> dict[str, str]:
    """Describe a module, Linen or NNX, by its class and the fields of it and of the modules in it.

    Examples:
        >>> import pkjax as pk
        >>> module_fields(pk.models.fc(8, 1, classes=3))
        {'module': 'FC', "the module's width": '8', "the module's depth": '1', "the module's classes": '3', ...}
    """
    named = dict(_fields(module, (), set()))
    return {"the module's " + ".".join(name) if name else "module": text for name, text in named.items()}


def _fields(value: Any, name: tuple[str, ...], above: set[int]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Write an object and what is in it, each field under its name; what is nested in itself, once."""
    from flax import linen, nnx

    inner: Mapping[Any, Any] | None = None
    if isinstance(value, linen.Module):
        inner = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)
                 if f.name not in ("parent", "name")}
    elif isinstance(value, nnx.Module | nnx.Rngs):      # their numbers are digested on their own
        inner = {k: v for k, v in sorted(vars(value).items()) if not (k.startswith("_") or isinstance(v, nnx.Variable))}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    elif isinstance(value, functools.partial):
        inner = {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    elif isinstance(value, Mapping):
        inner = dict(sorted(((str(k), v) for k, v in value.items()), key=lambda pair: pair[0]))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes | range):
        inner = dict(enumerate(value))
    if inner is None:
        yield name, _text(value)
        return
    if not isinstance(value, Sequence | Mapping) or not inner:
        yield name, type(value).__qualname__
    if id(value) not in above:
        for key, part in inner.items():
            yield from _fields(part, (*name, str(key)), above | {id(value)})


def _text(value: Any) -> str:
    """Write a plain value, an array, a type or a function; of any other object its class."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | range):
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… {_hashed(text.encode())}"
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value) if np.ndim(value) else repr(np.asarray(value).item())
    if isinstance(value, np.dtype) or isinstance(getattr(value, "dtype", None), np.dtype):
        return str(np.dtype(getattr(value, "dtype", value)))
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def program_digest(fn: Callable[..., Any], *arguments: PyTree) -> str:
    """Fingerprint a function by the operations that it does, and the arrays that it closes over.

    It is traced on the shapes of its arguments, by this version of JAX: another one may write other operations.

    Examples:
        >>> relu, tanh = (program_digest(fn, jnp.ones(2)) for fn in (jax.nn.relu, jnp.tanh))
        >>> relu == tanh, relu == program_digest(lambda x: jax.nn.relu(x), jnp.zeros(2))
        (False, True)
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), arguments)
    traced = jax.make_jaxpr(lambda *given: fn(*given))(*shapes)
    return _hashed(_written(program_key(traced.jaxpr, traced.consts)).encode())


def _written(key: Any) -> str:
    """Write a program's key: sets in order, without the addresses of objects and the folders of files."""
    if isinstance(key, tuple | list):
        return f"({','.join(map(_written, key))})"
    if isinstance(key, set | frozenset):
        return f"{{{','.join(sorted(map(_written, key)))}}}"
    return re.sub(r" at [^\s>]+", "", repr(key))
