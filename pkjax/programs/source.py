"""Where an operation of a program stands in the user's code, for error messages."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from jax.extend import source_info_util

__all__ = ["in_place", "module_scope", "source_line"]

LIBRARIES = ("/jax/", "/jaxlib/", "/flax/", "/pkjax/", "/jaxtyping/", "/beartype/", "<")


def source_line(enclosing: Sequence[Any]) -> str:
    """Name the innermost line outside JAX, Flax and this package, else the innermost that JAX would name.

    Args:
        enclosing: the operation, and before it the calls around it.
    """
    return next((line for eqn in reversed(enclosing) if (line := _line(eqn.source_info))), "an unknown line")


def _line(source_info: Any) -> str:
    traceback = getattr(source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        file = frame.file_name.replace("\\", "/")
        if not any(part in file for part in LIBRARIES):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    summary = source_info_util.summarize(source_info)
    return "" if summary.startswith("unknown") else summary


def module_scope(enclosing: Sequence[Any]) -> str:
    """Name the Flax module, or other named scope, that an operation stands in; "" where there is none."""
    return next((str(eqn.source_info.name_stack) for eqn in reversed(enclosing) if str(eqn.source_info.name_stack)), "")


def in_place(eqn: Any) -> AbstractContextManager[None]:
    """Give what is traced in this context the line and the scope of an operation: for programs evaluated anew."""
    scope = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=scope)
