"""Where examples lie, read off programs: networks that keep them apart are let through, networks that join them not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from pkjax.network import read
from pkjax.programs.batch_axes import ELEMENTWISE, OPERATIONS
from pkjax.programs.examples import EXAMPLES, Free, Joined, Rows, Uncertain
from pkjax.programs.independence import RULES, follow

from tests.cases import FLOAT, normal
from tests.programs.samples import SKIPPED, emitted, functions

W = normal(0, (4, 4))
TABLE = jnp.asarray([2, 0, 1, 3])
ATTENTION = nn.MultiHeadDotProductAttention(2, dtype=FLOAT, param_dtype=FLOAT)
ATTENDED = ATTENTION.init(jax.random.key(0), jnp.ones((1, 3, 4), FLOAT))
RNN = nn.RNN(nn.LSTMCell(4, dtype=FLOAT, param_dtype=FLOAT))
SPLIT_RNN = nn.RNN(nn.OptimizedLSTMCell(4, dtype=FLOAT, param_dtype=FLOAT))       # of the same parameters
STATE = RNN.init(jax.random.key(0), jnp.ones((1, 3, 4), FLOAT))


def followed(net, shape):
    closed = jax.make_jaxpr(lambda w, x: net(w, x))(W, jax.ShapeDtypeStruct((EXAMPLES, *shape), FLOAT))
    (place,) = follow(closed.jaxpr, closed.consts, [Free(), Rows(0)])
    return place


def convolution(w, x, groups=1):
    return lax.conv_general_dilated(x, w.reshape(2, 2, 2 // groups, -1), (1, 1), "SAME", feature_group_count=groups,
                                    dimension_numbers=("NHWC", "HWIO", "NHWC"))


def window(operation, start):
    return lambda w, x: lax.reduce_window(x, np.asarray(start, x.dtype), operation, (1, 2), (1, 1), "SAME")


FOLLOWED = {
    "reshape": (lambda w, x: x.reshape(-1, 2, 2).reshape(len(x), 4) @ w, (4,)),
    "reshape that merges": (lambda w, x: (x.reshape(-1, 4) @ w).reshape(x.shape), (3, 4)),
    "transpose": (lambda w, x: (w @ x.T).T, (4,)), "moved axis": (lambda w, x: jnp.moveaxis(x, 0, 1).sum(0), (3, 4)),
    "broadcast": (lambda w, x: jnp.broadcast_to(x[:, None], (len(x), 3, 4)).sum(1), (4,)),
    "positions": (lambda w, x: x + normal(1, (3, 4)), (3, 4)), "iota of a position": (
        lambda w, x: x * jnp.arange(4, dtype=FLOAT), (4,)),
    "expand and squeeze": (lambda w, x: jnp.squeeze(jnp.expand_dims(x, 0), 0), (4,)), "sum": (
        lambda w, x: x.sum(1), (4,)), "max": (lambda w, x: x.max(1), (4,)), "softmax": (
        lambda w, x: jax.nn.softmax(x, 1), (4,)), "argmax": (lambda w, x: x.argmax(1), (4,)),
    "rev": (lambda w, x: x[:, ::-1], (4,)), "cumsum": (lambda w, x: jnp.cumsum(x, 1), (4,)), "cummax": (
        lambda w, x: lax.cummax(x, 1), (4,)), "sort": (lambda w, x: jnp.sort(x, 1), (4,)), "argsort": (
        lambda w, x: jnp.argsort(x, 1), (4,)), "top_k": (lambda w, x: lax.top_k(x, 2)[0], (4,)), "split": (
        lambda w, x: jnp.split(x, 2, 1)[1], (4,)), "slice": (lambda w, x: x[:, 1:3], (4,)), "pad": (
        lambda w, x: jnp.pad(x, ((0, 0), (1, 0))), (4,)), "dynamic_slice": (
        lambda w, x: lax.dynamic_slice_in_dim(x, jnp.argmax(w), 2, 1), (4,)), "dynamic_update_slice": (
        lambda w, x: lax.dynamic_update_slice_in_dim(x, 2 * x[:, :1], 1, 1), (4,)),
    "window sum": (window(lax.add, 0.0), (4,)), "window maximum": (window(lax.max, -np.inf), (4,)),
    "tile": (lambda w, x: jnp.tile(x, (1, 2)), (4,)), "concatenate": (
        lambda w, x: jnp.concatenate([x, 2 * x], 1), (4,)), "class token": (lambda w, x: jnp.concatenate(
            [jnp.broadcast_to(w[0], (len(x), 1, 4)), x], 1), (3, 4)), "stack": (
        lambda w, x: jnp.stack([x, x], 1), (4,)), "stack in front": (lambda w, x: jnp.stack([x, x])[1], (4,)),
    "unstack": (lambda w, x: jnp.unstack(x, axis=1)[2], (4,)), "matrix product": (lambda w, x: x @ w, (3, 4)),
    "product from the left": (lambda w, x: jnp.einsum("ij,nj->ni", w, x), (4,)), "batched product": (
        lambda w, x: jnp.einsum("nti,nsi->nts", x, x), (3, 4)), "convolution": (convolution, (3, 3, 2)),
    "vmapped convolution": (lambda w, x: jax.vmap(lambda e: convolution(w, e[None])[0])(x), (3, 3, 2)),
    "convolution over frames": (lambda w, x: jax.vmap(lambda f: convolution(w, f), 1, 1)(x), (2, 3, 3, 2)),
    "grouped convolution": (lambda w, x: convolution(w, x, 2), (3, 3, 2)),
    "gather": (lambda w, x: x[:, TABLE], (4,)), "lookup": (lambda w, x: w[x.astype(int) % 4].sum(1), (3,)),
    "take_along_axis": (lambda w, x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1), (4,)), "scatter": (
        lambda w, x: x.at[:, 1].set(0), (4,)), "scatter-add": (
        lambda w, x: jnp.zeros_like(x).at[:, TABLE].add(x), (4,)),
    "scatter-mul": (lambda w, x: x.at[:, TABLE].multiply(2.0), (4,)), "scatter-max": (
        lambda w, x: x.at[:, TABLE].max(0.0), (4,)), "scatter-sub": (lambda w, x: x.at[:, 2].subtract(1.0), (4,)),
    "attention": (lambda w, x: ATTENTION.apply(ATTENDED, x), (3, 4)), "recurrent network": (
        lambda w, x: RNN.apply(STATE, x), (3, 4)), "gates split from a state of zeros": (
        lambda w, x: SPLIT_RNN.apply(STATE, x), (3, 4)), "constants, split and joined": (
        lambda w, x: x + jnp.concatenate(jnp.split(jnp.ones((2, 4), FLOAT) @ w, 2, 1)[::-1], 1)[:, ::-1], (4,)),
    "scan over layers": (lambda w, x: lax.scan(
            lambda h, row: (jnp.tanh(h * row), None), x, w)[0], (4,)), "map over examples": (
        lambda w, x: lax.map(lambda e: jnp.tanh(e @ w), x), (4,)), "loop": (lambda w, x: lax.fori_loop(
            0, 3, lambda i, h: jnp.tanh(h @ w), x), (4,)), "while": (lambda w, x: lax.while_loop(
                lambda h: h[1] < 3, lambda h: (h[0] @ w, h[1] + 1), (x, 0))[0], (4,)),
    "branch": (lambda w, x: lax.cond(w[0, 0] > 0, jnp.tanh, jnp.negative, x), (4,)), "calls": (
        lambda w, x: jax.checkpoint(jax.jit(jax.nn.relu))(x), (4,)), "name": (
        lambda w, x: checkpoint_name(x, "h"), (4,)), "barrier": (
        lambda w, x: (lambda a, b, c: a + b.T)(*lax.optimization_barrier((x, x.T, w))), (4,)), "device_put": (
        lambda w, x: jax.device_put((w, x))[1], (4,)), "layer norm": (
        lambda w, x: nn.LayerNorm(dtype=FLOAT, use_bias=False, use_scale=False).apply({}, x), (4,)), "cholesky": (
        lambda w, x: jnp.linalg.cholesky(x @ x.mT + jnp.eye(3)), (3, 3)), "solve": (lambda w, x: jax.scipy.linalg.
        solve_triangular(jnp.tril(x) + jnp.eye(3), x), (3, 3)), "fft": (lambda w, x: jnp.fft.fft(x).real, (4,)),
    "selected": (lambda w, x: jnp.where(x > 0, x, w[0]), (4,)), "bits": (lambda w, x: jnp.signbit(x), (4,)),
}
"""Networks that keep examples apart, as the rules alone can tell."""
COMPARED = {
    "examples with themselves": (lambda w, x: x[jnp.arange(len(x)), TABLE[:len(x)] * 0], (4,)),
    "reversed twice": (lambda w, x: jnp.tanh(x[::-1])[::-1], (4,)),
    "sorted by length and back": (lambda w, x: (x[jnp.argsort(x[:, 0])] @ w)[jnp.argsort(jnp.argsort(x[:, 0]))], (4,)),
    "steadied softmax": (lambda w, x: (lambda e: e / e.sum(1, keepdims=True))(jnp.exp(x - x.max())), (4,)),
    "loop for each example": (jax.vmap(lambda w, x: lax.while_loop(
        lambda h: (h**2).sum() < 9, lambda h: 2 * h, x), (None, 0)), (4,)),
    "apart and together": (lambda w, x: jnp.concatenate([x[:1] @ w, x[1:] @ w]), (4,)),
    "kernels of examples": (lambda w, x: jax.vmap(lambda e: convolution(e.reshape(4, 4), e.reshape(1, 2, 4, 2))[0])(x),
                            (16,)),
}
"""Networks that keep examples apart, as numbers tell."""
JOINED = {
    "centred": (lambda w, x: x - x.mean(0), (4,)), "batch norm": (lambda w, x: nn.BatchNorm(
        use_running_average=False, use_bias=False, use_scale=False, dtype=FLOAT, momentum=0.9).apply(
            {"batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}, x, mutable=["batch_stats"])[0], (4,)),
    "cumsum over the batch": (lambda w, x: jnp.cumsum(x, 0), (4,)), "cummax over the batch": (
        lambda w, x: lax.cummax(x, 0), (4,)), "sorted batch": (lambda w, x: jnp.sort(x, 0), (4,)),
    "Gram matrix": (lambda w, x: x @ x.T @ x, (4,)), "pairwise": (lambda w, x: (x[:, None] - x[None]).sum(1), (4,)),
    "argmax over the batch": (lambda w, x: x + x.argmax(0), (4,)), "attention over the batch": (
        lambda w, x: jax.nn.softmax(x @ x.T, 1) @ x, (4,)), "product": (lambda w, x: x * x.prod(0), (4,)),
    "whole sum": (lambda w, x: x * x.sum(), (4,)), "sum in a scan": (lambda w, x: lax.scan(
        lambda h, row: (h - h.mean(0), None), x, w)[0], (4,)), "sum in a branch": (lambda w, x: lax.cond(
            w[0, 0] > 0, lambda v: v - v.mean(0), jnp.negative, x), (4,)),
}
"""Networks that join examples, and say by which operation."""
MIXED = {
    "the first one's": (lambda w, x: x + x[:1], (4,)), "maximum": (lambda w, x: x * x.max(0), (4,)), "reversed": (
        lambda w, x: x + x[::-1], (4,)), "rolled": (lambda w, x: x + jnp.roll(x, 1, 0), (4,)), "gathered": (
        lambda w, x: x[jnp.argsort(x[:, 0])], (4,)), "position": (
        lambda w, x: x * jnp.arange(len(x), dtype=FLOAT)[:, None], (4,)), "recurrent over the batch": (
        lambda w, x: lax.scan(lambda h, e: (h + e, h + e), jnp.zeros(4, FLOAT), x)[1], (4,)), "convolution": (
        lambda w, x: jax.vmap(lambda c: jnp.convolve(c, jnp.ones(3, FLOAT))[:len(x)], 1, 1)(x), (4,)), "any": (
        lambda w, x: jnp.where((x > 0.5).any(0), x, 0), (4,)), "tiled": (
        lambda w, x: jnp.tile(x, (2, 1))[1::2], (4,)), "other constants for each": (
        lambda w, x: x + jnp.concatenate([w[:1], w[1:2]])[:len(x)], (4,)),
    "windows over the batch": (lambda w, x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"), (4,)),
}
"""Networks that join examples, as numbers tell."""


@pytest.mark.parametrize("name", FOLLOWED)
def test_rules_follow_examples_through_networks_that_keep_them_apart(name):
    with jax.numpy_dtype_promotion("standard"):
        assert followed(*FOLLOWED[name]) == Rows(0)


@pytest.mark.parametrize("name", COMPARED)
def test_numbers_acquit_where_rules_are_uncertain(name):
    net, shape = COMPARED[name]
    with pytest.raises(Uncertain):
        followed(net, shape)
    read(net, W, jax.ShapeDtypeStruct((3, *shape), FLOAT))


@pytest.mark.parametrize("name", JOINED)
def test_an_operation_that_joins_examples_is_named(name):
    net, shape = JOINED[name]
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(Joined):
            followed(net, shape)
        with pytest.raises(ValueError, match=r"the operation .* joins the examples"):
            read(net, W, jax.ShapeDtypeStruct((3, *shape), FLOAT))


@pytest.mark.parametrize("name", MIXED)
def test_numbers_convict_where_rules_are_uncertain(name):
    net, shape = MIXED[name]
    with pytest.raises(ValueError, match="its own example alone"):
        read(net, W, jax.ShapeDtypeStruct((3, *shape), FLOAT))


def test_the_line_of_an_operation_inside_a_call_is_the_users():
    with pytest.raises(ValueError, match=r"'sort' joins the examples of a batch\n  source: .*test_independence\.py:"):
        read(lambda w, x: jnp.sort(x @ w, 0), jnp.ones((3, 2)), jax.ShapeDtypeStruct((3, 3), FLOAT))


def test_the_rules_know_what_jax_emits():
    """What they do not know is compared, so that a new primitive costs time and no truth; those of today are listed."""
    modules = {"jax.numpy": jax.numpy, "jax.nn": jax.nn, "jax.lax": jax.lax}
    names = {primitive for module, of in modules.items() for name in functions(of) if name not in SKIPPED[module]
             for primitive in emitted(of, name) or ()}
    unknown = names - ELEMENTWISE - set(RULES)
    assert unknown <= {
        "call_hi_primitive", "custom_linear_solve", "dce_sink", "polynomial",                      # are compared
        "ragged_dot_general", "scaled_dot",
        "create_token", "empty", "iota", "platform_index", "rng_bit_generator", "rng_uniform",     # take no example
        "pmax", "pmin", "psum", "axis_index"}                                                      # name an axis
    assert not ELEMENTWISE & set(OPERATIONS)
