"""Sites and taps: the gradient of every parameter from the operands and cotangents of one example."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import lax
from pkjax import paths
from pkjax.network import read
from pkjax.paths.taps import network_sites

from tests.cases import FLOAT, checking_leaks, normal


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1e-30, np.abs(np.asarray(b)).max()))


def per_entry(w, x):
    """A convolution over as many images as an example has entries."""
    return lax.conv_general_dilated(x.reshape(-1, 1, 1), w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
                                    ).reshape(x.shape)


def frames(w, x):
    """A linen convolution over (N, T, H, W, C), which takes the frames as images."""
    h = nn.Conv(2, (2, 2), dtype=FLOAT, param_dtype=FLOAT).apply({"params": w["conv"]}, x)
    return jax.nn.relu(h).reshape(len(x), -1) @ w["head"]


def vmapped_frames(w, x):
    def one(frame):
        return lax.conv_general_dilated(frame, w["conv"]["kernel"], (2, 1), "SAME", rhs_dilation=(1, 2),
                                        dimension_numbers=("HWNC", "HWIO", "NHWC"))
    h = jax.vmap(one, 1, 1)(x[:, :, :, :, None].transpose(2, 1, 3, 0, 4, 5))
    return jnp.moveaxis(h, 1, -1).reshape(len(x), -1)[:, :24] @ w["head"][:24]


CONV = {"conv": {"kernel": normal(0, (2, 2, 1, 2)), "bias": normal(1, (2,))}, "head": normal(2, (36, 2))}
TABLE = {"table": normal(3, (5, 3)), "at": jnp.asarray([4, 1, 1]), "w": normal(4, (3, 2))}
PACKED = {"packed": normal(5, (6,)), "w": normal(6, (3, 2))}
NETWORKS = {
    "images of one place": (per_entry, normal(7, (1, 1, 1)), normal(8, (3, 4))),
    "frames": (frames, CONV, normal(9, (2, 3, 3, 2, 1))),
    "lower triangle": (lambda w, x: jax.nn.relu(x @ jnp.zeros((3, 3), FLOAT).at[jnp.tril_indices(3)].set(w["packed"])
                                                ) @ w["w"], PACKED, normal(10, (2, 3))),
    "symmetric": (lambda w, x: x @ (jnp.zeros((3, 3), FLOAT).at[jnp.triu_indices(3)].add(w["packed"]).at[
        jnp.tril_indices(3)].add(w["packed"])) @ w["w"], PACKED, normal(10, (2, 3))),
    "gathered at integers": (lambda w, x: jax.nn.relu(x * w["table"][w["at"]].sum(0)) @ w["w"], TABLE,
                             normal(10, (2, 3))),
    "gathered whole": (lambda w, x: jax.nn.relu(x @ w["table"][w["at"]]) @ w["w"], TABLE, normal(10, (2, 3))),
    "bytes": (lambda w, x: jax.nn.relu((x.astype(FLOAT) / 255) @ w["table"][:3]) @ w["w"], TABLE,
              jnp.asarray([[0, 255, 7], [128, 3, 90]], jnp.uint8)),
    "masked by bytes": (lambda w, x: (x.astype(FLOAT) @ w["table"][:3] * (x > 5).astype(FLOAT)) @ w["w"], TABLE,
                        jnp.asarray([[0, 255, 7], [128, 3, 90]], jnp.uint8)),
    "tokens": (lambda w, x: jax.nn.relu(w["table"][x].sum(1)) @ w["w"], TABLE, jnp.asarray([[0, 4, 4], [2, 3, 0]])),
    "scaled by tokens": (lambda w, x: w["table"][x].sum(1) * (1 + x).astype(FLOAT) @ w["w"], TABLE,
                         jnp.asarray([[0, 4, 4], [2, 3, 0]])),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_give_the_gradient_of_every_covered_leaf(name):
    net, params, X = NETWORKS[name]
    floating = [i for i, leaf in enumerate(jax.tree.leaves(params)) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def output(*values):
        full = jax.tree.leaves(params)
        for i, value in zip(floating, values, strict=True):
            full[i] = value
        return net(jax.tree.unflatten(jax.tree.structure(params), full), X[:1])[0]
    jacobian = jax.jacrev(output, tuple(range(len(floating))))(*(jax.tree.leaves(params)[i] for i in floating))
    sites, of_leaf = paths.sites(net, params, X[:1])
    taps = tuple(jnp.zeros(s.shape, s.dtype) for s in sites)
    deltas, h = jax.jacrev(lambda t: paths.tapped(net, params, X[:1], t), has_aux=True)(taps)
    for i, own in zip(floating, jacobian, strict=True):
        if i not in of_leaf:
            continue
        pulled = sum(np.stack([sites[s].pullback(h[s], d) for d in deltas[s][0]]) for s in of_leaf[i])
        close(pulled, own)
        for s in of_leaf[i]:
            if sites[s].matrices is not None and len(of_leaf[i]) == 1:
                rows = sites[s].matrices.rows(h[s])
                columns = jax.vmap(sites[s].matrices.columns)(deltas[s][0])
                close(jnp.einsum("pi,kpj->kij", rows, columns), jax.vmap(sites[s].matrices.entries)(own))


# The kernel takes floating-point inputs alone.
@pytest.mark.parametrize("name", [name for name, (*_, X) in NETWORKS.items() if jnp.issubdtype(X.dtype, jnp.floating)])
@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_structured_kernel_is_that_of_the_jacobian(name, transformation):
    net, params, X = NETWORKS[name]
    want = pk.ntk(net, params, X, engine="jacobian")
    with checking_leaks():
        close(transformation(lambda p: pk.ntk(net, p, X, engine="structured"))(params), want)
    close(pk.ntk_trace(net, params, X), jnp.einsum("nnkk->", want))


@pytest.mark.parametrize(("n", "taps", "message"), [
    (1, [(1, 2)], r"taps must have the shapes of the network's sites, \[\(1, 2\), \(1, 2\)\], got \[\(1, 2\)\]"),
    (1, [(1, 2), (1, 1)], r"taps must have the shapes .* got \[\(1, 2\), \(1, 1\)\]"),
    (3, [(1, 2), (1, 2)], r"x must be a batch of one, \(1, \*input\), but has 3 examples: use jax.vmap")])
def test_taps_that_do_not_fit_are_refused(n, taps, message):
    with pytest.raises(ValueError, match=message):
        paths.tapped(lambda w, x: x @ w + w[0], jnp.ones((3, 2)), jnp.ones((n, 3)), [jnp.zeros(t) for t in taps])


def test_a_convolution_over_two_images_an_example():
    theta = pk.ntk(per_entry, jnp.ones((1, 1, 1), FLOAT), jnp.asarray([[1.0, 2.0]], FLOAT))
    assert theta[0, 0].tolist() == [[1, 2], [2, 4]]
    assert float(pk.ntk_trace(per_entry, jnp.ones((1, 1, 1), FLOAT), jnp.asarray([[1.0, 2.0]], FLOAT))) == 5


def test_a_loop_over_stacked_vectors_is_one_operation_and_over_stacked_matrices_one_for_each_step():
    def net(p, x):
        return lax.scan(lambda h, q: (jnp.tanh(h @ p["w"] + q), None), x, p["q"])[0]

    vectors = {"w": normal(0, (3, 3)), "q": normal(1, (100, 3))}
    found, _ = paths.sites(net, vectors, jnp.ones((1, 3), FLOAT))
    assert [(s.kind, s.shape) for s in found] == [("operand", (3, 3)), ("operand", (100, 3))]
    found, _ = paths.sites(lambda w, x: lax.scan(lambda h, q: (h @ q, None), x, w)[0], normal(2, (4, 3, 3)),
                                 jnp.ones((1, 3), FLOAT))
    assert [s.kind for s in found] == ["other"] * 4


def test_a_loop_that_weights_enter_is_curved_where_its_body_is():
    def curved(activation):
        def net(w, x):
            return lax.scan(lambda h, _: (activation(h @ w), None), x, length=3)[0]
        network = read(net, normal(0, (3, 3)), normal(1, (2, 3)))
        return network_sites(network.fn, network.params, network.example)[2]

    assert curved(jnp.tanh)
    assert not curved(jax.nn.relu)
