"""Sums over a stream of batches, of which the device holds one at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.network import Network, read
from pkjax.programs.meshes import automatic
from pkjax.programs.program import BoundProgram, trace
from pkjax.pruning.scores.leaves import split, widened
from pkjax.trees import ApplyFn, accumulator, apply_masks, check_finite, check_masks

__all__ = ["Inputs", "Sums", "add", "checked", "fold", "in_chunks", "inputs", "mean", "scored_network", "spent",
           "whole_number", "zeros"]

Inputs = Array | np.ndarray | Iterable[Array | np.ndarray]
"""Examples (N, *input), or a stream of such arrays."""

Sums = tuple[list[Array], list[Array]]
"""Running sums and what rounding took from them."""


def zeros(like: list[Array]) -> Sums:
    """Start running sums of arrays of these shapes, in float32 or wider."""
    first, second = ([jnp.zeros(t.shape, accumulator(t.dtype)) for t in like] for _ in range(2))
    return first, second


def add(sums: Sums, terms: list[Array]) -> Sums:
    """Add to running sums; the rounding error of one addition enters the next (Kahan), so that length costs nothing."""
    whole: list[Array] = []
    lost: list[Array] = []
    for s, loss, t in zip(*sums, terms, strict=True):
        t = t.astype(s.dtype) - loss
        whole.append(s + t)
        lost.append((whole[-1] - s) - t)
    return whole, lost


def checked(batches: Iterable[PyTree], what: str) -> Iterator[tuple[int, PyTree]]:
    """Yield every batch, as arrays of float32 or wider, with its number of examples; name the batch that is not one."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | jax.Array | np.ndarray):
        raise TypeError(f"{what} must be an iterable of batches, got a {type(batches).__name__}; pass [batch] for one")
    for i, batch in enumerate(batches):
        paths, structure = jax.tree_util.tree_flatten_with_path(batch)
        batch = jax.tree.unflatten(structure, [_array(leaf, f"{what}, batch {i}, field {_name(path)!r},")
                                               for path, leaf in paths])
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
        if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(f"{what}: the leaves of a batch must share a leading axis of examples, but those of batch "
                             f"{i} have the shapes {shapes}")
        size = shapes[0][0]
        if size == 0:
            raise ValueError(f"{what}: batch {i} holds no example")
        check_finite(batch, f"{what}, batch {i},")
        yield size, widened(batch)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def _array(leaf: Any, where: str) -> Array | np.ndarray:
    """Read a field of a batch, which may be a PyTorch tensor; raise TypeError where it does not hold numbers."""
    if isinstance(leaf, jax.Array):
        return automatic(leaf)
    try:
        array = np.asarray(leaf)
    except Exception as error:      # whatever the tensors of another library raise
        raise TypeError(f"{where} is a {type(leaf).__name__} that NumPy cannot read: {error}") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.number, jnp.bool_)):
        kind = "text" if array.dtype.kind in "US" else f"{type(leaf).__name__} of {array.dtype}"
        raise TypeError(f"{where} holds {kind}, but batches consist of numbers: leave the field out, as in "
                        "[{\"image\": b[\"image\"], \"label\": b[\"label\"]} for b in batches]")
    return array


def inputs(X: Array | np.ndarray | Iterable[Array | np.ndarray]) -> tuple[Array, Iterator[tuple[int, Array]]]:
    """Return the first example as a batch of one, and the stream of all; raise where shapes or types differ."""
    whole = [X] if isinstance(X, jax.Array | np.ndarray) else X

    def arrays() -> Iterator[tuple[int, Array]]:
        kinds: list[str] = []
        for i, (size, batch) in enumerate(checked(whole, "X")):
            leaves = jax.tree.leaves(batch)
            if len(leaves) != 1:
                raise ValueError(f"X: batch {i} holds {len(leaves)} arrays, but must be the inputs alone: pass "
                                 "[images for images, labels in X]")
            array = jnp.asarray(leaves[0])
            kinds = [*kinds[:1], f"{array.dtype}{list(array.shape[1:])}"]
            if kinds[0] != kinds[-1]:
                raise ValueError(f"X: the examples must be of one shape and type, but the first is {kinds[0]} and "
                                 f"batch {i} holds {kinds[-1]}")
            yield size, array

    stream = arrays()
    first = next(stream, None)
    if first is None:
        raise ValueError(f"X holds no batch{spent(X)}")
    return first[1][:1], chain([first], stream)


def spent(batches: Any) -> str:
    """Say why a stream may be empty."""
    return (f": a {type(batches).__name__} can be read only once; pass a list, or an object whose __iter__ starts anew "
            "each time") if isinstance(batches, Iterator) else ""


def in_chunks(term: Callable[[PyTree], list[Array]], sums: Sums, batch: PyTree, size: int) -> Sums:
    """Add ``term`` of every ``size`` examples of a batch, and of those that remain; one chunk's is held at a time."""
    count = jax.tree.leaves(batch)[0].shape[0]
    size = min(size, count)
    whole = count // size * size
    chunks = jax.tree.map(lambda v: v[:whole].reshape(-1, size, *v.shape[1:]), batch)
    sums, _ = jax.lax.scan(lambda s, chunk: (add(s, term(chunk)), None), sums, chunks)
    return sums if whole == count else add(sums, term(jax.tree.map(lambda v: v[whole:], batch)))


def whole_number(count: Any, name: str) -> int:
    """Read a number of examples; ValueError unless it is whole and 1 or more."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{name} must be a whole number of examples, 1 or more, got {count!r}")
    return int(count)


def _advance(program: BoundProgram, state: Any, *arguments: Any) -> Any:
    return program(state, *arguments)


_advanced = jax.jit(_advance)
_updated = jax.jit(_advance, donate_argnames="state")


def fold(step: Callable[..., Any], state: Any, stream: Iterator[tuple[int, PyTree]], *fixed: Any) -> tuple[Any, int]:
    """Carry ``state`` through ``step(state, batch, *fixed)``; return it, and the number of examples.

    ``step`` is traced once for every shape of batch, compiled once for equal programs, and writes over the state. While
    a batch is computed the next one is read, but it is not sent before the last is done, so that batches never queue
    up.
    """
    programs: dict[Any, BoundProgram] = {}
    count = 0
    for size, batch in stream:
        leaves, structure = jax.tree.flatten(batch)
        kind = structure, tuple((leaf.shape, jnp.result_type(leaf)) for leaf in leaves)
        if kind not in programs:
            programs[kind] = BoundProgram(*trace(step, state, batch, *fixed, opaque=True))
        known = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((programs[kind], batch, fixed)))
        jax.block_until_ready(state)
        state, count = (_updated if known else _advanced)(programs[kind], state, batch, *fixed), count + size
    return state, count


def mean(term: Callable[..., list[Array]], batches: Iterable[PyTree], leaves: list[Array], *fixed: Any
         ) -> tuple[list[Array], int]:
    """Average ``term(leaves, batch, *fixed)``, arrays like ``leaves``, over the examples; return their number too.

    Products are taken at JAX's highest precision: a lower one would round the batches' means by their sizes.
    """
    def step(sums: Sums, batch: PyTree, leaves: list[Array], *fixed: Any) -> Sums:
        size = jax.tree.leaves(batch)[0].shape[0]
        terms = term(leaves, batch, *fixed)
        return add(sums, [size * t.astype(s.dtype) for s, t in zip(sums[0], terms, strict=True)])

    with jax.default_matmul_precision("highest"):
        (sums, _), count = fold(step, zeros(leaves), checked(batches, "batches"), leaves, *fixed)
    if count == 0:
        raise ValueError(f"batches holds no batch{spent(batches)}")
    return [(s / float(count)).astype(t.dtype) for s, t in zip(sums, leaves, strict=True)], count


def scored_network(apply_fn: ApplyFn, params: PyTree, X: Inputs, masks: PyTree | None, paths: bool = False) -> tuple[
        Network, list[Array], Callable[..., PyTree], Iterator[tuple[int, Array]]]:
    """Read network and data; return the network, its masked leaves, how to rebuild them, and the stream.

    The network takes the stream's batches as they come.
    """
    check_masks(masks, params)
    leaves, rebuild = split(params if masks is None else apply_masks(params, masks))
    first, stream = inputs(X)
    network = read(apply_fn, widened(params), first, masks=masks, paths=paths)
    return network, leaves, rebuild, ((size, network.batch(batch)) for size, batch in stream)
