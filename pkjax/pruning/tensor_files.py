"""Parameters and masks as safetensors files, which other libraries and languages read."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.extras import needed
from pkjax.files import replacing
from pkjax.trees import apply_masks, leaf_names

__all__ = ["LoadedTensors", "load_safetensors", "save_safetensors"]

MASK = ":mask"
"""What the name of a leaf's mask ends in."""
PURPOSE = "safetensors files need safetensors"
RESERVED = "__metadata__"
"""What safetensors files call their own description."""
TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bfloat16", "float16",
         "float32", "float64", "complex64")
"""The types that NumPy reads back from safetensors files."""


class LoadedTensors(NamedTuple):
    """What a safetensors file holds.

    Returned by ``load_safetensors``. Unpacks as ``params, masks``.

    Examples:
        >>> LoadedTensors({"kernel": 1.0}, None).masks is None
        True
    """

    params: PyTree
    """The parameters, those that are masked at 0."""
    masks: PyTree | None
    """Booleans like ``params``; None where the file has none."""


def save_safetensors(path: str | os.PathLike[str], params: PyTree, *, masks: PyTree | None = None) -> None:
    """Write parameters, and masks where given, to one safetensors file.

    Tensors are named by their tree paths, ``Dense_0/kernel``; with masks the pruned weights are written as 0, and the
    mask of each leaf stands beside it as ``Dense_0/kernel:mask``, a byte for each weight (``save_masks`` takes a bit).
    All types stay as JAX holds them, bfloat16 included. The file appears whole or not at all.

    Args:
        path: the file.
        params: the parameters; masks alone are a tree as well.
        masks: booleans like ``params``.

    Raises:
        ValueError: masks have another structure than the parameters; a leaf is named like another leaf's mask,
            or as safetensors names its own entry.
        TypeError: the masks are not booleans; a leaf has a type that NumPy does not read from such files (float8, int4,
            keys).
        ImportError: safetensors is missing (the extra ``pkjax[safetensors]``).
        OSError: the file cannot be written.

    Examples:
        >>> import tempfile
        >>> params, masks = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_safetensors(f"{folder}/pruned.safetensors", params, masks=masks)
        ...     load_safetensors(f"{folder}/pruned.safetensors", like=params).params["kernel"].tolist()
        [1.0, 0.0]
    """
    files = needed("safetensors.numpy", "safetensors", PURPOSE)
    names = leaf_names(params)
    tensors = dict(zip(names, jax.tree.leaves(apply_masks(params, masks)), strict=True))
    if masks is not None:
        beside = dict(zip((name + MASK for name in names), jax.tree.leaves(masks), strict=True))
        if both := tensors.keys() & beside.keys():
            raise ValueError(f"leaf {min(both)!r} has the name of a mask: give the leaf another key")
        tensors |= beside
    content = files.save({name: _held(name, leaf) for name, leaf in tensors.items()})
    with replacing(Path(path)) as part:
        part.write_bytes(content)


def _held(name: str, leaf: Any) -> np.ndarray:
    """A leaf as the file takes it."""
    value = jnp.asarray(leaf)
    if name == RESERVED:
        raise ValueError(f"a leaf is named {name!r}, which safetensors files keep for themselves: give it another key")
    if str(value.dtype) not in TYPES:
        raise TypeError(f"leaf {name!r} is {value.dtype}, which cannot be read back from a safetensors file: convert "
                        f"it to one of {', '.join(TYPES)}")
    return np.ascontiguousarray(value).reshape(value.shape)      # which makes vectors of scalars


def load_safetensors(path: str | os.PathLike[str], like: PyTree) -> LoadedTensors:
    """Read what ``save_safetensors`` wrote into the tree structure of ``like``.

    Args:
        path: the file.
        like: parameters of the network, or their shapes and types (``jax.ShapeDtypeStruct``).

    Returns:
        The parameters, and the masks or None.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged or is not a safetensors file, or belongs to another network; the message names
            the first leaf whose name, shape or type differs.
        ImportError: safetensors is missing (the extra ``pkjax[safetensors]``).

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_safetensors(f"{folder}/masks.safetensors", {"kernel": jnp.array([True, False])})
        ...     load_safetensors(f"{folder}/masks.safetensors", like={"kernel": jnp.array([True, True])}).params
        {'kernel': Array([ True, False], dtype=bool)}
    """
    files = needed("safetensors", "safetensors", PURPOSE)
    with Path(path).open("rb"):     # an error that is not about the content comes first
        pass
    try:
        with files.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118 it is not a mapping
    except Exception as error:  # a damaged header makes its reader raise errors of many kinds
        raise ValueError(f"{os.fspath(path)!r} is not a readable safetensors file: {error}") from error
    names, leaves = leaf_names(like), jax.tree.leaves(like)
    foreign = f"the tensors in {os.fspath(path)!r} are of another network: they have"
    masked = any(name + MASK in tensors for name in names)
    wanted = {name: (jnp.shape(leaf), jnp.result_type(leaf)) for name, leaf in zip(names, leaves, strict=True)}
    if masked:
        wanted |= {name + MASK: (shape, jnp.dtype(bool)) for name, (shape, _) in wanted.items()}
    for name, (shape, dtype) in wanted.items():
        if name not in tensors:
            raise ValueError(f"{foreign} no {name!r} (but {', '.join(tensors)})")
        if (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            raise ValueError(f"{foreign} {tensors[name].dtype} of shape {tensors[name].shape} at {name!r}, where like "
                             f"has {dtype} of shape {shape}")
    if extra := [name for name in tensors if name not in wanted]:
        raise ValueError(f"{foreign} {extra[0]!r}, which like does not have")

    def tree(ending: str) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(tensors[name + ending]) for name in names])

    return LoadedTensors(tree(""), tree(MASK) if masked else None)
