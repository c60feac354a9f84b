"""Kernel regression against scikit-learn, dense NumPy and least squares."""

import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax import kernel_regression, ntk_regression

from tests.cases import assert_close, named_network, normal


def flat(theta):
    n, m, k, _ = theta.shape
    return np.asarray(theta, np.float64).transpose(0, 2, 1, 3).reshape(n * k, m * k)


@pytest.fixture(scope="module")
def kernels():
    apply_fn, params, x = named_network("mlp")
    test = 0.7 * x[:3] + 0.2
    theta, cross = (np.asarray(pk.ntk(apply_fn, params, *pair)) for pair in ((x,), (test, x)))
    return apply_fn, params, x, test, theta, cross


@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_predictions_are_those_of_scikit_learn(kernels, ridge):
    from sklearn.kernel_ridge import KernelRidge

    apply_fn, params, x, test, theta, cross = kernels
    y = np.asarray(normal(1, (len(x), theta.shape[-1])))
    model = KernelRidge(alpha=ridge, kernel="precomputed").fit(flat(theta), y.ravel())
    expected = model.predict(flat(cross)).reshape(len(test), -1)
    assert_close(kernel_regression(theta, cross, y, ridge=ridge).predictions, expected, rtol=1e-9)
    assert_close(ntk_regression(apply_fn, params, x, y, test, ridge=ridge).predictions, expected, rtol=1e-9)


def test_masks_and_options_reach_the_kernel():
    w, masks = jnp.ones((3, 1)), jnp.array([[True], [True], [False]])
    x, test, y = normal(0, (2, 3)), normal(1, (4, 3)), normal(2, (2, 1))
    got = ntk_regression(lambda w, x: x @ w, w, x, y, test, masks=masks, tile=1).predictions
    slope = np.linalg.solve(np.asarray(x)[:, :2], np.asarray(y))      # two weights, two examples
    assert_close(got, np.asarray(test)[:, :2] @ slope, rtol=1e-8)


def test_without_a_ridge_it_interpolates_and_is_where_training_ends():
    apply_fn, params, x = named_network("mlp")
    x = x[:2]
    y, f = np.asarray(normal(4, apply_fn(params, x).shape)), apply_fn(params, x)
    result = ntk_regression(apply_fn, params, x, jnp.asarray(y) - f, x, y_test=jnp.asarray(y) - f)
    assert_close(result.predictions + f, y, rtol=1e-6)
    assert (result.accuracy, result.mean_squared_error < 1e-9) == (1.0, True)
    matrix = flat(np.asarray(pk.ntk(apply_fn, params, x)))
    exact = 1 / np.linalg.norm(matrix, 1) / np.linalg.norm(np.linalg.inv(matrix), 1)
    assert exact * 0.99 <= result.reciprocal_condition <= 10 * exact


def test_accuracy_counts_the_largest_output_or_the_sign_of_one():
    eye = np.eye(3)
    classes = kernel_regression(np.einsum("nm,kl->nmkl", eye, np.eye(2)), np.einsum("nm,kl->nmkl", eye, np.eye(2)),
                                np.array([[1.0, 0.0], [0.0, 1.0], [0.2, 0.3]]),
                                y_test=np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    signs = kernel_regression(eye, eye, np.array([0.3, -2.0, 1.0]), y_test=np.array([1.0, -1.0, -1.0]))
    assert classes.accuracy == signs.accuracy == 2 / 3
    assert classes.mean_squared_error == pytest.approx((0 + 2 + 0.04 + 0.49) / 6)
    assert kernel_regression(eye, eye, np.ones(3)).accuracy is None


def test_singular_kernels_are_refused_in_the_precision_of_their_numbers():
    x = np.array([[1.0, 2.0], [1.0, 2.0 + 1e-5], [0.0, 1.0]])
    y = np.ones((3, 1))
    with pytest.raises(ValueError, match=r"Θ\(X, X\) \+ 0 · I, of 3 rows, is singular .* pass a ridge, such as"):
        ntk_regression(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.asarray(x), y, jnp.asarray(x))
    gram = x[:2] @ x[:2].T
    twice = kernel_regression(gram, gram, np.array([1.0, 2.0]))                     # float64 holds the difference
    np.testing.assert_allclose(twice.predictions, [1.0, 2.0], rtol=1e-4)
    with pytest.raises(ValueError, match="precision of float32"):
        kernel_regression(gram.astype(np.float32), gram, np.array([1.0, 2.0]))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"ridge": -1.0}, ValueError, "ridge must be finite and at least 0, got -1"),
    ({"y": np.ones(2)}, ValueError, r"theta must have the shape \(2, 2\)"),
    ({"cross": np.ones((4, 2))}, ValueError, r"cross must have the shape \('M', 3\)"),
    ({"y": np.arange(3)}, TypeError, "y must be floating-point targets"),
    ({"y_test": np.ones(1)}, ValueError, r"y_test must have the shape \(4,\) of the predictions"),
    ({"theta": np.full((3, 3), np.nan)}, ValueError, "theta leaf .* holds 9 values"),
    ({"theta": np.eye(3, dtype=int)}, TypeError, "theta must hold floating-point numbers, but is int"),
    ({"theta": np.eye(3) + np.tri(3)}, ValueError, "must be symmetric.* differ by up to 1 .*, of 2 at most"),
    ({"theta": np.zeros((3, 3))}, ValueError, "pass a ridge, such as 1, for its trace is not positive")])
def test_what_does_not_fit_is_an_error(change, error, message):
    given = {"theta": np.eye(3), "cross": np.ones((4, 3)), "y": np.ones(3)} | change
    with pytest.raises(error, match=message):
        kernel_regression(given.pop("theta"), given.pop("cross"), given.pop("y"), **given)


def test_it_prints_briefly():
    assert "accuracy=None" in repr(kernel_regression(np.eye(2), np.eye(2), np.ones(2)))
