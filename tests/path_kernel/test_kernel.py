"""The path kernel's dual Gram, spectrum and traces against enumerated paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from pkjax import path_kernel as pk
from pkjax import paths
from pkjax.linalg.block_lanczos import NotConvergedWarning, block_lanczos
from pkjax.paths import NotFullyConnectedError, dense_layers

from tests.cases import Case, cases
from tests.oracles import enumerate_paths

KINDS = ("dense", "conv", "residual")


def ones(case):
    return jnp.ones((1, *case.X.shape[1:]))


def explicit(case):
    oracle = enumerate_paths(case.layers, case.params, np.ones((1, *case.X.shape[1:])), case.masks)
    return oracle.jtv.T @ oracle.jtv


def flat(tree, rows=1):
    return np.concatenate([np.asarray(v).reshape(rows, -1) for v in jax.tree.leaves(tree)], axis=1)


def spectrum(gram):
    return np.linalg.eigvalsh(gram)[::-1]


TIED = Case([("dense", "w", 3, True), ("leaky", 0.0), ("dense", "w", 3, True), ("dense", "v", 2, False)],
            {"v.kernel": np.random.default_rng(5).normal(size=(3, 2)),
             "w.bias": np.random.default_rng(6).normal(size=3),
             "w.kernel": np.random.default_rng(7).normal(size=(3, 3))}, None, np.ones((1, 3)))


@given(cases(kinds=KINDS))
@settings(max_examples=10, deadline=None)
def test_dual_gram_is_that_of_the_enumerated_jacobian(case):
    gram = explicit(case)
    scale = np.abs(gram).max()
    u = {n: np.random.default_rng(0).normal(size=v.shape) for n, v in case.params.items()}

    @jax.jit
    def everything(params, u):
        arguments = (case.apply, params, ones(case))
        return (pk.dense(*arguments, masks=case.masks), pk.trace(*arguments, masks=case.masks),
                pk.trace(*arguments, masks=case.masks, log=True), pk.matvec(*arguments, masks=case.masks)(u))

    matrix, trace, logarithm, product = everything(case.params, u)
    np.testing.assert_allclose(matrix, gram, atol=1e-10 * scale)
    np.testing.assert_allclose(trace, np.trace(gram), rtol=1e-10)
    np.testing.assert_allclose(np.exp(logarithm), np.trace(gram), rtol=1e-9, atol=0)  # -inf where no path is left
    np.testing.assert_allclose(flat(product)[0], gram @ flat(u)[0], atol=1e-9 * scale)


def test_a_weight_twice_on_a_path_adds_its_second_derivative_to_the_trace():
    gram = explicit(TIED)
    first = np.sum(flat(jax.grad(lambda phi: paths.polynomial(TIED.apply, phi, ones(TIED), q=2).sum())(
        {n: v**2 for n, v in TIED.params.items()})))
    assert np.trace(gram) > 1.001 * first
    np.testing.assert_allclose(pk.trace(TIED.apply, TIED.params, ones(TIED)), np.trace(gram), rtol=1e-12)
    np.testing.assert_allclose(pk.dense(TIED.apply, TIED.params, ones(TIED)), gram, atol=1e-11)
    pairs = pk.eigenpairs(TIED.apply, TIED.params, ones(TIED), k=18)
    np.testing.assert_allclose(pairs.values, spectrum(gram), atol=1e-11 * np.trace(gram))


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
        pairs = pk.eigenpairs(case.apply, case.params, ones(case), k=k, masks=case.masks, method=method)
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


@given(cases(kinds=KINDS))
@settings(max_examples=8, deadline=None)
def test_gated_trace_is_the_diagonal_part_of_the_ntk_trace(case):
    oracle = enumerate_paths(case.layers, case.params, case.X, case.masks)
    expected = np.sum(oracle.jvf**2 * (oracle.jtv**2).sum(1))
    found = jax.jit(lambda p, X: pk.gated_trace(case.apply, p, X, masks=case.masks))(case.params, case.X)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_effective_rank_is_within_its_standard_error(key):
    case = Case([("dense", "a", 8, True), ("leaky", 0.0), ("dense", "b", 3, True)],
                {n: np.random.default_rng(i).normal(size=s) for i, (n, s) in enumerate(
                    {"a.bias": 8, "a.kernel": (6, 8), "b.bias": 3, "b.kernel": (8, 3)}.items())}, None, np.ones((1, 6)))
    gram = explicit(case)
    truth = np.trace(gram) ** 2 / np.sum(gram**2)
    rank, error = jax.jit(lambda p: pk.effective_rank_estimate(case.apply, p, ones(case), key=key, probes=200))(
        case.params)
    assert error < 0.1 * truth
    assert abs(rank - truth) < 4 * error
    x = ones(case).astype(np.float32)
    single = pk.effective_rank(case.apply, jax.tree.map(np.float32, case.params), x, key=key)
    assert single.dtype == np.float32
    assert abs(float(single) - truth) < 0.3 * truth


def test_density_has_the_moments_of_the_spectrum(key):
    case = Case([("dense", "a", 8, False), ("leaky", 0.0), ("dense", "b", 3, False)],
                {"a.kernel": np.random.default_rng(0).normal(size=(6, 8)),
                 "b.kernel": np.random.default_rng(1).normal(size=(8, 3))}, None, np.ones((1, 6)))
    truth = spectrum(explicit(case))
    # More steps than there are distinct eigenvalues: the Lanczos recursion ends early and must not leave NaN.
    found = jax.jit(lambda p: pk.density(case.apply, p, ones(case), key=key, probes=400, depth=72))(case.params)
    assert np.isfinite(found.nodes).all()
    np.testing.assert_allclose(found.weights.sum(1), 72, rtol=1e-6)
    for power in (1, 2):
        moment = np.asarray((found.weights * found.nodes**power).sum(1))
        error = moment.std() / 20
        assert abs(moment.mean() - np.sum(truth**power)) <= 4 * error + 1e-6 * truth[0]**power
    np.testing.assert_allclose(found.nodes.max(), truth[0], rtol=1e-6)
    step = np.diff(np.log10(found.points))[0]
    assert abs(float(found.density.sum()) * step - (truth > 1e-9 * truth[0]).sum()) < 2


def test_block_lanczos_finds_every_copy_of_multiple_eigenvalues():
    # 40 copies of the largest, many times the block: one Krylov space holds 8 of them and looks converged.
    diagonal = np.concatenate([np.full(40, 3.0), np.full(25, 2.0), np.linspace(0, 1.5, 600)])
    found = block_lanczos(lambda u: u * diagonal, len(diagonal), 70)
    assert found.converged
    np.testing.assert_allclose(found.values, np.sort(diagonal)[::-1][:70], atol=1e-9)
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(70), atol=1e-10)


def test_block_lanczos_finds_any_number_of_eigenpairs_of_small_matrices():
    rng = np.random.default_rng(0)
    for trial in range(60):
        n, rank = (int(v) for v in rng.integers(1, 60, 2))
        k = int(rng.integers(1, n + 1))
        root = rng.normal(size=(n, rank)) * np.exp(rng.normal(size=(n, 1)) * (trial % 4))
        gram = np.diag(np.repeat(rng.random(n), 3)[:n]) if trial % 5 == 0 else root @ root.T
        found = block_lanczos(lambda rows, gram=gram: rows @ gram, n, k)
        want = np.linalg.eigvalsh(gram)[::-1][:k]
        np.testing.assert_allclose(found.values, want, rtol=0, atol=1e-9 * want[0])
        np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(k), atol=1e-10)
        assert found.converged


def test_a_value_far_above_all_others_is_vouched_for_in_few_products():
    """What lies below converges slowly, a bulk without gaps; it need not."""
    diagonal = np.concatenate([[2.0], np.linspace(0, 1, 4999)])
    spent = []
    found = block_lanczos(lambda u: spent.append(len(u)) or u * diagonal, 5000, 1)
    assert found.converged
    np.testing.assert_allclose(found.values, [2.0], rtol=1e-12)
    assert sum(spent) < 300


def test_block_lanczos_says_when_it_did_not_converge():
    diagonal = np.linspace(0, 1, 3000)
    with pytest.warns(NotConvergedWarning, match="of 40 eigenpairs converged"):
        found = block_lanczos(lambda u: u * diagonal, 3000, 40, most_products=200)
    assert not found.converged


def test_bad_input_is_named():
    net, w = (lambda p, x: x @ p["a"]), {"a": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="batch of one"):
        pk.trace(net, w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="non-negative"):
        pk.trace(net, w, -jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        pk.trace(net, {"a": w["a"] * jnp.nan}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="method must be"):
        pk.eigenvalues(net, w, jnp.ones((1, 3)), k=1, method="power")
    with pytest.raises(ValueError, match="k must be between 1 and"):
        pk.eigenvalues(net, w, jnp.ones((1, 3)), k=0)
    with pytest.raises(ValueError, match="probes"):
        pk.effective_rank(net, w, jnp.ones((1, 3)), key=jax.random.key(0), probes=1)
    with pytest.raises(ValueError, match="tree structure"):
        pk.matvec(net, w, jnp.ones((1, 3)))({"b": w["a"]})
