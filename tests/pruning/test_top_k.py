"""The k highest keys against a stable sort, on leaves of many chunks, where brackets end in a look-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.pruning import top_k
from pkjax.pruning.selection import select_best

SHAPES = [(90, 37), (1024,), (3, 3, 16, 40), (10,), (0,), (2047, 2)]
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES)
TOP = np.iinfo(np.uint32).max

KEYS = {
    "spread": lambda rng, shape: rng.integers(0, TOP, shape, np.uint32, endpoint=True),
    "close": lambda rng, shape: rng.integers(2**30, 2**30 + 4 * TOTAL, shape, np.uint32),
    "tied": lambda rng, shape: rng.integers(5, 50, shape, np.uint32),
    "equal": lambda rng, shape: np.full(shape, 7, np.uint32),
    "nothing": lambda rng, shape: np.zeros(shape, np.uint32),
    "highest": lambda rng, shape: np.where(rng.random(shape) < 0.1, TOP, rng.integers(0, 9, shape)).astype(np.uint32),
    "mostly dead": lambda rng, shape: ((rng.random(shape) < 0.02) * rng.integers(0, TOP, shape)).astype(np.uint32),
    "heavy tails": lambda rng, shape: np.exp(9 * rng.normal(size=shape)).astype(np.float32).view(np.uint32),
    "ascending": lambda rng, shape: np.sort(rng.integers(0, TOP, shape, np.uint32), axis=None).reshape(shape),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that a few thousand keys go the way of millions."""
    for name, size in {"CHUNK": 1024, "JOINED": 0, "SAMPLE": 64, "COLUMNS": 32, "GATHERED": 8}.items():
        monkeypatch.setattr(top_k, name, size)


@pytest.mark.parametrize("keep", [top_k.keep_largest, top_k._keep_sorted])
def test_the_highest_are_the_head_of_a_stable_sort(keep, small_chunks):
    select = jax.jit(keep)
    for kind, draw in KEYS.items():
        rng = np.random.default_rng(0)
        keys = [draw(rng, shape) for shape in SHAPES]
        order = np.argsort(-np.concatenate([key.reshape(-1).astype(np.int64) for key in keys]), kind="stable")
        ends = np.cumsum([key.size for key in keys])[:-1]
        for k in [0, 1, 2, 17, 33, *(TOTAL * np.array([1, 10, 50, 99]) // 100), TOTAL - 1, TOTAL]:
            expected = np.zeros(TOTAL, bool)
            expected[order[:k]] = True
            marks, counts = select([jnp.asarray(key) for key in keys], jnp.asarray(k))
            marked = np.concatenate([np.asarray(mark).reshape(-1) for mark in marks])
            np.testing.assert_array_equal(marked, expected, err_msg=f"{kind}, k={k}")
            assert counts.tolist() == [part.sum() for part in np.split(expected, ends)], (kind, k)


def test_what_is_not_finite_is_seen_wherever_it_lies(small_chunks):
    rng = np.random.default_rng(1)
    leaves = [rng.normal(size=3000).astype(np.float32) for _ in range(4)]
    leaves[1][2999] = np.inf
    leaves[2][0] = -np.inf
    leaves[3][[5, 1500]] = np.inf, np.nan
    for joined in (0, 1 << 20):
        top_k.JOINED = joined
        best = select_best([jnp.asarray(leaf) for leaf in leaves], [jnp.ones(3000, bool)] * 4, jnp.asarray(5))
        assert best.flags.tolist() == [[False, False, False, True], [False, True, True, True]]
