"""Comparisons against dense matrices by NumPy, enumerated paths and SciPy's rank correlations."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.analysis.comparison import PREDICTORS, TARGETS, Comparison, Row
from pkjax.analysis.correlations import spearman
from pkjax.analysis.stopwatch import Stopwatch
from scipy import stats

from tests.cases import FLOAT, coins, normal

X = normal(0, (3, 3), FLOAT)
SHAPES = {"a": (3, 4), "b": (4,), "c": (4, 2), "d": (2,)}


def net(w, x):
    return jax.nn.relu(x @ w["a"] + w["b"]) @ w["c"] + w["d"]


def weights(seed):
    return {name: normal(10 * seed + i, shape, FLOAT) for i, (name, shape) in enumerate(SHAPES.items())}


def thinned(seed, density=0.7):
    return {name: coins(seed, density, shape) if name in "ac" else np.ones(shape, bool)
            for name, shape in SHAPES.items()}


def dense(params, masks, X, trains=tuple(SHAPES), fn=net):
    """Θ from the full Jacobian of the masked network."""
    alive = {name: jnp.where(masks[name], leaf, 0) for name, leaf in params.items()}
    rows = jax.jacobian(lambda w: fn(w, X).ravel())(alive)
    J = np.concatenate([(np.asarray(rows[name]) * np.asarray(masks[name])).reshape(2 * len(X), -1)
                        for name in trains], axis=1)
    return J @ J.T


PARAMS = weights(0)
EVERY = {"dense": {name: np.ones(shape, bool) for name, shape in SHAPES.items()}, "thin": thinned(3)}


@pytest.fixture(scope="module")
def comparison():
    return pk.compare(net, PARAMS, X, masks={"dense": None, "thin": EVERY["thin"]})


@pytest.mark.parametrize("name", EVERY)
def test_every_quantity_is_that_of_dense_matrices_and_enumerated_paths(comparison, name):
    masks = EVERY[name]
    row, lam = next(row for row in comparison.rows if row.name == name), comparison.spectra[name, None, None]
    theta = dense(PARAMS, masks, X)
    want = np.linalg.eigvalsh(theta)[::-1]
    np.testing.assert_allclose(lam, want[want > 1e-12 * want[0]], rtol=1e-8)
    assert row.largest == lam[0]
    assert row.trace_ntk == pytest.approx(np.trace(theta))
    assert row.effective_rank == pytest.approx(np.trace(theta)**2 / (theta**2).sum())
    fitted = lam[lam > 1e-4 * lam[0]]
    line = np.stack([np.log(np.arange(1, len(fitted) + 1)), np.ones(len(fitted))], axis=1)
    assert row.decay == pytest.approx(-np.linalg.lstsq(line, np.log(fitted))[0][0])
    ones = pk.paths.factorize(net, PARAMS, jnp.ones((1, 3)), masks=masks)
    paths = pk.paths.factorize(net, PARAMS, X, masks=masks)
    assert row.trace_pi == pytest.approx(np.trace(ones.pi))
    assert row.log10_trace_pi == pytest.approx(np.log10(np.trace(ones.pi)))
    gated = ((paths.jvf**2) @ np.diag(paths.pi)).sum()
    assert row.gated_trace == pytest.approx(gated)
    assert row.log10_gated_trace == pytest.approx(np.log10(gated))
    nu = np.linalg.eigvalsh(paths.jvf @ paths.jvf.T)[::-1]
    pi = np.linalg.eigvalsh(ones.jtv.T @ ones.jtv)[::-1]
    assert row.nu_pi == pytest.approx((nu * pi[:len(nu)]).sum())
    assert row.nu_pi_upper == pytest.approx(row.nu_pi)
    assert row.parameters == sum(int(mask.sum()) for mask in masks.values())
    assert (row.connected, row.note) == (True, "")


def test_part_of_the_sum_lies_between_its_bounds(comparison):
    part = pk.compare(net, PARAMS, X, masks={"thin": EVERY["thin"]}, k=2).rows[0]
    assert part.nu_pi < comparison.rows[1].nu_pi <= part.nu_pi_upper
    assert "2 largest π" in part.note
    assert np.isnan(pk.compare(net, PARAMS, X, masks={"thin": EVERY["thin"]}, k=0).rows[0].nu_pi)


def test_what_does_not_train_is_no_part_of_theta():
    row = pk.compare(net, PARAMS, X, masks={"thin": EVERY["thin"]}, trainable=lambda path, leaf: path[0].key != "a",
                     k=0).rows[0]
    assert row.trace_ntk == pytest.approx(np.trace(dense(PARAMS, EVERY["thin"], X, "bcd")))
    assert row.parameters == sum(int(EVERY["thin"][name].sum()) for name in "bcd")


def test_one_example_is_a_batch():
    row = pk.compare(net, PARAMS, X[:1], masks={"thin": EVERY["thin"]}).rows[0]
    assert row.trace_ntk == pytest.approx(np.trace(dense(PARAMS, EVERY["thin"], X[:1])))


def test_no_program_is_compiled_for_other_masks_and_weights():
    cut, emptied = (EVERY["thin"] | {name: np.zeros(SHAPES[name], bool)} for name in "ac")
    pk.compare(net, PARAMS, X, masks={"thin": EVERY["thin"], "cut": cut})      # what is 0 takes the careful programs
    watch, others = Stopwatch(progress=False), {str(i): thinned(i) for i in range(4, 8)}
    params, masks = weights(1), {"dense": None, "emptied": emptied, **others}
    watch.part("again", lambda: pk.compare(net, params, X, masks=masks))
    assert watch.compile_seconds["again"] == 0


@pytest.fixture(scope="module")
def grid():
    seeds = {seed: weights(seed) for seed in range(3)}
    masks = {(name, ρ, seed): thinned(100 * seed + 10 * i + j, 0.9 - 0.2 * j) for seed in seeds
             for i, name in enumerate(("one", "two", "three")) for j, ρ in enumerate((0.1, 0.2, 0.3))}
    result = pk.compare(net, PARAMS, X, masks=masks, seeds=seeds)
    assert all(row.connected for row in result.rows)
    return result


def test_an_entry_has_the_weights_of_its_seed(grid):
    for row in grid.rows[::5]:
        masks = thinned(100 * row.seed + 10 * ("one", "two", "three").index(row.name) + round(10 * row.compression) - 1,
                        1.1 - 2 * row.compression)
        assert row.trace_ntk == pytest.approx(np.trace(dense(weights(row.seed), masks, X)))


@pytest.mark.parametrize(("within", "common"), [("seeds", (0, 1)), ("compressions", (0, 2)), ("names", (1, 2)),
                                                ("all", ())])
def test_correlations_are_the_mean_of_spearmans_over_the_groups(grid, within, common):
    groups = {}
    for row in grid.rows:
        groups.setdefault(tuple(row[i] for i in common), []).append(row)
    for of in PREDICTORS:
        for to in TARGETS:
            each = [stats.spearmanr([getattr(r, of) for r in rows], [getattr(r, to) for r in rows]).statistic
                    for rows in groups.values()]
            got = grid.correlations[within][of][to]
            assert got.value == pytest.approx(np.mean(each))
            assert got.low <= got.value <= got.high
            assert (got.groups, got.entries) == (len(each), len(grid.rows))


def test_few_networks_tell_a_correlation_but_no_spread(grid):
    few = dataclasses.replace(grid, rows=grid.rows[:3])
    (kind, table), = few.correlations.items()
    assert kind == "all"
    value, low, high, groups, entries = table["trace_pi"]["trace_ntk"]
    assert (np.isnan(low), np.isnan(high), groups, entries) == (True, True, 1, 3)
    assert value == pytest.approx(spearman(*(np.array([getattr(row, name) for row in few.rows])
                                             for name in ("trace_pi", "trace_ntk"))))
    json.dumps(few.to_dict(), allow_nan=False)


def test_ties_have_mean_ranks():
    a, b = np.array([1.0, 1, 2, 3, 3, 3]), np.array([2.0, 1, 1, 5, 4, 4])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_networks_that_nothing_passes_are_zeros_and_correlate_with_nothing():
    empty = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    cut = EVERY["dense"] | {"a": empty["a"], "c": empty["c"]}      # the biases of the last layer are left
    result = pk.compare(net, PARAMS, X, masks={"empty": empty, "cut": cut, "thin": EVERY["thin"]})
    zeros, biases, _ = result.rows
    assert not zeros.connected
    assert not biases.connected
    assert zeros[5:13] == (0.0,) * 8
    assert zeros.log10_trace_pi == -np.inf
    assert result.spectra["empty", None, None].size == 0
    assert biases.trace_ntk == pytest.approx(np.trace(dense(PARAMS, cut, X)))
    assert biases.decay == 0                                       # the identity of outputs, three times
    assert result.correlations == {}
    assert "leave out 2 of 3 networks" in str(result)


def test_logarithms_stand_where_numbers_are_beyond_their_type():
    def chain(w, x):
        return x * w[0] * w[1] * w[2]

    masks = {"chain": None}
    wide = pk.compare(chain, list(jnp.full((3,), 1e100, jnp.float64)), jnp.ones((2, 1)), masks=masks)
    row = wide.rows[0]
    assert row.log10_trace_pi == pytest.approx(400 + np.log10(3))
    assert row.log10_gated_trace == pytest.approx(400 + np.log10(6))
    assert np.isnan(row.trace_pi)
    assert np.isnan(row.trace_ntk)
    assert "beyond float64" in row.note
    assert "Θ is not finite" in row.note
    assert max(map(len, str(wide).splitlines())) <= 80
    square = pk.compare(chain, list(jnp.full((3,), 1e40, jnp.float64)), jnp.ones((2, 1)), masks=masks).rows[0]
    assert (square.effective_rank, square.trace_ntk) == pytest.approx((1, 6e160))       # its square is beyond float64
    narrow = pk.compare(chain, list(jnp.full((3,), 1e15, jnp.float32)), jnp.ones((2, 1), jnp.float32), masks=masks)
    assert narrow.rows[0].trace_pi == pytest.approx(3e60, rel=1e-5)
    assert narrow.dtype == "float32"
    assert "Θ is not finite" in str(narrow)
    assert "no network has a tangent kernel that is known and not 0" in str(narrow)
    json.dumps(narrow.to_dict(), allow_nan=False)


def test_of_a_large_kernel_the_top_is_found_within_its_error(comparison, monkeypatch):
    module = importlib.import_module("pkjax.analysis.measurement")
    monkeypatch.setattr(module, "WHOLE", 2)
    monkeypatch.setattr(module, "LARGEST", 3)
    result = pk.compare(net, PARAMS, X, masks={"dense": None})
    row, want = result.rows[0], comparison.spectra["dense", None, None]
    assert np.abs(result.spectra["dense", None, None] - want[:3]).max() <= row.error + 1e-9 * want[0]
    assert row.trace_ntk == pytest.approx(comparison.rows[0].trace_ntk)
    assert row.effective_rank == pytest.approx(comparison.rows[0].effective_rank, rel=0.5)
    assert "3 largest of 6" in row.note


def test_a_comparison_becomes_json_and_comes_back(grid):
    plain = json.loads(json.dumps(grid.to_dict(), allow_nan=False))
    again = Comparison.from_dict(plain)
    assert again.rows == grid.rows
    assert str(again) == str(grid)
    jax.tree.map(np.testing.assert_array_equal, again.spectra, grid.spectra)
    assert plain["correlations"]["all"]["trace_pi"]["largest"]["value"] == again.correlations["all"]["trace_pi"][
        "largest"].value
    with pytest.raises(ValueError, match="not fit"):
        Comparison.from_dict({"rows": []})


def test_it_prints_in_80_columns_and_as_a_table(grid):
    text = str(grid)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("27 networks on 3 examples of 2 outputs, float64")
    assert "over the seeds of a name and ρ" in text
    assert grid._repr_html_().count("<tr>") == 10


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (12345.6, "12346"), (999999.0, "999999"), (1.678e9, "1.68e9"),
                                             (4.63e24, "4.63e24"), (2e-300, "2e-300"), (1.4e300, "1.4e300"),
                                             (5.36e-58, "5.4e-58"), (5.39e-100, "5e-100"), (1.37e300, "1.4e300")])
def test_numbers_of_any_size_fit_their_column(value, text):
    row = Row("a", 1.0, 0, 5, True, *[value] * 8, 0.0, 0.0, 0.0, "")
    result = Comparison(rows=(row,), spectra={row[:3]: np.ones(1)}, samples=1, outputs=1, dtype="float32")
    line = str(result).splitlines()[2]
    assert line.split()[2:7] == [text] * 5
    assert len(line) <= 80


def test_progress_names_each_network():
    lines = []
    pk.compare(net, PARAMS, X, masks={("thin", 0.3, 7): EVERY["thin"]}, progress=lines.append, k=0)
    assert lines == ["1 of 1: thin 0.3 7"]


@pytest.mark.parametrize(("options", "says"), [
    ({"masks": {}}, "masks must map names to masks, as in .* but got nothing"),
    ({"masks": {3: None}}, "must be a name, .* got 3"),
    ({"masks": {("a", 1.0, 0, 0): None}}, "must be a name"),
    ({"masks": {"a": None, ("a",): None}}, "two entries of the key"),
    ({"masks": {("a", 1.0, 5): None}, "seeds": {0: PARAMS}}, "names a seed for which seeds has no parameters; .* 0"),
    ({"masks": {"a": None}, "k": -1}, "k must be at least 0, but got -1"),
    ({"masks": {("a", np.nan): None}}, "compression of a key of masks must be finite, but got"),
    ({"masks": {"a": {**EVERY["thin"], "a": np.ones((2, 2), bool)}}}, "the entry 'a' of masks: masks leaf"),
    ({"masks": EVERY["thin"]}, "the entry 'a' of masks: masks must have the tree structure"),
    ({"masks": {("a", 1.0): pk.prune(pk.magnitude, PARAMS, prunable=lambda *_: True, density=0.5)}},
     r"the entry \('a', 1.0, None\) of masks: .* is a PruneResult: pass its field masks"),
    ({"masks": {"a": None}, "x": jnp.ones((2, 3))}, "batch of one"),
])
def test_bad_input_is_refused_by_name(options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        pk.compare(net, PARAMS, X, **options)


def test_traced_arrays_are_refused():
    with pytest.raises(TypeError, match="concrete arrays, but got traced ones: call it outside of jit"):
        jax.jit(lambda w: pk.compare(net, w, X, masks={"a": None}).rows[0].trace_pi)(PARAMS)


# -- frozen gates ------------------------------------------------------------------------------------------------------


def gated(w, x):
    return (jax.nn.gelu(x @ w["a"] + w["b"]) * jax.nn.sigmoid(x @ w["a"])) @ w["c"] + w["d"]


def test_with_frozen_gates_rows_hold_what_the_analyzer_finds():
    reference = normal(7, (2, 3), FLOAT)
    result = pk.compare(gated, PARAMS, X, masks={"dense": None, "thin": EVERY["thin"]}, gates="frozen",
                        reference=reference)
    for row in result.rows:
        report = pk.analyze(gated, PARAMS, X, masks=EVERY[row.name], gates="frozen", reference=reference,
                            k=row.parameters)
        count = min(len(report.nu), len(report.pi))
        want = [report.trace_pi, report.gated_trace, report.trace_ntk, report.nu[:count] @ report.pi[:count],
                report.lam[0], report.frozen.trace]
        np.testing.assert_allclose([row.trace_pi, row.gated_trace, row.trace_ntk, row.nu_pi, row.largest,
                                    row.frozen_trace], want, rtol=1e-6)
        theta = np.linalg.eigvalsh(dense(PARAMS, EVERY[row.name], X, fn=gated))
        np.testing.assert_allclose(row.largest, theta[-1], rtol=1e-6)
    assert "gates are frozen: Tr Π, gated and Σ ν_iπ_i are of Θ_frozen" in str(result)
    again = Comparison.from_dict(json.loads(json.dumps(result.to_dict())))
    assert [row.frozen_trace for row in again.rows] == [row.frozen_trace for row in result.rows]


def test_frozen_gates_change_nothing_for_a_piecewise_linear_network(comparison):
    frozen = pk.compare(net, PARAMS, X, masks={"dense": None, "thin": EVERY["thin"]}, gates="frozen")
    for one, other in zip(frozen.rows, comparison.rows, strict=True):
        np.testing.assert_allclose(one[3:16], other[3:16], rtol=1e-12)
        np.testing.assert_allclose(one.frozen_trace, one.trace_ntk, rtol=1e-12)
    assert "frozen" not in str(comparison)


def test_gates_that_are_none_and_networks_without_paths_are_refused():
    with pytest.raises(pk.NotPathNetworkError, match='gates="frozen"'):
        pk.compare(gated, PARAMS, X, masks={"dense": None})
    with pytest.raises(ValueError, match=r'gates must be None or "frozen", but got .open.'):
        pk.compare(gated, PARAMS, X, masks={"dense": None}, gates="open")
    with pytest.raises(ValueError, match='pass gates="frozen" with it'):
        pk.compare(gated, PARAMS, X, masks={"dense": None}, reference=X)
