"""The dual Gram matrix G of the path kernel as derivatives of the path polynomial ``R(φ) = R_2(φ, x)`` at φ = θ²."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from pkjax.network import Network, read
from pkjax.paths.algebras import Polynomial
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.frozen import with_gates
from pkjax.programs.program import BoundProgram
from pkjax.trees import ApplyFn, Choice, accumulator, is_floating

__all__ = ["Problem", "check_start", "flat_product", "floating_entries", "floating_leaves", "make_problem", "product",
           "read_paths", "read_start", "trained_positions", "widened", "with_floating", "with_wide_gates"]

Objective = Callable[[Network], Array]
"""A function of a network whose parameters are φ."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A function of φ, the floating-point leaves, with what Π differentiates."""

    network: Network
    of_network: Objective
    leaves: list[Array]    # θ, floating-point leaves only
    train: list[Array]     # booleans like them

    def objective(self, phi: list[Array]) -> Array:
        """Evaluate the function."""
        return self.of_network(self.at(phi))

    def at(self, phi: list[Array]) -> Network:
        """Return the network with other floating-point leaves."""
        return with_floating(self.network, phi)


def floating_leaves(network: Network) -> list[Array]:
    """The leaves that hold floating-point numbers."""
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(network.params) if is_floating(leaf)]


def floating_entries(network: Network) -> list[Any]:
    """Which entries of them train: booleans that broadcast against each."""
    pairs = zip(network.entries, jax.tree.leaves(network.params), strict=True)
    return [np.zeros((), bool) if entries is None else entries for entries, leaf in pairs if is_floating(leaf)]


def with_floating(network: Network, values: list[Array]) -> Network:
    """Return the network with other floating-point leaves."""
    given = iter(values)
    params = jax.tree.map(lambda leaf: next(given) if is_floating(leaf) else leaf, network.params)
    return replace(network, params=params)


def trained_positions(network: Network) -> np.ndarray:
    """Positions of the parameters that train among the entries of all leaves."""
    return np.flatnonzero(np.concatenate([
        np.broadcast_to(False if entries is None else np.asarray(entries), np.shape(leaf)).ravel()
        for entries, leaf in zip(network.entries, jax.tree.leaves(network.params), strict=True)]))


def make_problem(network: Network, x: Array) -> Problem:
    """Take R, and the leaves that G has rows for."""
    def total(at: Network) -> Array:
        return evaluate_paths(partial(Polynomial, 2), at, x, None).sum()

    leaves = floating_leaves(network)
    train = [jnp.broadcast_to(t, leaf.shape) for t, leaf in zip(floating_entries(network), leaves, strict=True)]
    return Problem(network, total, leaves, train)


def read_paths(apply_fn: ApplyFn, params: PyTree, X: PyTree, masks: PyTree | None, trainable: Choice,
               name: str = "X") -> tuple[Network, Array]:
    """Read a network as a sum over paths, and the signals of its inputs, in float32 where numbers are narrower."""
    params, X = widened(apply_fn, (params, X))
    with jax.numpy_dtype_promotion("standard"):
        network = read(apply_fn, params, X, masks=masks, trainable=trainable, paths=True)
    return _comparable(network), network.batch(X, name)


def _comparable(network: Network) -> Network:
    """Let networks with other masks be alike to the compiler, also where a leaf trains as a whole or not at all."""
    entries = network.entries if network.masks is None else [
        np.zeros(np.shape(leaf), bool) if e is None and is_floating(leaf) else e
        for e, leaf in zip(network.entries, jax.tree.leaves(network.params), strict=True)]
    return replace(network, entries=entries, whole=())


def widened(apply_fn: ApplyFn, tree: PyTree) -> PyTree:
    """Bring floating-point leaves that are narrower than float32 to it, unless a program says what types it takes."""
    def wide(leaf: Any) -> Any:
        narrow = is_floating(leaf) and accumulator(jnp.result_type(leaf)) != jnp.result_type(leaf)
        return jnp.asarray(leaf, jnp.float32) if narrow else leaf
    return tree if isinstance(apply_fn, BoundProgram) else jax.tree.map(wide, tree)


def read_start(apply_fn: ApplyFn, params: PyTree, x: PyTree, masks: PyTree | None, trainable: Choice,
               gates: str | None = None, reference: PyTree | None = None) -> tuple[Network, Array]:
    """Read a network and its start values: the signals of one example, which are at least 0."""
    apply_fn = with_wide_gates(apply_fn, params, x, gates, reference, masks)
    network, z = read_paths(apply_fn, params, x, masks, trainable, "x")
    check_start(z, x)
    return network, z


def with_wide_gates(apply_fn: ApplyFn, params: PyTree, x: PyTree, gates: str | None, reference: PyTree | None,
                    masks: PyTree | None) -> ApplyFn:
    """The network that ``gates`` and ``reference`` ask for, its coefficients in float32 where numbers are narrower."""
    params, x, reference = widened(apply_fn, (params, x, reference))
    with jax.numpy_dtype_promotion("standard"):
        return with_gates(apply_fn, params, x, gates, reference, masks)


def check_start(z: Array, x: PyTree) -> None:
    """Raise ValueError unless x is one example, and its signals z are at least 0."""
    if len(z) != 1:
        raise ValueError(f"x must be a batch of one, (1, *input), got shape {jax.tree.map(jnp.shape, x)}")
    if not isinstance(z, jax.core.Tracer) and bool((np.asarray(z) < 0).any()):
        raise ValueError("x must be non-negative: it holds the start values z of R_2(θ², z); use its magnitude")


def product(problem: Problem) -> Callable[[list[Array]], list[Array]]:
    """Products with G on lists of floating-point leaves."""
    slope = jax.grad(problem.objective)
    theta = problem.leaves

    def multiply(u: list[Array]) -> list[Array]:
        u = [jnp.where(t, v, 0) for t, v in zip(problem.train, u, strict=True)]
        phi, direction = [p**2 for p in theta], [p * v for p, v in zip(theta, u, strict=True)]
        gradient, second = jax.jvp(slope, (phi,), (direction,))
        return [jnp.where(t, g * v + p * h, 0)
                for t, g, v, p, h in zip(problem.train, gradient, u, theta, second, strict=True)]

    return multiply


def flat_product(problem: Problem) -> tuple[Callable[[Array], Array], Array, Array]:
    """Products with G on flat vectors over the floating-point leaves; θ itself; what trains, as 0 and 1."""
    flat, unravel = ravel_pytree(problem.leaves)
    multiply = product(problem)
    train = jnp.concatenate([t.ravel() for t in problem.train]).astype(flat.dtype)
    return lambda u: ravel_pytree(multiply(unravel(u)))[0], flat, train
