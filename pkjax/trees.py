"""Checks and selections on pytrees that share the structure of the parameters."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

__all__ = [
    "ApplyFn",
    "Choice",
    "Predicate",
    "accumulator",
    "apply_masks",
    "as_array",
    "check_distinct",
    "check_finite",
    "check_like",
    "check_masks",
    "check_structure",
    "is_boolean_tree",
    "is_floating",
    "kernels",
    "leaf_keys",
    "leaf_names",
    "select",
    "shapes",
    "trainable_leaves",
    "trainable_masks",
    "trained_entries",
]

ApplyFn = Callable[[PyTree, Array], Array]
"""A network: maps (parameters, batch of inputs (N, *input)) to outputs (N, K)."""

Predicate = Callable[[tuple[Any, ...], Any], bool]
"""Chooses leaves: maps (key path, leaf) to True or False."""

Choice = Any
"""Which parameters: a ``Predicate``, a tree of booleans like the parameters, or None for all floating-point leaves.

A tree of booleans is recognised by its leaves, so it may be callable (an Equinox module, a Flax struct)."""


def leaf_names(tree: PyTree) -> list[str]:
    """Name every leaf by its key path, in flattening order; different leaves have different names.

    Where keys hold the separator themselves, so that two paths read alike, those are written out.

    Examples:
        >>> leaf_names({"dense": {"bias": 0, "kernel": 1}})
        ['dense/bias', 'dense/kernel']
        >>> leaf_names({"a": {"b": 0}, "a/b": 1, "c": 2})
        ["['a']['b']", "['a/b']", 'c']
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [_name(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    alike = Counter(names)
    names = [jax.tree_util.keystr(path) if alike[name] > 1 else name for path, name in zip(paths, names, strict=True)]
    alike = Counter(names)      # keys of other types may print alike even so
    return [f"{name}#{i}" if alike[name] > 1 else name for i, name in enumerate(names)]


def leaf_keys(tree: PyTree, what: str) -> list[tuple[str, ...]]:
    """Name every leaf by the parts of its key path: the same for equal keys in any containers.

    Raises:
        ValueError: two leaves have the same parts, as under the keys 1 and "1".

    Examples:
        >>> leaf_keys({"a/b": 0, "c": [1]}, "tree")
        [('a/b',), ('c', '0')]
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    keys = [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path in paths]
    check_distinct(keys, what)
    return keys


def check_distinct(keys: Sequence[tuple[str, ...]], what: str) -> None:
    """Raise ValueError where two leaves have the same key path, part by part."""
    if len(set(keys)) != len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(f"{what} has two leaves under the keys {' → '.join(map(repr, twice)) or '(root)'}, which "
                         "their names cannot tell apart: give them different keys")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def shapes(tree: PyTree) -> PyTree:
    """Shape and type of each leaf, in its place."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), _dtype(leaf)), tree)


def as_array(leaf: Any) -> Array:
    """Put a leaf on the device, without compiling anything; arrays and tracers are left as they are."""
    return leaf if isinstance(leaf, jax.Array) else jax.device_put(np.asarray(leaf))


def accumulator(dtype: Any) -> Any:
    """Return the dtype that products are summed in: the given one, or float32 where that is narrower."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers, and so can train."""
    return bool(jnp.issubdtype(_dtype(leaf), jnp.floating))


def _dtype(leaf: Any) -> Any:
    # result_type knows the types that Python's numbers and NumPy's arrays take, but is slow to say an array's own.
    return leaf.dtype if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.result_type(leaf)


_KERNELS = frozenset(("kernel", "w", "weight"))
_OTHERS = frozenset(("bias", "scale", "offset", "embedding", "embeddings", "positions", "gamma", "beta"))


def kernels(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is the kernel of a dense or convolution layer (the default prunable parameters).

    A floating-point leaf of two or more axes counts, by its name and its shape. Names that libraries give to kernels
    (``kernel`` in Flax, ``w`` in Haiku, ``weight`` in Equinox and PyTorch) count whatever the shape; ``bias``,
    ``scale``, ``offset``, ``embedding``, ``embeddings``, ``positions``, ``gamma`` and ``beta`` do not. Under any other
    name a leaf of three or more axes that is longer than 1 along one of them alone, such as (1, 1, 1, C) or (C, 1, 1),
    is a vector made to be broadcast, and does not count. Embeddings named ``weight`` (``equinox.nn.Embedding``) count:
    leave them out by a predicate or a tree of booleans of your own.

    Source: Gebhart, Saxena and Schrater (2021), appendix A.4.2: not biases, nor the parameters of BatchNorm.

    Examples:
        >>> import jax.numpy as jnp
        >>> kernels((jax.tree_util.DictKey("kernel"),), jnp.ones((3, 2)))
        True
        >>> kernels((jax.tree_util.DictKey("bias"),), jnp.ones(2))
        False
        >>> kernels((jax.tree_util.DictKey("offset"),), jnp.ones((1, 1, 1, 2)))     # of Haiku's BatchNorm
        False
    """
    names = _name(path).split("/") if path else [""]
    name = names[-2] if names[-1] == "value" and len(names) > 1 else names[-1]      # a variable of Flax NNX
    shape = jnp.shape(leaf)
    if not is_floating(leaf) or len(shape) < 2 or name in _OTHERS:
        return False
    return name in _KERNELS or len(shape) == 2 or sum(n != 1 for n in shape) > 1


def check_like(tree: PyTree, like: PyTree, what: str) -> None:
    """Raise ValueError, naming the first difference, unless ``tree`` has the structure and shapes of ``like``."""
    if str(jax.tree.structure(tree)) != str(jax.tree.structure(like)):
        got, want = leaf_names(tree), leaf_names(like)
        missing, extra = ([name for name in some if name not in other] for some, other in ((want, got), (got, want)))
        raise ValueError(f"{what} must have the tree structure of params, but " + (
            f"leaf {missing[0]!r} is missing" if missing else f"has the extra leaf {extra[0]!r}" if extra else
            f"is {jax.tree.structure(tree)}, where params is {jax.tree.structure(like)}"))
    for i, (leaf, model) in enumerate(zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)):
        if jnp.shape(leaf) != jnp.shape(model):
            raise ValueError(f"{what} leaf {leaf_names(like)[i]!r} has shape {jnp.shape(leaf)}, but params has "
                             f"{jnp.shape(model)}")


def check_structure(tree: PyTree, like: PyTree, what: str) -> None:
    """Raise ValueError, naming the first difference, unless ``tree`` has a leaf for each of ``like``."""
    got, want = leaf_names(tree), leaf_names(like)
    if got != want:
        differing = next((n for n in [*want, *got] if (n in got) != (n in want)), want[0])
        raise ValueError(f"{what} must have the tree structure of params, but differs at leaf {differing!r}")


def check_masks(masks: PyTree | None, params: PyTree) -> None:
    """Raise ValueError or TypeError unless ``masks`` is None or a tree of booleans shaped like ``params``."""
    if masks is None:
        return
    if hasattr(masks, "masks"):
        raise TypeError(f"masks must be a tree of booleans, but is a {type(masks).__name__}: pass its field masks")
    check_like(masks, params, "masks")
    for i, leaf in enumerate(jax.tree.leaves(masks)):
        if jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(f"masks leaf {leaf_names(masks)[i]!r} has dtype {jnp.result_type(leaf)}, but masks are "
                            "booleans")


def apply_masks(params: PyTree, masks: PyTree | None) -> PyTree:
    """Set the weights that are pruned to exactly +0, whatever they hold, and leave the others as they are.

        θ_j ↦ θ_j where mask_j, 0 elsewhere

    A selection, not a product: NaN, infinity and −0 under the mask become +0 too. Dtypes are kept. Works under `jit`,
    `grad` and `vmap`.

    Args:
        params: the parameters, or any tree of their structure and shapes.
        masks: booleans like `params`; None keeps everything.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: the trees differ in structure or shapes.
        TypeError: the masks are not booleans.

    Examples:
        >>> import jax.numpy as jnp
        >>> apply_masks({"kernel": jnp.array([1.0, -2.0, jnp.nan])}, {"kernel": jnp.array([True, True, False])})
        {'kernel': Array([ 1., -2.,  0.], dtype=float...)}
    """
    if masks is None:
        return params
    check_masks(masks, params)
    return jax.tree.map(_kept, params, masks)


def _kept(leaf: Any, mask: Any) -> Array:
    leaf = as_array(leaf)
    return jnp.where(as_array(mask), leaf, jnp.zeros((), leaf.dtype))


def check_finite(tree: PyTree, what: str) -> None:
    """Raise ValueError naming the first leaf of ``tree`` that holds NaN or infinity (traced leaves and shapes pass)."""
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) or not is_floating(leaf):
            continue
        values = np.asarray(leaf)  # NumPy's own functions run at once, under jit too
        finite = np.isfinite(values if values.dtype.kind == "f" else values.astype(np.float32))
        if not finite.all():
            bad = np.size(leaf) - int(finite.sum())
            raise ValueError(f"{what} leaf {leaf_names(tree)[i]!r} holds {bad} values that are NaN or infinite")


def is_boolean_tree(value: Any) -> bool:
    """Whether a value is a tree with at least one leaf, all of whose leaves are booleans or arrays of booleans.

    A function is one leaf that is not a boolean; a callable object that JAX knows as a tree is judged by its leaves.

    Examples:
        >>> is_boolean_tree({"kernel": True, "bias": False}), is_boolean_tree(kernels), is_boolean_tree({})
        (True, False, False)
    """
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, bool) or getattr(leaf, "dtype", None) == jnp.bool_ for leaf in leaves)


def select(choice: Choice, params: PyTree, name: str = "prunable") -> PyTree:
    """Read which parameters are chosen: a tree like ``params`` of Python booleans, or of arrays where given.

    Args:
        choice: a predicate (key path, leaf) → bool, a tree of booleans with a leaf for each of ``params``, or None
            for all floating-point leaves. What ``is_boolean_tree`` accepts is a tree, even if it can be called.
        params: the parameters.
        name: the argument's name, for errors.

    Raises:
        ValueError: a tree of booleans has other leaves than ``params``, or an array of another shape.
        TypeError: ``choice`` is none of the three.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2)), "steps": jnp.array(0)}
        >>> select(kernels, params)
        {'bias': False, 'kernel': True, 'steps': False}
        >>> select(None, params)
        {'bias': True, 'kernel': True, 'steps': False}
    """
    if choice is None:
        return jax.tree.map(is_floating, params)
    if is_boolean_tree(choice) or (not callable(choice) and not jax.tree.leaves(choice)):
        check_structure(choice, params, name)
        for i, (leaf, model) in enumerate(zip(jax.tree.leaves(choice), jax.tree.leaves(params), strict=True)):
            if jnp.ndim(leaf) and jnp.shape(leaf) != jnp.shape(model):
                raise ValueError(f"{name} leaf {leaf_names(params)[i]!r} has shape {jnp.shape(leaf)}, but params has "
                                 f"{jnp.shape(model)}: give one boolean, or one for each entry")
        leaves = [bool(leaf) if isinstance(leaf, bool | np.bool_) else leaf for leaf in jax.tree.leaves(choice)]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)
    if callable(choice):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: bool(choice(path, leaf)), params)
    raise TypeError(f"{name} must be a function of (key path, leaf), a tree of booleans like params, or None, but is a "
                    f"{type(choice).__name__} whose leaves are not all booleans")


def trainable_leaves(params: PyTree, trainable: Choice = None) -> PyTree:
    """Say leaf by leaf what Θ and Π differentiate: a tree like ``params`` of single booleans, or arrays where given.

    Leaves that do not hold floating-point numbers never train.

    Raises:
        ValueError: the tree does not match, or no leaf is left to train.
        TypeError: ``trainable`` is not a choice (see ``select``).
    """
    chosen = jax.tree.map(lambda t, leaf: t if is_floating(leaf) else False, select(trainable, params, "trainable"),
                          params)
    if not any(not isinstance(t, bool) or t for t in jax.tree.leaves(chosen)):
        raise ValueError("trainable selects no floating-point leaf of params: nothing to differentiate")
    return chosen


def trainable_masks(params: PyTree, trainable: Choice = None, masks: PyTree | None = None) -> PyTree:
    """Say entry by entry what Θ and Π differentiate: floating, chosen by ``trainable``, not masked away.

    Returns a tree like ``params`` of boolean arrays with the leaves' shapes.

    Raises ValueError where a tree does not match or nothing is left to train.
    """
    check_masks(masks, params)
    chosen = trainable_leaves(params, trainable)
    full = jax.tree.map(lambda t, leaf: jnp.broadcast_to(jnp.asarray(t, bool), jnp.shape(leaf)), chosen, params)
    return full if masks is None else jax.tree.map(jnp.logical_and, full, masks)


def trained_entries(params: PyTree, masks: PyTree | None = None, trainable: Choice = None
                    ) -> tuple[list[Any], tuple[bool, ...]]:
    """Say which entries of each leaf train (None: none does; a single True: all), and of which leaves all do."""
    check_masks(masks, params)
    leaves = jax.tree.leaves(trainable_leaves(params, trainable))
    if masks is None and all(isinstance(train, bool) for train in leaves):
        filled = [0 not in jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        moving = [train and holds for train, holds in zip(leaves, filled, strict=True)]
        return [np.ones((), bool) if train else None for train in moving], tuple(moving)
    given = [leaf for leaf in jax.tree.leaves((masks, trainable)) if not callable(leaf)]
    # Booleans known while tracing stay known, so that whole layers keep their cheaper route under jit.
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in given)
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        train = jax.tree.leaves(trainable_masks(params, trainable, masks))
    flags = [(bool(np.asarray(t).any()), bool(np.asarray(t).all())) if known else (True, False) for t in train]
    entries = [t if some and is_floating(leaf) else None
               for t, (some, _), leaf in zip(train, flags, jax.tree.leaves(params), strict=True)]
    return entries, tuple(all_ for _, all_ in flags)
