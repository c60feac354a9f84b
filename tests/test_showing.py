"""Results print as short texts without arrays, and as tables whose every cell is escaped."""

import dataclasses
import re
from html import unescape

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax import tables

from tests.fake_report import report as fake


def net(w, x):
    return jnp.maximum(x @ w["a"], 0.0) @ w["<b>"]


@pytest.fixture(scope="module")
def results():
    """Of every result, one that holds many numbers."""
    w = {"a": jax.random.normal(jax.random.key(0), (6, 5)), "<b>": jax.random.normal(jax.random.key(1), (5, 2))}
    X, ones = jax.random.normal(jax.random.key(2), (4, 6)), jnp.ones((1, 6))
    pruned = pk.prune(pk.magnitude, w, density=0.5, steps=20)
    theta = pk.ntk(net, w, X)
    row = {"train_loss": 1.0, "test_accuracy": 0.5}
    digits = pk.data.load("digits", samples=64)
    return {
        "PruneResult": pruned,
        "Connectivity": pk.connectivity(net, w, ones, masks=pruned.masks),
        "NtkPlan": pk.ntk_plan(net, w, X),
        "NtkEigenpairs": pk.ntk_eigenpairs(net, w, X, k=8),
        "Eigenpairs": pk.path_kernel.eigenpairs(net, w, ones, k=30),
        "SpectralDensity": pk.path_kernel.density(net, w, ones, key=jax.random.key(3)),
        "Factorization": pk.paths.factorize(net, w, X),
        "Trajectory": pk.dynamics.linearized(theta, net(w, X), jnp.ones((4, 2)), learning_rate=0.1,
                                             t=jnp.linspace(0.0, 1.0, 40)),
        "Fit": pk.training.Fit(w, {}, pruned.masks, tuple({"epoch": i, **row} for i in range(50)), finished=True),
        "Dataset": digits,
        "DenseLayer": pk.paths.dense_layers(net, w, ones)[0],
        "Report": fake(),
    }


TABLES = ("PruneResult", "Connectivity", "NtkPlan", "NtkEigenpairs", "Eigenpairs", "Factorization", "Trajectory", "Fit",
          "Report")
NAMES = (*TABLES, "SpectralDensity", "Dataset", "DenseLayer")


def cells(page):
    return [[unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", page)]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_short_and_names_the_result(name, results):
    assert type(results[name]).__name__ == name
    text = repr(results[name])
    assert text.startswith(name)
    assert len(text) < 1400
    assert max(map(len, text.split("\n"))) <= 80
    assert not re.search(r"\[\[|Array\(|array\(", text)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_well_formed_and_its_rows_are_full(name, results):
    page = results[name]._repr_html_()
    assert page.count("<table>") == page.count("</table>") >= 1
    for table in page.split("</table>")[:-1]:
        rows = cells(table)
        assert len(rows) > 1
        assert len({len(row) for row in rows}) == 1
    assert not re.search(r"color|background", page)          # readable on light and on dark pages


@pytest.mark.parametrize("name", ["PruneResult", "Connectivity", "NtkPlan", "Factorization"])
def test_names_are_escaped(name, results):
    page = results[name]._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_the_tables_hold_the_results_numbers(results):
    pruned, pairs, fit = results["PruneResult"], results["Eigenpairs"], results["Fit"]
    rows = cells(pruned._repr_html_())
    assert rows[1:] == [[layer.name, "×".join(map(str, layer.shape)), str(layer.kept), str(layer.total),
                         f"{layer.density:.4f}"] for layer in pruned.layers]
    assert [float(row[5]) for row in cells(results["Connectivity"]._repr_html_())[1:]] == pytest.approx(
        [layer.flow for layer in results["Connectivity"].layers], rel=1e-2)
    rows = cells(pairs._repr_html_())[1:]
    assert len(rows) == 12
    assert [int(row[0]) for row in (rows[0], rows[-1])] == [1, 30]
    assert float(rows[0][1]) == pytest.approx(pairs.values[0], rel=1e-3)
    assert [int(row[0]) for row in cells(fit._repr_html_())[1:]] == tables.spread(50)
    rows = cells(results["Report"]._repr_html_())
    assert ["π₁, largest of Π", rows[8][1]] == rows[8]
    assert any(row[0].startswith("per_index") for row in rows)


def test_a_report_says_in_words_what_does_not_hold():
    text = repr(fake(pruned=True))
    assert "per_index fails: 32 at i = 4" in text
    assert "1 of 2 passed; FAILED: neural_tangents" in text
    assert "none of 6" in repr(fake())


def test_results_print_while_they_are_traced_and_after_their_arrays_are_deleted(results):
    texts = []

    def trace(trajectory):
        texts.append(repr(trajectory))
        return trajectory

    jax.jit(trace)(results["Trajectory"])
    assert "outputs=float64[40,4,2]" in texts[0]
    assert "times=float64[40]," in texts[0]
    assert "masks=<0 leaves, 0 entries>" in repr(dataclasses.replace(
        results["PruneResult"], masks=jax.tree.map(lambda _: None, results["PruneResult"].masks)))
    gone = results["SpectralDensity"]
    gone.points.delete()
    assert "points=float64[200]," in repr(gone)


@dataclasses.dataclass
class Held:
    value: object
    __repr__ = tables.brief


@pytest.mark.parametrize(("value", "text"), [
    (np.float64(2.5), "2.5"), (np.arange(3), "int64[3] 0 … 2"), (np.zeros(0), "float64[0]"),
    (np.ones((2, 3)), "float64[2,3]"), ((1, 2), "(1, 2)"), ((1,), "(1,)"), (("a",), "('a',)"), ((), "()"),
    (None, "None"), (True, "True"), (1e-9, "1e-09"), (tuple(range(20)), "(0, …, 19)"),
    ({"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, "<2 leaves, 10 entries>"), (({"epoch": 1},), "<1 of dict>"),
    (jnp.ones((2, 3)), "float64[2,3]"), ({"a": jnp.ones(())}, "<1 leaf, 1 entry>")])
def test_values_are_short(value, text):
    assert repr(Held(value)) == f"Held(value={text})"
