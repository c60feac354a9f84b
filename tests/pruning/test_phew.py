"""PHEW's masks are walks from input to output, as many weights as asked for, and steps have their probabilities."""

import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import lax
from pkjax.pruning.phew import _Walks
from pkjax.pruning.weight_chains import weight_chain

from tests.cases import FLOAT, normal

KEY = jax.random.key(0)
DENSE = {"a": {"kernel": normal(0, (5, 7)), "bias": normal(1, (7,))}, "b": {"kernel": normal(2, (7, 6))},
         "c": {"kernel": normal(3, (6, 3))}, "scale": normal(4, (6,))}
CONV = {"first": normal(5, (3, 3, 2, 4)), "second": normal(6, (3, 2, 4, 3)), "head": normal(7, (12, 5)),
        "bias": normal(8, (4,))}


def dense(p, x):
    x = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
    x = jax.nn.leaky_relu((x @ p["b"]["kernel"] - 0.5) * p["scale"])
    return (p["c"]["kernel"].T @ x.T).T


def conv(p, x):
    def layer(x, k, stride=1):
        return lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(layer(x, p["first"]) + p["bias"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(layer(x, p["second"]))
    return x.reshape(len(x), -1) @ p["head"]


def ones(shape):
    return jnp.ones((1, *shape), FLOAT)


NETWORKS = {"dense": (dense, DENSE, (5,)), "conv": (conv, CONV, (4, 4, 2))}


def joined(name, masks):
    """Which units of each layer its weights join: matrices of booleans, from the shapes of the networks above."""
    m = jax.tree.map(np.asarray, masks)
    if name == "dense":
        return [m[n]["kernel"] for n in "abc"], [m[n]["kernel"] for n in "abc"]
    matrices = [m["first"].any((0, 1)), m["second"].any((0, 1)), m["head"].reshape(4, 3, 5).any(0)]
    return matrices, [m["first"], m["second"], m["head"]]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("density", [0.15, 0.45, 0.8])
def test_every_weight_kept_lies_on_a_path_of_weights_kept_and_their_number_is_exact(name, density):
    apply_fn, params, shape = NETWORKS[name]
    found = pk.phew(apply_fn, params, ones(shape), key=KEY, density=density)
    matrices, kernels = joined(name, found.masks)
    assert found.total == sum(k.size for k in kernels)
    assert found.kept == round(density * found.total) == sum(int(k.sum()) for k in kernels)
    assert found.kept == sum(layer.kept for layer in found.layers) == found.history[-1]
    ahead, behind = [np.ones(len(matrices[0]), bool)], [np.ones(matrices[-1].shape[1], bool)]
    for here in matrices:
        ahead.append(ahead[-1] @ here)
    for here in reversed(matrices):
        behind.insert(0, here @ behind[0])
    for here, before, after in zip(matrices, ahead, behind[1:], strict=False):
        assert not (here & ~np.outer(before, after)).any()
    others = [mask for path, mask in jax.tree_util.tree_leaves_with_path(found.masks)
              if not pk.kernels(path, dict(jax.tree_util.tree_leaves_with_path(params))[path])]
    assert len(others) == (2 if name == "dense" else 1)
    assert all(np.asarray(mask).all() for mask in others)
    if name == "dense":     # paths are paths of entries too: each weight has a share of their number
        number = jax.grad(lambda phi: pk.paths.polynomial(apply_fn, phi, ones(shape), q=0).sum())(
            jax.tree.map(lambda m, leaf: m.astype(leaf.dtype), found.masks, params))
        assert all((np.asarray(number[n]["kernel"])[k] > 0).all() for n, k in zip("abc", kernels, strict=True))


def test_the_key_decides_everything():
    masks = [pk.phew(dense, DENSE, ones((5,)), key=jax.random.key(k), density=0.3).masks for k in (0, 0, 1)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, masks[0], masks[1])))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, masks[0], masks[2])))


def drawn(apply_fn, params, shape, pairs):
    """Walks as tuples of positions in the leaves: forward and backward ones."""
    chain = weight_chain(apply_fn, params, ones(shape))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    walks = _Walks(chain, leaves, pk.trees.leaf_names(params), np.random.default_rng(0))
    numbers = walks.draw(pairs) - walks.offsets[:-1]
    places = np.stack([layer.entries.ravel()[numbers[:, i]] for i, layer in enumerate(chain)], 1)
    return places[0::2], places[1::2]


def chi_square(observed, expected):
    """Over its degrees of freedom, in standard deviations from its mean."""
    value = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    return (value - freedom) / np.sqrt(2 * freedom)


def test_dense_walks_have_the_probabilities_of_their_steps():
    pairs = 40_000
    a, b, c = (np.abs(np.asarray(DENSE[n]["kernel"], np.float64)) for n in "abc")
    ways = list(itertools.product(range(5), range(7), range(6), range(3)))
    forward = [a[i, j] / a[i].sum() * b[j, k] / b[j].sum() * c[k, m] / c[k].sum() / 5 for i, j, k, m in ways]
    backward = [c[k, m] / c[:, m].sum() * b[j, k] / b[:, k].sum() * a[i, j] / a[:, j].sum() / 3 for i, j, k, m in ways]
    assert abs(sum(forward) - 1) < 1e-9
    assert abs(sum(backward) - 1) < 1e-9
    names = {(i * 7 + j, j * 6 + k, k * 3 + m): n for n, (i, j, k, m) in enumerate(ways)}
    for walks, probability in zip(drawn(dense, DENSE, (5,), pairs), (forward, backward), strict=True):
        counts = np.bincount([names[tuple(w)] for w in walks], minlength=len(ways))
        expected = pairs * np.array(probability)
        often = expected > 5
        assert often.sum() > 100
        assert abs(chi_square(counts[often], expected[often] * counts[often].sum() / expected[often].sum())) < 4


def test_convolution_walks_take_single_weights_and_leave_a_channel_by_all_its_places():
    pairs = 40_000
    first, second, head = (np.abs(np.asarray(CONV[n], np.float64)) for n in ("first", "second", "head"))
    forward, backward = drawn(conv, CONV, (4, 4, 2), pairs)
    # Input channels are drawn uniformly; then every weight in proportion to its size.
    chance = first / first.sum((0, 1, 3), keepdims=True) / 2
    counts = np.bincount(forward[:, 0], minlength=first.size)
    assert abs(chi_square(counts, pairs * chance.ravel())) < 4
    # Channel 3 f + c of the flattened image stands at place f: rows 3 f + c leave channel c.
    channel = forward[:, 1] % 3
    np.testing.assert_array_equal((forward[:, 2] // 5) % 3, channel)
    rows = head.reshape(4, 3, 5)
    for c in range(3):
        chosen = forward[channel == c, 2]
        counts = np.bincount(chosen, minlength=60).reshape(4, 3, 5)[:, c].ravel()
        assert abs(chi_square(counts, len(chosen) * (rows[:, c] / rows[:, c].sum()).ravel())) < 4
    # Backwards: outputs uniformly, then the weights that enter them; a channel of `second` in proportion too.
    chance = head / head.sum(0) / 5
    assert abs(chi_square(np.bincount(backward[:, 2], minlength=60), pairs * chance.ravel())) < 4
    np.testing.assert_array_equal((backward[:, 2] // 5) % 3, backward[:, 1] % 3)
    np.testing.assert_array_equal((forward[:, 0] % 4), forward[:, 1] // 3 % 4)
    into = second / second.sum((0, 1, 2))
    for c in range(3):
        chosen = backward[backward[:, 1] % 3 == c, 1]
        counts = np.bincount(chosen, minlength=second.size).reshape(second.shape)[..., c].ravel()
        assert abs(chi_square(counts, len(chosen) * into[..., c].ravel())) < 4


def test_weights_that_meet_padding_alone_are_on_no_walk():
    params = {"kernel": normal(0, (3, 3, 1, 4)), "head": normal(1, (4, 2))}

    def point(p, x):
        x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x.mean((1, 2)) @ p["head"]

    found = pk.phew(point, params, ones((1, 1, 1)), key=KEY, density=0.25)
    assert found.kept == 11
    around = np.asarray(found.masks["kernel"]).copy()
    around[1, 1] = False
    assert not around.any()
    with pytest.raises(ValueError, match="keeps 22 of 44 weights, but walks reach only the 12"):
        pk.phew(point, params, ones((1, 1, 1)), key=KEY, density=0.5)


def test_modules_of_both_kinds_of_layers_are_walked():
    for module in (pk.models.fc(9, 2), Norms()):
        x = jnp.ones((1, 6, 6, 2), jnp.float32)
        apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), x))
        found = pk.phew(apply_fn, params, x, key=KEY, compression=1.5)
        assert found.kept == round(found.total * 10**-1.5)
        assert found.total == sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)
                                  if pk.kernels(path, leaf))


class Norms(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        for width in (4, 8):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=not train)(x)), (2, 2), padding="SAME")
        return nn.Dense(10)(x.mean((1, 2)))


def residual(p, x):
    return (x + jax.nn.relu(x @ p["a"])) @ p["b"]


@pytest.mark.parametrize(("apply_fn", "params", "message"), [
    (residual, {"a": jnp.ones((5, 5)), "b": jnp.ones((5, 2))}, r"the operation 'add' joins .* \(a skip connection\)"),
    (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["a"], {"a": jnp.ones((5, 5))}, "kernel 'a' is used 2 times"),
    (lambda p, x: x @ p["a"], {"a": jnp.ones((5, 5)), "b": jnp.ones((5, 5))}, "kernel 'b' has no place in it"),
    (lambda p, x: (x @ p["a"])[:, :2], {"a": jnp.ones((5, 3))}, "unit 2 of the layer 'a' leads nowhere"),
    (lambda p, x: (x @ p["a"]).reshape(-1, 2, 2).sum(1) @ p["b"], {"a": jnp.ones((5, 4)), "b": jnp.ones((2, 1))},
     "the operation 'reduce_sum' joins different units of one layer"),
    (lambda p, x: x @ (p["a"] * 2), {"a": jnp.ones((5, 4))}, "multiplies a signal by what is computed"),
    (lambda p, x: x * p["s"], {"s": jnp.ones(5)}, "no layer of weights leads to its output")])
def test_networks_that_are_no_chain_are_refused(apply_fn, params, message):
    with pytest.raises(ValueError, match=f"not a chain of dense and convolution layers: .*{message}"):
        pk.phew(apply_fn, params, ones((5,)), key=KEY, density=0.5)


@pytest.mark.parametrize(("params", "options", "message"), [
    (DENSE, {"density": 0.02}, "keeps 2 of 95 weights, fewer than the 3 of one path"),
    (DENSE, {}, "give exactly one of compression"),
    ({**DENSE, "b": {"kernel": DENSE["b"]["kernel"].at[2].set(0)}}, {"density": 0.5},
     "all weights of 'b/kernel' that leave unit 2 are 0"),
    ({**DENSE, "c": {"kernel": DENSE["c"]["kernel"] * np.nan}}, {"density": 0.5}, "params leaf 'c/kernel' holds 18")])
def test_bad_input_is_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        pk.phew(dense, params, ones((5,)), key=KEY, **options)


def test_weights_that_walks_never_take_are_not_asked_for_in_vain(monkeypatch):
    monkeypatch.setattr(sys.modules["pkjax.pruning.phew"], "HOPELESS", 2000)
    params = {"a": jnp.asarray([[1.0, 1e-30], [1.0, 1e-30]], FLOAT), "b": jnp.asarray([[1.0], [1e-30]], FLOAT)}
    with pytest.raises(ValueError, match=r"walks in a row met no weight that was not kept already, with 3 of 6 kept"):
        pk.phew(lambda p, x: x @ p["a"] @ p["b"], params, ones((2,)), key=KEY, density=1.0)
