"""What a Krylov space does not show, against operators that hide an eigenvalue."""

import numpy as np
import pytest
from pkjax.linalg.block_lanczos import block_lanczos
from pkjax.linalg.unseen import Weights


def krylov(matrix, start, steps):
    """A Krylov basis by QR, the projected matrix and its couplings."""
    basis, blocks = np.linalg.qr(start)[0], [0, start.shape[1]]
    for _ in range(steps):
        image = matrix @ basis[:, blocks[-2]:]
        for _ in range(2):
            image = image - basis @ (basis.T @ image)
        basis = np.concatenate([basis, np.linalg.qr(image)[0]], axis=1)
        blocks.append(basis.shape[1])
    return basis, basis.T @ matrix @ basis, blocks


@pytest.mark.parametrize("block", [1, 3])
def test_weights_are_those_of_the_eigenvector_also_after_a_restart(block):
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    values = np.append(np.linspace(0, 1, 59), 1.3)
    matrix = vectors * values @ vectors.T
    basis, projected, ends = krylov(matrix, rng.normal(size=(60, block)), 4)
    weights = Weights(block)
    for start, stop, after in zip(ends, ends[1:], ends[2:], strict=False):
        weights.grow(1.3, projected[start:stop, :stop], projected[start:stop, stop:after])
    of_top = basis.T @ vectors[:, -1]
    np.testing.assert_allclose(weights.on_basis @ of_top[:block], of_top, atol=1e-9)
    s = np.linalg.qr(rng.normal(size=(2 * block, block)))[0]
    weights.rotate(s)
    of_kept = np.concatenate([s.T @ of_top[:2 * block], of_top[2 * block:]])
    np.testing.assert_allclose(weights.on_basis @ of_top[:block], of_kept, atol=1e-9)


def test_the_chance_to_overlook_an_eigenvalue_bounds_how_often_random_starts_do():
    """An operator of values at most 1 and one more, 1.2: how often do the weights lie below what a search excludes?"""
    n, level, rng = 200, 1.2, np.random.default_rng(1)
    values = np.append(np.linspace(0, 1, n - 1), level)
    chances, hidden = [], []
    for _ in range(200):
        start = rng.normal(size=(n, 1))
        start /= np.linalg.norm(start)
        # Without its last entry the start sees a spectrum up to 1 alone.
        blind = start * (np.arange(n) < n - 1)[:, None]
        _, projected, ends = krylov(np.diag(values), blind, 4)
        weights = Weights(1)
        for begin, stop, after in zip(ends, ends[1:], ends[2:], strict=False):
            weights.grow(level, projected[begin:stop, :stop], projected[begin:stop, stop:after])
        chances.append(weights.chance(n))
        hidden.append(abs(start[-1, 0]) <= 1 / np.linalg.norm(weights.on_basis))
    assert 0.01 < np.mean(chances) < 0.7
    assert np.mean(hidden) <= np.mean(chances) + 0.03


def test_a_lone_largest_pair_needs_no_second_search():
    values = np.concatenate([[2.0, 2.0], np.linspace(0, 1, 5000)])
    spent = []
    pairs = block_lanczos(lambda rows: spent.append(len(rows)) or rows * values, len(values), 1, block=1,
                          tolerance=1e-6)
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, 2.0, rtol=1e-9)
    assert sum(spent) < 25
    assert pairs.slack <= 2.1e-5
