"""Reading a network under an algebra: its program is traced, and walked with the table of rules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pkjax.paths.errors import NotPathNetworkError
from pkjax.paths.interpreter import Algebra, Const, Gate, Interpreter, PathSum, Value
from pkjax.paths.rules import RULES
from pkjax.trees import check_output, naming_input

__all__ = ["interpret"]


def interpret(algebra: Algebra, apply_fn: Callable[[Any, Any], Any], params: Any, x: Any,
              sources: Callable[[int, Any], Any], signal: Callable[[Any], Any]) -> PathSum:
    """Interpret a network under an algebra.

    ``sources(leaf, value)`` and ``signal(x)`` return what the path sums of parameter leaves and of the input hold.
    Integer leaves and integer inputs (token indices, say) are constants.
    """
    abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)), (params, x))
    with naming_input(abstract[1]):
        closed, out = jax.make_jaxpr(apply_fn, return_shape=True)(*abstract)
    check_output(out, x)
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
            args.append(Const(leaf))
    interpreter = Interpreter(algebra, RULES)
    (result,) = interpreter.run_closed(closed, args)
    if isinstance(result, Gate):
        raise NotPathNetworkError("the network's output is piecewise constant: it has no paths")
    return interpreter.lifted(result)
