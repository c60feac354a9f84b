"""Block Lanczos against dense eigenvalues: every copy of a multiple one, and an honest word on what it found."""

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
