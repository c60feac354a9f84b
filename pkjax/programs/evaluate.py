"""Functions that are traced at each call and compiled once for all that consist of the same operations."""

from collections.abc import Callable
from typing import Any

import jax

from pkjax.programs.program import BoundProgram, trace

__all__ = ["evaluate", "evaluate_program"]


def evaluate(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Evaluate a function by what is compiled for its program, whatever it closes over.

    Examples:
        >>> import jax.numpy as jnp
        >>> evaluate(lambda x: 2 * x, jnp.ones(2)).tolist()
        [2.0, 2.0]
    """
    return evaluate_program(BoundProgram(*trace(fn, *arguments, opaque=True)), *arguments)


@jax.jit
def evaluate_program(program: BoundProgram, *arguments: Any) -> Any:
    """Evaluate a program, compiled once for equal ones."""
    return program(*arguments)
