"""Networks that are no Linen modules, as Linen modules: what initialises, prunes and trains takes one kind alone."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, PyTree

from pkjax.adapters import mode_flags

__all__ = ["Functions", "Nnx"]

_STATE = "nnx_state"


class Nnx(nn.Module):
    """An NNX module as a Linen module: its parameters are `params`, its other variables one more collection.

    Dropout and other random layers draw from Linen's stream "dropout" in training mode.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    kind: type

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Evaluate the network, in training mode or not."""
        if self.is_initializing():
            _, params, _, state = _split(self.make(nnx.Rngs(self.make_rng("params"))))
            self._put("params", params)
            self._put(_STATE, state)
        definition, shapes, random, shapes_of_state = _shapes(self.make)
        params, state = (_filled(like, self.variables.get(name, {}))
                         for like, name in ((shapes, "params"), (shapes_of_state, _STATE)))
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else jax.random.key(0)
        module = nnx.merge(definition, params, _seeded(random, key), state, copy=True)
        (module.train if train else module.eval)()
        out = module(x, **mode_flags(self.kind.__call__, train))
        if train and self.is_mutable_collection(_STATE):
            self._put(_STATE, _split(module)[3])
        return out

    def _put(self, collection: str, state: Any) -> None:
        for name, value in nnx.to_pure_dict(state).items():
            self.put_variable(collection, name, value)


def _split(module: nnx.Module) -> tuple[Any, Any, Any, Any]:
    definition, params, random, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return definition, params, random, state


@lru_cache(maxsize=32)
def _shapes(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any, Any, Any]:
    """Split a network that is not initialised: shapes stand for its arrays."""
    return _split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def _filled(like: Any, values: Mapping[str, Any]) -> Any:
    state = jax.tree.map(lambda leaf: leaf, like)
    if values:
        nnx.replace_by_pure_dict(state, nn.unbox(dict(values)))
    return state


def _seeded(random: Any, key: Array) -> Any:
    """Begin the streams of random numbers, each at a key of its own."""
    leaves, structure = jax.tree.flatten(random)
    fresh = []
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, i)
            fresh.append(jax.random.split(own, leaf.shape) if leaf.shape else own)
        else:
            fresh.append(jnp.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, fresh)


class Functions(nn.Module):
    """A pair of functions, init(key, x) → parameters and apply(parameters, x) → outputs, as a Linen module."""

    begin: Callable[[Array, Array], PyTree]
    network: Callable[[PyTree, Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Evaluate the network."""
        if self.is_initializing():
            params = self.begin(self.make_rng("params"), x)
            if not isinstance(params, Mapping) or not params:
                raise TypeError("the parameters of a pair (init, apply) must be a dictionary, got "
                                f"{type(params).__name__}")
            for name, value in params.items():
                self.put_variable("params", name, value)
        return self.network(dict(self.variables["params"]), x)
