"""Counts, eigenvalues and eigenvectors of fully connected networks against enumerated paths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pkjax.path_kernel import inertia, spectrum_slicing
from pkjax.path_kernel.dense_gram import build, lift, lift_isolated, matmul
from pkjax.paths.dense_layers import DenseLayer


def network(seed, widths, *, bias=True, density=1.0, diagonal=(), fixed=(), kind="normal", constants=False):
    """Layers of a random network, and its number of parameters."""
    rng = np.random.default_rng(seed)
    layers, used = [], 0

    def draw(*shape):
        if kind == "ones":
            return np.ones(shape)
        return rng.integers(-2, 3, shape).astype(float) if kind == "integers" else rng.normal(size=shape)

    for l, (n, k) in enumerate(itertools.pairwise(widths)):
        c = (rng.random((n, k)) < density) * (rng.uniform(0.5, 2) if constants else 1.0)
        index = np.where(c != 0, used + np.arange(n * k).reshape(n, k), -1)
        used += n * k
        if l in fixed:
            index[:] = -1
        b = np.full(k, float(bias))
        at = used + np.arange(k) if bias else np.full(k, -1)
        used += k * bias
        theta_b = draw(k) * (0 if kind == "normal" and l % 2 else 1)
        layers.append(DenseLayer(c * draw(n, k), c, index, b * theta_b, b, at, np.zeros(k)))
        if l in diagonal:
            c = np.diag(rng.uniform(0.5, 2, k))
            index = np.where(c != 0, used + np.arange(k), -1)
            used += k
            zero = np.zeros(k)
            layers.append(DenseLayer(c * rng.uniform(0.5, 1.5, k), c, index, zero, zero, np.full(k, -1),
                                     rng.uniform(0, 1, k)))
    return layers, used


def enumerated_gram(layers, size, z):
    """``J_θ^vᵀ J_θ^v`` path by path."""
    gram = np.zeros((size, size))

    def follow(l, node, path, start):
        if l == len(layers):
            row = np.zeros(size)
            for t, (c, index, _) in enumerate(path):
                if index >= 0:
                    row[index] += start * c * np.prod([v for s, (_, _, v) in enumerate(path) if s != t])
            gram[:] += np.outer(row, row)
            return
        layer = layers[l]
        for j in np.flatnonzero(layer.constant[node]):
            follow(l + 1, j, [*path, (layer.constant[node, j], layer.index[node, j], layer.value[node, j])], start)

    for i, energy in enumerate(z):
        follow(0, i, [], np.sqrt(energy))
    for l, layer in enumerate(layers):
        for j in np.flatnonzero(layer.bias_constant):
            follow(l + 1, j, [(layer.bias_constant[j], layer.bias_index[j], layer.bias_value[j])], 1.0)
        for j in np.flatnonzero(layer.source):
            follow(l + 1, j, [], np.sqrt(layer.source[j]))
    return gram


KINDS = [{}, {"bias": False}, {"density": 0.5}, {"diagonal": (0, 1)}, {"fixed": (0,)}, {"fixed": (1,)},
         {"fixed": (2,), "diagonal": (1,)}, {"kind": "integers"}, {"kind": "ones"}, {"kind": "ones", "bias": False},
         {"diagonal": (0, 1), "constants": True, "density": 0.7}]
WIDTHS = [(3, 4), (4, 5, 2), (3, 4, 3, 2), (3, 3, 3, 3, 2)]


@st.composite
def problems(draw):
    kind, widths = draw(st.sampled_from(KINDS)), draw(st.sampled_from(WIDTHS))
    layers, size = network(draw(st.integers(0, 2**32 - 1)), widths, **kind)
    z = np.ones(widths[0]) if draw(st.booleans()) else np.linspace(0, 2, widths[0])
    gram = enumerated_gram(layers, size, z)
    return layers, size, z, gram, np.linalg.eigvalsh(gram)[::-1]


def trained(layers):
    return int(sum((layer.index >= 0).sum() + (layer.bias_index >= 0).sum() for layer in layers))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_enumerated_gram_on_both_sides_of_every_eigenvalue(problem):
    layers, _, z, _, spectrum = problem
    top = spectrum[0]
    if top <= 0:
        return
    far = spectrum[spectrum > 1e-8 * top]
    near = (far[:, None] * (1 + np.array([-1e-6, -1e-9, 1e-9, 1e-6]))).ravel()
    thresholds = np.concatenate([near, np.geomspace(1e-6 * top, 2 * top, 15)])
    counts = inertia.count_above(layers, thresholds, inputs=z)
    slack = 1e-13 * top
    assert (counts >= [(spectrum > t + slack).sum() for t in thresholds]).all()
    assert (counts <= [(spectrum > t - slack).sum() for t in thresholds]).all()


def test_a_threshold_on_a_pole_itself_is_counted():
    # An all-ones network: whole layers share one d, it is an eigenvalue, and leading parts are singular there.
    for widths in ((3, 3, 3, 3, 2), (3, 4, 3, 2)):
        layers, size = network(0, widths, bias=False, kind="ones")
        spectrum = np.linalg.eigvalsh(enumerated_gram(layers, size, np.ones(3)))
        poles = np.unique(build(layers).d)
        assert any(np.isclose(spectrum, pole, rtol=1e-12).any() for pole in poles)
        for pole in poles:
            for threshold in (pole * (1 - 1e-11), pole * (1 + 1e-11)):
                assert inertia.count_above(layers, threshold) == (spectrum > threshold).sum()
            assert (spectrum > pole * 1.001).sum() <= inertia.count_above(layers, pole) <= (
                spectrum > pole * 0.999).sum()


@given(problems())
@settings(max_examples=30, deadline=None)
def test_trivial_eigenvectors_and_the_rest_make_up_the_gram(problem):
    layers, size, z, gram, _ = problem
    chain = build(layers, z)
    scale = max(np.abs(gram).max(), 1e-300)
    basis = np.concatenate([lift(chain, np.eye(chain.size), size),
                            lift_isolated(chain, np.arange(len(chain.isolated)), size)])
    np.testing.assert_allclose(basis @ basis.T, np.eye(trained(layers)), atol=1e-13)
    rest = basis[: chain.size]
    np.testing.assert_allclose(rest @ gram @ rest.T, matmul(chain, np.eye(chain.size)), atol=1e-12 * scale)
    trivial = basis[chain.size :]
    np.testing.assert_allclose(gram @ trivial.T, trivial.T * chain.isolated, atol=1e-12 * scale)


@given(problems(), st.sampled_from([0.3, 0.99, 1.7]))
@settings(max_examples=30, deadline=None)
def test_solve_inverts_the_shifted_gram(problem, place):
    layers, _, z, _, spectrum = problem
    chain = build(layers, z)
    if not chain.size or spectrum[0] <= 0:
        return
    elimination = inertia.eliminate(chain, place * spectrum[0], keep=True)
    v = np.random.default_rng(0).normal(size=(chain.size, 3))
    u = inertia.solve_shifted(chain, elimination, v)
    error = np.abs(matmul(chain, u) - elimination.shift * u - v).max()
    assert error <= 1e-10 * (1 + spectrum[0] * np.abs(u).max())


@given(problems(), st.sampled_from([0, 500]), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_top_spectrum_is_the_enumerated_one_with_every_copy(problem, dense_below, k):
    layers, size, z, gram, spectrum = problem
    k = min(k, trained(layers))
    top = spectrum_slicing.top_spectrum(layers, k, inputs=z, vectors=True, size=size, dense_below=dense_below)
    scale = max(spectrum[0], 1e-300)
    assert np.abs(top.values - spectrum[:k]).max() <= 1e-11 * scale
    assert (np.abs(top.values - spectrum[:k]) <= top.bounds + 1e-13 * scale).all()
    np.testing.assert_allclose(top.vectors @ top.vectors.T, np.eye(k), atol=1e-11)
    residuals = np.linalg.norm(gram @ top.vectors.T - top.vectors.T * top.values, axis=0)
    assert (residuals <= top.residuals + 2e-12 * scale).all()
    values = spectrum_slicing.top_spectrum(layers, k, inputs=z, size=size, dense_below=dense_below).values
    np.testing.assert_allclose(values, top.values, atol=1e-11 * scale)


def test_slicing_agrees_with_a_dense_solve_on_a_network_of_a_few_thousand_parameters():
    layers, size = network(3, (20, 24, 24, 24, 5))
    chain = build(layers)
    assert chain.size > 500
    identity = np.eye(size)
    rows = np.concatenate([lift(chain, np.eye(chain.size), size),
                           lift_isolated(chain, np.arange(len(chain.isolated)), size)])
    np.testing.assert_allclose(rows.T @ rows, identity, atol=1e-12)
    spectrum = np.sort(np.concatenate([np.linalg.eigvalsh(matmul(chain, np.eye(chain.size))), chain.isolated]))[::-1]
    top = spectrum_slicing.top_spectrum(layers, 300, vectors=True)
    np.testing.assert_allclose(top.values, spectrum[:300], atol=1e-11 * spectrum[0])
    assert top.bounds.max() < 1e-9 * spectrum[0]
    thresholds = np.random.default_rng(0).choice((spectrum[:-1] + spectrum[1:])[:1000] / 2, 50, replace=False)
    slack = 1e-13 * spectrum[0]
    counts = inertia.count_above(layers, thresholds)
    assert all((spectrum > t + slack).sum() <= c <= (spectrum > t - slack).sum()
               for t, c in zip(thresholds, counts, strict=True))


def test_every_eigenvector_of_a_network_pruned_by_magnitude_is_found():
    """The elimination loses digits where weights are sparse and large; 14 of these 200 vectors did not converge."""
    layers, _ = network(0, (40, 50, 50, 50, 50, 50, 50, 10), bias=False)
    for layer in layers:
        absent = np.abs(layer.value) < 1.6
        layer.value[absent], layer.constant[absent], layer.index[absent] = 0, 0, -1
    top = spectrum_slicing.top_spectrum(layers, 200, vectors=True, dense_below=0)
    assert (top.residuals <= 1e-11 * top.values[0]).all()
    np.testing.assert_allclose(top.vectors @ top.vectors.T, np.eye(200), atol=1e-12)
    exact = spectrum_slicing.top_spectrum(layers, 200, dense_below=10**6)
    assert (np.abs(top.values - exact.values) <= top.bounds + exact.bounds).all()


def test_bad_layers_and_arguments_are_named():
    layers, _ = network(0, (3, 4, 2))
    with pytest.raises(ValueError, match="greater than 0"):
        inertia.count_above(layers, [1.0, 0.0])
    with pytest.raises(ValueError, match="layer 1 has 3 inputs"):
        inertia.count_above([layers[0], layers[0]], 1.0)
    with pytest.raises(ValueError, match="inputs must be 3"):
        inertia.count_above(layers, 1.0, inputs=-np.ones(3))
    with pytest.raises(ValueError, match="empty"):
        build([])
    with pytest.raises(ValueError, match="between 1 and"):
        spectrum_slicing.top_spectrum(layers, 10**6)
    with pytest.raises(ValueError, match="NaN or infinity in its value"):
        build([DenseLayer(**{**vars(layers[0]), "value": layers[0].value * np.nan}), layers[1]])
