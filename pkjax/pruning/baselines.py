"""Baselines that show what a pruning method knows: masks shuffled, weights drawn anew, scores reversed.

Where a network trains as well after its masks are shuffled, or its weights drawn anew, the method has found only a
density for each layer, and no weights. Source: the ablations of Frankle, Dziugaite, Roy and Carbin 2021,
"Pruning Neural Networks at Initialization: Why Are We Missing the Mark?".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from pkjax.pruning.prunable import prunable_leaves
from pkjax.trees import Choice, check_masks, kernels, leaf_names

__all__ = ["Initializer", "inverted", "reinitialize", "shuffle_masks"]

Initializer = Callable[[Key[Array, ""], Sequence[int], DTypeLike], Array]
"""Draws weights: maps (key, shape, dtype) to an array, as the functions of ``jax.nn.initializers`` do."""


def shuffle_masks(masks: PyTree, *, key: Key[Array, ""]) -> PyTree:
    """Permute every mask within its leaf: each layer keeps its count, but not its choice of weights.

    All permutations of a leaf are equally likely; leaves that are all True stay as they are. The same key gives
    the same masks. Works under ``jit``.

    Args:
        masks: booleans, as ``prune`` returns them.
        key: a typed key, ``jax.random.key(seed)``.

    Returns:
        Masks of the same tree.

    Raises:
        TypeError: the masks are not booleans, or ``key`` is not a typed key.

    Source: Frankle et al. 2021, the ablation "randomly shuffling".

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> masks = {"bias": jnp.ones(2, bool), "kernel": jnp.arange(6).reshape(3, 2) < 2}
        >>> shuffled = shuffle_masks(masks, key=jax.random.key(0))
        >>> shuffled["bias"].tolist(), int(shuffled["kernel"].sum())
        ([True, True], 2)
    """
    check_masks(masks, masks)
    leaves, structure = jax.tree.flatten(masks)
    keys = _split(key, len(leaves), "shuffle_masks")
    return jax.tree.unflatten(structure, [_shuffle(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])


def reinitialize(
    params: PyTree,
    *,
    key: Key[Array, ""],
    prunable: Choice = kernels,
    initializer: Initializer | None = None,
) -> PyTree:
    """Draw the prunable weights anew from the distribution that they came from; keep all other leaves.

    By default the weights of each leaf are permuted within it: a draw without replacement from the leaf's empirical
    distribution, which needs no knowledge of the initializer. With ``initializer`` (say
    ``jax.nn.initializers.lecun_normal()``) every leaf is drawn by it. Works under ``jit``.

    Pass the parameters before pruning, and mask the result,
    ``pk.apply_masks(pk.reinitialize(params, key=key), masks)``: a permutation would move the zeros of parameters
    already masked.

    Args:
        params: the parameters before pruning.
        key: a typed key, ``jax.random.key(seed)``.
        prunable: which leaves to draw anew, as in ``prune``.
        initializer: draws a leaf from (key, shape, dtype); None permutes.

    Returns:
        Parameters of the same tree, shapes and types.

    Raises:
        ValueError: ``prunable`` selects no weight, or the initializer returns another shape or type.
        TypeError: ``key`` is not a typed key, or a prunable leaf holds no floating-point numbers.

    Source: Frankle et al. 2021, the ablation "reinitialization".

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = {"bias": jnp.ones(2), "kernel": jnp.arange(6.0).reshape(3, 2)}
        >>> drawn = reinitialize(params, key=jax.random.key(0))
        >>> drawn["bias"].tolist(), sorted(drawn["kernel"].ravel().tolist())
        ([1.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    """
    chosen = prunable_leaves(params, prunable)
    leaves, structure = jax.tree.flatten(params)
    keys = _split(key, len(leaves), "reinitialize")
    for i, name in enumerate(leaf_names(params)):
        if not chosen[i] or jnp.size(leaves[i]) == 0:
            continue
        if initializer is None:
            leaves[i] = _shuffle(keys[i], leaves[i])
            continue
        shape, dtype = jnp.shape(leaves[i]), jnp.result_type(leaves[i])
        leaves[i] = initializer(keys[i], shape, dtype)
        if leaves[i].shape != shape or leaves[i].dtype != dtype:
            raise ValueError(f"initializer was asked for leaf {name!r} of {dtype}{list(shape)}, but returned "
                             f"{leaves[i].dtype}{list(leaves[i].shape)}")
    return jax.tree.unflatten(structure, leaves)


def inverted(score_fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Reverse the order of a score function, so that pruning removes first the weights it would keep.

        S ↦ −S

    The result takes the arguments of ``score_fn``, has its signature and raises what it raises. Two inversions of the
    same function are equal, so that what is compiled for one serves the other.

    Source: Frankle et al. 2021, the ablation "inversion".

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax.pruning.scores.data_free import magnitude
        >>> inverted(magnitude)({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[-2.0, -1.0]]
        >>> inverted(magnitude) == inverted(magnitude)
        True
    """
    return _Inverted(score_fn)


@dataclass(frozen=True)
class _Inverted:
    """The negative of a score function: compared and hashed by it."""

    score_fn: Callable[..., PyTree]

    def __post_init__(self) -> None:
        object.__setattr__(self, "__wrapped__", self.score_fn)  # where inspect.signature looks

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        return jax.tree.map(jnp.negative, self.score_fn(*args, **kwargs))


def _split(key: Any, count: int, what: str) -> Key[Array, " count"]:
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(f"{what} needs a typed key, jax.random.key(seed), but got {key!r}")
    return jax.random.split(key, count)


def _shuffle(key: Key[Array, ""], leaf: Array | np.ndarray) -> Array:
    return jax.random.permutation(key, jnp.ravel(leaf)).reshape(jnp.shape(leaf))
