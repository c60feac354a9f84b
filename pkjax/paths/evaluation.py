"""Evaluating a path polynomial: one walk of the network for each example."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from pkjax.network import Network
from pkjax.paths.interpret import interpret
from pkjax.trees import as_array, is_floating

__all__ = ["evaluate_paths", "unit_weights"]


def evaluate_paths(make: Callable[..., Any], network: Network, x: Array, gates: Sequence[ArrayLike] | None,
                   pool: str = "sum", hold: Callable[[Any], Any] = lambda value: value,
                   release: Callable[[Any], Any] = lambda held: held[0],
                   source: Callable[[int, Any], Any] | None = None) -> Any:
    """Walk a network for each example of x, under ``make(gates, whether maxima stay)``; stack the examples' values.

    Parameters and input are held as ``hold`` says, or the former as ``source(index of the leaf, leaf)`` does;
    ``release`` makes arrays of what the output (1, K) holds.
    """
    if pool not in ("sum", "max"):
        raise ValueError(f'pool must be "sum" or "max", but is {pool!r}')

    def one(x: Array, gates: tuple[Array, ...] | None) -> Any:
        algebra = make(gates, pool == "max")
        out = interpret(algebra, network.fn, network.params, x[None], source or (lambda _, leaf: hold(leaf)), hold,
                        frozen=gates is not None)
        if algebra.gates is not None and algebra.used != len(algebra.gates):
            raise ValueError(f"gates holds {len(algebra.gates)} arrays, but this network uses {algebra.used}; record "
                             "them with pkjax.paths.gates on the same apply_fn")
        return release(out.value)

    if len(x) == 1:      # convolutions of one example have a faster form, which vmap would undo
        values = one(x[0], None if gates is None else tuple(map(jnp.asarray, gates)))
        return jax.tree.map(lambda v: v[None], values)
    return jax.vmap(one)(x, None if gates is None else tuple(_by_example(g, i, len(x)) for i, g in enumerate(gates)))


def _by_example(gate: ArrayLike, index: int, n: int) -> Array:
    """One gate of a batch, (N·s, ...), as those of its examples, (N, s, ...)."""
    gate = jnp.asarray(gate)
    if gate.ndim == 0 or gate.shape[0] % n:
        raise ValueError(f"gate {index} has shape {gate.shape}, but x holds {n} examples; record gates with "
                         "pkjax.paths.gates on a batch of the same size")
    return gate if gate.shape == (n,) else gate.reshape(n, gate.shape[0] // n, *gate.shape[1:])


def unit_weights(params: PyTree) -> PyTree:
    """Replace every floating leaf by ones: the parameters of a path network that counts paths.

    Computed from the leaves: XLA's CPU compiler (jaxlib 0.10) multiplies a sum by a matrix wrongly where it knows that
    all columns are alike, as in ``jit(lambda x: x.sum((1, 2)) @ jnp.ones((512, 10)))``.

    Examples:
        >>> import jax.numpy as jnp
        >>> unit_weights({"kernel": jnp.array([-2., 0.]), "count": jnp.array(3)})
        {'count': Array(3, ...), 'kernel': Array([1., 1.], ...)}
    """
    return jax.tree.map(lambda p: jnp.nan_to_num(as_array(p)) * 0 + 1 if is_floating(p) else p, params)
