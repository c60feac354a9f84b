"""The path kernel Π through its dual Gram matrix: traces, products, and the matrix itself.

``Π = J_θ^v J_θ^vᵀ`` has a row for every path. ``G = J_θ^vᵀ J_θ^v``, with a row for every parameter, has the same
non-zero eigenvalues, and comes from derivatives of ``R(φ) = R_2(φ, x)`` at φ = θ²:

    G = diag(∇R) + diag(θ) ∇²R diag(θ)

``x`` is a batch of one whose entries, non-negative numbers, are the start values of the path polynomial; the theory
takes ones.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import Network
from pkjax.path_kernel.gram import flat_product, make_problem, product, read_paths, read_start, with_floating
from pkjax.path_kernel.traces import check_range, check_size, gated_measured, measured
from pkjax.paths.frozen import is_frozen
from pkjax.programs.checks import HOLDS, check_result
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, Choice, is_floating

__all__ = ["dense", "gated_trace", "matvec", "trace"]


@automatic_axes
def trace(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: PyTree | None = None,
          trainable: Choice = None, log: bool = False, gates: str | None = None,
          reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Float[Array, ""]:
    """Trace of the path kernel, by one derivative of the path polynomial.

        Tr Π = Σ_j ∂R_2(θ², x)/∂φ_j

    plus ``Σ_j φ_j ∂²R_2/∂φ_j²`` over the parameters that may lie twice on one path.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.
        log: return the natural logarithm of the trace, which stays in range at any depth and any size of the weights;
            −∞ where the trace is 0.

    Returns:
        A scalar of the parameters' dtype, float32 for narrower ones. Works under jit and vmap, where no number can be
        checked: a trace outside of its type's range is infinite or 0 there.

    Raises:
        ValueError: trees that do not match, masks that keep nothing, numbers that are not finite, an ``x`` that is not
            a batch of one or has negative entries.
        FloatingPointError: the trace is outside of the range of its type; with ``log`` there is no such bound, but
            constants of the network that are infinite.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), equations 14 and 15.

    Examples:
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> float(trace(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2))))
        10.0
    """
    number, value, logarithm = measured(*read_start(apply_fn, params, x, masks, trainable, gates, reference))
    if log:
        check_result(number.mantissa, "Tr Π", HOLDS)
        return logarithm
    check_range(number, value.dtype, "Tr Π")
    return value


@automatic_axes
def matvec(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: PyTree | None = None,
           trainable: Choice = None, gates: str | None = None,
           reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Callable[[PyTree], PyTree]:
    """The product with the dual Gram matrix: one Hessian-vector product of a forward pass.

        G u = ∇R ∘ u + θ ∘ ∇²R (θ ∘ u)

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        A function that maps a tree u like ``params`` to G u. It ignores the entries of u that do not train, and
        returns zeros for them. Works under jit and vmap.

    Raises:
        ValueError: as for ``trace``; the returned function raises it for a u of another tree structure.
        FloatingPointError: Tr Π or the product is outside of the range of its type (not checked under jit).
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), equation 11 for Π, whose non-zero eigenvalues G has.

    Examples:
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> product = matvec(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)))
        >>> product({"a": jnp.zeros((2, 1)), "b": jnp.ones((1, 1))})["a"].tolist()
        [[2.0], [2.0]]
    """
    network, z = read_start(apply_fn, params, x, masks, trainable, gates, reference)
    check_size(network, z)
    structure: Any = jax.tree.structure(params)

    def multiply(u: PyTree) -> PyTree:
        if jax.tree.structure(u) != structure:
            raise ValueError(f"u must have the tree structure of params, {structure}, got {jax.tree.structure(u)}")
        result = _multiply(network, z, u)
        check_result(result, "G u")
        return result

    return automatic_axes(multiply)


@jax.jit
def _multiply(network: Network, z: Array, u: PyTree) -> PyTree:
    problem = make_problem(network, z)
    pairs = zip(jax.tree.leaves(u), jax.tree.leaves(network.params), strict=True)
    rows = product(problem)([v.astype(leaf.dtype) for v, leaf in pairs if is_floating(leaf)])
    zeros = replace(network, params=jax.tree.map(jnp.zeros_like, network.params))
    return with_floating(zeros, rows).params


@automatic_axes
def dense(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: PyTree | None = None,
          trainable: Choice = None, gates: str | None = None,
          reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Float[Array, "m m"]:
    """The dual Gram matrix itself, over the floating-point parameters in flattening order.

        G = J_θ^vᵀ J_θ^v

    Args:
        apply_fn: the network.
        params: its parameters θ, at most a few thousand.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        (m, m) for m floating-point parameters; rows and columns of entries that do not train are zero. Works under
        jit.

    Raises:
        ValueError: as for ``trace``.
        FloatingPointError: Tr Π or an entry is outside of the range of its type (not checked under jit).
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), the factor J_θ^v of equation 10.

    Examples:
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> dense(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2))).tolist()
        [[4.0, 0.0, 2.0], [0.0, 4.0, 2.0], [2.0, 2.0, 2.0]]
    """
    network, z = read_start(apply_fn, params, x, masks, trainable, gates, reference)
    check_size(network, z)
    gram = _dense(network, z)
    check_result(gram, "G")
    return gram


@jax.jit
def _dense(network: Network, z: Array) -> Array:
    multiply, flat, _ = flat_product(make_problem(network, z))
    # Row by row from unit vectors, so that no identity matrix has to exist beside the result.
    return jax.lax.map(lambda i: multiply(jnp.zeros_like(flat).at[i].set(1)), jnp.arange(flat.size), batch_size=64)


@automatic_axes
def gated_trace(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[ArrayLike, "N ..."]], *,
                masks: PyTree | None = None, trainable: Choice = None, batch_size: int = 16, gates: str | None = None
                ) -> Float[Array, ""]:
    """Gated path trace of a batch of examples: the part of Tr Θ on the diagonal of Π.

        T_g = Σ_x Σ_j ∂R_2^{g(x)²}(θ², x ∘ x)/∂φ_j

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the examples.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too (``pkjax.paths.frozen``). The gates g(x) hold
            the coefficients of each example itself, so there is no reference.
        batch_size: how many examples are taken at a time.

    Returns:
        A scalar of the parameters' dtype, float32 for narrower ones. Works under jit and vmap, where a trace outside
        of its type's range is infinite or 0.

    Raises:
        ValueError: trees that do not match, masks that keep nothing, or numbers that are not finite.
        FloatingPointError: the trace is outside of the range of its type.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), the terms p = p′ of Tr Θ in equation 11.

    Examples:
        >>> w = {"a": jnp.array([[1.0, -1.0]]), "b": jnp.array([[2.0], [1.0]])}
        >>> net = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"]
        >>> float(gated_trace(net, w, jnp.array([[1.0], [-1.0]])))  # one open path each: 4 + 1 and 1 + 1
        7.0
    """
    network, signals = read_paths(apply_fn, params, X, masks, trainable)
    number, value = gated_measured(network, signals, int(batch_size), frozen=is_frozen(gates))
    check_range(number, value.dtype, "the gated path trace")
    return value
