"""The parts that the gradients of one example consist of: operands h, cotangents δ, and Jacobians of one leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from pkjax.paths.sites import Site
from pkjax.paths.taps import network_sites, network_tapped
from pkjax.programs.program import BoundProgram

__all__ = ["LeafJacobian", "TappedNetwork"]

LeafJacobian = Callable[[int, int], Array]
"""Maps a range of outputs (first, last) to the Jacobian (N, last - first, entries of the leaf)."""


@dataclass(frozen=True, eq=False)
class TappedNetwork:
    """A network with taps, ready for backward passes from each of its K outputs."""

    fn: BoundProgram
    leaves: list[Any]
    treedef: Any
    sites: tuple[Site, ...]
    by_leaf: dict[int, tuple[int, ...]]
    curved: bool
    n_out: int
    dtype: Any

    @classmethod
    def of(cls, fn: BoundProgram, params: PyTree, x: Array) -> "TappedNetwork":
        """Put taps at the sites of a network, found for `x`, a batch of one."""
        leaves, treedef = jax.tree.flatten(params)
        return cls(fn, leaves, treedef, *network_sites(fn, params, x), fn.out.shape[1], fn.out.dtype)

    def operands_and_cotangents(self, x: Shaped[Array, "..."]) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
        """Return h and δ (K, ...) of every site for one example, by one backward pass per output."""
        params = jax.tree.unflatten(self.treedef, self.leaves)

        def tapped(taps: tuple[Array, ...]) -> tuple[Array, Any]:
            return network_tapped(self.fn, params, x[None], taps, self.sites)

        zeros = tuple(jnp.zeros(site.shape, site.dtype) for site in self.sites)
        _, pullback, operands = jax.vjp(tapped, zeros, has_aux=True)
        return operands, jax.vmap(lambda e: pullback(e)[0])(jnp.eye(self.n_out, dtype=self.dtype)[:, None])

    def through_sites(self, index: int, operands: Any, deltas: Any) -> LeafJacobian:
        """Return the Jacobian of a leaf from the operands and cotangents of a batch."""
        def jacobian(first: int, last: int) -> Array:
            def one_site(s: int) -> Array:
                over_outputs = jax.vmap(self.sites[s].pullback, (None, 0))
                return jax.vmap(over_outputs)(operands[s], deltas[s][:, first:last])

            used = self.by_leaf[index]
            return _flat(sum(map(one_site, used[1:]), start=one_site(used[0])))

        return jacobian


def _flat(jacobian: Array) -> Array:
    return jacobian.reshape(*jacobian.shape[:2], -1)
