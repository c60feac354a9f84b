"""A Flax module, Linen or NNX, as one function of parameters and state for training and evaluation."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from pkjax.adapters import from_linen, from_nnx, linen_init, mode_flags

__all__ = ["Forward", "SplitModule", "placed", "split_module"]

Forward = Callable[[PyTree, PyTree, Array, Array | None], tuple[Array, PyTree]]
"""Maps (params, state, batch, key) to (logits, new state); a key means training mode, None evaluation mode."""


class SplitModule(NamedTuple):
    """A network to train. Equal modules share one `forward`, and so everything compiled from it."""

    forward: Forward
    params: PyTree
    state: PyTree


def split_module(module: Any, variables: PyTree | None, example: Array, seed: int) -> SplitModule:
    """Split a Linen or NNX module into its function, parameters and state.

    Raises:
        TypeError: `module` is not a Flax module.
        ValueError: a Linen module's variables lack `params`, or variables are given with an NNX module.
    """
    import flax.linen as nn
    from flax import nnx

    if isinstance(module, nn.Module):
        if variables is None:
            variables = linen_init(module)(jax.random.key(seed), example)
        _, params = from_linen(module, variables)       # checks and unboxes the variables
        state = {name: value for name, value in variables.items() if name != "params"}
        try:
            return SplitModule(_linen(module), params, state)
        except TypeError:                               # a field cannot be hashed: compiled for this call only
            return SplitModule(_linen.__wrapped__(module), params, state)
    if isinstance(module, nnx.Module):
        if variables is not None:
            raise ValueError("an NNX module holds its own variables: pass variables=None")
        _, params = from_nnx(module)
        definition, kept, state = nnx.split(nnx.clone(module), nnx.Param, ...)
        return SplitModule(_nnx(type(module), definition, kept), params, state)
    raise TypeError(f"training takes a Linen or NNX module, got {type(module).__name__}")


def placed(module: Any, params: PyTree, state: PyTree) -> tuple[Any, PyTree | None]:
    """Put parameters and state into a module: the module and variables that a training with them starts from.

    A Linen module stays as it is, beside its variables; of an NNX module it is a copy that holds them.
    """
    import flax.linen as nn
    from flax import nnx

    if isinstance(module, nn.Module):
        return module, {"params": params, **state}
    copy = nnx.clone(module)
    kept = nnx.state(copy, nnx.Param)
    nnx.replace_by_pure_dict(kept, params)
    nnx.update(copy, kept, state)
    return copy, None


@lru_cache(maxsize=32)
def _linen(module: Any) -> Forward:
    flags = {training: mode_flags(type(module).__call__, training) for training in (False, True)}

    def forward(params: PyTree, state: PyTree, x: Array, key: Array | None) -> tuple[Array, PyTree]:
        variables = {"params": params, **state}
        if key is None:
            return from_linen(module, variables)[0](params, x), state
        out, changed = module.apply(variables, x, mutable=list(state), rngs={"dropout": key}, **flags[True])
        return out, {**state, **changed}

    return forward


def _nnx(kind: type, definition: Any, template: Any) -> Forward:
    from flax import nnx

    flags = {training: mode_flags(kind.__call__, training) for training in (False, True)}

    def forward(params: PyTree, state: PyTree, x: Array, key: Array | None) -> tuple[Array, PyTree]:
        filled = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(filled, params)
        model = nnx.merge(definition, filled, state, copy=True)
        (model.eval if key is None else model.train)()
        out = model(x, **flags[key is not None])
        return out, nnx.state(model, nnx.Not(nnx.Param))

    return forward
