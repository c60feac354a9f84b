"""The door: how a network is read. Every public function that takes ``(apply_fn, params, x)`` begins with ``read``.

The function is traced on shapes, at each call anew; the arrays that it closes over become arguments of its program;
what is compiled is kept by the program, whatever function it came from. What a network must be is checked once, from
static facts. What comes out is one frozen value, a pytree whose static part is the program.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.adapters import ModuleFunction
from pkjax.programs.checks import check_constants, check_parameters, check_some_kept
from pkjax.programs.contents import contents
from pkjax.programs.examples import EXAMPLES, Free, Joined, Rows, Uncertain
from pkjax.programs.independence import follow
from pkjax.programs.integers import encode, encoded
from pkjax.programs.program import BoundProgram, trace
from pkjax.programs.source import module_scope, source_line
from pkjax.trees import (
    ApplyFn,
    Choice,
    apply_masks,
    as_array,
    check_finite,
    check_masks,
    is_floating,
    trained_entries,
)

__all__ = ["Network", "arrays", "own_types", "read"]

_OWN_TYPES: ContextVar[tuple[Any, ...]] = ContextVar("own types", default=())


@partial(jax.tree_util.register_dataclass, data_fields=["fn", "params", "masks", "entries", "raw"],
         meta_fields=["whole", "inputs", "outputs", "signal"])
@dataclass(frozen=True, eq=False)
class Network:
    """A network read once: program, parameters with the masked ones at 0, masks, and what trains.

    A pytree: it passes through ``jit``, ``vmap`` and ``grad`` as it is, and functions compiled for one network serve
    every other with an equal program.

    Examples:
        >>> network = read(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((5, 3)))
        >>> network.fn(network.params, jnp.ones((1, 3))), network.outputs
        (Array([[3., 3.]], ...), (2,))
    """

    fn: BoundProgram
    """The program with the arrays that ``apply_fn`` closed over: maps (params, one example (1, *input)) to (1, K)."""
    params: PyTree
    """The parameters, those that are masked at 0."""
    masks: PyTree | None
    """Booleans like ``params``, or None."""
    entries: list[Any]
    """For each leaf which of its entries train: booleans that broadcast against it, or None where none does."""
    raw: BoundProgram | None
    """The program on the inputs as they were given, where those are no single floating array."""
    whole: tuple[bool, ...]
    """For each leaf whether all of it trains."""
    inputs: tuple[Any, tuple[Any, ...]]
    """Tree structure, and shapes and types without N, of the inputs as they were given."""
    outputs: tuple[int, ...]
    """The shape of one example's output."""
    signal: Any
    """Shape and type of the examples that ``fn`` takes, without N."""

    @property
    def size(self) -> int:
        """K, the outputs of one example."""
        return prod(self.outputs)

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of one example as a batch, (1, *input)."""
        return jax.ShapeDtypeStruct((1, *self.signal.shape), self.signal.dtype)

    @property
    def fixed(self) -> "Network":
        """The network where nothing is differentiated: to the compiler it is alike for all masks."""
        return replace(self, entries=[], whole=())

    def batch(self, X: PyTree, name: str = "X") -> Array:
        """Check a batch like that which the network was read for, and return it as the array that ``fn`` takes.

        Raises:
            ValueError: inputs of another structure, shape or type, no example, NaN or infinity.
        """
        X = arrays(X, name)
        self.count(X, name)
        return X if self.raw is None else encode(self.raw.program, self.raw.constants, self.params, X)

    def count(self, X: PyTree, name: str = "X") -> int:
        """Check a batch, of which shapes suffice (``jax.ShapeDtypeStruct``); return N, or raise as ``batch`` does."""
        if (structure := _structure(X, name)) != self.inputs:
            raise ValueError(f"{name} holds examples of {_told(structure)}, but the network was read for "
                             f"{_told(self.inputs)}")
        check_finite(X, name)
        return int(jax.tree.leaves(X)[0].shape[0])

    def over(self, params: PyTree, X: Array) -> Array:
        """Evaluate a batch, (N, K), each example by itself."""
        return jax.vmap(lambda x: self.fn(params, x[None])[0])(X)

    def shaped(self, values: Array, *axes: int) -> Array:
        """Give each of these axes of length K the shape of an example's output."""
        for axis in sorted((a % values.ndim for a in axes), reverse=True):
            values = values.reshape(*values.shape[:axis], *self.outputs, *values.shape[axis + 1:])
        return values


def read(apply_fn: ApplyFn, params: PyTree, x: PyTree, *, masks: PyTree | None = None, trainable: Choice = None,
         paths: bool = False, name: str = "X") -> Network:
    """Read a network: trace it, check it, mask it.

    Args:
        apply_fn: maps (params, inputs with a leading N) to outputs with a leading N, each example by itself.
        params: a pytree. Real floating leaves are parameters, integers and booleans are constants.
        x: inputs, or their shapes: an array (N, *input), or a tree of arrays with one N.
        masks: booleans like ``params``; a weight that is False is absent.
        trainable: which parameters are differentiated: a predicate, a tree of booleans, or None for all.
        paths: read the network as a sum over paths, for which integer inputs become the signals that the program
            makes of them: casts to floating point, one-hot vectors where they look up tables, and 0 or 1 where they
            choose.
        name: what messages call ``x``.

    Raises:
        ValueError: whatever is wrong with these, in a message that names what was received: parameters, inputs or
            arrays that the function holds that are NaN or infinite (traced ones are not looked at), masks that keep
            nothing, no example.
    """
    x = arrays(x, name, shapes=True)
    check_parameters(params)
    check_masks(masks, params)
    check_some_kept(masks, params)
    inputs = _structure(x, name)
    fn, outputs = _traced(apply_fn, params, inputs)
    if fn is not apply_fn:
        check_constants(fn, params, _examples(inputs, 1))
    single = jax.tree_util.treedef_is_leaf(inputs[0])
    shapes = inputs[1]
    entries, whole = trained_entries(params, masks, trainable)
    if masks is not None and all(each is None for each in entries):
        raise ValueError("masks and trainable leave nothing to train: every parameter that trainable selects is masked")
    masked = apply_masks(params, masks)
    if single and (not paths or jnp.issubdtype(shapes[0].dtype, jnp.floating)):
        return Network(fn, masked, masks, entries, None, whole, inputs, outputs, shapes[0])
    example = jax.tree.unflatten(inputs[0], [jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for s in shapes])
    vector = jax.eval_shape(partial(encode, fn.program), fn.constants, params, example)
    signals = BoundProgram(*encoded(fn, params, example, vector.dtype, vector.shape[1]))
    return Network(signals, masked, masks, entries, fn, whole, inputs, outputs,
                   jax.ShapeDtypeStruct(vector.shape[1:], vector.dtype))


# -- tracing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_types(tree: PyTree) -> Iterator[None]:
    """Where a function cannot be read in double precision within the block, read it in the types of (params, x).

    Recurrent layers of Flax hold their state in a type of their own, whatever they are given.
    """
    x64 = jax.dtypes.canonicalize_dtype(float) == np.float64
    token = _OWN_TYPES.set((x64, *map(jnp.result_type, jax.tree.leaves(tree))))
    try:
        yield
    finally:
        _OWN_TYPES.reset(token)


def _in_types(tree: PyTree, types: Sequence[Any]) -> PyTree:
    """The parameters and inputs of a function in the types in which it computes."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.asarray(v).astype(t) for v, t in zip(leaves, types, strict=True)])

_OF_MODULES: "weakref.WeakKeyDictionary[ModuleFunction, dict[Any, Any]]" = weakref.WeakKeyDictionary()
"""What adapters' functions were read as: while what they compute with is unchanged, equality stands in for tracing."""
_KEPT = 16      # readings of one function, in other shapes or of other contents


def _traced(apply_fn: ApplyFn, params: PyTree, inputs: Any) -> tuple[BoundProgram, tuple[int, ...]]:
    """The program of one example, flattened to (1, K), and the shape of its output."""
    if isinstance(apply_fn, BoundProgram):
        out = jax.eval_shape(apply_fn, params, _examples(inputs, 1))
        return apply_fn, out.shape[1:]
    content = contents(apply_fn) if isinstance(apply_fn, ModuleFunction) else None
    if content is None:
        return _read_anew(apply_fn, params, inputs)
    known = _OF_MODULES.setdefault(apply_fn, {})
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple((jnp.shape(p), jnp.result_type(p), getattr(getattr(p, "aval", p), "weak_type", False))
                   for p in leaves)
    key = (content, structure, shapes, inputs, jax.config.jax_enable_x64, _OWN_TYPES.get())
    if key not in known:
        traced = _read_anew(apply_fn, params, inputs)
        if any(isinstance(c, jax.core.Tracer) for c in traced[0].constants):
            return traced
        if len(known) == _KEPT:
            known.clear()
        known[key] = traced
    return known[key]


def _read_anew(apply_fn: ApplyFn, params: PyTree, inputs: Any) -> tuple[BoundProgram, tuple[int, ...]]:
    shape: list[tuple[int, ...]] = []

    def flat(n: int, params: PyTree, x: PyTree) -> Array:
        out = _output(apply_fn, params, x, n)
        shape.append(tuple(out.shape[1:]))
        return out if out.ndim == 2 else out.reshape(n, -1)

    one, several = _examples(inputs, 1), _examples(inputs, EXAMPLES)
    with jax.default_matmul_precision("highest"):      # which JAX fixes while it traces
        program, constants = trace(partial(flat, 1), params, one)
    _check_rows(partial(flat, EXAMPLES), program, constants, params, several)
    return BoundProgram(program, constants), shape[0]


def _output(apply_fn: ApplyFn, params: PyTree, x: PyTree, n: int) -> Array:
    """One array with a leading N, or an error that says what came instead."""
    def told() -> Any:
        return _told((jax.tree.structure(x), tuple(jax.tree.leaves(x))))

    try:
        try:
            out = apply_fn(params, x)
        except Exception:
            x64, *types = _OWN_TYPES.get() or (None,)
            if len(types) != len(jax.tree.leaves((params, x))):     # of another network, or of none
                raise
            params, x = _in_types((params, x), types)
            with jax.enable_x64(x64):
                out = apply_fn(params, x)
            out = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if is_floating(leaf) else leaf, out)
    except Exception as error:
        raise ValueError(f"apply_fn(params, x) failed on a batch of {n}, {told()}: {error}") from error
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1:
        raise ValueError(f"apply_fn(params, x) must return one array (N, *out), but returned {len(leaves)} of shapes "
                         f"{[jnp.shape(leaf) for leaf in leaves]}: choose one, as in lambda p, x: apply_fn(p, x)[0]")
    (array,) = leaves
    if jnp.ndim(array) == 0 or array.shape[0] != n:
        raise ValueError("apply_fn(params, x) must return one row for each example, (N, *out), but returned shape "
                         f"{jnp.shape(array)} for an input of {told()}")
    if 0 in array.shape:
        raise ValueError("apply_fn(params, x) must return one number or more for each example, but returned shape "
                         f"{array.shape} for an input of {told()}")
    if not is_floating(array):
        raise ValueError(f"apply_fn(params, x) must return real floating-point numbers, but returned {array.dtype}")
    return jnp.asarray(array)


def _check_rows(fn: Callable[..., Array], program: Any, constants: Any, params: PyTree, x: PyTree) -> None:
    """Raise ValueError where an output row depends on another example."""
    closed = jax.make_jaxpr(fn)(*jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)),
                                              (params, x)))
    inputs = [Free()] * len(jax.tree.leaves(params)) + [Rows(0)] * len(jax.tree.leaves(x))
    try:
        (place,) = follow(closed.jaxpr, closed.consts, inputs)
    except Joined as error:
        *_, eqn = error.args
        module = module_scope(error.args)
        raise ValueError(
            "each row of the output must depend on its own example alone, but the operation "
            f"'{eqn.primitive.name}' joins the examples of a batch\n  source: {source_line(error.args)}"
            + (f"\n  module: {module}" if module else "") + "\n  what to do: treat each example by itself; freeze "
            "BatchNorm at its running averages (train=False, use_running_average=True, or module.eval())") from None
    except Uncertain:
        place = None
    if place != Rows(0) and not _rows_agree(*trace(fn, params, x), program, constants, params, x):
        raise ValueError("each row of the output must depend on its own example alone, but evaluating two "
                         "examples together gives other outputs than evaluating them one by one")


def _rows_agree(pair: Any, pair_constants: Any, program: Any, constants: Any, params: PyTree, x: PyTree) -> bool:
    """Whether a network treats random examples together as it treats each alone."""
    draw = np.random.default_rng(0)
    drawn: dict[int, Any] = {}      # what is unknown is the same wherever it stands

    def random(leaf: Any) -> np.ndarray:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        return (draw.normal(size=shape) if is_floating(leaf) else draw.integers(0, 2, shape)).astype(dtype)

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            return leaf
        return drawn[id(leaf)] if id(leaf) in drawn else drawn.setdefault(id(leaf), random(leaf))

    with jax.ensure_compile_time_eval():
        params, pair_constants, constants = jax.tree.map(value, (params, pair_constants, constants))
        X = jax.tree.map(random, x)
        together = np.asarray(_call(pair, pair_constants, params, X), np.float64)
        alone = [np.asarray(_call(program, constants, params, jax.tree.map(lambda v, i=i: v[i:i + 1], X)), np.float64)
                 for i in range(EXAMPLES)]
    size = np.abs(together).max(initial=0.0)
    return bool(np.allclose(together, np.concatenate(alone), rtol=1e-3, atol=1e-4 * size, equal_nan=True))


@partial(jax.jit, static_argnames="program")
def _call(program: Any, constants: Any, params: PyTree, x: PyTree) -> Array:
    return program(constants, params, x)


# -- checking --------------------------------------------------------------------------------------------------------


def arrays(x: PyTree, name: str, shapes: bool = False) -> PyTree:
    """A tree of arrays, and where they suffice of shapes; ValueError where a leaf is not of numbers."""
    def array(leaf: Any) -> Any:
        if shapes and isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        try:
            return as_array(leaf)
        except TypeError:
            kind = type(leaf).__name__
            raise ValueError(f"{name} must be an array or a tree of arrays, but holds a {kind}") from None
    return jax.tree.map(array, x)


def _structure(x: PyTree, name: str) -> tuple[Any, tuple[Any, ...]]:
    """Tree structure, and shapes and types without N; ValueError unless all leaves share a leading N of 1 or more."""
    leaves, structure = jax.tree.flatten(x)
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) != 1 or shapes[0][0] == 0:
        raise ValueError(f"{name} must be a batch of shape (N, *input) with N >= 1, or a tree of arrays with one such "
                         f"N, but has shape {shapes[0] if len(shapes) == 1 else shapes}")
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves):
        raise ValueError(f"{name} holds complex numbers; inputs are real")
    return structure, tuple(jax.ShapeDtypeStruct(s[1:], leaf.dtype) for s, leaf in zip(shapes, leaves, strict=True))


def _examples(inputs: Any, n: int) -> PyTree:
    structure, shapes = inputs
    return jax.tree.unflatten(structure, [jax.ShapeDtypeStruct((n, *s.shape), s.dtype) for s in shapes])


def _told(inputs: Any) -> Any:
    structure, shapes = inputs
    return jax.tree.unflatten(structure, [f"{s.dtype}{list(s.shape)}" for s in shapes])
