"""The analyzer with frozen gates, against the listed paths of small networks."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import nn
from pkjax.analysis import frozen_kernel
from pkjax.analysis.report import side_by_side
from pkjax.cli.html import page
from pkjax.paths import NotPathNetworkError

from tests import fake_report
from tests.cases import assert_close, normal
from tests.listed import NETWORKS, Listed, jacobian, layer_norm, normal_cdf, opened, problem

EACH = pytest.mark.parametrize("name", ["block", "attention", "swiglu", "layer norm"])
SHAPES = {"q": (2, 2), "k": (2, 2), "v": (2, 2), "s": (2,), "t": (2,), "a": (2, 2), "b": (2,), "d": (2, 2)}


def block(w, x):
    """Attention on a LayerNorm, then GELU, as in a transformer."""
    mean = x.mean(-1, keepdims=True)
    n = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-2) * w["s"] + w["t"]
    p = nn.softmax(jnp.einsum("nid,njd->nij", n @ w["q"], n @ w["k"]), -1)
    h = x + jnp.einsum("nij,njd->nid", p, n @ w["v"])
    return nn.gelu(h @ w["a"] + w["b"], approximate=False).mean(1) @ w["d"]


def block_paths(w, x):
    spread, scale = layer_norm(x)
    values = spread * scale * w["s"] + w["t"]
    logits = (values @ w["q"]) @ (values @ w["k"]).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    z = (x + p @ values @ w["v"]) @ w["a"] + w["b"]
    signal = Listed.inputs(x.shape)
    h = signal + signal.centred().times(scale).scaled("s").biased("t").dense("v", 2).attended(p)
    return h.dense("a", 2).biased("b").constant(0.5).times(2 * normal_cdf(z)).averaged(0).dense("d", 2)


@functools.cache
def case(name):
    """A network, its parameters and inputs, the paths of each input, and how to list them."""
    if name != "block":
        return (*problem(name), NETWORKS[name][1])
    w, X = {leaf: normal(i, shape) for i, (leaf, shape) in enumerate(SHAPES.items())}, normal(9, (2, 2, 2))
    held = {k: np.asarray(v, np.float64) for k, v in w.items()}
    return block, w, X, held, [block_paths(held, np.asarray(x, np.float64)) for x in X], block_paths


@functools.cache
def whole_report(name):
    net, w, X, *_ = case(name)
    return pk.analyze(net, w, X, gates="frozen", k=sum(v.size for v in w.values()))


def factors(name, reference):
    """J_θ^v with opened coefficients, and J_v^f in units of these: the paths of all outputs, rows (example, output)."""
    _, _, X, held, listed, paths = case(name)
    outputs = range(2)
    free = opened(paths, held, X, reference).lists.ravel()
    J = np.concatenate([jacobian(free[k], held) for k in outputs])
    ends = np.concatenate([np.full(len(free[k]), k) for k in outputs])
    units = np.array([path[1] for k in outputs for path in free[k]])
    rows = []
    for x, of in zip(np.asarray(X, np.float64), listed, strict=True):
        a = np.array([p[1] * (1.0 if p[3] is None else x[p[3]]) for k in outputs for p in of.lists.ravel()[k]])
        rows += [np.where(ends == k, a / units, 0) for k in outputs]
    return J, np.stack(rows)


def gradients(name):
    """∇f, and ∇f with gates held from the product rule on every path: rows (example, output)."""
    net, w, X, held, listed, _ = case(name)
    whole = jax.jacobian(net)(w, X)
    frozen = [of.gradient(held, np.asarray(x, np.float64)) for of, x in zip(listed, X, strict=True)]
    return ({k: np.asarray(whole[k], np.float64).reshape(4, -1) for k in w},
            {k: np.stack([tree[k].ravel() for trees in frozen for tree in trees]) for k in w})


def kernel(rows):
    return sum(r @ r.T for r in rows.values())


def descending(matrix):
    return np.linalg.eigvalsh(matrix)[::-1]


@EACH
def test_frozen_kernel_is_the_product_of_its_factors_over_listed_paths(name):
    report = whole_report(name)
    J, data = factors(name, case(name)[2])
    theta = data @ (J @ J.T) @ data.T
    assert_close(theta, kernel(gradients(name)[1]), 1e-10, 1e-10)
    assert_close(report.frozen.lam, descending(theta), 1e-9, 1e-9)
    assert_close(report.nu, descending(data @ data.T), 1e-9, 1e-9)
    assert_close(report.pi, descending(J.T @ J), 1e-9, 1e-9)
    assert_close(report.trace_pi, (J**2).sum(), 1e-10)
    assert_close(report.frozen.trace, np.trace(theta), 1e-10)
    assert_close(report.gated_trace, (data**2 @ (J**2).sum(1)).sum(), 1e-10)
    assert_close((report.overlaps**2 * np.outer(report.nu, report.pi)).sum(), np.trace(theta), 1e-6)
    assert_close(report.captured, 1.0, 1e-6)
    assert all(check.passed for check in report.checks.values()), report.checks
    assert {"f is its gated path sum", "frozen gradients are J_v^f J_θ^v"} <= set(report.checks)
    assert all(claim.holds for claim in report.claims.values() if claim.proven)
    assert all(claim.text.endswith("λ of Θ_frozen") for claim in report.claims.values())


@EACH
def test_the_rest_is_what_the_frozen_gradients_lack(name):
    report, (whole, frozen) = whole_report(name), gradients(name)
    theta, held = kernel(whole), kernel(frozen)
    assert_close(report.lam, descending(theta), 1e-9, 1e-9)
    assert_close(report.trace_ntk, np.trace(theta), 1e-10)
    rest, of_trace = np.linalg.norm(theta - held) / np.linalg.norm(theta), 1 - np.trace(held) / np.trace(theta)
    assert_close([1, report.frozen.rest, report.frozen.rest_of_trace], [1, rest, of_trace], 1e-9, 1e-12)
    assert (report.frozen.rest > 0.01) == (name != "layer norm")      # which acts on the input
    assert [leaf.name for leaf in report.frozen.leaves] == sorted(whole)
    for leaf in report.frozen.leaves:
        a, b = (rows[leaf.name] @ rows[leaf.name].T for rows in (whole, frozen))
        rest, of_trace = np.linalg.norm(a - b) / np.linalg.norm(a), 1 - np.trace(b) / np.trace(a)
        assert_close(leaf[1:], [np.trace(a), np.trace(b), rest, of_trace], 1e-9, 1e-11)


def test_coefficients_at_a_reference_belong_to_the_path_kernel():
    net, w, X, *_ = case("block")
    report = pk.analyze(net, w, X, gates="frozen", reference=X[1:], k=5)
    J, data = factors("block", X[1:])
    assert_close(report.frozen.lam, descending(data @ (J @ J.T) @ data.T), 1e-9, 1e-9)
    assert_close(report.nu, descending(data @ data.T), 1e-9, 1e-9)
    assert_close(report.pi, descending(J.T @ J)[:5], 1e-9)
    at = {"gates": "frozen", "reference": X[1:]}
    assert_close(report.trace_pi, pk.path_kernel.trace(net, w, jnp.ones_like(X[:1]), **at), 1e-12)
    assert_close(report.log10_paths, pk.paths.log_count(net, w, jnp.ones_like(X[:1]), **at), 1e-12)
    assert all(claim.holds for claim in report.claims.values() if claim.proven)
    assert all(check.passed for check in report.checks.values()), report.checks


def test_masks_and_choices_of_what_trains_are_kept():
    net, w, X, *_ = case("attention")
    masks = {k: jnp.asarray(np.random.default_rng(2).random(v.shape) < 0.7) for k, v in w.items()}
    report = pk.analyze(net, w, X, gates="frozen", masks=masks, trainable=lambda path, leaf: path[0].key in "vq")
    assert [leaf.name for leaf in report.frozen.leaves] == ["q", "v"]
    masked = {k: jnp.where(masks[k], v, 0) for k, v in w.items()}
    whole = jax.jacobian(net)(masked, X)
    value = np.where(masks["v"], whole["v"], 0).reshape(4, -1)
    query = np.where(masks["q"], whole["q"], 0).reshape(4, -1)
    assert_close(report.lam, descending(value @ value.T + query @ query.T), 1e-9, 1e-9)
    assert_close(report.frozen.lam, descending(value @ value.T), 1e-9, 1e-9)      # values alone are linear
    assert all(check.passed for check in report.checks.values()), report.checks


def relu_net(w, x):
    return nn.relu(x @ w["a"] + w["b"]) @ w["c"]


def test_relu_networks_have_no_rest():
    w, X = {"a": normal(0, (3, 4)), "b": normal(1, (4,)), "c": normal(2, (4, 2))}, normal(3, (3, 3))
    plain, frozen = pk.analyze(relu_net, w, X), pk.analyze(relu_net, w, X, gates="frozen")
    before, after = plain.to_dict(), frozen.to_dict()
    for name in set(before) - {"seconds", "compile_seconds", "checks", "claims", "frozen"}:
        assert before[name] == after[name], name
    assert {n: c[:4] for n, c in plain.claims.items()} == {n: c[:4] for n, c in frozen.claims.items()}
    assert plain.frozen is None
    assert frozen.frozen.rest == frozen.frozen.rest_of_trace == 0
    assert all(leaf.rest == leaf.rest_of_trace == 0 for leaf in frozen.frozen.leaves)
    np.testing.assert_array_equal(frozen.frozen.lam, frozen.lam)
    assert all(check.passed for check in frozen.checks.values())


def test_parts_that_fit_memory_add_up(monkeypatch):
    net, w, X, *_ = case("swiglu")
    X = jnp.concatenate([X, normal(4, (3, 3))])
    whole = pk.analyze(net, w, X, gates="frozen").frozen
    monkeypatch.setattr(frozen_kernel, "default_memory_limit", lambda: 2 * 8 * 2 * 36 * 8)      # two examples at a time
    parts = pk.analyze(net, w, X, gates="frozen").frozen
    for a, b in zip(parts.leaves, whole.leaves, strict=True):
        assert_close(a[1:], b[1:], 1e-10, 1e-12)
    assert_close([parts.rest, parts.rest_of_trace], [whole.rest, whole.rest_of_trace], 1e-10)
    assert parts.samples == whole.samples == 5
    monkeypatch.setattr(frozen_kernel, "ROWS", 4)      # norms over two of five examples, traces over all
    some = pk.analyze(net, w, X, gates="frozen").frozen
    assert some.samples == 2
    assert_close(some.rest, pk.analyze(net, w, X[:2], gates="frozen").frozen.rest, 1e-10)
    assert_close([leaf.trace for leaf in some.leaves], [leaf.trace for leaf in whole.leaves], 1e-10)


def test_the_report_tells_the_frozen_part_apart():
    report = whole_report("swiglu")
    text, tables = str(report), report._repr_html_()
    assert "Tr Θ_frozen, with gates held" in text
    assert "claims on Θ_frozen that do not hold" in text
    assert "(Θ_frozen)" in tables
    assert "What frozen gates leave out" in tables
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["frozen"]["leaves"][3]["name"] == "g"
    assert plain["frozen"]["leaves"][3]["rest"] == pytest.approx(1)
    assert len(plain["frozen"]["lam"]) == 4
    rows = {name: values for name, *values in side_by_side({"gated": report, "relu": fake_report.report()})}
    assert rows["Tr Θ_frozen, with gates held"][1] == "–"
    assert rows["Tr Θ"][1] == "53,212"
    pytest.importorskip("matplotlib")
    whole = page({"gated": report}, title="", settings={}, environment={})
    assert "<h2>What frozen gates leave out</h2>" in whole
    assert "<th style=text-align:left>gated (Θ_frozen)</th>" in whole
    assert "J<sub>v</sub><sup>f</sup>" in whole
    figure = pk.plots.report(report)
    assert len(figure.axes) == 5      # and a colour bar
    with pytest.raises(ValueError, match="drawn on 4 panels"):
        pk.plots.report(report, axes=figure.axes[:3])
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert sum("frozen" in label for label in labels) == 1


def test_the_quick_form_has_the_traces_and_the_largest_pi():
    net, w, X, *_ = case("swiglu")
    quick, whole = pk.analyze(net, w, X, gates="frozen", quick=True), whole_report("swiglu")
    assert_close([quick.trace_ntk, quick.trace_pi, quick.gated_trace, quick.pi[0]],
                 [whole.trace_ntk, whole.trace_pi, whole.gated_trace, whole.pi[0]], 1e-9)
    assert quick.frozen is None


def test_bad_input_is_refused_by_name():
    net, w, X, *_ = case("gelu")
    with pytest.raises(NotPathNetworkError, match='gates="frozen"'):
        pk.analyze(net, w, X)
    with pytest.raises(ValueError, match='gates must be None or "frozen", but got'):
        pk.analyze(net, w, X, gates="thawed")
    with pytest.raises(ValueError, match="reference is the input"):
        pk.analyze(net, w, X, reference=X)
    with pytest.raises(ValueError, match="reference holds examples"):
        pk.analyze(net, w, X, gates="frozen", reference=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="a coefficient is 0 at the reference and not on X"):
        pk.analyze(lambda w, x: nn.tanh(x) * (x @ w), jnp.ones((3, 3)), X, gates="frozen", reference=jnp.zeros((1, 3)))


def test_tokens_and_single_precision_are_analyzed():
    def net(w, tokens):
        h = w["e"][tokens]
        p = nn.softmax(jnp.einsum("nid,njd->nij", h @ w["q"], h @ w["k"]))
        return (h + p @ nn.gelu(h @ w["v"])).mean(1) @ w["d"]
    shapes = {"e": (5, 3), "q": (3, 2), "k": (3, 2), "v": (3, 3), "d": (3, 2)}
    w = {leaf: normal(i, shape).astype(jnp.float32) for i, (leaf, shape) in enumerate(shapes.items())}
    tokens = jnp.array([[0, 3], [4, 4]])
    report = pk.analyze(net, w, tokens, gates="frozen", x=tokens[:1], k=42)
    assert all(check.passed for check in report.checks.values()), report.checks
    assert all(claim.holds for claim in report.claims.values() if claim.proven)
    rests = {leaf.name: leaf.rest for leaf in report.frozen.leaves}
    assert rests["d"] < 1e-6
    assert rests["q"] == pytest.approx(1)
    assert rests["k"] == pytest.approx(1)
