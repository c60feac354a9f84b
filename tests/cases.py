"""Networks that tests draw (layer lists, their JAX functions, their parameters) and named ones; tolerances by type."""

import contextlib
import functools
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

FLOAT = {"float64": np.float64, "float32": np.float32}[os.environ.get("PKJAX_TESTS", "float64")]
"""The type of what is drawn."""
FLOAT32 = FLOAT is np.float32
"""Whether the tests run in the second configuration: float32 and standard promotion."""
TOLERANCE = 2**10 * float(np.finfo(FLOAT).eps)
"""A relative difference that rounding explains: 2·10⁻¹³ in float64, 10⁻⁴ in float32."""

_assert_allclose, _approx = np.testing.assert_allclose, pytest.approx


def assert_close(actual, desired, rtol=1e-7, atol=0, **options):
    """NumPy's comparison, no stricter than the type: an entry may miss by `TOLERANCE` of the largest one."""
    sizes = np.abs(np.asarray(desired, np.float64))
    top = sizes[np.isfinite(sizes)].max(initial=0.0)
    _assert_allclose(actual, desired, max(rtol, TOLERANCE), max(atol, TOLERANCE * top), **options)


def approx(expected, rel=None, abs=None, **options):
    """Pytest's comparison of numbers, no stricter than the type."""
    return _approx(expected, max(rel or 1e-6, TOLERANCE), abs, **options)


def named_in_float32_txt():
    """The names of the tests that run in the second configuration too."""
    lines = (Path(__file__).parent / "float32.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def normal(seed, shape, dtype=FLOAT):
    """Normal numbers, drawn by NumPy: JAX takes longer to compile a draw of each shape than most of what is tested."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def coins(seed, p, shape):
    """Booleans that are True with probability p, likewise."""
    return jnp.asarray(np.random.default_rng(seed).random(shape) < p)


@dataclass
class Case:
    layers: list
    params: dict
    masks: dict | None
    X: np.ndarray

    def apply(self, params, x):
        for layer in self.layers:
            x = APPLY[layer[0]](params, x, *layer[1:])
        return x

    @property
    def alive(self):
        """The parameters as the network uses them."""
        return self.params if self.masks is None else {n: v * self.masks[n] for n, v in self.params.items()}

    def __repr__(self):
        masked = None if self.masks is None else {n: float(np.mean(m)) for n, m in self.masks.items()}
        return f"Case({self.layers}, X{self.X.shape}, density {masked})"


def _conv(p, x, name, features, size, stride, dilation, groups, padding, bias):
    y = lax.conv_general_dilated(x, p[f"{name}.kernel"], (stride, stride), padding, rhs_dilation=(dilation, dilation),
                                 dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
    return y + p[f"{name}.bias"] if bias else y


def _dense(p, x, name, width, bias):
    return x @ p[f"{name}.kernel"] + p[f"{name}.bias"] if bias else x @ p[f"{name}.kernel"]


def _bn(p, x, name, mean, variance, epsilon):
    mean, variance = jnp.asarray(mean, x.dtype), jnp.asarray(variance, x.dtype)
    return (x - mean) * (lax.rsqrt(variance + epsilon) * p[f"{name}.scale"]) + p[f"{name}.bias"]


def _leaky(p, x, slope):
    return jax.nn.relu(x) if slope == 0 else jnp.where(x > 0, x, slope * x)


def _pool(p, x, kind, size):
    window, reduce = (1, size, size, 1), (lax.max, -np.inf) if kind == "max" else (lax.add, 0.0)
    y = lax.reduce_window(x, np.asarray(reduce[1], x.dtype), reduce[0], window, window, "VALID")
    return y if kind == "max" else y / size**2


def _residual(p, x, inner):
    y = x
    for layer in inner:
        y = APPLY[layer[0]](p, y, *layer[1:])
    return x + y


APPLY = {"flatten": lambda p, x: x.reshape(x.shape[0], -1), "dense": _dense, "conv": _conv, "bn": _bn,
         "leaky": _leaky, "prelu": lambda p, x, name: jnp.where(x >= 0, x, p[f"{name}.slope"] * x),
         "abs": lambda p, x: jnp.abs(x), "pool": _pool, "residual": _residual}


@st.composite
def cases(draw, kinds=("dense", "conv"), masked=None):
    """Draw a small network with parameters, maybe masks, and two or three inputs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    params, layers = {}, []
    bias = draw(st.booleans())

    def normal(*shape):
        return rng.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1)) * 1.5

    def dense(n, width):
        name = f"l{len(params):02d}"
        params[f"{name}.kernel"] = normal(n, width)
        if bias:
            params[f"{name}.bias"] = rng.normal(size=width) * draw(st.sampled_from([0.0, 0.3]))
        return ("dense", name, width, bias)

    def activation():
        kind = draw(st.sampled_from(["relu", "relu", "leaky", "prelu", "abs"]))
        if kind == "prelu":
            name = f"l{len(params):02d}"
            params[f"{name}.slope"] = np.array(rng.uniform(0.1, 0.5))
            return ("prelu", name)
        return ("abs",) if kind == "abs" else ("leaky", 0.0 if kind == "relu" else 0.2)

    def batch_norm(channels):
        name = f"l{len(params):02d}"
        params[f"{name}.scale"] = rng.uniform(0.5, 1.5, channels)
        params[f"{name}.bias"] = rng.normal(size=channels) * 0.3
        mean = rng.normal(size=channels) * draw(st.sampled_from([0.0, 0.5]))
        return ("bn", name, tuple(mean), tuple(rng.uniform(0.5, 2, channels)), 1e-3)

    if draw(st.sampled_from(kinds)) == "conv":
        shape = (4, 4, draw(st.sampled_from([1, 2])))
        features = 2
        size, stride = draw(st.sampled_from([2, 3])), draw(st.sampled_from([1, 2]))
        dilation = draw(st.sampled_from([1, 1, 2])) if size == 2 and stride == 1 else 1
        groups = draw(st.sampled_from([1, shape[2]]))
        padding = draw(st.sampled_from(["SAME", "SAME", "VALID"]))
        params["a.kernel"] = normal(size, size, shape[2] // groups, features)
        if bias:
            params["a.bias"] = rng.normal(size=features) * 0.3
        layers.append(("conv", "a", features, size, stride, dilation, groups, padding, bias))
        reach = (size - 1) * dilation + 1
        side = -(-4 // stride) if padding == "SAME" else (4 - reach) // stride + 1
        if draw(st.booleans()):
            layers.append(batch_norm(features))
        layers.append(activation())
        if draw(st.booleans()):
            params["b.kernel"] = normal(2, 2, features, features)
            layers.append(("residual", [("conv", "b", features, 2, 1, 1, 1, "SAME", False), ("leaky", 0.0)]))
        if side >= 2:
            layers.append(("pool", draw(st.sampled_from(["max", "avg"])), 2))
            side //= 2
        layers.append(("flatten",))
        width = side * side * features
    else:
        shape, width = (draw(st.integers(2, 3)),), None
        width = shape[0]
        for _ in range(draw(st.integers(1, 2))):
            layers.append(dense(width, draw(st.integers(2, 4))))
            width = layers[-1][2]
            if draw(st.booleans()):
                layers.append(batch_norm(width))
            layers.append(activation())
            if "residual" in kinds and draw(st.booleans()):
                layers.append(("residual", [dense(width, width), ("leaky", 0.0)]))
    layers.append(dense(width, draw(st.integers(1, 2))))
    params = {name: np.asarray(value, FLOAT) for name, value in params.items()}
    masks = None
    if draw(st.booleans()) if masked is None else masked:
        masks = {n: rng.random(v.shape) < 0.7 if n.endswith("kernel") else np.ones(v.shape, bool)
                 for n, v in params.items()}
    X = rng.normal(size=(draw(st.integers(2, 3)), *shape)).astype(FLOAT)
    return Case(layers, params, masks, X)


def live(case, oracle):
    """Whether a draw tests anything: outputs differ between inputs, and every leaf has a gradient.

    Told from the enumerated paths: JAX would compile two programs for every draw.
    """
    if np.ptp(oracle.outputs, axis=0).min() < 1e-6:
        return False
    gradient = np.abs(oracle.jvf @ oracle.jtv).max(0)
    ends = np.cumsum([case.params[name].size for name in sorted(case.params)])
    return all(leaf.max() > 1e-9 for leaf in np.split(gradient, ends[:-1]))


def mlp(p, x):
    for w, b in p[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ p[-1][0] + p[-1][1]


def convnet(p, x):
    def conv(x, k, stride=1):
        return jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(conv(x, p["stem"]) + p["stem_bias"])
    x = x + conv(jax.nn.relu(conv(x, p["first"])), p["second"])
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = conv(jax.nn.relu(x), p["down"], 2).mean((1, 2))
    return x @ p["head"] + p["head_bias"]


def frozen_norm(p, x):
    x = (x @ p["a"] - 0.25) * (1 / jnp.sqrt(jnp.asarray(1.5, x.dtype))) * p["scale"] + p["shift"]
    return jnp.where(x > 0, x, 0.2 * x) @ p["b"]


def shared(p, x):
    for _ in range(3):
        x = jax.nn.relu(x @ p["again"] + p["bias"])
    return x @ p["again"][:, :3]


def positions(p, x):
    x = jax.nn.relu(x @ p["each"] + p["bias"])   # (N, T, features): one weight at every position
    return x.mean(1) @ p["head"]


def drawn_like(shapes, seed=0, dtype=FLOAT):
    """Parameters with a tree of shapes: normal, of about unit length along the axes that are summed over."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple) and isinstance(s[0], int))
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=s) / np.prod(s[:-1])**0.5 + (0.1 if len(s) == 1 else 0) for s in leaves]
    return jax.tree.unflatten(treedef, [jnp.asarray(v, dtype) for v in values])


NETWORKS = {
    "mlp": (mlp, [((6, 9), (9,)), ((9, 8), (8,)), ((8, 3), (3,))], (6,)),
    "convnet": (convnet, dict(stem=(3, 3, 2, 4), stem_bias=(4,), first=(3, 3, 4, 4), second=(3, 3, 4, 4),
                              down=(1, 1, 4, 5), head=(5, 3), head_bias=(3,)), (6, 6, 2)),
    "frozen norm": (frozen_norm, dict(a=(5, 7), scale=(7,), shift=(7,), b=(7, 3)), (5,)),
    "shared": (shared, dict(again=(5, 5), bias=(5,)), (5,)),
    "positions": (positions, dict(each=(4, 6), bias=(6,), head=(6, 3)), (3, 4)),
}
"""Name → (function, shapes of the parameters, shape of an input): what kinds of layers a tangent kernel tells apart."""


@functools.cache
def jacobian(apply_fn):
    """The dense Jacobian of a network in its parameters, compiled once."""
    return jax.jit(jax.jacobian(apply_fn))


@functools.cache
def named_network(name, dtype=FLOAT, n=7):
    """Function, parameters and n inputs of one of `NETWORKS`, each of whose outputs feels every parameter."""
    apply_fn, shapes, shape = NETWORKS[name]
    params = drawn_like(shapes, dtype=dtype)
    x = normal(1, (n, *shape), dtype)
    for leaf in jax.tree.leaves(jacobian(apply_fn)(params, x)):
        assert jnp.abs(leaf).max() > 1e-3, "a parameter that no output feels tests nothing"
        assert jnp.abs(leaf - leaf[:1]).max() > 1e-6 or leaf.shape[2:] == (3,), "gates that never change test little"
    return apply_fn, params, x


def half_masks(params, seed=3):
    """Masks that keep about 60 % of the entries of each leaf."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [coins((seed, i), 0.6, v.shape) for i, v in enumerate(leaves)])


@contextlib.contextmanager
def compilations():
    """Count the programs that are compiled within the block: yields a function that gives the number so far."""
    count = 0

    def listen(event, duration, **kwargs):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def checking_leaks():
    """JAX's search for leaked tracers, which looks at every object but those that were there before."""
    gc.collect()
    gc.freeze()
    with jax.checking_leaks():
        yield


def unchecked(fn):
    """A function past the checks of types, where the tests make them."""
    return getattr(fn, "__wrapped__", fn)
