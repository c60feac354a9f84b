"""Masks: pytrees of booleans like the parameters, True where a weight is kept."""

import io
import json
import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.extras import needed
from pkjax.trees import apply_masks, check_masks, is_boolean_tree, leaf_names

if TYPE_CHECKING:
    import optax

__all__ = ["apply_masks", "load_masks", "masked", "save_masks"]

FORMAT = "pkjax masks 1"

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
    given, fitted = _by_name(masks, lambda leaf: leaf is None), {}
    targets = _by_name(tree)
    for name, leaf in targets.items():
        prefix = next((name[:i] for i in range(len(name), -1, -1) if name[:i] in given), None)
        if prefix is None:
            continue
        mask = True if given[prefix] is None else given[prefix]
        fitted[name] = jnp.broadcast_to(mask, jnp.shape(leaf)) if jnp.ndim(mask) == 0 else mask
    unused = {name: mask for name, mask in given.items()
              if mask is not None and not any(name == target[:len(name)] for target in targets)}
    check_masks(_joined(fitted | unused), _joined(targets))
    return jax.tree.unflatten(jax.tree.structure(tree), [fitted[name] for name in targets])


def _by_name(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[tuple[str, ...], Any]:
    """Leaves by name, without the boxes around single leaves (nnx.Param and others keep theirs as ``value``)."""
    box = jax.tree_util.GetAttrKey("value")
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    trimmed = [(path[:-1] if path and path[-1] == box else path, leaf) for path, leaf in pairs]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in trimmed}


def _joined(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    return {"/".join(name): leaf for name, leaf in leaves.items()}


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
    layers = [[name, list(leaf.shape)] for name, leaf in zip(leaf_names(masks), leaves, strict=True)]
    arrays: dict[str, Any] = {f"bits_{i}": np.packbits(leaf.ravel()) for i, leaf in enumerate(leaves)}
    header = np.frombuffer(json.dumps({"format": FORMAT, "layers": layers}).encode(), np.uint8)
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            np.savez_compressed(file, header=header, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


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
    content = Path(path).read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, and this version reads {FORMAT!r}")
        layers = {str(name): tuple(int(n) for n in shape) for name, shape in header["layers"]}
        bits = dict(zip(layers, (arrays[f"bits_{i}"] for i in range(len(layers))), strict=True))
        for name, shape in layers.items():
            if bits[name].dtype != np.uint8 or bits[name].shape != (-(-int(np.prod(shape)) // 8),):
                raise ValueError(f"the bits of leaf {name!r} do not fill its shape {shape}")
    except Exception as error:  # a damaged file makes the readers of zip, npy and JSON raise nearly anything
        # NumPy takes any other file for a pickle and advises to load it unsafely; that advice is not passed on.
        reason = "it is not an npz archive" if not zipfile.is_zipfile(path) else str(error)
        raise ValueError(f"{os.fspath(path)!r} is not a readable file of masks: {reason}") from error

    want = {name: jnp.shape(leaf) for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True)}
    foreign = f"masks in {os.fspath(path)!r} are of another network: they have"
    for name, shape in want.items():
        if name not in layers:
            raise ValueError(f"{foreign} no leaf {name!r} (but {', '.join(layers)})")
        if layers[name] != shape:
            raise ValueError(f"{foreign} shape {layers[name]} at leaf {name!r}, where like has {shape}")
    extra = [name for name in layers if name not in want]
    if extra:
        raise ValueError(f"{foreign} the leaf {extra[0]!r}, which like does not have")
    flat = [
        np.unpackbits(bits[name], count=int(np.prod(shape))).astype(bool).reshape(shape)
        for name, shape in want.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in flat])
