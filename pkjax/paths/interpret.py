"""Reading a network under an algebra: its program is walked with the table of rules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pkjax.paths.coefficients import FrozenInterpreter
from pkjax.paths.errors import NotPathNetworkError
from pkjax.paths.interpreter import Algebra, Const, Gate, Interpreter, PathSum, Value
from pkjax.paths.rules import RULES
from pkjax.programs.program import BoundProgram

__all__ = ["interpret"]


def interpret(algebra: Algebra, fn: BoundProgram, params: Any, x: Any, sources: Callable[[int, Any], Any],
              signal: Callable[[Any], Any], *, frozen: bool = False) -> PathSum:
    """Interpret a network under an algebra.

    Args:
        algebra: what to compute about path sums.
        fn: the network's program for one example.
        params: its parameters; leaves that hold no floating-point numbers are constants.
        x: one example as a batch, (1, *input), or a tree of such arrays; integers are constants.
        sources: (leaf's index, leaf) → what its path sum holds.
        signal: x → what its path sum holds.
        frozen: let what is not linear in the signal be coefficients on paths (``pkjax.paths.coefficients``).

    Raises:
        NotPathNetworkError: an operation has no paths.
    """
    args: list[Value] = []
    for i, leaf in enumerate(jax.tree.leaves(params)):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            args.append(PathSum(sources(i, leaf), jnp.shape(leaf), jnp.result_type(leaf), False, {(i,): 1}))
        else:
            args.append(Const(leaf))
    for leaf in jax.tree.leaves(x):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            args.append(PathSum(signal(leaf), jnp.shape(leaf), jnp.result_type(leaf), True))
        else:
            args.append(Const(leaf, of_input=True))
    interpreter = (FrozenInterpreter if frozen else Interpreter)(algebra, RULES, fn.constants)
    (result,) = interpreter.run(fn.program.jaxpr, [Const(interpreter.constant(c)) for c in fn.program.consts], args)
    if isinstance(result, Gate):
        raise NotPathNetworkError("the network's output is piecewise constant: it has no paths")
    return interpreter.lifted(result)
