"""The network and the kernel that the tests of linearised training share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from pkjax import ntk

from tests.cases import normal

T = np.array([0.0, 0.3, 2.0, 17.0])


def mlp(params, x):
    return jax.nn.relu(x @ params["a"] + params["c"]) @ params["b"]


@functools.cache
def network(n=4, width=7, outputs=2):
    a, c, b = normal((1, 0), (3, width)), normal((1, 1), (width,)), normal((1, 2), (width, outputs))
    x, x2, y = normal((1, 3), (n, 3)), normal((1, 4), (3, 3)), normal((1, 5), (n, outputs))
    params = {"a": a, "c": 0.3 * c, "b": b / width**0.5}
    return params, x, x2, y


@functools.cache
def problem():
    params, x, _, y = network()
    return ntk(mlp, params, x), mlp(params, x), y


def matrix_of(theta):
    n, m, k, _ = theta.shape
    return np.asarray(theta).transpose(0, 2, 1, 3).reshape(n * k, m * k)


def cross_entropy(f):
    return -jax.nn.log_softmax(f)[jnp.arange(4), jnp.array([0, 1, 1, 0])].sum()


def norms(tree, axes=0):
    return np.sqrt(sum((np.asarray(v) ** 2).sum(tuple(range(axes, v.ndim))) for v in jax.tree.leaves(tree)))
