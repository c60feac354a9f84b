"""Every rule against enumeration and JAX's own derivatives, on networks around one operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from pkjax import paths
from pkjax.paths.polynomial import path_sum

from tests.cases import FLOAT

rng = np.random.default_rng(0)
W = {"a": jnp.asarray(rng.normal(size=(3, 4)), FLOAT), "b": jnp.asarray(rng.normal(size=(4, 2)), FLOAT),
     "c": jnp.asarray(rng.normal(size=4), FLOAT)}
X = jnp.asarray(rng.normal(size=(2, 3)), FLOAT)
C = jnp.asarray([[0.5, -2.0, 0.0, 1.5]], FLOAT)
ORDER = jnp.asarray([[2, 0, 3, 1]])


def places(v):
    """The four entries of each example as an image of 2 × 2."""
    return v.reshape(-1, 1, 2, 2)


def convolved(v, kernel, **options):
    out = lax.conv_general_dilated(v, kernel, **{"window_strides": (1, 1), "padding": "SAME", **options})
    return out.reshape(len(v), -1)[:, :4]


def kernel(*shape):
    return jnp.asarray(np.random.default_rng(5).normal(size=shape), FLOAT)


def by_index(operation, update):
    """Scatter into four entries, two of which coincide."""
    def hidden(v):
        at = jnp.zeros_like(v).at[:, jnp.asarray([1, 3, 1, 0])]
        return getattr(at, operation)(update(v))
    return hidden


def generic(combine, start):
    """`lax.reduce_window` and `lax.reduce` by a function that JAX does not know by name."""
    def hidden(v):
        pairs = lax.reduce_window(v, np.asarray(start, v.dtype), combine, (1, 2), (1, 1), "SAME")
        return pairs + lax.reduce(v, np.asarray(start, v.dtype), combine, (1,))[:, None]
    return hidden


LINEAR = {
    "stack": lambda v: jnp.stack([v, 2 * v], 1).sum(1), "unstack": lambda v: jnp.stack(
        jnp.unstack(v, axis=1)[::-1], 1),
    "tile": lambda v: jnp.tile(v, (1, 2))[:, 2:6], "name": lambda v: checkpoint_name(v, "hidden"),
    "optimization_barrier": lambda v: lax.optimization_barrier((v, v))[1], "device_put": jax.device_put,
    "reshape": lambda v: v.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4), "rev": lambda v: v[:, ::-1],
    "pad": lambda v: jnp.pad(v, ((0, 0), (1, 2)))[:, 1:5], "pad, negative": lambda v: lax.pad(
        v, np.zeros((), v.dtype), [(0, 0, 0), (-1, 1, 0)]), "reflect": lambda v: jnp.pad(
        v, ((0, 0), (2, 0)), mode="reflect")[:, :4], "cumsum": lambda v: jnp.cumsum(v, 1),
    "cumsum, reversed": lambda v: lax.cumsum(v, 1, reverse=True),
    "reduce_window_sum": lambda v: lax.reduce_window(v, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
    "diff": lambda v: jnp.pad(jnp.diff(v, axis=1), ((0, 0), (0, 1))), "trace": lambda v: v * 0.5 + jnp.trace(
        v.reshape(-1, 2, 2), axis1=1, axis2=2)[:, None], "kron": lambda v: jax.vmap(
        lambda e: jnp.kron(e, jnp.asarray([1.0, -2.0], e.dtype)))(v)[:, 2:6],
    "convolve": jax.vmap(lambda e: jnp.convolve(e, jnp.asarray([1.0, -2.0, 0.5], e.dtype), "same")),
    "interp by constants": lambda v: v @ jnp.asarray([[0.5, 0.5, 0, 0]] * 4, v.dtype),
    "gather": lambda v: v[:, jnp.asarray([2, 0, 1, 1])], "take_along_axis": lambda v: jnp.take_along_axis(
        v, jnp.broadcast_to(ORDER, v.shape), 1), "take, filled": lambda v: jnp.take(
        v, jnp.asarray([3, 1, 7, 0]), axis=1, fill_value=0), "dynamic_slice": lambda v: lax.dynamic_slice_in_dim(
        jnp.tile(v, (1, 2)), jnp.asarray(3), 4, 1), "dynamic_update_slice": lambda v: lax.dynamic_update_slice_in_dim(
        2 * v, v[:, :2], jnp.asarray(1), 1), "permuted by constants": lambda v: lax.sort(
        (jnp.broadcast_to(ORDER, v.shape), v), dimension=1, num_keys=1)[1],
    "scatter": lambda v: jnp.zeros_like(v).at[:, jnp.asarray([1, 3])].set(v[:, :2]), "scatter-add": by_index(
        "add", lambda v: v), "scatter-sub": by_index("subtract", lambda v: v), "scatter-sub, unsigned": lambda v: v.at[
        :, 1].subtract(3 * v[:, 0]), "scatter-mul": lambda v: v.at[:, jnp.asarray([1, 3])].multiply(C[:, :2]),
    "scatter-mul, twice": lambda v: v.at[:, jnp.asarray([1, 1])].multiply(jnp.asarray([2.0, -3.0], v.dtype)),
    "scatter, divided": lambda v: v.at[:, 2].divide(4.0), "transposed convolution": lambda v: convolved(
        places(v), kernel(1, 1, 3, 3), lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
    "grouped convolution": lambda v: convolved(
        v.reshape(-1, 2, 1, 2), kernel(2, 1, 1, 2), feature_group_count=2), "vmapped convolution": jax.vmap(
        lambda e: convolved(places(e), kernel(1, 1, 2, 2))[0]), "batch-grouped convolution": jax.vmap(
        lambda e: lax.conv_general_dilated(e.reshape(2, 1, 2, 1), kernel(2, 1, 1, 1), (1, 1), "SAME",
                                           batch_group_count=2).ravel()),
    "fft of constants": lambda v: v * jnp.abs(jnp.fft.fft(C)).astype(v.dtype), "select": lambda v: jnp.where(
        C > 0, v, -v),
    "platform": lambda v: lax.platform_dependent(v, cpu=lambda v: 2 * v, default=lambda v: v),
    "nan_to_num": lambda v: jnp.nan_to_num(v), "isnan": lambda v: jnp.where(jnp.isnan(v), jnp.nan, v),
    "switch": lambda v: lax.switch(1, [jnp.negative, lambda v: 3 * v], v), "select_and_scatter_add": jax.vmap(
        lambda e: jax.vjp(lambda c: lax.reduce_window(c, -np.inf, lax.max, (2,), (2,), "VALID"), C[0])[1](e[:2])[0]),
    "scan of length 0": lambda v: lax.scan(lambda s, _: (jnp.tanh(s), s), v, None, length=0)[0],
}
PIECEWISE = {
    "sort": lambda v: jnp.sort(v, axis=1), "sort, descending": lambda v: jnp.sort(v, axis=1, descending=True),
    "sort with values": lambda v: lax.sort((v, 2 * v[:, ::-1]), dimension=1, num_keys=1)[1],
    "argsort": lambda v: jnp.take_along_axis(v, jnp.argsort(v[:, ::-1], axis=1), 1),
    "top_k": lambda v: jnp.tile(lax.top_k(v, 2)[0], (1, 2)), "top_k's places": lambda v: v.at[:, :2].add(
        jnp.take_along_axis(2 * v, lax.top_k(v, 2)[1], 1)), "top_k of the other axis": jax.vmap(
        lambda e: lax.top_k(e.reshape(2, 2), 1, axis=0)[0].ravel()[jnp.asarray([0, 1, 1, 0])]),
    "cummax": lambda v: lax.cummax(v, 1), "cummin, reversed": lambda v: lax.cummin(v, 1, reverse=True),
    "median": lambda v: v + jnp.median(v, axis=1, keepdims=True), "quantile": lambda v: v + jnp.quantile(
        v, 0.3, axis=1, keepdims=True), "partition": lambda v: jnp.partition(v, 1, axis=1),
    "ptp": lambda v: v - jnp.ptp(v, axis=1, keepdims=True),
    "nanmax": lambda v: v + jnp.nanmax(v, axis=1, keepdims=True),
    "scatter-max": by_index("max", lambda v: v),
    "scatter-min": lambda v: v.at[:, jnp.asarray([1, 1, 2])].min(2 * v[:, :3]), "segment_max": jax.vmap(
        lambda e: jnp.tile(jax.ops.segment_max(e, jnp.asarray([0, 1, 0, 1]), 2), 2)),
    "argmax, gathered": lambda v: v - jnp.take_along_axis(v, jnp.argmax(v, 1, keepdims=True), 1),
    "argmax, sliced": jax.vmap(lambda e: e + lax.dynamic_slice_in_dim(e, jnp.argmax(-e), 2)[0]),
    "argmax, one-hot": lambda v: v + jnp.einsum("ni,ni->n", v, jax.nn.one_hot(v.argmax(1), 4, dtype=v.dtype))[:, None],
    "masked mean": lambda v: v + (jax.nn.relu(v).sum(1) / jnp.maximum(
        1, (v > 0).sum(1)).astype(v.dtype))[:, None], "scatter-mul by a gate": lambda v: v.at[:, 1].multiply(
        (v[:, 0] > 0).astype(v.dtype)), "fmax": lambda v: jnp.fmax(v, 2 * v[:, ::-1]),
    "clip": lambda v: jnp.clip(v, 0), "relu of sorted": lambda v: jax.nn.relu(jnp.sort(v, 1)),
    "prelu": lambda v: jnp.where(v >= 0, v, 0.25 * v), "cummax of relu": lambda v: lax.cummax(jax.nn.relu(v), 1),
}
PARAMETERS = {
    "class token": lambda w, v: jnp.stack([v, jnp.broadcast_to(w["c"], v.shape)], 1).sum(1),
    "concatenated token": lambda w, v: jnp.concatenate([w["c"][None, :2] + 0 * v[:, :2], v[:, 2:]], 1),
    "scattered by parameters": lambda w, v: v.at[:, jnp.asarray([3, 0])].multiply(
        w["c"][:2], unique_indices=True),
    "parameters scattered": lambda w, v: v @ jnp.zeros((4, 4), v.dtype).at[jnp.diag_indices(4)].set(w["c"]),
    "lower triangle": lambda w, v: v.at[:, :3].set(v[:, :3] @ jnp.zeros((3, 3), v.dtype).at[jnp.tril_indices(3)].set(
        jnp.concatenate([w["c"], w["b"][0]]))), "sorted parameters": lambda w, v: v * jnp.sort(w["c"]),
    "gathered parameters": lambda w, v: v * w["c"][jnp.asarray([2, 2, 0, 1])],
    "expert by argmax": lambda w, v: jax.nn.one_hot(v.argmax(1), 4, dtype=v.dtype) @ (w["c"][:, None] * 0.5) * v,
    "power": lambda w, v: v * w["c"] ** 3, "tiled": lambda w, v: v * jnp.tile(w["c"][:2], 2),
}
WITHOUT_DERIVATIVE = {      # in JAX; beside each, the same function with one
    "reduce by add": (generic(lambda a, b: a + b, 0.0), lambda v: lax.reduce_window(v, 0.0, lax.add, (1, 2), (
        1, 1), "SAME") + v.sum(1, keepdims=True)),
    "reduce by max": (generic(lambda a, b: jnp.maximum(a, b), -np.inf), lambda v: lax.reduce_window(
        v, -np.inf, lax.max, (1, 2), (1, 1), "SAME") + v.max(1, keepdims=True)),
    "reduce by min": (generic(lambda a, b: lax.min(b, a), np.inf), lambda v: lax.reduce_window(
        v, np.inf, lax.min, (1, 2), (1, 1), "SAME") + v.min(1, keepdims=True)),
    "composite": (lax.composite(lambda v: 2 * v, "tests.double"), lambda v: 2 * v),
}


def around(hidden):
    return lambda w, x: hidden(x @ w["a"] + w["c"]) @ w["b"]


NETWORKS = {**{name: around(hidden) for name, hidden in (LINEAR | PIECEWISE).items()},
            **{name: lambda w, x, h=h: jax.nn.relu(h(w, x @ w["a"])) @ w["b"] for name, h in PARAMETERS.items()}}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1e-30, np.abs(np.asarray(b)).max()))


@functools.cache
def rows(net):
    """The dense Jacobian, (N K, m)."""
    return np.concatenate([np.asarray(leaf).reshape(4, -1) for leaf in jax.tree.leaves(jax.jacrev(net)(W, X))], 1)


@pytest.mark.parametrize("name", [*NETWORKS, *WITHOUT_DERIVATIVE])
def test_paths_give_value_gradient_and_polynomial(name):
    net, same = map(around, WITHOUT_DERIVATIVE[name]) if name in WITHOUT_DERIVATIVE else (NETWORKS[name],) * 2
    factors, dense = paths.factorize(net, W, X), rows(same)
    assert np.abs(dense).max() > 0.1
    close(factors.jvf @ factors.jtv, dense)
    gates = paths.gates(net, W, X)
    close(path_sum(net, W, X, gates=gates), net(W, X))
    for q in (1, 2):
        z = jnp.ones((1, 3), FLOAT)
        total = paths.polynomial(net, jax.tree.map(lambda v, q=q: jnp.abs(v)**q, W), z, q=q).sum()
        close(total, (np.abs(factors.values)**q).sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_structured_kernel_is_that_of_the_jacobian(name):
    net = NETWORKS[name]
    dense = rows(net)
    theta = pk.ntk(net, W, X, engine="structured").transpose(0, 2, 1, 3).reshape(4, 4)
    close(theta, dense @ dense.T)
