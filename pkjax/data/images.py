"""Images that are stored as bytes and read as normalised numbers, those that are asked for alone."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Images"]


class Images:
    """An array (N, H, W, C) in float32 that is computed when it is read: (bytes / levels − mean) / std.

    Indices and slices compute what they choose, and nothing is kept. Everything else that arrays do, it does as the
    whole array: arithmetic, NumPy's and JAX's functions, methods such as `mean`, arguments of functions under `jit`.
    Part of a `Dataset`.

    Examples:
        >>> images = Images(np.full((100, 8, 8, 1), 3, np.uint8), 4, np.zeros(1, np.float32), np.ones(1, np.float32))
        >>> images
        Images(float32[100,8,8,1])
        >>> images[:2].shape, float(images[0, 0, 0, 0]), float(jnp.max(images))
        ((2, 8, 8, 1), 0.75, 0.75)
    """

    dtype = np.dtype(np.float32)

    def __init__(self, pixels: np.ndarray, levels: int, mean: np.ndarray, std: np.ndarray) -> None:
        """Take the stored pixels, which are not copied, and numbers per channel."""
        self._pixels, self._levels, self._mean, self._std = pixels, levels, mean, std

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return self._pixels.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._pixels.ndim

    @property
    def size(self) -> int:
        """Number of entries."""
        return self._pixels.size

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Any) -> Any:
        # A part at a time of one new array: no second one of its size.
        out = np.asarray(self._pixels[index]).astype(np.float32)
        out /= np.float32(self._levels)
        out -= np.broadcast_to(self._mean, self.shape)[index]
        out /= np.broadcast_to(self._std, self.shape)[index]
        return out[()]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("images are stored as bytes: an array of their numbers is always new")
        return np.asarray(self[...], dtype)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self[...])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self[...], name)

    def __repr__(self) -> str:
        return f"Images({self.dtype}[{','.join(map(str, self.shape))}])"


def _operator(name: str) -> Any:
    def apply(self: Images, *others: Any) -> Any:
        return getattr(self[...], name)(*others)

    apply.__name__ = name
    return apply


_TWO = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul")
_COMPARING = ("lt", "le", "gt", "ge", "eq", "ne", "contains")
for _name in (*_TWO, *(f"r{name}" for name in _TWO), *_COMPARING, "neg", "pos", "abs"):
    setattr(Images, f"__{_name}__", _operator(f"__{_name}__"))

# A tree of one array, so that JAX's transformations take images as an argument.
jax.tree_util.register_pytree_node(Images, lambda images: ((images[...],), None), lambda _, leaves: leaves[0])
