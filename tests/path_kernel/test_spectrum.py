"""Counts, eigenvalues and eigenvectors of the path kernel against those of enumerated paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from pkjax import path_kernel as pk
from pkjax.path_kernel import solvers
from pkjax.paths import NotFullyConnectedError, dense_layers

from tests.cases import Case, cases, normal
from tests.oracles import enumerate_paths
from tests.path_kernel.oracle import KINDS, explicit, flat, ones, spectrum


@given(cases(kinds=KINDS))
@settings(max_examples=8, deadline=None)
def test_every_method_finds_the_same_eigenpairs_as_the_enumerated_gram(case):
    gram = explicit(case)
    truth = spectrum(gram)
    train = flat(case.masks)[0] if case.masks else np.ones(len(gram), bool)
    k = min(int(train.sum()), 20)
    methods = ["dense", "lanczos"]
    try:
        dense_layers(case.apply, case.params, ones(case), masks=case.masks)
        methods.append("counting")
    except NotFullyConnectedError:
        pass
    for method in methods:
        pairs = pk.eigenpairs(case.apply, case.params, ones(case), k=k, masks=case.masks, method=method,
                              tolerance=1e-10)
        assert pairs.converged
        assert (np.abs(pairs.values - truth[:k]) <= 1e-10 * truth[0]).all(), method
        assert (np.abs(pairs.values - truth[:k]) <= pairs.bounds + 1e-13 * truth[0]).all(), method
        z = flat(pairs.vectors, k)
        np.testing.assert_allclose(z @ z.T, np.eye(k), atol=1e-10)
        np.testing.assert_allclose(gram @ z.T, z.T * pairs.values, atol=2e-9 * truth[0])
        assert not z[:, ~train].any()


@pytest.mark.parametrize("method", ["dense", "counting"])
def test_parameters_that_do_not_train_leave_the_spectrum(method):
    case = Case([("dense", "a", 4, True), ("leaky", 0.1), ("dense", "b", 2, True)],
                {n: np.random.default_rng(i).normal(size=s) for i, (n, s) in enumerate(
                    {"a.bias": 4, "a.kernel": (3, 4), "b.bias": 2, "b.kernel": (4, 2)}.items())}, None, np.ones((1, 3)))
    chosen = {"a.bias": False, "a.kernel": True, "b.bias": True, "b.kernel": False}
    keep = flat({n: np.full(v.shape, chosen[n]) for n, v in case.params.items()})[0]
    gram = explicit(case)[np.ix_(keep, keep)]
    values = pk.eigenvalues(case.apply, case.params, ones(case), k=len(gram), trainable=chosen, method=method)
    np.testing.assert_allclose(values, spectrum(gram), atol=1e-11 * np.trace(gram))
    np.testing.assert_allclose(pk.trace(case.apply, case.params, ones(case), trainable=chosen), np.trace(gram))
    with pytest.raises(ValueError, match="train, 14, got 15"):
        pk.eigenvalues(case.apply, case.params, ones(case), k=15, trainable=chosen)
    middle = np.unique(spectrum(gram).round(9))[-3:]
    counts = pk.count_above(case.apply, case.params, ones(case), middle * 0.999, trainable=chosen)
    assert counts.tolist() == [(spectrum(gram) > t).sum() for t in middle * 0.999]


def test_start_values_other_than_ones_enter_as_energies():
    case = Case([("dense", "a", 3, False), ("leaky", 0.0), ("dense", "b", 2, False)],
                {"a.kernel": np.random.default_rng(0).normal(size=(3, 3)),
                 "b.kernel": np.random.default_rng(1).normal(size=(3, 2))}, None, np.ones((1, 3)))
    z = np.array([[0.0, 0.5, 2.0]])
    oracle = enumerate_paths(case.layers, case.params, np.ones((1, 3)))
    start = np.repeat(z[0], 1)
    # The oracle lists paths by output, then hidden unit, then input: weigh each by its input's energy.
    weights = np.array([start[i] for _ in range(2) for _ in range(3) for i in range(3)])
    gram = (oracle.jtv * weights[:, None]).T @ oracle.jtv
    for method in ("dense", "counting"):
        values = pk.eigenvalues(case.apply, case.params, z, k=15, method=method)
        np.testing.assert_allclose(values, spectrum(gram), atol=1e-12 * np.trace(gram))


@pytest.mark.parametrize("method", ["dense", "counting", "lanczos"])
def test_eigenvalues_lie_within_their_bounds_and_are_the_same_without_them(method):
    net, w = (lambda p, x: x @ p["a"] @ p["b"]), {"a": jnp.ones((2, 1)), "b": 2 * jnp.ones((1, 1))}
    values, bounds = pk.bounded_eigenvalues(net, w, jnp.ones((1, 2)), k=3, method=method)
    assert (np.abs(values - [6, 4, 0]) <= bounds + 1e-13).all()     # two paths of value 2 through one weight
    assert (bounds < 1e-8).all()
    np.testing.assert_array_equal(pk.eigenvalues(net, w, jnp.ones((1, 2)), k=3, method=method), values)


@pytest.mark.parametrize("scale", [1.0, 1e12, 1e-12])
def test_pairs_found_by_products_in_float32_are_judged_in_float64(scale):
    """Also where float32 overflows or underflows: two layers of paths of 1e24, squared."""
    w = {"a": normal(0, (5, 8), jnp.float32), "b": normal(1, (8, 4), jnp.float32) * scale}
    w["a"] = w["a"] * scale

    def net(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]

    one = jnp.ones((1, 5), jnp.float32)
    wide = jax.tree.map(lambda v: v.astype(jnp.float64), w)
    exact = pk.eigenvalues(net, wide, jnp.ones((1, 5)), k=12, method="dense")
    pairs = pk.eigenpairs(net, w, one, k=12, method="lanczos")
    assert pairs.converged
    assert (np.abs(pairs.values - exact) <= pairs.bounds + 1e-13 * exact[0]).all()
    assert pairs.bounds.max() <= 1e-4 * exact[-1]


def test_blocks_of_lanczos_shrink_before_memory_ends(monkeypatch):
    monkeypatch.setattr(solvers, "default_memory_limit", lambda: 8 * 1000 * 60)
    assert solvers._sizes(1000, 4, 8) == (6, 36)
    assert solvers._sizes(1000, 17, 8).block == 1
    with pytest.raises(ValueError, match=r"18 eigenpairs of 1000 parameters take 4.96e\+05 bytes.* at most 17 fit"):
        solvers._sizes(1000, 18, 8)


def test_bad_input_of_the_spectrum_is_named():
    net, w = (lambda p, x: x @ p["a"]), {"a": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="method must be"):
        pk.eigenvalues(net, w, jnp.ones((1, 3)), k=1, method="power")
    with pytest.raises(ValueError, match="k must be between 1 and"):
        pk.eigenvalues(net, w, jnp.ones((1, 3)), k=0)
