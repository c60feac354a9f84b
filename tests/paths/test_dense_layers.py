"""Dense networks are chains of layers, elementwise operations without matrices; others are refused by shapes."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.network import read
from pkjax.paths import NotFullyConnectedError, dense_layers, factorize
from pkjax.paths.dense_layers import network_layers
from pkjax.paths.layers import DenseLayer, DiagonalLayer

from tests.cases import normal

relu = jax.nn.relu


def positive(seed, shape):
    return jnp.abs(normal(seed, shape)) + 0.5


DENSE = {
    "scale first": (lambda w, x: relu((x * w["s"]) @ w["a"]) @ w["b"], {"s": (3,), "a": (3, 4), "b": (4, 2)}),
    "scale last": (lambda w, x: relu(x @ w["a"]) @ w["b"] * w["s"], {"s": (2,), "a": (3, 4), "b": (4, 2)}),
    "scale alone": (lambda w, x: x * w["s"], {"s": (3,)}),
    "scales around": (lambda w, x: relu((2.0 * x - 1.0) * w["s"]) @ w["a"] * w["t"] / 3.0, {"s": (3,), "a": (3, 2),
                                                                                           "t": (2,)}),
    "scale within": (lambda w, x: relu(relu(x @ w["a"]) * w["s"] + w["c"]) @ w["b"], {"s": (4,), "a": (3, 4), "c": (4,),
                                                                                      "b": (4, 2)}),
    "normalised": (lambda w, x: relu((x - 0.5) / 0.25 @ w["a"] + w["c"]) @ w["b"],
                   {"a": (3, 4), "c": (4,), "b": (4, 2)}),
    "two biases": (lambda w, x: x @ w["a"] + w["c"] + w["d"], {"a": (3, 2), "c": (2,), "d": (2,)}),
    "reordered": (lambda w, x: (x[:, ::-1] * w["s"])[:, jnp.array([2, 0])] @ w["a"], {"s": (3,), "a": (2, 2)}),
    "slices of a leaf": (lambda w, x: x @ jnp.concatenate([w["a"][1:], w["a"][:1]]), {"a": (3, 2)}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_exact_counting_agrees_with_the_list_of_paths(name, masked):
    net, shapes = DENSE[name]
    w = {k: positive(i, s) for i, (k, s) in enumerate(shapes.items())}
    masks = {k: normal((9, i), s) > -1 for i, (k, s) in enumerate(shapes.items())} if masked else None
    pi = np.linalg.eigvalsh(factorize(net, w, jnp.ones((1, 3)), masks=masks).pi)[::-1]
    live = pi[pi > 1e-9 * pi[0]]
    thresholds = np.sqrt(live[:-1] * live[1:])
    distinct = thresholds[live[:-1] > 1.01 * live[1:]]
    counts = pk.path_kernel.count_above(net, w, jnp.ones((1, 3)), distinct, masks=masks)
    assert counts.tolist() == [(live > t).sum() for t in distinct]
    got = pk.path_kernel.eigenvalues(net, w, jnp.ones((1, 3)), k=len(live), masks=masks, method="counting")
    np.testing.assert_allclose(got, live, rtol=1e-6)


def test_a_layer_without_a_matrix_does_what_its_matrix_does():
    rng = np.random.default_rng(0)
    start = np.array([2, 0, 0, 4])
    one = DiagonalLayer(start, 5, *rng.normal(size=(2, 4)), np.array([7, -1, 8, 9]), *rng.normal(size=(2, 4)),
                        np.full(4, -1), rng.random(4))
    other, (tails, heads) = one.matrices(), (rng.random(5), rng.random(4))
    assert (one.shape, one.fixed) == (other.shape, other.fixed) == ((5, 4), False)
    np.testing.assert_allclose(one.forward(tails), other.forward(tails))
    np.testing.assert_allclose(one.backward(heads), other.backward(heads))
    edges = other.index >= 0
    for values in (lambda layer: layer.value * layer.at_tails(tails),
                   lambda layer: layer.value * layer.at_heads(heads)):
        np.testing.assert_allclose(np.sort(values(other)[edges]), np.sort(values(one)[one.index >= 0]))


def test_public_layers_are_matrices_as_ever():
    layers = dense_layers(lambda w, x: x * 2.0 @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
    assert all(isinstance(layer, DenseLayer) for layer in layers)
    np.testing.assert_array_equal(layers[0].value, 2 * np.eye(3))


def test_an_input_that_is_used_twice_is_two_edges_unless_one_is_masked():
    def net(w, x):
        return x[:, jnp.array([0, 1, 0])] @ w

    w = jnp.asarray([[1.0], [2.0], [3.0]])
    with pytest.raises(NotFullyConnectedError, match="two edges join the same pair of nodes"):
        dense_layers(net, w, jnp.ones((1, 2)))
    (layer,) = dense_layers(net, w, jnp.ones((1, 2)), masks=jnp.asarray([[False], [True], [True]]))
    assert (layer.value.tolist(), layer.index.tolist()) == ([[3.0], [2.0]], [[2], [1]])
    with pytest.raises(NotFullyConnectedError, match="its edges are tied"):
        dense_layers(lambda w, x: x * w[0, 0], w, jnp.ones((1, 2)))


def convolution(w, x):
    y = x * w["s"] - 0.5
    y = jax.lax.conv_general_dilated(y, w["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.mean((1, 2))


def scaled_then_dense(w, x):
    return (((x - 0.4) / 0.2).reshape(len(x), -1) * w["s"].ravel()) @ w["d"]


def refused_late(w, x):
    return (x * w["s"] / 0.3).reshape(len(x), -1) @ (w["d"] * w["d"])


@pytest.mark.parametrize("net", [convolution, scaled_then_dense, refused_late])
def test_the_memory_of_reading_grows_with_the_image_not_with_its_square(net):
    peaks = []
    for side in (16, 32):
        w = {"s": jnp.ones((side, side, 3)), "k": jnp.ones((3, 3, 3, 2)), "d": jnp.ones((side * side * 3, 2))}
        x = jnp.ones((1, side, side, 3))
        network = read(net, w, x, paths=True)
        for _ in range(2):      # the first time JAX keeps what it compiles
            tracemalloc.start()
            try:
                layers = network_layers(network, x)
            except NotFullyConnectedError:
                layers = ()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert bool(layers) == (net is scaled_then_dense)
        peaks.append(peak)
    assert peaks[1] < 40 * 8 * 32 * 32 * 3        # a matrix of nodes by nodes is 75 MB
    assert peaks[1] < 5 * peaks[0]
