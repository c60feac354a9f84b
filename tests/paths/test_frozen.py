"""Frozen gates: any network as an exact sum over paths, against its listed paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from jax import nn
from jax.scipy.special import erf
from pkjax.network import read
from pkjax.paths import NotPathNetworkError, frozen
from pkjax.paths.algebras import Polynomial
from pkjax.paths.interpret import interpret
from pkjax.paths.polynomial import path_sum

from tests.cases import assert_close, normal
from tests.listed import NETWORKS, SHAPES, jacobian, mlp_gelu, problem

each = pytest.mark.parametrize("name", NETWORKS)


@each
def test_network_is_the_sum_over_its_listed_paths(name):
    net, w, X, held, listed = problem(name)
    want = np.stack([paths.values(held, np.asarray(x)) for paths, x in zip(listed, X, strict=True)])
    assert_close(net(w, X), want, 1e-10)
    recorded = pk.paths.gates(net, w, X, gates="frozen")
    assert_close(path_sum(net, w, X, gates=recorded), want, 1e-10)
    assert_close(frozen(net, w, X[:1])(w, X[:1]), want[:1], 1e-10)
    assert np.ptp(want, 0).min() > 1e-3
    assert all(np.abs(g).max() > 1e-6 for g in recorded)


@each
@pytest.mark.parametrize("q", [0, 1, 2])
def test_polynomial_weighs_coefficients_as_constants(name, q):
    net, w, X, held, listed = problem(name)
    z = np.abs(np.asarray(X))
    power = {k: jnp.abs(v) ** q for k, v in w.items()}
    want = np.stack([paths.values(held, x, q, lambda v: abs(v) ** q) for paths, x in zip(listed, z, strict=True)])
    given = [jnp.abs(g) ** q if q else (g != 0).astype(g.dtype) for g in pk.paths.gates(net, w, X, gates="frozen")]
    assert_close(pk.paths.polynomial(net, power, z, q=q, gates=given), want, 1e-10)
    if name != "layer norm":      # whose ReLU stays open
        assert_close(pk.paths.polynomial(frozen(net, w, X[:1]), power, z[:1], q=q), want[:1], 1e-10)
        if q == 0:
            assert_close(pk.paths.log_count(net, w, X[:1], gates="frozen"), np.log10(
                listed[0].values(held, np.ones(X.shape[1:]), 0, lambda v: 1.0).sum()), 1e-10)


@each
def test_data_factor_is_the_gram_matrix_of_path_activations(name):
    net, w, X, _, listed = problem(name)
    activations = [[np.array([p[1] * (1.0 if p[3] is None else x[p[3]]) for p in paths])
                    for x, of in zip(np.asarray(X), listed, strict=True) for paths in of.lists.ravel()[k:k + 1]]
                   for k in range(2)]
    got = pk.data_factor(net, w, X, gates="frozen")
    assert_close(got, [[[a @ b for b in rows] for a in rows] for rows in activations], 1e-10)


@pytest.mark.parametrize("name", ["gelu", "swiglu", "attention"])
def test_path_kernel_of_the_frozen_network_is_that_of_the_listed_paths(name):
    net, w, X, held, listed = problem(name)
    paths = [path for output in listed[0].lists.ravel() for path in output]
    J = jacobian(paths, held)
    linear, ones = frozen(net, w, X[:1]), jnp.ones_like(X[:1])
    assert_close(pk.path_kernel.dense(linear, w, ones), J.T @ J, 1e-10)
    assert_close(pk.path_kernel.trace(linear, w, ones), (J**2).sum(), 1e-10)


def test_path_exclusion_is_its_sum_over_listed_paths():
    net, w, X, held, listed = problem("gelu")
    outputs = range(2)
    data = [sum((p[1] * (1.0 if p[3] is None else x[p[3]]))**2 for x, of in zip(np.asarray(X), listed, strict=True)
                for p in of.lists.ravel()[k]) for k in outputs]
    want = {leaf: np.zeros(np.shape(v)) for leaf, v in w.items()}
    for k in outputs:
        for c, a, p, _ in listed[0].lists.ravel()[k]:
            for leaf, *i in p:
                want[leaf][tuple(i)] += data[k] * (c * a * np.prod([held[n][tuple(j)] for n, *j in p]))**2
    got = pk.path_exclusion(net, w, X, gates="frozen", reference=X[:1])
    for leaf in w:
        assert_close(got[leaf], want[leaf], 1e-10)


def test_connectivity_counts_frozen_paths():
    net, w, X, _, _ = problem("attention")
    report = pk.connectivity(net, w, X[:1], gates="frozen")
    assert_close(report.log10_paths, pk.paths.log_count(net, w, X[:1], gates="frozen"), 1e-10)
    values = {k: jnp.ones(v.shape, bool) for k, v in w.items()} | {"d": jnp.zeros(w["d"].shape, bool)}
    with pytest.warns(pk.DisconnectedWarning):
        assert not pk.connectivity(net, w, X[:1], masks=values, gates="frozen").connected


@each
def test_gradient_with_frozen_gates_is_that_of_the_listed_paths(name):
    net, w, X, held, listed = problem(name)
    got = jax.jacobian(frozen(net, w, X[:1]))(w, X[:1])
    for k, want in enumerate(listed[0].gradient(held, np.asarray(X[0]))):
        for leaf in w:
            assert_close(got[leaf][0, k], want[leaf], 1e-10, 1e-10)


ACTIVATIONS = {
    "tanh": jnp.tanh, "sigmoid": nn.sigmoid, "softplus": nn.softplus, "elu": nn.elu, "celu": nn.celu, "selu": nn.selu,
    "gelu": nn.gelu, "silu": nn.silu, "relu6": nn.relu6, "hard_tanh": nn.hard_tanh, "hard_swish": nn.hard_swish,
    "mish": nn.mish, "squareplus": nn.squareplus, "soft_sign": nn.soft_sign, "squared relu": lambda z: nn.relu(z)**2,
    "sine": jnp.sin, "cube": lambda z: z**3, "square": lambda z: z * z, "glu": lambda z: nn.glu(z),
    "squeeze": lambda z: z * nn.sigmoid(z.mean(-1, keepdims=True)), "tanh of erf": lambda z: jnp.tanh(erf(z)),
    "rms": lambda z: z / jnp.sqrt((z**2).mean(-1) + 1)[:, None],
    "unit": lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True),
}


def activated(name, w, x):
    return ACTIVATIONS[name](x @ w["a"] + w["b"])[:, :2]


def test_any_activation_is_a_sum_over_paths():
    def net(w, x):
        return jnp.concatenate([activated(name, w, x) @ w["c"][:2] for name in ACTIVATIONS], -1)
    w = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("abc")} | {"b": jnp.zeros(4)}
    X = jnp.concatenate([normal(5, (2, 3)), jnp.full((1, 3), 1e-3)])

    @jax.jit
    def both(w, X):
        recorded = pk.paths.gates(net, w, X, gates="frozen")
        return recorded, path_sum(net, w, X, gates=recorded), net(w, X)
    recorded, summed, want = both(w, X)
    assert all(np.isfinite(g).all() for g in recorded)
    assert_close(summed, want, 1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_default_refuses_and_names_the_way_out(name):
    w = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("ab")}
    with pytest.raises(NotPathNetworkError, match='gates="frozen"'):
        pk.paths.polynomial(functools.partial(activated, name), w, jnp.ones((1, 3)), q=1)


ENTRYWISE = ["softplus", "elu", "relu6", "squareplus", "mish", "hard_tanh"]


def test_elementwise_function_is_one_gate_whatever_its_formula():
    def net(w, x):
        return jnp.concatenate([ACTIVATIONS[name](x * w) for name in ENTRYWISE], -1)
    w, x = normal(0, (6,)), normal(1, (1, 6))
    got = pk.paths.polynomial(frozen(net, w, x), abs(w), abs(x), q=1)[0].reshape(len(ENTRYWISE), -1)
    z = np.asarray(x * w)[0]
    for name, of in zip(ENTRYWISE, got, strict=True):
        start = float(ACTIVATIONS[name](jnp.zeros(())))
        assert_close(of, np.abs(ACTIVATIONS[name](jnp.asarray(z)) - start) + abs(start), 1e-10)


def test_function_is_a_gate_on_the_nearest_value_at_0_of_which_it_is_finite():
    w, x = jnp.array([2.0]), jnp.ones((1, 1))
    (a,) = pk.paths.gates(lambda w, x: jnp.log(3 + abs(x * w)), w, x, gates="frozen")[-1:]
    assert_close(a, [[(np.log(5) - np.log(3)) / 2]], 1e-10)


def test_selections_by_a_signal_stay_gates_beside_coefficients():
    def net(w, x):
        chosen = jnp.where(x @ w["g"] > 0, nn.silu(x @ w["a"]), 0.0)
        return (chosen + jnp.where(x @ w["a"] > 0, x @ w["g"], 0.0)) @ w["c"]
    w, x = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("acg")}, normal(3, (1, 3))
    by, gate = (x @ w["g"] > 0).astype(x.dtype), nn.sigmoid(x @ w["a"])
    linear = frozen(net, w, x)
    assert_close(linear(w, x), net(w, x), 1e-10)
    assert_close(jax.jacobian(linear)(w, x)["a"], jax.jacobian(
        lambda w: (by * gate * (x @ w["a"])) @ w["c"])(w)["a"], 1e-10)
    # 3 entries to 4 units of each kind to 2 outputs
    assert_close(pk.paths.log_count(linear, w, x), np.log10(2 * 3 * 4 * 2), 1e-10)


def test_function_with_a_derivative_rule_keeps_it_at_a_tie():
    (a,) = pk.paths.gates(lambda w, x: nn.relu(jnp.tanh(x * w)), jnp.ones(1), jnp.zeros((1, 1)), gates="frozen")
    assert a == 0


def test_elementwise_function_is_its_value_at_0_and_a_secant():
    w, x = {"a": jnp.eye(2)}, jnp.array([[2.0, 0.0]])
    (a,) = pk.paths.gates(lambda w, x: nn.sigmoid(x @ w["a"]), w, x, gates="frozen")
    assert_close(a, [[(1 / (1 + np.exp(-2.0)) - 0.5) / 2, 0.25]], 1e-10)
    assert_close(pk.paths.polynomial(lambda w, x: nn.sigmoid(x @ w["a"]), w, x, q=1, gates="frozen"),
                 [[1 / (1 + np.exp(-2.0)), 0.5]], 1e-10)


# -- networks of which each is written twice: as users do, and with its coefficients marked ----------------------------


class Marked:
    """Marks coefficients: keeps their values, and then puts these in their places."""

    def __init__(self):
        self.values, self.next = [], None

    def __call__(self, value):
        if self.next is None:
            self.values.append(value)
            return value
        self.next += 1
        return self.values[self.next - 1]

    def act(self, fn, z):
        start = fn(jnp.zeros_like(z))
        return self((fn(z) - start) / z) * z + start


class Plain:
    """Marks nothing."""

    def __call__(self, value):
        return value

    def act(self, fn, z):
        return fn(z)


def normalised(h, scale, m, root):
    spread = h - h.mean(-1, keepdims=True)
    variance = jnp.square(spread).mean(-1, keepdims=True) + 1e-2
    return spread * (m(jax.lax.rsqrt(variance)) * scale if root else scale * m(1 / jnp.sqrt(variance)))


def divided(h, by, m):
    return h / by if isinstance(m, Plain) else h * m(1 / by)


def linear_attention(w, x, m):
    q, k = m(nn.elu(x @ w["q"]) + 1), m(nn.elu(x @ w["k"]) + 1)
    mixed = jnp.einsum("nid,nde->nie", q, jnp.einsum("njd,nje->nde", k, x @ w["v"]))
    return divided(mixed, jnp.einsum("nid,nd->ni", q, k.sum(1))[..., None], m).mean(1) @ w["d"]


def mixture(w, x, m):
    h = jnp.einsum("ne,nef->nf", m(nn.softmax(x.mean(1) @ w["q"])), m.act(jnp.tanh, jnp.einsum(
        "nd,edf->nef", x.mean(1), w["v"])))
    return h @ w["d"]


def squeezed(w, x, m):
    h = m.act(nn.elu, x @ w["q"])
    return (h * m(nn.sigmoid(nn.relu(h.mean(1, keepdims=True) @ w["k"]) @ w["v"]))).mean(1) @ w["d"]


def cosine(w, x, m):
    h = m.act(jnp.tanh, x.mean(1) @ w["q"])
    return divided(h, jnp.linalg.norm(h, axis=-1, keepdims=True), m) @ divided(
        w["d"], jnp.linalg.norm(w["d"], axis=0, keepdims=True), m)


MARKED = {
    "normalised tanh": lambda w, x, m: normalised(m.act(jnp.tanh, x @ w["q"]), w["s"], m, True).mean(1) @ w["d"],
    "normalised elu": lambda w, x, m: normalised(m.act(nn.elu, x @ w["q"]), w["s"], m, False).mean(1) @ w["d"],
    "scale on a 1-norm": lambda w, x, m: (x.mean(1) * (w["s"] * m(jax.lax.rsqrt(
        1 + abs(x.mean(1)).sum(-1, keepdims=True))))) @ w["d"],
    "scale on tanh": lambda w, x, m: (x.mean(1) + w["s"] * m.act(jnp.tanh, x.mean(1) @ w["q"])) @ w["d"],
    "relu of it": lambda w, x, m: (nn.relu(w["s"] * m.act(jnp.tanh, x.mean(1) @ w["q"])) + abs(
        w["s"] * m.act(jnp.tanh, x.mean(1) @ w["k"]))) @ w["d"],
    "linear attention": linear_attention,
    "attention to tanh": lambda w, x, m: (m(nn.softmax(jnp.tanh(x @ w["q"]) @ w["s"]))[..., None] * m.act(
        jnp.tanh, x @ w["k"])).sum(1) @ w["d"],
    "experts": lambda w, x, m: mixture(w | {"v": jnp.stack([w["v"], w["k"], w["q"]])}, x, m),
    "squeeze and excite": squeezed,
    "cosine": cosine,
    "tanh of means": lambda w, x, m: m.act(jnp.tanh, m.act(jnp.tanh, x @ w["q"]).mean(1)) @ w["d"],
    "low rank": lambda w, x, m: m.act(nn.softplus, x.mean(1) @ (w["q"] + w["k"][:, :1] @ w["v"][:1])) @ w["d"],
}


def test_marked_coefficients_are_those_that_are_frozen():
    w, x = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("qkvsd")}, normal(5, (1, 2, 3))
    w["k"], w["q"] = (jnp.concatenate([w[k], w[k][:, :1] ** 2], 1) for k in "kq")

    def user(w, x):
        return jnp.concatenate([net(w, x, Plain()) for net in MARKED.values()], -1)
    mark = Marked()
    for net in MARKED.values():
        net(w, x, mark)

    def hand(w, x):
        mark.next = 0
        return jnp.concatenate([net(w, x, mark) for net in MARKED.values()], -1)
    linear = frozen(user, w, x)
    got, want = (jax.jit(jax.jacobian(net))(w, x) for net in (linear, hand))
    sizes = [pk.paths.polynomial(net, jax.tree.map(abs, w), abs(x), q=1) for net in (linear, hand)]
    values = [jax.jit(net)(w, x) for net in (linear, user)]
    for i, name in enumerate(MARKED):
        at = slice(2 * i, 2 * i + 2)
        for leaf in w:
            np.testing.assert_allclose(got[leaf][:, at], want[leaf][:, at], 1e-9, 1e-12, err_msg=f"{name}, {leaf}")
        for one, other in (sizes, values):
            np.testing.assert_allclose(one[:, at], other[:, at], 1e-10, err_msg=name)


REFUSED = {
    "gated tanh": lambda w, x: (nn.sigmoid(x @ w["a"]) * jnp.tanh(x @ w["g"])) @ w["c"],
    "function of a gated tanh": lambda w, x: jnp.tanh(nn.sigmoid(x @ w["a"]) * jnp.tanh(x @ w["g"])) @ w["c"],
    "its quotient": lambda w, x: (nn.silu(x @ w["a"]) * nn.silu(x @ w["g"]) / jnp.sqrt(
        1 + (x**2).sum(-1, keepdims=True))) @ w["c"],
    "product of two signals": lambda w, x: ((x @ w["a"]) * (x @ w["g"])) @ w["c"],
    "its sum with a signal": lambda w, x: (x @ w["a"] + (x @ w["a"]) * (x @ w["g"])) @ w["c"],
    "as the output": lambda w, x: (x @ w["a"]) * (x @ w["g"]),
    "two gated signals": lambda w, x: (nn.silu(x @ w["a"]) * nn.silu(x @ w["g"])) @ w["c"],
    "softmax as the output": lambda w, x: nn.softmax(x @ w["a"]),
    "logarithm of a signal": lambda w, x: jnp.log(x @ w["a"]) + x @ w["g"],
    "product of entries": lambda w, x: jnp.prod((x @ w["a"]).reshape(-1, 2, 2), 1) @ w["c"][:2],
    "Fourier transform": lambda w, x: jnp.fft.fft(x @ w["a"]).real @ w["c"],
    "solved equations": lambda w, x: jax.scipy.linalg.solve_triangular(jnp.eye(4), (x @ w["a"]).T).T @ w["c"],
    "open loop": lambda w, x: jax.lax.while_loop(lambda h: h[0] < 2, lambda h: (h[0] + 1, nn.silu(h[1])),
                                                 (0, x @ w["a"]))[1] @ w["c"],
    "chosen branch": lambda w, x: jax.lax.cond(w["a"].sum() > 0, lambda: x @ w["a"], lambda: x @ w["g"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_have_to_be_guessed_is_refused(name):
    w = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("acg")}
    with pytest.raises(NotPathNetworkError, match="what to do") as error:
        pk.synflow(REFUSED[name], w, jnp.ones((1, 3)), gates="frozen")
    assert "freeze" not in str(error.value)


def test_stopped_gradient_marks_the_gate():
    w, x = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("acg")}, normal(3, (1, 3))
    gate = nn.sigmoid(x @ w["a"])
    linear = frozen(lambda w, x: (jax.lax.stop_gradient(nn.sigmoid(x @ w["a"])) * (x @ w["g"])) @ w["c"], w, x)
    assert_close(jax.jacobian(linear)(w, x)["g"], jax.jacobian(
        lambda w: (gate * (x @ w["g"])) @ w["c"])(w)["g"], 1e-10)

    def marked(w, x):
        return (jax.lax.stop_gradient(nn.sigmoid(x @ w["a"])) * jnp.tanh(x @ w["g"])) @ w["c"]
    # 3 entries to 4 units to 2 outputs
    assert_close(pk.paths.log_count(marked, w, x, gates="frozen"), np.log10(3 * 4 * 2), 1e-10)


def test_products_of_signals_may_make_coefficients():
    def net(w, x):      # logits with a bias of their own and a mix of heads, as in talking heads
        logits = jnp.einsum("nid,njd->nij", x @ w["q"], x @ w["k"]) @ w["m"] + w["m"]
        return (nn.softmax(jnp.where(jnp.tril(jnp.ones((2, 2))) > 0, logits, -jnp.inf)) @ (x @ w["v"])).sum(1)
    w = {leaf: normal(i, SHAPES.get(leaf, (2, 2))) for i, leaf in enumerate("qkvm")}
    x = normal(3, (1, 2, 3))
    assert_close(path_sum(net, w, x, gates=pk.paths.gates(net, w, x, gates="frozen")), net(w, x), 1e-10)
    scores = pk.synflow(net, w, jnp.ones_like(x), gates="frozen", reference=x)
    assert not any(np.any(scores[leaf]) for leaf in "qkm")
    assert np.all(scores["v"] > 0)


def deep(w, x):
    h = nn.gelu(x @ w["a"] + w["b"])
    return (nn.silu(h @ w["m"]) * (h @ w["n"])) @ w["c"]


@pytest.mark.parametrize("variant", ["synflow", "conserved"])
def test_layer_sums_of_scores_are_conserved(variant):
    w = {leaf: normal(i, SHAPES.get(leaf, (4, 4))) for i, leaf in enumerate("abcmn")} | {"b": jnp.zeros(4)}
    z, reference = jnp.ones((1, 3)), normal(7, (5, 3))
    score = pk.synflow if variant == "synflow" else functools.partial(pk.synflow_l2, variant=variant)
    sums = {k: float(v.sum()) for k, v in score(deep, w, z, gates="frozen", reference=reference).items()}
    q = 1 if variant == "synflow" else 2
    total = float(pk.paths.polynomial(frozen(deep, w, reference), {k: abs(v) ** q for k, v in w.items()}, z, q=q).sum())
    assert_close([sums[k] for k in "anc"], [total] * 3, 1e-10)
    assert sums["m"] == sums["b"] == 0


def test_pruning_warns_where_queries_and_keys_are_emptied():
    net, w, X, _, _ = problem("attention")
    with pytest.warns(pk.EmptiedLayerWarning, match="k, q"):
        pk.prune(lambda p: pk.synflow(net, p, jnp.ones_like(X[:1]), gates="frozen", reference=X), w, density=0.1)


def test_coefficients_of_several_references_are_averaged():
    w, X = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("abc")}, normal(3, (4, 3))
    mean = pk.paths.gates(mlp_gelu, w, X, gates="frozen")[0].mean(0, keepdims=True)
    got = pk.paths.polynomial(mlp_gelu, w, X[:1], q=1, gates="frozen", reference=X)
    assert_close(got, pk.paths.polynomial(mlp_gelu, w, X[:1], q=1, gates=[mean]), 1e-10)
    own = pk.paths.polynomial(mlp_gelu, w, X, q=1, gates="frozen")
    assert_close(own[2:3], pk.paths.polynomial(mlp_gelu, w, X[2:3], q=1, gates="frozen", reference=X[2:3]), 1e-10)


def test_masks_act_before_coefficients_are_taken():
    net, w, X, _, _ = problem("gelu")
    masks = jax.tree.map(jnp.ones_like, w) | {"a": jnp.arange(12).reshape(3, 4) % 3 > 0}
    masks = jax.tree.map(lambda m: m.astype(bool), masks)
    masked = {k: jnp.where(masks[k], v, 0) for k, v in w.items()}
    assert_close(path_sum(net, masked, X, gates=pk.paths.gates(net, w, X, masks=masks, gates="frozen")),
                 net(masked, X), 1e-10)
    # 8 of 12 edges in, 4 biases, 2 outputs
    assert_close(pk.paths.log_count(net, w, X[:1], masks=masks, gates="frozen"), np.log10(24), 1e-10)


def relu_net(w, x):
    return nn.relu(x.reshape(len(x), -1) @ w["a"] + w["b"]) @ w["c"]


def test_relu_networks_are_what_they_were():
    w, x = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("abc")}, normal(4, (1, 3))
    assert frozen(relu_net, w, x) is relu_net
    g = pk.paths.gates(relu_net, w, x)
    assert all(np.array_equal(a, b) for a, b in zip(g, pk.paths.gates(relu_net, w, x, gates="frozen"), strict=True))
    network = read(relu_net, w, x, paths=True)

    def walked(frozen):
        return str(jax.make_jaxpr(lambda w, x: interpret(Polynomial(2, None, False), network.fn, w, x, lambda _, v: v,
                                                         lambda v: v, frozen=frozen).value)(w, x))
    assert walked(False) == walked(True)


def test_frozen_relu_and_pooling_keep_their_operations():
    def net(w, x):
        h = nn.relu(nn.silu(x @ w["a"]))
        return jax.lax.reduce_max(h, (1,))[:, None] * w["b"]
    w, x = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("ab")}, normal(4, (1, 3))
    text = str(jax.make_jaxpr(frozen(net, w, x))(w, x))
    assert "custom_jvp_call[" in text
    assert "reduce_max" in text
    assert "logistic" not in text
    both = [pk.paths.polynomial(net, jax.tree.map(abs, w), abs(x), q=1, gates="frozen", reference=x, pool=pool)
            for pool in ("sum", "max")]
    assert (both[0] > both[1]).all()


def test_single_precision_and_compiled_calls_agree():
    net, w, X, _, _ = problem("attention")
    z = jnp.ones_like(X[:1])
    want = pk.synflow(net, w, z, gates="frozen", reference=X)
    inside = jax.jit(lambda w: pk.synflow(net, w, z, gates="frozen", reference=X))(w)
    single = jax.tree.map(lambda v: v.astype(jnp.float32), (w, z, X))
    narrow = pk.synflow(net, *single[:2], gates="frozen", reference=single[2])
    for k in w:
        assert_close(inside[k], want[k], 1e-10)
        assert narrow[k].dtype == jnp.float32
        np.testing.assert_allclose(narrow[k], want[k], 1e-4, 1e-4)
    assert_close(pk.paths.log_count(net, *single[:2], gates="frozen"), pk.paths.log_count(net, w, z, gates="frozen"))


def test_tokens_are_signals():
    def net(w, tokens):
        h = w["e"][tokens]
        p = nn.softmax(jnp.einsum("nid,njd->nij", h @ w["q"], h @ w["k"]))
        return (h + p @ nn.gelu(h @ w["v"])).mean(1) @ w["d"]
    w = {leaf: normal(i, SHAPES.get(leaf, (5, 3))) for i, leaf in enumerate("eqkvd")}
    tokens = jnp.array([[0, 3], [4, 4]])
    linear = frozen(net, w, tokens[:1])
    assert_close(linear(w, tokens[:1]), net(w, tokens[:1]), 1e-10)
    # each of 2 tokens: 3 entries to 2 outputs, and to 3·3 by 2 places through the values
    assert_close(pk.paths.log_count(net, w, tokens[:1], gates="frozen"), np.log10(2 * 3 * 2 + 2 * 2 * 9 * 2), 1e-10)


MASKED = {
    "chosen": lambda h, seen: jnp.where(seen > 0, h, 0).sum(1),
    "times a gate": lambda h, seen: (h * jax.lax.stop_gradient(seen)).sum(1),
    "mean": lambda h, seen: h.sum(1) / seen.sum(1),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_tokens_are_those_given_as_booleans_or_numbers(name):
    def pooled(w, h, seen):
        return MASKED[name](nn.gelu(h @ w["q"]), seen) @ w["d"]

    def looked_up(w, tokens):
        return pooled(w, w["e"][tokens], (tokens > 0)[..., None].astype(w["d"].dtype))
    w = {leaf: normal(i, shape) for i, (leaf, shape) in enumerate({"e": (5, 3), "q": (3, 2), "d": (2, 2)}.items())}
    tokens = jnp.array([[2, 4, 0]])
    trees = [{"h": w["e"][tokens], "seen": seen} for seen in (tokens > 0, (tokens > 0).astype(w["d"].dtype))]
    nets = [(looked_up, tokens), *((lambda w, x: pooled(w, x["h"], x["seen"][..., None].astype(w["d"].dtype)), x)
                                   for x in trees)]
    values = [frozen(net, w, x)(w, x) for net, x in nets]
    gradients = [jax.jacobian(frozen(net, w, x))(w, x) for net, x in nets]
    sums = [path_sum(net, w, x, gates=pk.paths.gates(net, w, x, gates="frozen")) for net, x in nets]
    for got in (*values, *sums):
        assert_close(got, nets[0][0](w, tokens), 1e-10)
    h, seen = w["e"][tokens] @ w["q"], (tokens > 0)[..., None].astype(w["d"].dtype)
    gate = nn.gelu(h) / h
    want = jax.jacobian(lambda q: MASKED[name](gate * (w["e"][tokens] @ q), seen) @ w["d"])(w["q"])
    for got in gradients:
        assert_close(got["q"], want, 1e-10, 1e-12)
    tokens_of = 2 if name == "times a gate" else 3      # a gate that chooses is open
    assert_close(pk.paths.log_count(looked_up, w, tokens, gates="frozen"), np.log10(tokens_of * 3 * 2 * 2), 1e-10)


def test_arguments_are_checked():
    net, w, X, _, _ = problem("gelu")
    with pytest.raises(ValueError, match="reference is the input"):
        pk.synflow(net, w, jnp.ones((1, 3)), reference=X)
    with pytest.raises(ValueError, match="reference must be an array"):
        pk.synflow(net, w, jnp.ones((1, 3)), gates="frozen", reference="images")
    for call in (pk.paths.gates, pk.paths.log_count, functools.partial(pk.paths.polynomial, q=1), pk.synflow):
        with pytest.raises(ValueError, match='gates must be None or "frozen"'):
            call(net, w, jnp.ones((1, 3)), gates="thawed")
    with pytest.raises((ValueError, TypeError), match="reference"):      # a TypeError where types are checked
        frozen(lambda w, x: net(w, x["a"]), w, {"a": X, "b": X[:1]})
    with pytest.raises(ValueError, match="gates must be None, \"frozen\" or a sequence of arrays"):
        pk.paths.polynomial(net, w, X[:1], q=1, gates=True)
    with pytest.raises(FloatingPointError, match="a coefficient is not finite"):
        frozen(lambda w, x: (x @ w["a"]) / (x @ w["a"]).std(-1, keepdims=True), w, jnp.zeros((1, 3)))


UNLIKE = {"another length": jnp.ones((1, 1, 3)), "whole numbers": jnp.ones((1, 2, 3), int),
          "a tree": {"x": jnp.ones((1, 2, 3))}}


@pytest.mark.parametrize("name", UNLIKE)
def test_reference_unlike_the_input_is_refused_by_name(name):
    def net(w, x):      # whose coefficients at one token fit two
        return (nn.silu(x @ w["a"]) @ w["c"]).sum(1)
    w, x = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("ac")}, jnp.ones((1, 2, 3))
    for call in (pk.synflow, pk.path_exclusion, pk.path_kernel.trace, functools.partial(pk.paths.polynomial, q=1)):
        with pytest.raises(ValueError, match="reference holds examples of"):
            call(net, w, x, gates="frozen", reference=UNLIKE[name])
    if name == "another length":
        with pytest.raises(ValueError, match="freeze the network at a reference like the input"):
            frozen(net, w, UNLIKE[name])(w, x)


def test_references_of_several_inputs_are_trees():
    def net(w, x):      # whose queries see only some of the keys
        logits = jnp.einsum("nid,njd->nij", x["to"] @ w["q"], x["of"] @ w["k"])
        logits = jnp.where(x["sees"][:, None] > 0, logits, -jnp.inf)
        return jnp.einsum("nij,njd->nid", nn.softmax(logits), x["of"] @ w["v"]).mean(1) @ w["d"]
    w = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("qkvd")}
    X = {"to": normal(7, (2, 1, 3)), "of": normal(8, (2, 2, 3)), "sees": jnp.array([[1.0, 1.0], [1.0, 0.0]])}
    one = jax.tree.map(lambda v: v[1:], X)
    linear = frozen(net, w, one)
    assert_close(linear(w, one), net(w, one), 1e-10)
    assert_close(jax.jacobian(linear)(w, one)["v"], jax.jacobian(net)(w, one)["v"], 1e-10)
    assert not np.any(jax.jacobian(linear)(w, one)["q"])
    shown = frozen(lambda w, x: net(w, x | {"sees": jnp.ones((len(x["to"]), 2))}), w, floats := {
        k: X[k] for k in ("to", "of")})
    # 2 keys, 3 entries, 3 values, 2 outputs
    one = jax.tree.map(lambda v: v[:1], floats)
    assert_close(pk.paths.log_count(shown, w, one), np.log10(2 * 3 * 3 * 2), 1e-10)


def test_choices_by_the_signal_are_frozen_too():
    def experts(w, x):
        chosen = jax.lax.top_k(nn.softmax(x @ w["a"]), 2)
        return (chosen[0][:, :, None] * w["c"][chosen[1]]).sum(1) + x @ w["a"][:, :2]
    w, X = {leaf: normal(i, SHAPES[leaf]) for i, leaf in enumerate("ac")}, normal(2, (2, 3))
    assert_close(path_sum(experts, w, X, gates=pk.paths.gates(experts, w, X, gates="frozen")), experts(w, X), 1e-10)
    with pytest.raises(ValueError, match="choices have no average"):
        frozen(experts, w, X)
    with pytest.raises(ValueError, match="differently for the examples of X"):
        pk.data_factor(experts, w, X, gates="frozen")
    (share,), x = jax.lax.top_k(nn.softmax(X[:1] @ w["a"]), 2)[0], X[0]      # paths by the two that are chosen, and on
    assert_close(pk.data_factor(experts, w, X[:1], gates="frozen"), jnp.full((2, 1, 1), share @ share + x @ x), 1e-10)
