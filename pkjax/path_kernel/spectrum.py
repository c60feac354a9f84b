"""The largest eigenvalues of the path kernel Π, and exact counts of them.

Both come from the dual Gram matrix G, which has the non-zero eigenvalues of Π (``pkjax.path_kernel.kernel``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float64, Integer, PyTree, Shaped

from pkjax.path_kernel import inertia
from pkjax.path_kernel.gram import read_start
from pkjax.path_kernel.solvers import Eigenpairs, largest_eigenpairs
from pkjax.paths.dense_layers import network_layers
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, Choice

__all__ = ["BoundedEigenvalues", "bounded_eigenvalues", "count_above", "eigenpairs", "eigenvalues"]


class BoundedEigenvalues(NamedTuple):
    """Eigenvalues with bounds on their errors.

    Returned by ``path_kernel.bounded_eigenvalues``.

    Examples:
        >>> BoundedEigenvalues(np.array([6.0]), np.array([1e-12])).bounds
        array([1.e-12])
    """

    values: Float64[np.ndarray, "k"]
    """π, descending."""
    bounds: Float64[np.ndarray, "k"]
    """How far each value may be from the eigenvalue of its rank; infinite where the search did not converge."""


@automatic_axes
def count_above(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]],
                thresholds: Shaped[ArrayLike, "..."] | Sequence[float], *, masks: PyTree | None = None,
                trainable: Choice = None, gates: str | None = None,
                reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Integer[np.ndarray, "..."]:
    """Count the eigenvalues of Π above each threshold, exactly, for fully connected networks.

        #{i : π_i > λ}

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        thresholds: numbers λ greater than 0, of any shape.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.

    Returns:
        Integers of the thresholds' shape.

    Raises:
        ValueError: as for ``trace``, and for thresholds that are not above 0.
        NotFullyConnectedError: the network is not a chain of fully connected layers.
        NotPathNetworkError: an operation has no paths.

    Source: Sylvester (1852), the law of inertia, on G − λ I; ``pkjax.path_kernel.inertia`` derives the elimination.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> count_above(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)), [0.5, 4.5])
        array([2, 1])
    """
    network, z = read_start(apply_fn, params, x, masks, trainable, gates, reference)
    return inertia.count_above(network_layers(network, z), thresholds, inputs=np.asarray(z, np.float64).ravel())


@automatic_axes
def eigenvalues(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, k: int,
                masks: PyTree | None = None, trainable: Choice = None, method: str = "auto", tolerance: float = 1e-6,
                gates: str | None = None, reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None
                ) -> Float64[np.ndarray, "k"]:
    """The k largest eigenvalues of Π with their multiplicities, zeros included where Π has fewer.

        π_1 ≥ π_2 ≥ … ≥ π_k

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        k: how many, at most the number of parameters that train.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.
        method: "counting" (exact, for fully connected networks), "dense" (a matrix with a row for each parameter),
            "lanczos" (any network), or "auto": the first of these that fits.
        tolerance: of "lanczos", the residual ``‖G z − π z‖`` relative to the largest eigenvalue. From 1e-6 on, products
            in float32 find the pairs of networks of more than half a million parameters, and products in float64 judge
            them; otherwise all are in float64.
            The chance that its random start overlooks an eigenvalue beyond the bounds is below 1e-4.

    Returns:
        (k,) float64, descending. Where "lanczos" cannot vouch for the list, it warns with ``NotConvergedWarning``.
        ``bounded_eigenvalues`` returns error bounds too.

    Raises:
        ValueError: as for ``trace``, and for ``k`` or ``method`` out of range.
        NotFullyConnectedError: the method is "counting" and the network is not a chain of fully connected layers.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), π_i of theorem 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> eigenvalues(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)), k=2).round(4)
        array([6., 4.])
    """
    return largest_eigenpairs(apply_fn, params, x, k, masks, trainable, method, tolerance, gates, reference,
        vectors=False).values


@automatic_axes
def bounded_eigenvalues(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, k: int,
                        masks: PyTree | None = None, trainable: Choice = None, method: str = "auto",
                        tolerance: float = 1e-6, gates: str | None = None,
                        reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> BoundedEigenvalues:
    """The k largest eigenvalues of Π with bounds on their errors.

        |value_i − π_i| ≤ bound_i

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        k: how many, at most the number of parameters that train.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.
        method: as for ``eigenvalues``.
        tolerance: of "lanczos", the residual ``‖G z − π z‖`` relative to the largest eigenvalue. From 1e-6 on, products
            in float32 find the pairs of networks of more than half a million parameters, and products in float64 judge
            them; otherwise all are in float64.
            The chance that its random start overlooks an eigenvalue beyond the bounds is below 1e-4.

    Returns:
        The values (k,), descending, and their bounds (k,). Where "lanczos" cannot vouch for the list, it warns with
        ``NotConvergedWarning``, and the bounds are infinite.

    Raises:
        ValueError: as for ``eigenvalues``.
        NotFullyConnectedError: the method is "counting" and the network is not a chain of fully connected layers.
        NotPathNetworkError: an operation has no paths.

    Source: Weyl (1912) for "dense", Sylvester (1852) for "counting", Kahan (1967) for "lanczos".

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> net = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"]
        >>> values, bounds = bounded_eigenvalues(net, w, jnp.ones((1, 2)), k=2)
        >>> bool((abs(values - np.array([6.0, 4.0])) <= bounds).all())
        True
    """
    pairs = largest_eigenpairs(apply_fn, params, x, k, masks, trainable, method, tolerance, gates, reference,
        vectors=False)
    return BoundedEigenvalues(pairs.values, pairs.bounds)


@automatic_axes
def eigenpairs(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, k: int,
               masks: PyTree | None = None, trainable: Choice = None, method: str = "auto", tolerance: float = 1e-6,
               gates: str | None = None, reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Eigenpairs:
    """The k largest eigenvalues of Π, and the eigenvectors of its dual Gram matrix.

        G z_i = π_i z_i,   Π u_i = π_i u_i with u_i = J_θ^v z_i / √π_i where π_i > 0

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        x: (1, *input), the start values; of integer inputs one example, whose signals they are.
        k: how many, at most the number of parameters that train.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates; all floating-point leaves by default.
        gates: "frozen" takes networks that are not piecewise linear too, with constant coefficients
            (``pkjax.paths.frozen``).
        reference: with "frozen", the input whose coefficients are taken, averaged over several; x by default.
        method: as for ``eigenvalues``.
        tolerance: of "lanczos", the residual ``‖G z − π z‖`` relative to the largest eigenvalue. From 1e-6 on, products
            in float32 find the pairs of networks of more than half a million parameters, and products in float64 judge
            them; otherwise all are in float64.
            The chance that its random start overlooks an eigenvalue beyond the bounds is below 1e-4.

    Returns:
        The values (k,), the vectors z as a tree like ``params`` with a leading axis k, residuals and error bounds.

    Raises:
        ValueError: as for ``eigenvalues``.
        NotFullyConnectedError: the method is "counting" and the network is not a chain of fully connected layers.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), U and S of equation 12.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
        >>> pairs = eigenpairs(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)), k=2)
        >>> pairs.vectors["a"].shape, pairs.converged
        ((2, 2, 1), True)
    """
    return largest_eigenpairs(apply_fn, params, x, k, masks, trainable, method, tolerance, gates, reference,
        vectors=True)
