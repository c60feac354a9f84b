"""Arrays on meshes of devices: work on automatic axes, whatever mesh the arrays came on."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

__all__ = ["automatic", "automatic_axes"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def automatic_axes(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function take arrays of a mesh with explicit axes, which is what ``jax.make_mesh`` makes by default.

    Operations on arrays of such a mesh raise ``ShardingTypeError`` wherever the sharding of their result is ambiguous.
    The function gets the arrays among its arguments, trees included, on the same devices with automatic axes, and the
    arrays that it returns come back on the mesh with explicit axes; nothing is copied. Other arguments, traced arrays
    among them, are passed on as they are.

    Examples:
        >>> import jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
        >>> x = jax.device_put(jnp.arange(6.0).reshape(2, 3), NamedSharding(mesh, jax.P("rows")))
        >>> automatic_axes(lambda x: jnp.cumsum(x.reshape(-1)))(x).sharding.mesh.axis_types
        (Explicit,)
    """
    @functools.wraps(fn)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=_is_stream)
        explicit = next((leaf.sharding.mesh for leaf in leaves if _on_explicit_mesh(leaf)), None)
        if explicit is None:
            return fn(*args, **kwargs)
        ambient = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        args, kwargs = automatic((args, kwargs))
        with jax.set_mesh(_automatic_mesh(explicit)) if ambient else contextlib.nullcontext():
            out = fn(*args, **kwargs)

        def back(leaf: Any) -> Any:
            moves = _on_mesh(leaf) and leaf.sharding.mesh == _automatic_mesh(explicit)
            return _moved(leaf, explicit) if moves else leaf

        return jax.tree.map(back, out)

    return wrapped


def automatic(tree: Any) -> Any:
    """Move the arrays of meshes with explicit axes to automatic axes of the same devices, and copy nothing.

    Examples:
        >>> mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
        >>> x = jax.device_put(jax.numpy.ones(3), NamedSharding(mesh, jax.P("rows")))
        >>> automatic(x).sharding.mesh.axis_types
        (Auto,)
    """
    def move(leaf: Any) -> Any:
        return _moved(leaf, _automatic_mesh(leaf.sharding.mesh)) if _on_explicit_mesh(leaf) else leaf

    return jax.tree.map(move, tree, is_leaf=_is_stream)


def _is_stream(value: Any) -> bool:
    return isinstance(value, Iterator)


def _on_mesh(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and (
        isinstance(leaf.sharding, NamedSharding))


def _on_explicit_mesh(leaf: Any) -> bool:
    return _on_mesh(leaf) and AxisType.Explicit in leaf.sharding.mesh.axis_types


def _automatic_mesh(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def _moved(leaf: Any, mesh: Mesh) -> jax.Array:
    sharding = leaf.sharding
    return jax.device_put(leaf, NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind))
