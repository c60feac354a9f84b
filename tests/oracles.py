"""Independent oracles: networks given as plain layer lists, enumerated path by path in Python loops.

Nothing here uses JAX or pkjax: each layer says which edges it has, and the oracle follows them one by one.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass
class Enumerated:
    values: np.ndarray   # (P,)
    jvf: np.ndarray      # (N*K, P)
    jtv: np.ndarray      # (P, m)
    outputs: np.ndarray  # (N, K)
    ends: np.ndarray     # (P,) the output in which each path ends

    @property
    def pi(self):
        return self.jtv @ self.jtv.T

    @property
    def theta(self):
        return self.jvf @ self.pi @ self.jvf.T

    @property
    def data_factor(self):
        return self.jvf @ self.jvf.T

    def polynomial(self, q, gates=None):
        """Σ_p |v_p|^q, over the paths into all outputs."""
        return (np.abs(self.values) ** q).sum()


class Walk:
    """Paths as (constant, parameters, source, gates per example), kept per node."""

    def __init__(self, params, X, masks=None):
        self.params = {name: np.asarray(v, np.float64) for name, v in params.items()}
        self.masks = {name: np.ones_like(v, bool) if masks is None else np.asarray(masks[name])
                      for name, v in self.params.items()}
        self.names = sorted(self.params)
        self.X = np.asarray(X, np.float64)
        self.shape = self.X.shape[1:]
        n = int(np.prod(self.shape))
        one = (1.0,) * len(self.X)
        self.paths = [[(1.0, (), s, one)] for s in range(n)]

    def value(self, path):
        c, parameters, source, gates = path
        v = c
        for name, i in parameters:
            v *= self.params[name].flat[i]
        start = np.ones(len(self.X)) if source is None else self.X.reshape(len(self.X), -1)[:, source]
        return v * np.asarray(gates) * start

    def node_values(self):
        return np.array([sum((self.value(p) for p in node), np.zeros(len(self.X))) for node in self.paths]).T

    def edges(self, shape, edges, sources=()):
        """Follow edges (from, to, constant, parameter or None), and start paths (at, constant, parameter or None)."""
        new = [[] for _ in range(int(np.prod(shape)))]
        for i, o, c, p in edges:
            if c == 0 or (p is not None and not self.masks[p[0]].flat[p[1]]):
                continue
            new[o] += [(c * pc, (*pp, p) if p else pp, s, g) for pc, pp, s, g in self.paths[i]]
        for o, c, p in sources:
            if c == 0 or (p is not None and not self.masks[p[0]].flat[p[1]]):
                continue
            new[o].append((c, (p,) if p else (), None, (1.0,) * len(self.X)))
        self.paths, self.shape = new, shape

    def gate(self, slopes):
        """Multiply every node's paths by its slope, example by example."""
        self.paths = [[(c, p, s, tuple(np.asarray(g) * slopes[:, n])) for c, p, s, g in node]
                      for n, node in enumerate(self.paths)]


def enumerate_paths(layers, params, X, masks=None):
    """Enumerate a network given as a list of (kind, *arguments), as ``tests.cases`` builds them."""
    w = Walk(params, X, masks)
    for layer in layers:
        LAYERS[layer[0]](w, *layer[1:])
    sizes = [w.params[n].size for n in w.names]
    offset = dict(zip(w.names, np.cumsum([0, *sizes[:-1]]), strict=True))
    flat = [(k, path) for k, node in enumerate(w.paths) for path in node]
    n, outputs = len(w.X), len(w.paths)
    values, jvf, jtv = np.zeros(len(flat)), np.zeros((n, outputs, len(flat))), np.zeros((len(flat), sum(sizes)))
    for j, (k, (c, parameters, source, gates)) in enumerate(flat):
        factors = [w.params[name].flat[i] for name, i in parameters]
        values[j] = c * np.prod(factors)
        jvf[:, k, j] = np.asarray(gates) * (1.0 if source is None else w.X.reshape(n, -1)[:, source])
        for a, (name, i) in enumerate(parameters):
            jtv[j, offset[name] + i] += c * np.prod([f for b, f in enumerate(factors) if b != a])
    ends = np.array([k for k, _ in flat], int)
    return Enumerated(values, jvf.reshape(n * outputs, -1), jtv, w.node_values(), ends)


def _flatten(w):
    w.shape = (int(np.prod(w.shape)),)


def _dense(w, name, width, bias):
    n = w.shape[0]
    w.edges((width,), [(i, o, 1.0, (f"{name}.kernel", i * width + o)) for i in range(n) for o in range(width)],
            [(o, 1.0, (f"{name}.bias", o)) for o in range(width)] if bias else ())


def _conv(w, name, features, size, stride, dilation, groups, padding, bias):
    height, width, channels = w.shape
    reach = (size - 1) * dilation + 1
    if padding == "SAME":
        out = (-(-height // stride), -(-width // stride))
        low = [max((o - 1) * stride + reach - n, 0) // 2 for o, n in zip(out, (height, width), strict=True)]
    else:
        out, low = ((height - reach) // stride + 1, (width - reach) // stride + 1), [0, 0]
    per = channels // groups
    edges = []
    for y, x, f in product(range(out[0]), range(out[1]), range(features)):
        group = f // (features // groups)
        for a, b, c in product(range(size), range(size), range(per)):
            row, column = y * stride + a * dilation - low[0], x * stride + b * dilation - low[1]
            if 0 <= row < height and 0 <= column < width:
                start = (row * width + column) * channels + group * per + c
                edges.append((start, (y * out[1] + x) * features + f, 1.0,
                              (f"{name}.kernel", ((a * size + b) * per + c) * features + f)))
    w.edges((*out, features), edges,
            [(n, 1.0, (f"{name}.bias", n % features)) for n in range(out[0] * out[1] * features)] if bias else ())


def _batch_norm(w, name, mean, variance, epsilon):
    channels, n = w.shape[-1], int(np.prod(w.shape))
    w.edges(w.shape, [(i, i, 1.0, None) for i in range(n)], [(i, -mean[i % channels], None) for i in range(n)])
    w.edges(w.shape, [(i, i, 1 / np.sqrt(variance[i % channels] + epsilon), (f"{name}.scale", i % channels))
                      for i in range(n)], [(i, 1.0, (f"{name}.bias", i % channels)) for i in range(n)])


def _leaky(w, slope):
    v = w.node_values()
    w.gate(np.where(v > 0, 1.0, slope))


def _prelu(w, name):
    v, n = w.node_values(), len(w.paths)
    before = w.paths
    w.gate((v >= 0).astype(float))
    positive, w.paths = w.paths, before
    w.gate((v < 0).astype(float))
    w.edges(w.shape, [(i, i, 1.0, (f"{name}.slope", 0)) for i in range(n)])
    w.paths = [a + b for a, b in zip(positive, w.paths, strict=True)]


def _absolute(w):
    w.gate(np.sign(w.node_values()))


def _pool(w, kind, size):
    height, width, channels = w.shape
    out = (height // size, width // size)
    v, before = w.node_values(), w.paths
    new = []
    for y, x, c in product(range(out[0]), range(out[1]), range(channels)):
        cells = [((y * size + a) * width + x * size + b) * channels + c for a in range(size) for b in range(size)]
        winner = np.argmax(v[:, cells], axis=1)
        node = []
        for j, cell in enumerate(cells):
            share = (winner == j).astype(float) if kind == "max" else np.ones(len(v))
            constant = 1.0 if kind == "max" else 1 / size**2
            node += [(constant * pc, pp, s, tuple(np.asarray(g) * share)) for pc, pp, s, g in before[cell]]
        new.append(node)
    w.paths, w.shape = new, (*out, channels)


def _residual(w, inner):
    before, shape = w.paths, w.shape
    for layer in inner:
        LAYERS[layer[0]](w, *layer[1:])
    assert w.shape == shape
    w.paths = [a + b for a, b in zip(before, w.paths, strict=True)]


LAYERS = {"flatten": _flatten, "dense": _dense, "conv": _conv, "bn": _batch_norm, "leaky": _leaky, "prelu": _prelu,
          "abs": _absolute, "pool": _pool, "residual": _residual}
