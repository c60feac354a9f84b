"""Block Lanczos against LAPACK's eigenvalues of the whole matrix."""

import numpy as np
import pytest
from pkjax.linalg.block_lanczos import NotConvergedWarning, block_lanczos


def test_block_lanczos_finds_every_copy_of_multiple_eigenvalues():
    # 40 copies of the largest, many times the block: one Krylov space holds 8 of them and looks converged.
    diagonal = np.concatenate([np.full(40, 3.0), np.full(25, 2.0), np.linspace(0, 1.5, 600)])
    pairs = block_lanczos(lambda u: u * diagonal, len(diagonal), 70)
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, np.sort(diagonal)[::-1][:70], atol=1e-9)
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(70), atol=1e-10)


def test_block_lanczos_finds_any_number_of_eigenpairs_of_small_matrices():
    rng = np.random.default_rng(0)
    for trial in range(60):
        n, rank = (int(v) for v in rng.integers(1, 60, 2))
        k = int(rng.integers(1, n + 1))
        root = rng.normal(size=(n, rank)) * np.exp(rng.normal(size=(n, 1)) * (trial % 4))
        gram = np.diag(np.repeat(rng.random(n), 3)[:n]) if trial % 5 == 0 else root @ root.T
        pairs = block_lanczos(lambda rows, gram=gram: rows @ gram, n, k)
        want = np.linalg.eigvalsh(gram)[::-1][:k]
        np.testing.assert_allclose(pairs.values, want, rtol=0, atol=1e-9 * want[0])
        np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(k), atol=1e-10)
        assert pairs.converged


def test_a_value_far_above_all_others_is_vouched_for_in_few_products():
    """What lies below converges slowly, a bulk without gaps; it need not."""
    diagonal = np.concatenate([[2.0], np.linspace(0, 1, 4999)])
    spent = []
    pairs = block_lanczos(lambda u: spent.append(len(u)) or u * diagonal, 5000, 1)
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, [2.0], rtol=1e-12)
    assert sum(spent) < 300


def test_block_lanczos_says_when_it_did_not_converge():
    diagonal = np.linspace(0, 1, 3000)
    with pytest.warns(NotConvergedWarning, match="of 40 eigenpairs converged"):
        pairs = block_lanczos(lambda u: u * diagonal, 3000, 40, most_products=200)
    assert not pairs.converged


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
