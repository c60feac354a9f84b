"""Masks: pytrees of booleans like the parameters, True where a weight is kept."""

import io
import json
import os
import secrets
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.trees import check_masks, leaf_names

if TYPE_CHECKING:
    import optax

__all__ = ["apply_masks", "load_masks", "masked", "save_masks"]

FORMAT = "pkjax masks 1"


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Set the weights that are pruned to exactly +0, whatever they hold, and leave the others as they are.

        θ_j ↦ θ_j where mask_j, 0 elsewhere

    A selection, not a product: NaN, infinity and −0 under the mask become +0 too. Types are kept. Works under
    ``jit``, ``grad`` and ``vmap``.

    Raises ValueError where the trees differ, TypeError where the masks are not booleans.

    >>> import jax.numpy as jnp
    >>> apply_masks({"kernel": jnp.array([1.0, -2.0, jnp.nan])}, {"kernel": jnp.array([True, True, False])})
    {'kernel': Array([ 1., -2.,  0.], dtype=float...)}
    """
    check_masks(masks, params)
    return jax.tree.map(_select, params, masks)


def _select(leaf: Any, mask: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def masked(
    optimizer: "optax.GradientTransformation", masks: PyTree
) -> "optax.GradientTransformationExtraArgs":
    """Wrap an optax optimizer so that pruned weights stay exactly 0 and never touch its state.

        u = mask ∘ optimizer(mask ∘ g)

    Gradients are masked on the way in, so that norms, momenta and second moments see the pruned network
    alone; updates are masked on the way out, so that weight decay, momentum or noise move no pruned weight.
    The pruned weights must be 0 to begin with: call ``apply_masks(params, masks)`` first. (``optax.masked``
    is something else: it chooses which leaves an optimizer touches.)

    Raises ValueError or TypeError from ``init`` where the masks do not match the parameters, and ImportError
    where optax is missing.

    >>> import jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([1.0, 0.0])}
    >>> optimizer = masked(optax.sgd(0.5), {"kernel": jnp.array([True, False])})
    >>> updates, _ = optimizer.update({"kernel": jnp.array([1.0, 1.0])}, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [0.5, 0.0]
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError("pkjax.masked wraps an optax optimizer: pip install optax") from error
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        check_masks(masks, params)
        return inner.init(params)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        updates, state = inner.update(apply_masks(updates, masks), state, params, **extra)
        return apply_masks(updates, masks), state

    return optax.GradientTransformationExtraArgs(init, update)


def save_masks(path: str | os.PathLike[str], masks: PyTree) -> None:
    """Write masks to one file, a bit a weight, with the names and shapes of their leaves.

    The file is an npz without pickled objects. It appears whole or not at all: it is written beside its place
    and moved there.

    Raises TypeError where the masks are not booleans, OSError where the file cannot be written.

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

    Raises FileNotFoundError where there is no file, and ValueError where it is cut short, damaged, no file of
    masks, or of another network: the message names the first leaf whose name or shape differs.
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
        # What is no archive NumPy takes for a pickle, and then advises to load unsafely: that advice stops here.
        reason = "it is no npz archive" if not zipfile.is_zipfile(path) else str(error)
        raise ValueError(f"{os.fspath(path)!r} is no readable file of masks: {reason}") from error

    want = {name: jnp.shape(leaf) for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True)}
    foreign = f"masks in {os.fspath(path)!r} are of another network: they have"
    for name, shape in want.items():
        if name not in layers:
            raise ValueError(f"{foreign} no leaf {name!r} (but {', '.join(layers)})")
        if layers[name] != shape:
            raise ValueError(f"{foreign} shape {layers[name]} at leaf {name!r}, where like has {shape}")
    extra = [name for name in layers if name not in want]
    if extra:
        raise ValueError(f"{foreign} the leaf {extra[0]!r}, which like has not")
    flat = [
        np.unpackbits(bits[name], count=int(np.prod(shape))).astype(bool).reshape(shape)
        for name, shape in want.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in flat])
