"""Masks: pytrees of booleans like the parameters, True where a weight is kept."""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.extras import needed
from pkjax.files import replacing
from pkjax.trees import apply_masks, check_distinct, check_masks, is_boolean_tree, leaf_keys

if TYPE_CHECKING:
    import optax

__all__ = ["apply_masks", "load_masks", "masked", "save_masks"]

FORMAT = "pkjax masks 2"
JOINED = "pkjax masks 1"
"""The format before, in which the parts of a leaf's name are joined by "/"."""
HEADER = 2**20
"""Bytes that the names and shapes of all leaves may take, whatever the network is."""
NPY = 2**14
"""The largest number of bytes that precede an array."""

Masks = Any
"""What ``masked`` takes: a tree of booleans, or a function from parameters to one."""


def masked(
    optimizer: "optax.GradientTransformation", masks: Masks
) -> "optax.GradientTransformationExtraArgs":
    """Wrap an optax optimizer so that pruned weights are exactly 0 from the first step on and never touch its state.

        u = optimizer(mask ∘ g, mask ∘ θ) where mask,   −θ elsewhere

    Gradients and parameters are masked before the optimizer sees them, so that norms, momenta and second moments are
    those of the pruned network alone; afterwards the update takes a pruned weight to +0, whatever finite number it held
    (NaN and infinity stay NaN: ``apply_masks`` clears those). Without ``params`` the update of a pruned weight is 0,
    and the weight must be 0 to begin with. Mask the parameters before the first step too,
    ``apply_masks(params, masks)``, for its gradients to be those of the pruned network. Wrap the whole optimizer, since
    a later transformation would scale −θ; only a source of noise goes before, where it is masked like gradients:
    ``optax.chain(optax.add_noise(…), masked(optimizer, masks))``. (``optax.masked`` does something else: it chooses
    which leaves an optimizer updates.)

    The state is that of the optimizer alone. Masks fit parameters of the same leaf names and shapes in any containers,
    so that masks of the parameters of an NNX model train the model itself:

        apply_fn, params = pk.from_nnx(model)
        masks = pk.prune(score_fn, params, compression=1).masks
        nnx.update(model, pk.apply_masks(params, masks))
        optimizer = nnx.Optimizer(model, pk.masked(optax.adam(1e-3), masks), wrt=nnx.Param)

    Args:
        optimizer: an optax transformation.
        masks: booleans like the parameters. As for ``optax.masked``, a prefix will do, of which one boolean (or None:
            keep all) stands for a whole leaf or subtree, and a function from the parameters (from the updates, where
            ``update`` gets no parameters) to either. A tree of booleans that can be called is a tree.

    Returns:
        The optimizer of the pruned network.

    Raises:
        ValueError: ``init`` or ``update`` gets parameters that the masks do not fit.
        TypeError: the masks are not booleans.
        ImportError: optax is missing.

    Source: the pruned weights stay out of training in Gebhart, Saxena and Schrater (2021), section 5.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.array([1.0, 3.0])}
        >>> optimizer = masked(optax.sgd(0.5), {"kernel": jnp.array([True, False])})
        >>> updates, _ = optimizer.update({"kernel": jnp.array([1.0, 1.0])}, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [0.5, 0.0]
    """
    optax = needed("optax", "", "pkjax.masked wraps an optax optimizer")
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        if not jax.tree.leaves(params):  # optax.tree_map_params asks with a stand-in where the state holds parameters
            return inner.init(params)
        return inner.init(apply_masks(params, _fitted(masks, params)))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        fitted = _fitted(masks, updates, params)
        inside = None if params is None else apply_masks(params, fitted)
        updates, state = inner.update(apply_masks(updates, fitted), state, inside, **extra)
        if params is None:
            return apply_masks(updates, fitted), state
        return jax.tree.map(_cancel, updates, fitted, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _fitted(masks: Masks, tree: PyTree, params: PyTree | None = None) -> PyTree:
    """Put masks into the containers of a tree like the parameters, by the names of the leaves."""
    if callable(masks) and not is_boolean_tree(masks):
        masks = masks(tree if params is None else params)
    given, fitted = _by_name(masks, "masks", lambda leaf: leaf is None), {}
    targets, spread = _by_name(tree, "params" if params is None else "updates"), None
    for name, leaf in targets.items():
        prefix = next((name[:i] for i in range(len(name), -1, -1) if name[:i] in given), None)
        if prefix is None:
            continue
        mask = True if given[prefix] is None else given[prefix]
        fitted[name] = jnp.broadcast_to(mask, jnp.shape(leaf)) if jnp.ndim(mask) == 0 else mask
        if prefix != name and jnp.ndim(mask):
            spread = prefix
    unused = {name: mask for name, mask in given.items()
              if mask is not None and not any(name == target[:len(name)] for target in targets)}
    placed = fitted | unused
    check_masks(_joined(placed, targets), _joined(targets, placed))
    if spread is not None:      # the leaves below happen to have the shape of the array
        raise ValueError(f"masks leaf {'/'.join(spread)!r} has shape {jnp.shape(given[spread])}, and params has "
                         "several leaves there: give one boolean for all of them, or an array for each")
    return jax.tree.unflatten(jax.tree.structure(tree), [fitted[name] for name in targets])


def _by_name(tree: PyTree, what: str, is_leaf: Callable[[Any], bool] | None = None) -> dict[tuple[str, ...], Any]:
    """Leaves by name, without the boxes around single leaves (nnx.Param and others keep theirs as ``value``)."""
    box = jax.tree_util.GetAttrKey("value")
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    trimmed = [(path[:-1] if path and path[-1] == box else path, leaf) for path, leaf in pairs]
    names = [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in trimmed]
    check_distinct(names, what)
    return dict(zip(names, (leaf for _, leaf in trimmed), strict=True))


def _joined(leaves: dict[tuple[str, ...], Any], other: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Leaves by the names of errors, which tell the leaves of both trees apart."""
    alike = Counter("/".join(name) for name in {*leaves, *other})
    return {"/".join(name) if alike["/".join(name)] == 1 else " → ".join(map(repr, name)): leaf
            for name, leaf in leaves.items()}


def _cancel(update: Any, mask: Any, param: Any) -> jax.Array:
    """Keep an update where the mask is True, and take the parameter to +0 elsewhere: p + (−p) = +0 exactly."""
    update, param = jnp.asarray(update), jnp.asarray(param)
    dtype = jnp.promote_types(update.dtype, param.dtype)  # in a narrower type −p would be rounded
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def save_masks(path: str | os.PathLike[str], masks: PyTree) -> None:
    """Write masks to one file, one bit a weight, with the names and shapes of their leaves.

    The file is an npz without pickled objects. It appears whole or not at all: it is written under another name and
    moved to its place.

    Args:
        path: the file.
        masks: booleans, as ``prune`` returns them.

    Raises:
        TypeError: the masks are not booleans.
        ValueError: two leaves have the same key path, as under the keys 1 and "1".
        OSError: the file cannot be written.

    Examples:
        >>> import jax.numpy as jnp, tempfile
        >>> masks = {"kernel": jnp.array([[True, False, True]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(f"{folder}/masks.npz", masks)
        ...     load_masks(f"{folder}/masks.npz", like=masks)
        {'kernel': Array([[ True, False,  True]], dtype=bool)}
    """
    check_masks(masks, masks)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(masks)]
    layers = [[list(key), list(leaf.shape)] for key, leaf in zip(leaf_keys(masks, "masks"), leaves, strict=True)]
    arrays: dict[str, Any] = {f"bits_{i}": np.packbits(leaf.ravel()) for i, leaf in enumerate(leaves)}
    header = np.frombuffer(json.dumps({"format": FORMAT, "layers": layers}).encode(), np.uint8)
    with replacing(Path(path)) as part, part.open("xb") as file:
        np.savez_compressed(file, header=header, **arrays)
        file.flush()
        os.fsync(file.fileno())


def load_masks(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read masks written by ``save_masks`` into the tree structure of ``like`` (parameters or masks).

    Args:
        path: the file.
        like: parameters or masks of the network.

    Returns:
        Masks like ``like``.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is cut short, damaged or not a file of masks, or belongs to another network; the message
            names the first leaf whose name or shape differs.

    Examples:
        >>> import jax.numpy as jnp, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(f"{folder}/masks.npz", {"kernel": jnp.array([[True, False]])})
        ...     load_masks(f"{folder}/masks.npz", like={"kernel": jnp.ones((1, 2))})
        {'kernel': Array([[ True, False]], dtype=bool)}
    """
    want = dict(zip(leaf_keys(like, "like"), map(jnp.shape, jax.tree.leaves(like)), strict=True))
    foreign = f"masks in {os.fspath(path)!r} are of another network: they have"
    with Path(path).open("rb") as file:
        with _unreadable(path, file):
            archive = zipfile.ZipFile(file)
            layers = _layers(archive, [*want])
        got = dict(layers)
        named = {key: "/".join(key) or "(root)" for key in {*got, *want}}
        for key, shape in want.items():
            if key not in got:
                raise ValueError(f"{foreign} no leaf {named[key]!r} (but {', '.join(named[k] for k in got)})")
            if got[key] != shape:
                raise ValueError(f"{foreign} shape {got[key]} at leaf {named[key]!r}, where like has {shape}")
        extra = [key for key in got if key not in want]
        if extra:
            raise ValueError(f"{foreign} the leaf {named[extra[0]]!r}, which like does not have")
        with _unreadable(path, file):
            bits = {key: _member(archive, f"bits_{i}", -(-prod(shape) // 8)) for i, (key, shape) in enumerate(layers)}
    flat = [np.unpackbits(bits[key], count=prod(shape)).astype(bool).reshape(shape) for key, shape in want.items()]
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in flat])


@contextmanager
def _unreadable(path: str | os.PathLike[str], file: IO[bytes]) -> Iterator[None]:
    """Turn whatever a damaged file raises into one ValueError."""
    try:
        yield
    except Exception as error:  # a damaged file makes the readers of zip, npy and JSON raise nearly anything
        reason = str(error) or type(error).__name__ if zipfile.is_zipfile(file) else "it is not an npz archive"
        raise ValueError(f"{os.fspath(path)!r} is not a readable file of masks: {reason}") from error


def _layers(archive: zipfile.ZipFile, want: list[tuple[str, ...]]) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Read the names and shapes of the leaves, in the order of the file."""
    likely = json.dumps([[list(key), []] for key in want])
    header = json.loads(_member(archive, "header", max(HEADER, 8 * len(likely)), at_most=True).tobytes())
    kind = header["format"] if isinstance(header, dict) else None
    if kind not in (FORMAT, JOINED):
        raise ValueError(f"its format is {kind!r}, and this version reads {FORMAT!r}")
    layers = [(name, tuple(shape)) for name, shape in header["layers"]]
    if any(type(n) is not int or n < 0 for _, shape in layers for n in shape):
        raise ValueError("the shape of a leaf is not a list of whole numbers")
    if kind == JOINED:      # key paths were joined, with the name "(root)" for a tree that is one leaf
        if not all(isinstance(name, str) for name, _ in layers):
            raise ValueError("the name of a leaf is not a string")
        keys = {"/".join(key) or "(root)": key for key in want}
        if len(keys) != len(want):
            raise ValueError(f"its format, {JOINED!r}, does not tell leaves of like apart whose joined key paths are "
                             "equal; save the masks anew with this version")
        layers = [(keys.get(name, (name,)), shape) for name, shape in layers]
    elif not all(isinstance(name, list) and all(isinstance(part, str) for part in name) for name, _ in layers):
        raise ValueError("the name of a leaf is not a list of strings")
    layers = [(tuple(name), shape) for name, shape in layers]
    check_distinct([name for name, _ in layers], "the file")
    return layers


def _member(archive: zipfile.ZipFile, name: str, size: int, *, at_most: bool = False) -> np.ndarray:
    """Read one member of `size` bytes, or `at_most` as many.

    What the archive declares is checked before anything is unpacked, and no more is unpacked than that.
    """
    infos = [info for info in archive.infolist() if info.filename == f"{name}.npy"]
    if len(infos) != 1:
        raise ValueError(f"it has {len(infos)} members {name!r}, where masks have one")
    if infos[0].file_size > size + NPY:
        raise ValueError(f"its member {name!r} unpacks to {infos[0].file_size} bytes, where these masks have at most "
                         f"{size + NPY}")
    with archive.open(infos[0]) as packed:
        content = io.BytesIO(packed.read(size + NPY + 1))
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"its member {name!r} is not an array of bytes")
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    data = content.getvalue()[content.tell():]
    if dtype != np.uint8 or shape != (len(data),) or not (at_most or len(data) == size):
        raise ValueError(f"its member {name!r} is {dtype} of shape {shape} in {len(data)} bytes, which do not fill the "
                         "shape of the leaf")
    return np.frombuffer(data, np.uint8)
