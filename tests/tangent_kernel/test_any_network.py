"""The structured kernel of networks as users write them: it is the Gram matrix of the Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from pkjax import ntk, ntk_plan, ntk_trace
from pkjax.network import read
from pkjax.tangent_kernel.kernel import _Block

from tests.cases import FLOAT, half_masks, normal

softmax, tanh = jax.nn.softmax, jnp.tanh
X, SEQUENCES, IMAGES = normal(1, (3, 4)), normal(2, (3, 5, 4)), normal(3, (2, 5, 5, 4))
TOKENS = jnp.asarray([[0, 4, 4], [2, 3, 0], [1, 1, 6]])
HEAD = {"head": (4, 2)}


def transformer(p, tokens):
    """A class token, positions cut to length, distances and a temperature per head, rotated keys, tied words."""
    h = p["words"][tokens] + p["places"][:tokens.shape[1]]
    h = jnp.concatenate([jnp.broadcast_to(p["class"], (len(h), 1, 4)), h], 1)
    h = p["scale"] * (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 0.1) + p["shift"]
    q, k, v = jnp.einsum("nld,cdhe->cnlhe", h, p["heads"])
    turn = jnp.exp(1j * jnp.arange(h.shape[1]))[:, None, None]
    q, k = (lax.complex(a[..., :1], a[..., 1:]) * turn for a in (q, k))
    far = jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1])
    logits = jnp.einsum("nqhe,nkhe->nhqk", q, k.conj()).real * jnp.exp(p["temperature"])[:, None, None]
    logits = jnp.where(far >= 0, logits + p["far"][:, far], -jnp.inf)
    h = h + jnp.einsum("nhqk,nkhe,hed->nqd", softmax(logits), v, p["out"])
    return h[:, 0] @ p["words"].T


def out_of_bounds(p, tokens):
    absent = jnp.take(p["words"], tokens + 2, axis=0)      # NaN
    filled = jnp.take(p["more"], tokens + 2, axis=0, mode="fill", fill_value=5)
    h = jnp.where(tokens[..., None] > 4, 0, absent) + filled + jnp.take(p["last"], tokens - 9, axis=0, mode="clip")
    return tanh(h.sum(1)) @ p["head"]


def spectra(p, x):
    h = jnp.fft.irfft(jnp.fft.rfft(p["filter"], n=8) * jnp.fft.rfft(x, n=8), n=8)[:, :4]
    z = (tanh(h) + 0j) @ lax.complex(p["real"], p["imaginary"]) * jnp.exp(1j * p["phase"])
    return jnp.abs(z) + z.real * z.imag


def convolutions(p, x):
    def conv(x, kernel, **options):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, **options)
    h = tanh(conv(x, p["depthwise"], feature_group_count=4))
    standard = (p["standard"] - p["standard"].mean((0, 1, 2))) / p["standard"].std((0, 1, 2))
    h = tanh(conv(h, standard, rhs_dilation=(2, 1)) + conv(h, p["folded"].reshape(3, 3, 4, 4)))
    h = tanh(lax.conv_transpose(h, p["transposed"], (2, 2), "SAME") + p["bias"])
    return conv(h, p["turned"].transpose(2, 3, 1, 0)[::-1]).mean((1, 2))


def reparametrised(p, x):
    u = lax.stop_gradient(p["w"] @ jnp.ones(4, FLOAT))
    h = tanh(x @ (p["gain"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)) + x @ (p["w"] + p["a"] @ p["b"]))
    h = h + jnp.linalg.solve(5 * jnp.eye(4, dtype=FLOAT) + p["v"], x.T).T
    return tanh(h @ p["w"] / jnp.linalg.norm(p["w"].T @ u)) @ jnp.tril(p["head"]) + lax.stop_gradient(p["gain"])[:2]


def loops(p, x):
    h, sums = lax.scan(lambda h, q: (tanh(h @ q[0] + q[1]), h.sum(1) * q[1].sum()), x, (p["w"], p["b"]), reverse=True)
    h = lax.fori_loop(0, 3, lambda i, h: tanh(h @ p["w"][i] + h), h)
    h, _ = lax.scan(lambda h, z: (tanh(h @ p["again"] + z), None), h, jnp.broadcast_to(x, (100, *x.shape)))
    return h @ p["head"] + sums.T[:, :2]


def branches(p, x):
    def one(z):
        kind = jnp.argmax(z) % 3
        return lax.switch(kind, [lambda z: z @ p["w"], lambda z: z * p["a"], lambda z: p["a"]], z)
    return lax.cond(p["known"] > 0, lambda h: tanh(h @ p["w"]), jnp.exp, jax.vmap(one)(x)) @ p["head"]


@jax.custom_vjp
def straight(w):
    return jnp.sign(w)


straight.defvjp(lambda w: (straight(w), None), lambda _, d: (3 * d,))


@jax.custom_jvp
def ruled(w, x):
    return tanh(x @ w)


ruled.defjvp(lambda at, d: (ruled(*at), 2 * (d[1] @ at[0]) + 3 * (at[1] @ d[0])))


def rules(p, x):
    h = jax.checkpoint(lambda h: ruled(p["w"], h) @ straight(p["w"]))(x)
    slope = jax.vmap(jax.grad(lambda z: tanh(z @ p["a"]).sum()))(h)
    return (h + slope) @ straight(p["head"])


def selections(p, x):
    def one(z):
        row = lax.dynamic_slice(p["table"], (jnp.argmax(z), 0), (1, 4))[0]
        return row * z + p["a"].at[jnp.argsort(z)].add(z) + p["table"].at[jnp.argmax(z)].set(z).sum(0)
    h = jnp.maximum(p["a"], jax.vmap(one)(x)) + jnp.where(x > 0, p["a"], p["b"] * p["b"])
    h = jnp.clip(h, -3 * jnp.abs(p["b"]), 3 + p["a"]) + jnp.where(h > 0, h, p["leak"] * h)
    h = h + x[:, jnp.argsort(p["a"])] * jnp.sort(p["b"])
    return lax.pad(h, p["leak"], ((0, 0, 0), (0, 1, 0))) @ p["wide"]


def experts(p, x):
    weight, chosen = lax.top_k(softmax(x @ p["router"]), 2)
    some = jnp.einsum("nk,nko->no", weight, tanh(jnp.einsum("nd,nkdo->nko", x, p["experts"][chosen])))
    every = jax.vmap(lambda w: tanh(x @ w))(p["experts"]).mean(0)
    return some + every + jnp.einsum("eo,edo,nd->no", p["bias"], p["experts"], x) + p["bias"].sum(0)


def oddments(p, x):
    h = tanh((x - p["b"]) @ p["w"].T / (1 + p["s"] * p["s"]) @ p["w"]) @ p["w"] + x[:, :0] @ p["none"]
    return jnp.concatenate([h @ p["head"] + p["out"], jnp.broadcast_to(p["alone"] * p["out"], (len(x), 2))], 1)


class Block(nnx.Module):
    def __init__(self, rngs):
        types = {"rngs": rngs, "dtype": FLOAT, "param_dtype": FLOAT}
        self.norm, self.attention = nnx.RMSNorm(4, **types), nnx.MultiHeadAttention(2, 4, decode=False, **types)
        self.heads = nnx.Einsum("nlhd,hde->nle", (2, 2, 4), (4,), **types)
        self.split, self.lora = nnx.LinearGeneral((4,), (2, 2), **types), nnx.LoRA(4, 2, 4, **types)

    def __call__(self, x):
        h = self.split(x + self.attention(self.norm(x)))
        return (self.heads(tanh(h)) + self.lora(x)).reshape(len(x), -1)[:, :3]


with jax.numpy_dtype_promotion("standard"):
    GRAPH, _PARAMS, REST = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
PARAMS = jax.tree.map(lambda a: normal(a.size, a.shape), _PARAMS)


class Recurrent(linen.Module):
    @linen.compact
    def __call__(self, x):
        types = {"dtype": FLOAT, "param_dtype": FLOAT}
        h = linen.RNN(linen.GRUCell(4, **types), reverse=True)(linen.GroupNorm(2, **types)(x))
        return linen.PReLU(param_dtype=FLOAT)(linen.WeightNorm(linen.Dense(2, **types))(h[:, 0]))


with jax.numpy_dtype_promotion("standard"):
    RECURRENT = jax.tree.map(lambda a: normal(a.size, a.shape), Recurrent().init(jax.random.key(0), SEQUENCES))


NETWORKS = {
    transformer: ({"words": (7, 4), "places": (5, 4), "class": (1, 1, 4), "scale": (4,), "shift": (4,),
                   "heads": (3, 4, 2, 2), "temperature": (2,), "far": (2, 9), "out": (2, 2, 4)}, TOKENS),
    out_of_bounds: ({"words": (7, 4), "more": (7, 4), "last": (7, 4)} | HEAD, TOKENS),
    spectra: ({"filter": (4,), "real": (4, 2), "imaginary": (4, 2), "phase": (2,)}, X),
    convolutions: ({"depthwise": (3, 3, 1, 4), "standard": (3, 3, 4, 4), "folded": (36, 4), "transposed": (2, 2, 4, 3),
                    "bias": (3,), "turned": (2, 3, 2, 1)}, IMAGES),
    reparametrised: ({"gain": (4,), "v": (4, 4), "w": (4, 4), "a": (4, 1), "b": (1, 4)} | HEAD, X),
    loops: ({"w": (3, 4, 4), "b": (3, 4), "again": (4, 4)} | HEAD, X),
    branches: ({"known": jnp.asarray(1), "w": (4, 4), "a": (4,)} | HEAD, X),
    rules: ({"w": (4, 4), "a": (4, 3)} | HEAD, X),
    selections: ({"table": (4, 4), "a": (4,), "b": (4,), "leak": (), "wide": (5, 2)}, X),
    experts: ({"router": (4, 3), "experts": (3, 4, 2), "bias": (3, 2)}, X),
    oddments: ({"b": (4,), "w": (4, 4), "s": (4,), "none": (0, 4), "out": (2,), "alone": (2,), "unused": (3,),
                "empty": (4, 0)} | HEAD, X),
}


def drawn(shapes):
    return {name: normal(i, shape) if isinstance(shape, tuple) else shape
            for i, (name, shape) in enumerate(shapes.items())}


CASES = {net.__name__: (net, drawn(shapes), x) for net, (shapes, x) in NETWORKS.items()} | {
    "nnx": (lambda p, x: nnx.merge(GRAPH, p, REST)(x), PARAMS, SEQUENCES),
    "linen": (Recurrent().apply, RECURRENT, SEQUENCES)}


def dense(net, params, x):
    """The Jacobian of the outputs in all parameters, by JAX alone: (masks or None) → (N, K, parameters)."""
    leaves, treedef = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    @jax.jit
    def rows(kept):
        def outputs(values):
            full = dict(enumerate(leaves)) | {i: jnp.where(kept[i], v, 0) for i, v in zip(moving, values, strict=True)}
            return net(jax.tree.unflatten(treedef, list(full.values())), x)
        blocks = jax.jacrev(outputs)([leaves[i] for i in moving])
        return jnp.concatenate([b.reshape(*b.shape[:2], -1) for b in blocks], 2)
    return lambda masks: rows(jax.tree.leaves(masks))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_and_its_trace_are_those_of_the_dense_jacobian(name):
    as_written, params, x = CASES[name]
    net = jax.numpy_dtype_promotion("standard")(as_written)      # of the network alone
    jacobian, masks = dense(net, params, x), half_masks(params)
    whole = jacobian(jax.tree.map(jnp.ones_like, masks))
    want = np.einsum("nkp,mlp->nmkl", whole, whole)
    np.testing.assert_allclose(ntk(net, params, x), want, rtol=1e-10, atol=1e-10 * np.abs(want).max())
    np.testing.assert_allclose(ntk_trace(net, params, x, masks=masks), np.sum(jacobian(masks)**2), rtol=1e-10)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
    assert ntk_plan(net, *shapes) == ntk_plan(net, params, x)


def test_columns_masks_and_tiles_of_a_transformer():
    params, x = drawn(NETWORKS[transformer][0]), TOKENS
    net, masks = jax.numpy_dtype_promotion("standard")(transformer), half_masks(params)
    rows = dense(net, params, x)(masks)
    want = np.einsum("nkp,mlp->nmkl", rows, rows[:2])
    theta = ntk(net, params, x, x[:2], masks=masks, tile=2)
    np.testing.assert_allclose(theta, want, rtol=1e-10, atol=1e-10 * np.abs(want).max())


def test_peak_memory_of_a_transformer_is_that_of_the_compiled_program():
    params, x = drawn(NETWORKS[transformer][0]), jnp.tile(TOKENS, (7, 1))
    net = jax.numpy_dtype_promotion("standard")(transformer)
    network = read(net, params, x)
    block = jax.jit(_Block(network.whole, "structured")).lower(network.fn, network.params, network.entries, x, None)
    program = block.compile().memory_analysis()
    held = program.temp_size_in_bytes + program.output_size_in_bytes
    assert held / 2 <= ntk_plan(net, params, x).peak_memory <= 4 * held
