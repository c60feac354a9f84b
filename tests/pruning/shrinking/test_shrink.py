"""Smaller networks against the masked ones: equal outputs, and the units that loops over paths say remain."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import lax
from pkjax import shrink
from pkjax.models.resnet import ResNet

from tests.cases import FLOAT, assert_close, coins, normal

SIZES = (5, 9, 8, 7, 3)


def mlp(p, x, activation=jax.nn.relu):
    for i, layer in enumerate(p):
        x = x @ layer["w"] + layer["b"]
        x = activation(x) if i < len(p) - 1 else x
    return x


def sparse_mlp(seed, density=0.2):
    params = [{"b": jnp.where(coins(seed + 10 + i, 0.4, (n,)), normal(seed + i, (n,)), 0),
               "w": normal(seed + 20 + i, (m, n))}
              for i, (m, n) in enumerate(pairwise(SIZES))]
    masks = [{"b": jnp.ones(layer["b"].shape, bool), "w": coins(seed + 30 + i, density, layer["w"].shape)}
             for i, layer in enumerate(params)]
    return params, masks


def compared(apply_fn, params, x, masks=None, rtol=1e-6):
    """Shrink, and hold outputs and parameters to those of the masked network."""
    result = shrink(apply_fn, params, x[:1], masks=masks)
    kept = pk.apply_masks(params, masks)
    assert_close(result.apply_fn(result.params, x), apply_fn(kept, x), rtol=rtol)
    indices = jax.tree.leaves(result.kept, is_leaf=lambda v: isinstance(v, tuple))
    for old, new, rows in zip(jax.tree.leaves(kept), jax.tree.leaves(result.params), indices, strict=True):
        assert np.array_equal(np.asarray(old)[np.ix_(*rows)], new)
    return result


def units_by_loops(params):
    """Units that remain in each hidden layer: needed by an output, and driven or a constant but 0."""
    layers = [{k: np.asarray(v) for k, v in layer.items()} for layer in params]
    driven, constant = [True] * SIZES[0], [0.0] * SIZES[0]
    there = []
    for layer in layers[:-1]:
        moves, values = [], []
        for u in range(layer["w"].shape[1]):
            moves.append(any(d and w != 0 for d, w in zip(driven, layer["w"][:, u], strict=True)))
            total = sum((0.0 if d else c) * w for d, c, w in zip(driven, constant, layer["w"][:, u], strict=True))
            values.append(max(total + layer["b"][u], 0.0))
        driven, constant = moves, values
        there.append([d or c != 0 for d, c in zip(driven, constant, strict=True)])
    asked, remaining = [True] * SIZES[-1], []
    for layer, present in zip(layers[:0:-1], there[::-1], strict=True):
        asked = [p and any(a and w != 0 for a, w in zip(asked, row, strict=True))
                 for p, row in zip(present, layer["w"], strict=True)]
        remaining.append(asked)
    return remaining[::-1]


@pytest.mark.parametrize("seed", range(6))
def test_the_units_that_remain_are_those_that_loops_over_weights_find(seed):
    params, masks = sparse_mlp(100 * seed)
    result = compared(mlp, params, normal(seed, (4, SIZES[0])), masks)
    for i, remain in enumerate(units_by_loops(pk.apply_masks(params, masks))):
        expected = np.flatnonzero(remain) if any(remain) else [0]      # of nothing one unit stays
        assert result.kept[i]["w"][1].tolist() == result.kept[i + 1]["w"][0].tolist() == list(expected)
        assert np.array_equal(result.masks[i]["w"], np.asarray(masks[i]["w"])[np.ix_(*result.kept[i]["w"])])


def test_activations_that_are_not_0_at_0_keep_their_constants():
    params, masks = sparse_mlp(7, 0.7)
    params[0]["b"], masks[0]["w"] = params[0]["b"].at[2].set(0), masks[0]["w"].at[:, 2].set(False)
    x = normal(1, (4, SIZES[0]))
    zero_at_zero = compared(lambda p, x: mlp(p, x, jnp.tanh), params, x, masks)
    others = compared(lambda p, x: mlp(p, x, jax.nn.sigmoid), params, x, masks)
    assert 2 not in zero_at_zero.kept[0]["w"][1]
    assert 2 in others.kept[0]["w"][1]


def conv(x, w, stride=1):
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convnet(p, x):
    x = jax.nn.relu(conv(x, p["a"]) + p["bias"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(conv(x, p["b"], 2))
    return jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1) @ p["c"]


CONVNET = {"a": normal(0, (3, 3, 2, 6)), "b": normal(1, (3, 3, 6, 5)), "bias": normal(2, (6,)), "c": normal(3, (20, 3))}


def test_channels_go_through_pools_and_flattening():
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), CONVNET)
    masks["a"][..., 1] = False                    # channel 1: a constant, unless its bias is cut off
    masks["b"][..., 3, :] = False                 # channel 3: nothing reads it
    masks["c"][8:12] = False                      # channel 2 behind the second convolution, at all four positions
    masks["c"][5] = False                         # channel 1 there, at one of them
    x = normal(4, (3, 8, 8, 2))
    for sign, first in ((1.0, [0, 1, 2, 4, 5]), (-1.0, [0, 2, 4, 5])):
        params = CONVNET | {"bias": CONVNET["bias"].at[1].set(sign)}
        result = compared(convnet, params, x, masks)
        assert result.kept["a"][3].tolist() == result.kept["b"][2].tolist() == result.kept["bias"][0].tolist() == first
        assert result.kept["b"][3].tolist() == [0, 1, 3, 4]
        assert result.kept["c"][0].tolist() == [*range(8), *range(12, 20)]
        n = len(first)
        assert result.flops == (2 * (64 * 9 * 2 * 6 + 4 * 9 * 6 * 5 + 60), 2 * (64 * 9 * 2 * n + 4 * 9 * n * 4 + 48))


def test_units_tied_by_a_residual_sum_go_together_or_stay():
    def net(p, x):
        y = x @ p["stem"]
        y = y + jax.nn.relu(y @ p["in"]) @ p["out"]
        return y @ p["head"]

    params = {"stem": normal(0, (3, 4)), "in": normal(1, (4, 5)), "out": normal(2, (5, 4)), "head": normal(3, (4, 2))}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    masks["stem"][:, 1] = False                   # the block still writes to unit 1
    masks["stem"][:, 2] = masks["out"][:, 2] = False          # nothing writes to unit 2
    masks["head"][3] = masks["in"][3] = False                 # nothing reads unit 3
    masks["out"][4] = False                                   # nothing reads unit 4 within the block
    result = compared(net, params, normal(4, (3, 3)), masks)
    assert [leaf.after for leaf in result.leaves] == [(2, 2), (2, 4), (4, 2), (3, 2)]
    assert result.kept["stem"][1].tolist() == [0, 1]


@pytest.mark.parametrize("plain", [False, True])
def test_residual_networks_keep_their_outputs(plain):
    module = ResNet((4, 6), (1, 1), 3, plain, FLOAT)
    x = normal(0, (2, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + 0.1 * jnp.abs(normal(a.size, a.shape, a.dtype)), variables)
    apply_fn, params = pk.from_linen(module, variables)
    masks = jax.tree.map(np.array, pk.prune(pk.magnitude, params, density=0.7).masks)
    unread = {"stage0_block0_conv1": [1], "stage0_block0_conv0": [2], "stage1_block0_conv0": [2, 3],
              "stage1_block0_shortcut": [2, 3]}
    for name, channels in unread.items():
        masks[name]["kernel"][:, :, channels] = False
    result = compared(apply_fn, params, x, masks, rtol=1e-5)
    # Channel 3 of the stream is read by its own block, channel 2 by nothing; channel 1 is gone within the block.
    assert result.kept["stage0_block0_conv0"]["kernel"][2:][0].tolist() == [0, 1, 3]
    assert result.kept["stage0_block0_conv0"]["kernel"][3].tolist() == [0, 2, 3]
    assert result.kept["stem"]["kernel"][3].tolist() == [0, 1, 3]
    assert result.apply_fn(result.params, x).dtype == FLOAT


def test_derivatives_are_those_of_the_masked_network():
    params, masks = sparse_mlp(3, 0.4)
    x = normal(1, (4, SIZES[0]))
    result = compared(mlp, params, x, masks)
    trace = pk.ntk_trace(mlp, params, x, masks=masks)
    assert_close(pk.ntk_trace(result.apply_fn, result.params, x, masks=result.masks), trace, rtol=1e-9)
    assert_close(jax.jit(jax.vmap(result.apply_fn, (None, 0)))(result.params, x[:, None])[:, 0],
                 result.apply_fn(result.params, x))
    paths = (pk.connectivity(f, p, x[:1], masks=m) for f, p, m in
             ((mlp, params, masks), (result.apply_fn, result.params, result.masks)))
    assert len({each.connected for each in paths}) == 1


def test_a_network_of_which_nothing_is_left_is_its_constant():
    params, masks = sparse_mlp(0)
    masks[2]["w"] = jnp.zeros(masks[2]["w"].shape, bool)
    x = normal(1, (4, SIZES[0]))
    result = compared(mlp, params, x, masks)
    assert [leaf.after for leaf in result.leaves[:2]] == [(1,), (5, 1)]
    whole = compared(lambda p, x: x @ p["w"], {"unused": jnp.ones((3, 3)), "w": jnp.ones((5, 2))}, x)
    assert whole.leaves[0].after == (3, 3) and whole.parameters == (19, 19)      # noqa: PT018


def test_groups_and_half_precision_are_taken():
    def grouped(p, x):
        x = lax.conv_general_dilated(x, p["g"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                     feature_group_count=2)
        return jax.nn.relu(x).mean((1, 2)) @ p["w"]

    params = {"g": normal(0, (3, 3, 1, 4), jnp.bfloat16), "w": normal(1, (4, 6), jnp.bfloat16)}
    params["w"] = params["w"].at[0].set(0)
    result = shrink(grouped, params, jnp.ones((1, 4, 4, 2), jnp.bfloat16))
    assert [leaf.after for leaf in result.leaves] == [(3, 3, 1, 4), (4, 6)]      # groups stay whole
    dense = shrink(lambda p, x: x @ p["g"].reshape(9, 4) @ p["w"], params, jnp.ones((1, 9), jnp.bfloat16))
    assert dense.params["w"].dtype == jnp.bfloat16


def test_what_it_does_not_know_is_an_error_that_names_it():
    def recurrent(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p), None), x, None, length=3)[0]

    with pytest.raises(ValueError, match=r"which units go together in the operation 'scan'\n  source: .*test_shrink"):
        shrink(recurrent, jnp.eye(3), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="whose input is one array of numbers"):
        shrink(lambda p, x: x[0] @ p + x[1], jnp.eye(3), (jnp.ones((1, 3)), jnp.ones((1, 3))))
    with pytest.raises(ValueError, match="masks leaf"):
        shrink(lambda p, x: x @ p, jnp.eye(3), jnp.ones((1, 3)), masks=np.ones((2, 3), bool))
    with pytest.raises(TypeError, match="masks are booleans"):
        shrink(lambda p, x: x @ p, jnp.eye(3), jnp.ones((1, 3)), masks=np.ones((3, 3)))


def test_it_prints_what_it_saves():
    params = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[2.0], [3.0]])}
    result = shrink(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
    assert repr(result).splitlines() == [
        "ShrinkResult: 4 → 2 parameters, 8 → 4 floating-point operations per example", "  a: 1×2 → 1×1",
        "  b: 2×1 → 1×1"]
    assert "2×1" in result._repr_html_()
