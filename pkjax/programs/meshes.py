"""Arrays on meshes of devices: work on automatic axes, whatever mesh the arrays came on."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

__all__ = ["automatic_axes"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def automatic_axes(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function take arrays of a mesh with explicit axes, which is what ``jax.make_mesh`` makes by default.

    Operations on arrays of such a mesh raise ``ShardingTypeError`` wherever the sharding of their result is ambiguous.
    The function gets the arrays among its arguments, trees included, on the same devices with automatic axes, and the
    arrays that it returns come back on the mesh with explicit axes; nothing is copied. Other arguments, traced arrays
    among them, are passed on as they are.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
    >>> x = jax.device_put(jnp.arange(6.0).reshape(2, 3), NamedSharding(mesh, jax.P("rows")))
    >>> automatic_axes(lambda x: jnp.cumsum(x.reshape(-1)))(x).sharding.mesh.axis_types
    (Explicit,)
    """
    @functools.wraps(fn)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        explicit = next((leaf.sharding.mesh for leaf in jax.tree.leaves((args, kwargs))
                         if _on_mesh(leaf) and AxisType.Explicit in leaf.sharding.mesh.axis_types), None)
        if explicit is None:
            return fn(*args, **kwargs)
        automatic = Mesh(explicit.devices, explicit.axis_names, axis_types=(AxisType.Auto,) * explicit.devices.ndim)
        alone = jax.sharding.get_abstract_mesh().empty
        alone = jax.sharding.get_abstract_mesh().empty
        args, kwargs = _moved((args, kwargs), explicit, automatic)
        with contextlib.nullcontext() if alone else jax.set_mesh(automatic):
            out = fn(*args, **kwargs)
        return _moved(out, automatic, explicit)

    return wrapped


def _on_mesh(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and (
        isinstance(leaf.sharding, NamedSharding))


def _moved(tree: Any, old: Mesh, new: Mesh) -> Any:
    """Move the arrays of one mesh to another one of the same devices and axes."""
    def move(leaf: Any) -> Any:
        if not _on_mesh(leaf) or leaf.sharding.mesh != old:
            return leaf
        return jax.device_put(leaf, NamedSharding(new, leaf.sharding.spec, memory_kind=leaf.sharding.memory_kind))

    return jax.tree.map(move, tree)
