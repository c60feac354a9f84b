"""Block Lanczos against LAPACK's eigenvalues of the whole matrix."""

import numpy as np
import pytest
from pkjax.linalg.block_lanczos import NotConvergedWarning, block_lanczos


def operator(values, seed=0):
    """A symmetric matrix with given eigenvalues, and its products with rows."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    matrix = basis * values @ basis.T
    return (matrix + matrix.T) / 2, lambda rows: rows @ ((matrix + matrix.T) / 2)


SPECTRA = {
    "smooth": np.linspace(1.0, 2.0, 90) ** 8,
    "ten decades": 10.0 ** np.linspace(-10, 0, 90),
    "twelve copies of the largest": np.append(np.full(12, 3.0), np.linspace(0, 2, 78)),
    "copies around the k-th": np.append(np.repeat([9.0, 4.0, 2.0], [3, 30, 3]), np.zeros(54)),
    "low rank": np.append([5.0, 1.0], np.zeros(88)),
}


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenpairs_are_those_of_the_matrix_with_all_copies(name, k):
    matrix, multiply = operator(SPECTRA[name])
    pairs = block_lanczos(multiply, 90, k)
    want = np.linalg.eigvalsh(matrix)[::-1][:k]
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, want, rtol=0, atol=1e-9 * want[0])
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(k), atol=1e-12)
    residuals = np.linalg.norm(pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors, axis=1)
    np.testing.assert_allclose(pairs.residuals, residuals, atol=1e-13 * want[0])


@pytest.mark.parametrize("dimension", [1, 5, 11])
def test_all_eigenpairs_of_a_small_matrix_are_a_decomposition_of_it(dimension):
    matrix, multiply = operator(np.arange(dimension) + 0.5)
    pairs = block_lanczos(multiply, dimension, dimension)
    assert pairs.converged
    np.testing.assert_allclose(pairs.vectors.T * pairs.values @ pairs.vectors, matrix, atol=1e-10)


def test_within_each_residual_of_an_unfinished_search_lies_an_eigenvalue():
    matrix, multiply = operator(np.linspace(0.0, 1.0, 300))
    with pytest.warns(NotConvergedWarning, match=r"of 9 eigenpairs .* after \d+ products.*allow more products"):
        pairs = block_lanczos(multiply, 300, 9, most_products=60)
    assert not pairs.converged
    distances = np.abs(pairs.values[:, None] - np.linalg.eigvalsh(matrix)).min(axis=1)
    assert pairs.residuals.max() > 1e-6
    assert (distances <= pairs.residuals + 1e-12).all()


@pytest.mark.parametrize("k", [0, 6])
def test_more_pairs_than_dimensions_and_none_are_refused(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the operator's dimension, 5, got {k}"):
        block_lanczos(lambda rows: rows, 5, k)
