"""The dual Gram matrix G of the path kernel as derivatives of the path polynomial ``R(φ) = R_2(φ, x)`` at φ = θ²."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from pkjax import paths
from pkjax.trees import ApplyFn, Trainable, check_finite, check_masks, hashable, is_floating, shapes, trainable_masks

__all__ = ["Problem", "check_start", "flat_product", "log_trace_of", "make_problem", "product", "trace_of"]

Objective = Callable[[list[Array]], Array]


@dataclass(frozen=True, eq=False)
class Problem:
    """R at φ as a function of the floating-point leaves, with what Π differentiates."""

    objective: Objective
    scaled: Callable[[list[Array]], tuple[Array, Array]]   # R as a mantissa and its power of two
    leaves: list[Array]    # θ, floating-point leaves only
    train: list[Array]     # booleans
    rebuild: Callable[[list[Any]], PyTree]  # fills the other leaves with zeros of their shape
    tied: list[bool]       # whether the parameters of a leaf may lie twice on a path


def make_problem(apply_fn: ApplyFn, params: PyTree, x: ArrayLike, masks: PyTree | None, trainable: Trainable,
                 objective: Callable[[PyTree], Array] | None = None) -> Problem:
    """Take R and the leaves that G has rows for; ``objective``, a function of φ, replaces R."""
    check_masks(masks, params)
    train = trainable_masks(params, trainable, masks)
    flat, structure = jax.tree.flatten(params)
    floating = [i for i, leaf in enumerate(flat) if is_floating(leaf)]

    def fill(values: list[Any], others: list[Any]) -> PyTree:
        full = list(others)
        for i, value in zip(floating, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(structure, full)

    def total(phi: PyTree) -> Array:
        return paths.polynomial(apply_fn, phi, x, q=2, masks=masks).sum()

    def scaled(phi: PyTree) -> tuple[Array, Array]:
        mantissa, exponent = paths.scaled_polynomial(apply_fn, phi, x, q=2, masks=masks)
        return mantissa.sum(), exponent

    inner = total if objective is None else objective
    leaves, treedef = jax.tree.flatten(shapes((params, x)))
    twice = _tied(hashable(apply_fn), tuple(leaves), treedef)
    return Problem(lambda values: inner(fill(values, flat)),
                    lambda values: scaled(fill(values, flat)),
                    [jnp.asarray(flat[i]) for i in floating],
                    [jax.tree.leaves(train)[i] for i in floating],
                    lambda values: fill(values, [jnp.zeros_like(leaf) for leaf in flat]),
                    [twice[i] for i in floating])


@lru_cache(maxsize=256)
def _tied(apply_fn: ApplyFn, leaves: tuple[Any, ...], treedef: Any) -> tuple[bool, ...]:
    """Whether the parameters of each leaf may lie twice on a path, computed once for each set of shapes."""
    return paths.tied(apply_fn, *jax.tree.unflatten(treedef, leaves))


def check_start(params: PyTree, x: ArrayLike) -> Array:
    """Raise ValueError unless params is finite and x is a finite, non-negative batch of one; return x as an array."""
    x = jnp.asarray(x)
    check_finite(params, "params")
    check_finite(x, "x")
    if x.shape[:1] != (1,):
        raise ValueError(f"x must be a batch of one, (1, *input), got shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and bool((np.asarray(x) < 0).any()):
        raise ValueError("x must be non-negative: it holds the start values z of R_2(θ², z); use its magnitude")
    return x


def trace_of(problem: Problem) -> Array:
    """Trace of G: ``Σ_j ∂R/∂φ_j``, and ``Σ_j φ_j ∂²R/∂φ_j²`` over the leaves that may lie twice on a path."""
    return _trace(problem, jax.grad(problem.objective))


def log_trace_of(problem: Problem) -> Array:
    """Natural logarithm of the trace of G, which cannot overflow or underflow."""
    slope = jax.grad(problem.scaled, has_aux=True)
    exponent = problem.scaled([leaf**2 for leaf in problem.leaves])[1]
    mantissa = _trace(problem, lambda phi: slope(phi)[0])
    return jnp.log(mantissa) + exponent.astype(mantissa.dtype) * jnp.log(jnp.asarray(2, mantissa.dtype))


def _trace(problem: Problem, slope: Callable[[list[Array]], list[Array]]) -> Array:
    phi = [leaf**2 for leaf in problem.leaves]
    parts = [jnp.where(t, g, 0).sum() for t, g in zip(problem.train, slope(phi), strict=True)]
    for n, twice in enumerate(problem.tied):
        if twice:
            def curvature(i: Array, n: int = n) -> Array:
                unit = [jnp.zeros_like(p) for p in phi]
                unit[n] = unit[n].ravel().at[i].set(1).reshape(phi[n].shape)
                return jax.jvp(slope, (phi,), (unit,))[1][n].ravel()[i]
            second = jax.lax.map(curvature, jnp.arange(phi[n].size), batch_size=64).reshape(phi[n].shape)
            parts.append(jnp.where(problem.train[n], phi[n] * second, 0).sum())
    dtype = jnp.result_type(*problem.leaves)
    return sum((part.astype(dtype) for part in parts), jnp.zeros((), dtype))


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
