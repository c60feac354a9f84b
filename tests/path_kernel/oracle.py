"""The dual Gram matrix of enumerated paths, and what its tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.cases import Case
from tests.oracles import enumerate_paths

KINDS = ("dense", "conv", "residual")


def ones(case):
    return jnp.ones((1, *case.X.shape[1:]))


def explicit(case):
    oracle = enumerate_paths(case.layers, case.params, np.ones((1, *case.X.shape[1:])), case.masks)
    return oracle.jtv.T @ oracle.jtv


def flat(tree, rows=1):
    return np.concatenate([np.asarray(v).reshape(rows, -1) for v in jax.tree.leaves(tree)], axis=1)


def spectrum(gram):
    return np.linalg.eigvalsh(gram)[::-1]


TIED = Case([("dense", "w", 3, True), ("leaky", 0.0), ("dense", "w", 3, True), ("dense", "v", 2, False)],
            {"v.kernel": np.random.default_rng(5).normal(size=(3, 2)),
             "w.bias": np.random.default_rng(6).normal(size=3),
             "w.kernel": np.random.default_rng(7).normal(size=(3, 3))}, None, np.ones((1, 3)))
