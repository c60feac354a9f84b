"""Regression by the kernel: the predictor that infinitely long training of the linearised network ends in."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, PyTree, Shaped

from pkjax import tables
from pkjax.tangent_kernel.alignment import as_targets
from pkjax.tangent_kernel.kernel import ntk
from pkjax.trees import ApplyFn, check_finite

__all__ = ["KernelRegression", "kernel_regression", "ntk_regression"]


@dataclass(frozen=True, eq=False)
class KernelRegression:
    """Predictions of a kernel regression.

    Returned by `kernel_regression` and `ntk_regression`. Prints as a short text.

    Examples:
        >>> kernel_regression(np.eye(2), np.ones((1, 2)), np.array([1.0, 2.0]), y_test=np.array([3.0]))
        KernelRegression(
            predictions=float64[1] 3,
            accuracy=1,
            mean_squared_error=0,
            reciprocal_condition=1
        )
    """

    predictions: Float64[np.ndarray, "M ..."]
    """f(X') of shape (M, *out)."""
    accuracy: float | None
    """The fraction of test examples whose largest output is that of the target; of one output, whose sign is. None
    without test targets."""
    mean_squared_error: float | None
    """Of the predictions, over examples and outputs; None without test targets."""
    reciprocal_condition: float
    """An estimate of 1 / (‖K‖₁ ‖K⁻¹‖₁) of K = Θ(X, X) + ridge · I: the closer to the precision of Θ's numbers, the
    fewer digits of the predictions hold."""

    __repr__ = tables.brief


def kernel_regression(theta: Shaped[Array | np.ndarray, "..."], cross: Shaped[Array | np.ndarray, "..."],
                      y: Shaped[Array | np.ndarray, "..."], *, ridge: float | int = 0.0,
                      y_test: Shaped[Array | np.ndarray, "..."] | None = None) -> KernelRegression:
    """Predict by ridge regression with a kernel, through a Cholesky factor in float64.

        f(X') = Θ(X', X) (Θ(X, X) + ridge · I)⁻¹ y

    For targets y − f_0(X), f_0(X') + f(X') is where gradient descent on the linearised network ends (ridge 0), as in
    `pk.dynamics.predict` at infinite time. The matrix has NK rows: 8 (NK)² bytes, (NK)³ / 3 operations. Runs on the
    host, outside of `jit`.

    Args:
        theta: Θ(X, X) of shape (N, N, *out, *out), as `ntk` returns it. Compute it on float64 parameters and inputs
            (with `jax_enable_x64`) where its condition asks for that: eigenvalues of tangent kernels span many decades.
        cross: Θ(X', X) of shape (M, N, *out, *out): `ntk(apply_fn, params, X_test, X)`.
        y: targets (N, *out), floating point, such as one-hot vectors.
        ridge: added to the diagonal, 0 or more; the alpha of scikit-learn's `KernelRidge`. A small multiple of
            Tr Θ / (N K) is usual.
        y_test: targets (M, *out) of the test examples, for accuracy and error.

    Returns:
        Predictions, test accuracy and error, and the condition of the matrix.

    Raises:
        ValueError: shapes do not match; Θ(X, X) is not symmetric; ridge is negative or not finite; Θ(X, X) + ridge · I
            is singular to the precision of Θ's numbers, as without a ridge where two examples are equal or NK exceeds
            the number of parameters; a value is NaN or infinite.
        TypeError: kernels or targets are not floating point.

    Source: Jacot, Gabriel and Hongler (2018), section 5; Lee et al. (2019), equation 16.

    Examples:
        >>> kernel_regression(np.diag([2.0, 4.0]), np.array([[1.0, 1.0]]), np.array([2.0, 4.0])).predictions
        array([2.])
    """
    y = np.asarray(as_targets(y, "y"))
    n, out = len(y), y.shape[1:]
    theta, cross = np.asarray(theta), np.asarray(cross)
    m = cross.shape[0] if cross.ndim else 0
    for name, kernel, rows in (("theta", theta, n), ("cross", cross, m)):
        if kernel.shape != (rows, n, *out, *out):
            raise ValueError(f"{name} must have the shape {('M' if name == 'cross' else n, n, *out, *out)} for targets "
                             f"of shape {y.shape}, but has {kernel.shape}")
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise TypeError(f"{name} must hold floating-point numbers, but is {kernel.dtype}")
        check_finite(kernel, name)
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    rows = _matrix(theta, y[0].size)
    uneven, largest = (float(np.abs(v).max(initial=0)) for v in (rows - rows.T, rows))
    if uneven > float(jnp.finfo(theta.dtype).eps) ** 0.5 * largest:
        raise ValueError(f"theta must be symmetric, the kernel of the training examples with themselves, but entries "
                         f"differ by up to {uneven:.3g} from those across its diagonal, of {largest:.3g} at most")
    weights, reciprocal = _solved(rows, y.astype(np.float64).ravel(), float(ridge), theta.dtype)
    predictions = (_matrix(cross, y[0].size) @ weights).reshape(m, *out)
    accuracy, error = None, None
    if y_test is not None:
        held = np.asarray(as_targets(y_test, "y_test")).astype(np.float64)
        if held.shape != predictions.shape:
            raise ValueError(f"y_test must have the shape {predictions.shape} of the predictions, got {held.shape}")
        accuracy, error = _agreement(predictions, held), float(np.mean((predictions - held) ** 2))
    return KernelRegression(predictions, accuracy, error, reciprocal)


def ntk_regression(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]],
                   y: Shaped[Array | np.ndarray, "..."], X_test: PyTree[Shaped[Array | np.ndarray, "M ..."]], *,
                   y_test: Shaped[Array | np.ndarray, "..."] | None = None, ridge: float | int = 0.0,
                   **options: Any) -> KernelRegression:
    """Predict by regression with a network's tangent kernel: `kernel_regression` with Θ from `ntk`.

        f(X') = Θ(X', X) (Θ(X, X) + ridge · I)⁻¹ y

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the training inputs.
        y: targets (N, *out), floating point, such as one-hot vectors.
        X_test: (M, *input), the test inputs.
        y_test: targets (M, *out) of the test examples, for accuracy and error.
        ridge: added to the diagonal of Θ(X, X), 0 or more.
        **options: keyword arguments of `ntk`: masks, trainable, engine, tile, memory_limit, mesh, progress.

    Returns:
        Predictions, test accuracy and error, and the condition of the matrix.

    Raises:
        ValueError: as for `kernel_regression` and `ntk`.
        TypeError: targets are not floating point, or masks not booleans.
        FloatingPointError: as for `ntk`.

    Source: Jacot, Gabriel and Hongler (2018), section 5; Lee et al. (2019), equation 16.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [3.0]])
        >>> ntk_regression(lambda w, x: x @ w, jnp.ones((2, 1)), x, y, jnp.array([[0.0, 1.0]])).predictions.round(4)
        array([[2.]])
    """
    y = as_targets(y, "y")
    theta = ntk(apply_fn, params, X, **options)
    cross = ntk(apply_fn, params, X_test, X, **options)
    return kernel_regression(np.asarray(theta), np.asarray(cross), y, ridge=ridge, y_test=y_test)


def _matrix(kernel: np.ndarray, outputs: int) -> np.ndarray:
    """The matrix of a kernel, in float64: rows and columns are (example, output)."""
    rows, columns = kernel.shape[:2]
    blocks = kernel.astype(np.float64).reshape(rows, columns, outputs, outputs)
    return blocks.transpose(0, 2, 1, 3).reshape(rows * outputs, columns * outputs)


def _solved(rows: np.ndarray, y: np.ndarray, ridge: float, dtype: Any) -> tuple[np.ndarray, float]:
    """Solve with the ridge on the diagonal, and say the reciprocal condition of the matrix."""
    from scipy.linalg import cho_factor, cho_solve, lapack

    rows = rows + ridge * np.eye(len(rows))
    norm = np.abs(rows).sum(0).max(initial=0.0)
    try:
        factor = cho_factor(rows, lower=True)
        reciprocal = float(lapack.dpocon(factor[0], norm, uplo="L")[0])
    except np.linalg.LinAlgError:
        reciprocal = 0.0
    precision = float(jnp.finfo(dtype).eps)
    if reciprocal < precision:
        mean = np.trace(rows) / len(rows) - ridge
        least = f"{1e-4 * mean:.1e} (10⁻⁴ of the mean eigenvalue)" if mean > 0 else "1, for its trace is not positive"
        raise ValueError(
            f"Θ(X, X) + {ridge:g} · I, of {len(rows)} rows, is singular to the precision of its numbers (reciprocal "
            f"condition {reciprocal:.1e}, precision of {dtype} {precision:.1e}): pass a ridge, such as "
            f"{least}, leave out examples that occur twice, "
            "or compute Θ in float64")
    return cho_solve(factor, y), reciprocal


def _agreement(predictions: np.ndarray, held: np.ndarray) -> float:
    """The fraction of examples on which predictions and targets choose the same class."""
    a, b = (v.reshape(len(v), -1) for v in (predictions, held))
    return float(np.mean((a > 0) == (b > 0)) if a.shape[1] == 1 else np.mean(a.argmax(1) == b.argmax(1)))
