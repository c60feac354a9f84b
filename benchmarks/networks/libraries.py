"""One form for networks of four libraries: the shapes of all that they hold, and the function that values make."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk

Network = tuple[Callable[[Any, Any], Any], Any]


@dataclass(frozen=True, eq=False)
class Built:
    """A network without its numbers: nothing is drawn, and nothing computed."""

    shapes: Any                             # of the parameters and of the state
    network: Callable[[Any], Network]       # values like `shapes` → (apply_fn, params)


def linen(module: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Built:
    """Build a module of Flax Linen for inputs of this shape and type."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), dtype))
    return Built(shapes, lambda variables: pk.from_linen(module, variables))


def nnx(make: Callable[[Any], Any]) -> Built:
    """Build a module of Flax NNX that `make(rngs)` returns."""
    from flax import nnx as flax_nnx

    definition, state = flax_nnx.split(flax_nnx.eval_shape(lambda: make(flax_nnx.Rngs(0))))
    return Built(state, lambda values: pk.from_nnx(flax_nnx.merge(definition, values)))


def haiku(forward: Callable[[Any, bool], Any], shape: tuple[int, ...]) -> Built:
    """Build a function of Haiku, `forward(x, is_training)`."""
    import haiku as hk

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, True),
                            jax.ShapeDtypeStruct((1, *shape), jnp.float32))

    def network(values: Any) -> Network:
        params, state = values
        return lambda p, x: net.apply(p, state, x, False)[0], params

    return Built(shapes, network)


def equinox(make: Callable[[Any], Any]) -> Built:
    """Build a module of Equinox without state, `make(key)`."""
    import equinox as eqx

    def network(model: Any) -> Network:
        params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)
        return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params

    made = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, rest = eqx.partition(made, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Built(shapes, lambda values: network(eqx.combine(values, rest)))


def parameters(built: Built) -> int:
    """Count what trains, by shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(built)))


def abstract(built: Built) -> Any:
    """Shapes of the parameters alone."""
    return jax.eval_shape(lambda values: built.network(values)[1], built.shapes)


def drawn(built: Built, dtype: Any, seed: int = 0) -> Any:
    """Draw values like `built.shapes`: kernels of He's size, averages and offsets that are not 0, variances near 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path).lower()
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if any(word in name for word in ("scale", "var", "norm.weight")):
            value = rng.uniform(0.8, 1.2, leaf.shape)
        elif any(word in name for word in ("bias", "offset", "mean", "'b'")) or leaf.ndim < 2:
            value = rng.normal(scale=0.1, size=leaf.shape)
        else:
            value = rng.normal(scale=np.sqrt(2 * max(leaf.shape[0], leaf.shape[-1]) / leaf.size), size=leaf.shape)
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(draw, built.shapes)


def without_means(values: Any) -> Any:
    """Set the running means of BatchNorm to 0: they are subtracted, which closes gates."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "mean" in jax.tree_util.keystr(path) else leaf, values)
