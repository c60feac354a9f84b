"""Rows in the host's memory and on a device against NumPy's products in float64."""

import numpy as np
import pytest
from pkjax.linalg.block_lanczos import block_lanczos
from pkjax.linalg.rows import DeviceRows, HostRows

SPACES = [HostRows, DeviceRows]
DIMENSION = 70_001     # several pieces, the last one short


@pytest.mark.parametrize("space", SPACES)
def test_operations_on_rows_are_those_of_matrices(space):
    rows = space(DIMENSION, np.float32)
    x, y = rows.random(2), rows.random(5)
    a, b = rows.host(x), rows.host(y)
    coefficients = np.arange(6.0).reshape(2, 3)
    near = {"rtol": 1e-4, "atol": 1e-3}
    assert abs(a.std() - 1) < 0.02
    np.testing.assert_allclose(rows.products(x, y, 1, 4), a @ b[1:4].T, **near)
    np.testing.assert_allclose(rows.lengths(x), np.linalg.norm(a, axis=1), **near)
    np.testing.assert_allclose(rows.combine(coefficients, y), coefficients @ b[:3], **near)
    np.testing.assert_allclose(rows.scaled(x, np.array([2.0, -1.0])), a * [[2.0], [-1.0]], **near)
    np.testing.assert_allclose(rows.largest(x), np.abs(a).max(), **near)
    np.testing.assert_allclose(rows.join(x, y), np.concatenate([a, b]), **near)
    np.testing.assert_allclose(rows.subtract(x, coefficients, y, 2, 5), a - coefficients @ b[2:5], **near)
    buffer = rows.put(rows.put(rows.empty(4), 0, y[:4]), 1, y[3:5])
    np.testing.assert_allclose(buffer, b[[0, 3, 4, 3]], **near)


@pytest.mark.parametrize("space", SPACES)
def test_a_search_in_float32_finds_values_with_all_copies_that_float64_confirms(space):
    """Over twelve steps a single pass in float32 would lose a basis of this spectrum."""
    values = np.concatenate([np.full(5, 3000.0), 1500 * 0.93 ** np.arange(900)])
    narrow = values.astype(np.float32)
    pairs = block_lanczos(lambda rows: rows * narrow, len(values), 9, block=1, most_rows=4, tolerance=1e-6,
                          rows=space(len(values), np.float32), judge=lambda rows: rows * values)
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, values[:9], rtol=1e-9)
    assert pairs.residuals.max() < 1e-5 * values[0]
    assert pairs.slack < 1e-5 * values[0]
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(9), atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_values_whose_squares_float32_does_not_hold_are_found(space):
    values = 1e25 * 0.8 ** np.arange(300)
    pairs = block_lanczos(lambda rows: rows * values.astype(np.float32), 300, 3, block=1, tolerance=1e-6,
                          rows=space(300, np.float32), judge=lambda rows: rows * values)
    np.testing.assert_allclose(pairs.values, values[:3], rtol=1e-9)
    with pytest.raises(FloatingPointError, match="products with the operator are not finite"):
        block_lanczos(lambda rows: rows * np.float32(np.inf), 300, 1, rows=space(300, np.float32))
