"""Small networks that are not piecewise linear, and their paths listed as one reads them off the formulae.

Every entry of a signal is a list of (constant, coefficient, parameters, source), one for each path.
"""

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from tests.cases import normal


class Listed:
    """A signal whose entries list their paths; written without any look at a jaxpr."""

    used: ClassVar = []
    """The coefficients, in the order in which they are used."""
    given = None
    """An iterator over others to take in their place; gates of ReLU are then open."""

    @classmethod
    def factor(cls, coefficient):
        cls.used.append(np.asarray(coefficient))
        return coefficient if cls.given is None else next(cls.given)

    def __init__(self, lists):
        self.lists = lists

    @classmethod
    def inputs(cls, shape):
        lists = np.empty(shape, object)
        for at in np.ndindex(shape):
            lists[at] = [(1.0, 1.0, (), at)]
        return cls(lists)

    def mapped(self, extend):
        out = np.empty(self.lists.shape, object)
        for at in np.ndindex(out.shape):
            out[at] = [extend(at, *path) for path in self.lists[at]]
        return Listed(out)

    def dense(self, name, wide):
        """Times a matrix of parameters, over the last axis."""
        out = np.empty((*self.lists.shape[:-1], wide), object)
        for *at, j in np.ndindex(out.shape):
            out[(*at, j)] = [(c, a, (*p, (name, i, j)), s) for i, paths in enumerate(self.lists[tuple(at)])
                             for c, a, p, s in paths]
        return Listed(out)

    def scaled(self, name):
        return self.mapped(lambda at, c, a, p, s: (c, a, (*p, (name, at[-1])), s))

    def biased(self, name):
        return self + Listed(np.vectorize(lambda i: [(1.0, 1.0, ((name, i),), None)], otypes=[object])(
            np.indices(self.lists.shape)[-1]))

    def gated(self, gate):
        return self if Listed.given else self.mapped(lambda at, c, a, p, s: (c, a * gate[at], p, s))

    def times(self, coefficient):
        coefficient = self.factor(coefficient)
        return self.mapped(lambda at, c, a, p, s: (c, a * coefficient[at], p, s))

    def constant(self, value):
        return self.mapped(lambda at, c, a, p, s: (c * value, a, p, s))

    def attended(self, probabilities):
        """Mix the first axis by a matrix of coefficients."""
        probabilities = self.factor(probabilities)
        out = np.empty(self.lists.shape, object)
        for i, j in np.ndindex(out.shape):
            out[i, j] = [(c, a * probabilities[i, t], p, s) for t in range(out.shape[0])
                         for c, a, p, s in self.lists[t, j]]
        return Listed(out)

    def averaged(self, axis):
        n = self.lists.shape[axis]
        out = np.empty(tuple(np.delete(self.lists.shape, axis)), object)
        for at in np.ndindex(out.shape):
            out[at] = [(c / n, *rest) for paths in np.moveaxis(self.lists, axis, -1)[at] for c, *rest in paths]
        return Listed(out)

    def centred(self):
        """What a normalisation subtracts: two routes, straight on and by the mean."""
        mean = self.averaged(-1).constant(-1.0).lists
        return self + Listed(np.stack([mean] * self.lists.shape[-1], -1))

    def __add__(self, other):
        return Listed(self.lists + other.lists)

    def values(self, w, x, q=None, weigh=lambda w: w):
        """Σ c a v x of every output; with q, Σ |c a|^q Π weigh(θ) x."""
        def value(c, a, p, s):
            factor = c * a if q is None else float(c * a != 0) if q == 0 else abs(c * a) ** q
            return factor * np.prod([weigh(w[name][tuple(i)]) for name, *i in p]) * (1.0 if s is None else x[s])
        return np.array([sum(value(*path) for path in paths) for paths in self.lists.ravel()])

    def gradient(self, w, x):
        """J_v^f J_θ^v, by the product rule on every path."""
        out = [{name: np.zeros(np.shape(leaf)) for name, leaf in w.items()} for _ in self.lists.ravel()]
        for tree, paths in zip(out, self.lists.ravel(), strict=True):
            for c, a, p, s in paths:
                for n, (name, *i) in enumerate(p):
                    others = np.prod([w[other][tuple(j)] for m, (other, *j) in enumerate(p) if m != n])
                    tree[name][tuple(i)] += c * a * others * (1.0 if s is None else x[s])
        return out


def layer_norm(x):
    """A normalisation as its centring and its coefficient."""
    spread = x - x.mean(-1, keepdims=True)
    return spread, 1 / np.sqrt((spread**2).mean(-1, keepdims=True) + 1e-2) * np.ones_like(x)


def normal_cdf(z):
    return np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(z)


# -- networks: the function, its parameters, and its paths as one reads them off its formula ---------------------------


def mlp_gelu(w, x):
    return nn.gelu(x @ w["a"] + w["b"], approximate=False) @ w["c"]


def mlp_gelu_paths(w, x):
    z = x @ w["a"] + w["b"]
    return Listed.inputs(x.shape).dense("a", 4).biased("b").constant(0.5).times(2 * normal_cdf(z)).dense("c", 2)


def swiglu(w, x):
    return (nn.silu(x @ w["g"]) * (x @ w["a"] + w["b"])) @ w["c"]


def swiglu_paths(w, x):
    g = x @ w["g"]
    return Listed.inputs(x.shape).dense("a", 4).biased("b").times(g / (1 + np.exp(-g))).dense("c", 2)


def norm_net(w, x):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-2) * w["s"] + w["t"]
    return nn.relu(y) @ w["d"]


def norm_paths(w, x):
    spread, scale = layer_norm(x)
    y = Listed.inputs(x.shape).centred().times(scale).scaled("s").biased("t")
    return y.gated(spread * scale * w["s"] + w["t"] > 0).dense("d", 2)


def attention(w, x):
    q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
    p = nn.softmax(jnp.einsum("nid,njd->nij", q, k) / 2.0, -1)
    return (x + jnp.einsum("nij,njd->nid", p, v)).mean(1) @ w["d"]


def attention_paths(w, x):
    logits = (x @ w["q"]) @ (x @ w["k"]).T / 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    signal = Listed.inputs(x.shape)
    return (signal + signal.dense("v", x.shape[-1]).attended(p)).averaged(0).dense("d", 2)


SHAPES = {"a": (3, 4), "b": (4,), "c": (4, 2), "g": (3, 4), "s": (3,), "t": (3,), "d": (3, 2), "q": (3, 2),
          "k": (3, 2), "v": (3, 3)}
NETWORKS = {"gelu": (mlp_gelu, mlp_gelu_paths, "abc", (3,)), "swiglu": (swiglu, swiglu_paths, "abcg", (3,)),
            "layer norm": (norm_net, norm_paths, "std", (3,)),
            "attention": (attention, attention_paths, "qkvd", (2, 3))}


@functools.cache
def problem(name):
    """A network, its parameters, two inputs, and the paths of each."""
    net, paths, leaves, shape = NETWORKS[name]
    w = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate(leaves)}
    X = normal(9, (2, *shape))
    held = {k: np.asarray(v, np.float64) for k, v in w.items()}
    return net, w, X, held, [paths(held, np.asarray(x, np.float64)) for x in X]


def jacobian(paths, w):
    """∂(c a v)/∂θ of each path, the parameters in flattening order."""
    sizes = np.cumsum([0, *(v.size for _, v in sorted(w.items()))])
    first = dict(zip(sorted(w), sizes, strict=False))
    J = np.zeros((len(paths), sizes[-1]))
    for row, (c, a, p, _) in zip(J, paths, strict=True):
        for n, (leaf, *i) in enumerate(p):
            others = np.prod([w[other][tuple(j)] for m, (other, *j) in enumerate(p) if m != n])
            row[first[leaf] + np.ravel_multi_index(tuple(i), w[leaf].shape)] += c * a * others
    return J


def opened(paths, w, X, reference):
    """Paths with every coefficient at its largest magnitude for a reference, and gates open."""
    each = []
    for x in reference:
        Listed.used = []
        paths(w, np.asarray(x, np.float64))
        each.append(Listed.used)
    Listed.given = iter([np.abs(np.stack(values)).max(0) for values in zip(*each, strict=True)])
    try:
        return paths(w, np.asarray(X[0], np.float64))
    finally:
        Listed.given = None
