"""The path kernel Π through its dual Gram matrix: trace, products, spectrum, effective rank.

``Π = J_θ^v J_θ^vᵀ`` has a row for every path. ``G = J_θ^vᵀ J_θ^v``, with a row for every parameter, has the same
non-zero eigenvalues, and comes from derivatives of ``R(φ) = R_2(φ, x)`` at φ = θ²:

    G = diag(∇R) + diag(θ) ∇²R diag(θ)

All functions take a batch of one, ``x``, whose entries are the path polynomial's start values (ones by default of the
theory): non-negative numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float64, Integer, Key, PyTree, Shaped

from pkjax import paths
from pkjax.linalg.block_lanczos import NotConvergedWarning
from pkjax.linalg.stochastic import SpectralDensity, frobenius, quadrature
from pkjax.path_kernel.gram import check_start, flat_product, log_trace_of, make_problem, product, trace_of
from pkjax.path_kernel.solvers import Eigenpairs, solve
from pkjax.trees import ApplyFn, Trainable, check_finite, check_masks, is_floating

__all__ = ["Eigenpairs", "NotConvergedWarning", "SpectralDensity", "count_above", "dense", "density",
           "effective_rank", "eigenpairs", "eigenvalues", "gated_trace", "matvec", "trace"]


def trace(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, masks: PyTree | None = None,
          trainable: Trainable = None, log: bool = False) -> Float[Array, ""]:
    r"""Trace of the path kernel, by one gradient of the path polynomial.

    .. math:: \operatorname{Tr} \Pi = \sum_j \partial R_2(\theta^2, x) / \partial \phi_j

    and ``Σ_j φ_j ∂²R_2/∂φ_j²`` on top for parameters that may lie twice on one path.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input) start values.
        masks: booleans like ``params``; a masked weight carries no path and does not train.
        trainable: which parameters Π differentiates.
        log: return the natural logarithm of the trace, which no depth brings out of range.

    Returns: a scalar of the parameters' dtype. Works under jit.

    Raises: ValueError for mismatched trees, numbers that are not finite, an ``x`` that is no batch of one or negative;
    :class:`pkjax.paths.NotPathNetworkError` for networks without paths.

    Source: Gebhart, Saxena and Schrater (2021), equations 14 and 15.

    >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
    >>> float(trace(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2))))
    10.0
    """
    x = check_start(params, x)
    problem = make_problem(apply_fn, params, x, masks, trainable)
    return log_trace_of(problem) if log else trace_of(problem)


def matvec(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, masks: PyTree | None = None,
           trainable: Trainable = None) -> Callable[[PyTree], PyTree]:
    r"""The product with the dual Gram matrix, one Hessian-vector product of a forward pass.

    .. math:: G u = \nabla R \circ u + \theta \circ \nabla^2 R\,(\theta \circ u)

    Args: as in :func:`trace`.

    Returns: a function of a tree like ``params`` to one; entries that do not train neither count nor come out. Works
    under jit and vmap.

    Raises: as :func:`trace`; the function that is returned raises ValueError for a u of another tree structure.

    Source: Gebhart, Saxena and Schrater (2021), equation 11 for Π, whose non-zero eigenvalues G has.

    >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
    >>> product = matvec(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)))
    >>> product({"a": jnp.zeros((2, 1)), "b": jnp.ones((1, 1))})["a"].tolist()
    [[2.0], [2.0]]
    """
    problem = make_problem(apply_fn, params, check_start(params, x), masks, trainable)
    rows = product(problem)
    structure: Any = jax.tree.structure(params)
    positions = [i for i, leaf in enumerate(jax.tree.leaves(params)) if is_floating(leaf)]

    def multiply(u: PyTree) -> PyTree:
        if jax.tree.structure(u) != structure:
            raise ValueError(f"u must have the tree structure of params, {structure}, got {jax.tree.structure(u)}")
        flat = jax.tree.leaves(u)
        return problem.rebuild(rows([jnp.asarray(flat[i]) for i in positions]))

    return multiply


def dense(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, masks: PyTree | None = None,
          trainable: Trainable = None) -> Float[Array, "m m"]:
    r"""The dual Gram matrix itself, over the floating parameters in flattening order.

    .. math:: G = (J_\theta^v)^\top J_\theta^v

    Args: as in :func:`trace`.

    Returns: (m, m) for m floating parameters; rows and columns of entries that do not train are zero. Works under jit;
    meant for a few thousand parameters.

    Raises: as :func:`trace`.

    Source: Gebhart, Saxena and Schrater (2021), the factor J_θ^v of equation 10.

    >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
    >>> dense(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2))).tolist()
    [[4.0, 0.0, 2.0], [0.0, 4.0, 2.0], [2.0, 2.0, 2.0]]
    """
    multiply, flat, _ = flat_product(make_problem(apply_fn, params, check_start(params, x), masks, trainable))
    # Row by row from unit vectors, so that no identity matrix has to exist beside the result.
    return jax.lax.map(lambda i: multiply(jnp.zeros_like(flat).at[i].set(1)), jnp.arange(flat.size), batch_size=64)


def count_above(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"],
                thresholds: Shaped[ArrayLike, "..."] | Sequence[float], *, masks: PyTree | None = None,
                trainable: Trainable = None) -> Integer[np.ndarray, "..."]:
    """Count the eigenvalues of Π above each threshold, exactly, for fully connected networks.

        #{i : π_i > λ}

    Args: as in :func:`trace`; ``thresholds``: numbers λ greater than 0, of any shape.

    Returns: integers of the thresholds' shape.

    Raises: as :func:`trace`, :class:`pkjax.paths.NotFullyConnectedError` for other networks, and ValueError for
    thresholds that are not above 0.

    Source: Sylvester (1852), the law of inertia, on G − λ I; ``pkjax.path_kernel.inertia`` derives the elimination.

    >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
    >>> count_above(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)), [0.5, 4.5])
    array([2, 1])
    """
    from pkjax.path_kernel import inertia

    z = check_start(params, x)
    layers = paths.dense_layers(apply_fn, params, z, masks=masks, trainable=trainable)
    return inertia.count_above(layers, thresholds, inputs=np.asarray(z, np.float64).ravel())


def eigenvalues(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, k: int,
                masks: PyTree | None = None, trainable: Trainable = None, bounds: bool = False, method: str = "auto",
                tolerance: float = 1e-10
                ) -> Float64[np.ndarray, "k"] | tuple[Float64[np.ndarray, "k"], Float64[np.ndarray, "k"]]:
    """The k largest eigenvalues of Π with their multiplicities, zeros included where Π has fewer.

    Args: as in :func:`trace`, and
        k: how many, at most the number of parameters that train.
        bounds: return (values, bounds), where the eigenvalue of each rank lies within its bound of the value.
        method: "dense" (a matrix of the parameters' size), "counting" (exact; fully connected networks), "lanczos"
            (any network), or "auto": the first that fits.
        tolerance: of "lanczos", relative to the largest eigenvalue.

    Returns: (k,) float64, descending. When "lanczos" cannot vouch for the list it gives a
    :class:`NotConvergedWarning`, and infinite bounds.

    Raises: as :func:`trace`, and ValueError for k or method out of range.

    Source: Gebhart, Saxena and Schrater (2021), π_i of theorem 1.

    >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
    >>> eigenvalues(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)), k=2).round(4)
    array([6., 4.])
    """
    found = solve(apply_fn, params, x, k, masks, trainable, method, tolerance, vectors=False)
    return (found.values, found.bounds) if bounds else found.values


def eigenpairs(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, k: int,
               masks: PyTree | None = None, trainable: Trainable = None, method: str = "auto", tolerance: float = 1e-10
               ) -> Eigenpairs:
    """The k largest eigenvalues of Π, and the eigenvectors of its dual Gram matrix.

        G z_i = π_i z_i,   Π u_i = π_i u_i with u_i = J_θ^v z_i / √π_i where π_i > 0

    Args: as in :func:`eigenvalues`.

    Returns: values (k,), and vectors z: a tree like ``params`` with a leading axis k.

    Raises: as :func:`eigenvalues`.

    Source: Gebhart, Saxena and Schrater (2021), U and S of equation 12.

    >>> w = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0]])}
    >>> pairs = eigenpairs(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, jnp.ones((1, 2)), k=2)
    >>> pairs.vectors["a"].shape, pairs.converged
    ((2, 2, 1), True)
    """
    return solve(apply_fn, params, x, k, masks, trainable, method, tolerance, vectors=True)


def effective_rank(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, key: Key[Array, ""],
                   samples: int = 64, masks: PyTree | None = None, trainable: Trainable = None,
                   standard_error: bool = False) -> Float[Array, ""] | tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Effective rank of the path kernel: how many equal eigenvalues would have its trace and its Frobenius norm.

    .. math:: \operatorname{Tr}(\Pi)^2 / \|\Pi\|_F^2

    The trace is exact; the norm is Hutchinson's estimate, the mean of ``‖G s‖²`` over random signs s.

    Args: as in :func:`trace`, and
        key: a typed random key.
        samples: number of products with G.
        standard_error: return (estimate, its standard error).

    Returns: scalars of the parameters' dtype. Works under jit.

    Raises: as :func:`trace`, and ValueError for samples < 2.

    Source: Hutchinson (1990) for the norm; the ratio is the participation ratio of Π's eigenvalues, by definition.

    >>> w = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1))}
    >>> rank = effective_rank(lambda w, x: x @ w["a"] @ w["b"], w, jnp.ones((1, 2)), key=jax.random.key(0))
    >>> 1.0 < float(rank) < 3.0
    True
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    problem = make_problem(apply_fn, params, check_start(params, x), masks, trainable)
    multiply, flat, train = flat_product(problem)
    scale = trace_of(problem)
    # Products of G divided by its trace neither overflow nor vanish when squared. Signs are drawn as they are needed.
    mean, deviation = frobenius(lambda draw: multiply(jax.random.rademacher(draw, flat.shape, flat.dtype) * train),
                                jax.random.split(key, samples), scale, batch_size=max(1, min(8, 2**22 // flat.size)))
    rank = (1 / mean).astype(scale.dtype)
    error = (deviation / mean**2).astype(scale.dtype)
    return (rank, error) if standard_error else rank


def density(apply_fn: ApplyFn, params: PyTree, x: Shaped[ArrayLike, "N *input"], *, key: Key[Array, ""],
            samples: int = 8, depth: int = 64, points: int = 200, decades: float = 6.0, width: float = 0.08,
            masks: PyTree | None = None, trainable: Trainable = None) -> SpectralDensity:
    """Spectral density of the path kernel by stochastic Lanczos quadrature.

    Args: as in :func:`trace`, and
        key: a typed random key.
        samples: number of random vectors.
        depth: Lanczos steps with each, at most the number of parameters that train.
        points: how many eigenvalues to evaluate the density at, from the largest downwards.
        decades: how far down they go.
        width: standard deviation in decades of the Gaussian that stands for a node.

    Returns: the density (eigenvalues to a decade), and its nodes and weights.

    Raises: as :func:`trace`.

    Source: Ghorbani, Krishnan and Xiao (2019), section 3, for Hessians; Lanczos by matfree.

    >>> w = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    >>> estimate = density(lambda w, x: x @ w["a"] @ w["b"], w, jnp.ones((1, 2)), key=jax.random.key(0))
    >>> float(estimate.weights[0].sum().round(2))
    12.0
    """
    multiply, flat, train = flat_product(make_problem(apply_fn, params, check_start(params, x), masks, trainable))
    draws = jax.random.rademacher(key, (samples, flat.size), flat.dtype) * train
    return quadrature(multiply, draws, train.sum(), key, depth=depth, points=points, decades=decades, width=width)


def gated_trace(apply_fn: ApplyFn, params: PyTree, X: Shaped[ArrayLike, "N *input"], *, masks: PyTree | None = None,
                trainable: Trainable = None, batch_size: int = 16) -> Float[Array, ""]:
    r"""Gated path trace of a batch of examples: the part of Tr Θ on the diagonal of Π.

    .. math:: T_g = \sum_x \sum_j \partial R_2^{g(x)^2}(\theta^2, x \circ x) / \partial \phi_j

    Args: as in :func:`trace`, with ``X`` (N, *input) examples; ``batch_size`` of them are taken at once.

    Returns: a scalar of the parameters' dtype. Works under jit.

    Raises: as :func:`trace`.

    Source: the terms p = p′ of Tr Θ in equation 11 of Gebhart, Saxena and Schrater (2021).

    >>> w = {"a": jnp.array([[1.0, -1.0]]), "b": jnp.array([[2.0], [1.0]])}
    >>> net = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"]
    >>> float(gated_trace(net, w, jnp.array([[1.0], [-1.0]])))  # one open path each: 4 + 1 and 1 + 1
    7.0
    """
    check_finite(params, "params")
    check_finite(X, "X")
    check_masks(masks, params)
    X = jnp.asarray(X)

    def of(some: Array) -> Array:
        opened = tuple(g**2 for g in paths.gates(apply_fn, params, some, masks=masks))

        def total(phi: PyTree) -> Array:    # summed over the examples, so that one gradient serves them all
            return paths.polynomial(apply_fn, phi, some**2, q=2, gates=opened, masks=masks).sum()

        return trace_of(make_problem(apply_fn, params, some[:1], masks, trainable, total))

    side = max(1, min(batch_size, len(X)))
    whole = len(X) - len(X) % side
    batches = jax.lax.map(of, X[:whole].reshape(-1, side, *X.shape[1:])).sum()
    return batches if whole == len(X) else batches + of(X[whole:])
