"""Adapters hold against the modules' own evaluation and against hand-written arithmetic."""

import contextlib
import functools
import gc
import importlib.util
import re
import subprocess
import sys
import weakref
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pkjax.adapters as adapters
import pytest
from flax import nnx
from pkjax.network import read

from tests.cases import checking_leaks, normal

D, S = jnp.float64, jnp.float32
F64 = {"param_dtype": D, "force_float32_reductions": False}


class ConvNet(nn.Module):
    flag: str = "train"

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(4, (3, 3), param_dtype=D)(x)
        x = nn.BatchNorm(use_running_average=not train, **F64)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, param_dtype=D)(x.reshape(x.shape[0], -1))


def renamed(flag):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, **flags):
            x = nn.BatchNorm(**F64)(nn.Dense(5, param_dtype=D)(x),
                                            use_running_average=flags[flag] == adapters._EVALUATION[flag])
            return nn.Dense(3, param_dtype=D)(nn.relu(x))

    namespace: dict = {}
    exec(f"def call(self, x, *, {flag}): return self.body(x, {flag}={flag})", namespace)
    Net.body = Net.__call__
    return type("Named", (Net,), {"__call__": namespace["call"]})


def perturbed(variables):
    """Running averages that are not 0 and 1, so that frozen and training mode differ."""
    stats = jax.tree.map(lambda v: v + jnp.abs(normal(1, v.shape, v.dtype)), variables["batch_stats"])
    return {**variables, "batch_stats": stats}


def test_linen_batchnorm_uses_running_averages_by_hand(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return nn.BatchNorm(use_running_average=not train, **F64, epsilon=1e-5)(x)

    x = normal(0, (6, 3), D)
    variables = perturbed(Net().init(key, x, train=False))
    apply_fn, params = adapters.from_linen(Net(), variables)
    mean, var = (variables["batch_stats"]["BatchNorm_0"][name] for name in ("mean", "var"))
    np.testing.assert_allclose(apply_fn(params, x), (x - mean) / np.sqrt(var + 1e-5), rtol=1e-12)


def test_linen_dense_is_its_matrix_product(key):
    x = normal(0, (5, 4), D)
    module = nn.Dense(3, param_dtype=D)
    apply_fn, params = adapters.from_linen(module, module.init(key, x))
    np.testing.assert_allclose(apply_fn(params, x), x @ params["kernel"] + params["bias"], rtol=1e-12)


def test_linen_conv_batchnorm_dropout_net_is_its_evaluation(key):
    x = normal(0, (5, 6, 6, 2), D)
    variables = perturbed(ConvNet().init({"params": key}, x, train=False))
    apply_fn, params = adapters.from_linen(ConvNet(), variables)
    np.testing.assert_array_equal(apply_fn(params, x), ConvNet().apply(variables, x, train=False))
    # examples do not see one another, as they would under batch statistics
    np.testing.assert_allclose(apply_fn(params, x)[:1], apply_fn(params, x[:1]), rtol=1e-12)
    assert jax.tree.structure(params) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize("flag", sorted(adapters._EVALUATION))
def test_linen_train_flag_is_found_under_every_name(key, flag):
    module = renamed(flag)()
    x = normal(0, (5, 4), D)
    off = {flag: adapters._EVALUATION[flag]}
    variables = perturbed(module.init(key, x, **off))
    apply_fn, params = adapters.from_linen(module, variables)
    np.testing.assert_array_equal(apply_fn(params, x), module.apply(variables, x, **off))
    trained, _ = module.apply(variables, x, **{flag: not off[flag]}, mutable=["batch_stats"])
    assert not np.allclose(trained, apply_fn(params, x))


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_linen_dropout_is_inert_and_unset_batchnorm_is_frozen(key, deterministic):
    def net(average, off):
        return nn.Sequential([nn.Dense(3, param_dtype=D), nn.BatchNorm(average, **F64),
                              nn.Dropout(0.9, deterministic=off), nn.relu, nn.Dense(2, param_dtype=D)])

    x = normal(0, (7, 4), D)
    variables = perturbed(net(True, True).init(key, x))
    apply_fn, params = adapters.from_linen(net(None, deterministic), variables)
    np.testing.assert_array_equal(apply_fn(params, x), net(True, True).apply(variables, x))


def test_linen_frozen_dict_and_grad_under_jit(key):
    from flax.core import freeze

    x = normal(0, (5, 4), D)
    module = nn.Dense(2, param_dtype=D)
    variables = module.init(key, x)
    apply_fn, params = adapters.from_linen(module, freeze(variables))
    assert type(params) is dict
    grads = jax.jit(jax.grad(lambda p: apply_fn(p, x).sum()))(params)
    np.testing.assert_allclose(grads["kernel"], np.tile(np.asarray(x).sum(0)[:, None], (1, 2)), rtol=1e-12)


def test_linen_without_params_collection_names_what_it_got(key):
    module = nn.Dense(2)
    variables = module.init(key, jnp.ones((1, 3), jnp.float32))
    with pytest.raises(ValueError, match=r"no collection 'params' \(it holds \['bias', 'kernel'\]\)"):
        adapters.from_linen(module, variables["params"])
    with pytest.raises(TypeError, match=r"takes a flax\.linen\.Module, got Linear; use pkjax\.from_nnx"):
        adapters.from_linen(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), variables)


def test_linen_that_updates_state_or_draws_randomly_is_refused(key):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, param_dtype=D)(x) + jax.random.normal(self.make_rng("noise"), (), D)

    x = normal(0, (4, 3), D)
    training = nn.Sequential([nn.Dense(2, param_dtype=D), nn.BatchNorm(False, **F64)])
    apply_fn, params = adapters.from_linen(training, training.init(key, x))
    with pytest.raises(ValueError, match="use running averages"):
        apply_fn(params, x)
    apply_fn, params = adapters.from_linen(Noisy(), Noisy().init({"params": key, "noise": key}, x))
    with pytest.raises(ValueError, match="draws random numbers"):
        apply_fn(params, x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(4 * 36, 8, rngs=rngs), nnx.relu,
                                   nnx.Linear(8, 3, rngs=rngs))

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.conv(x))))
        return self.head(x.reshape(x.shape[0], -1))


def test_nnx_net_is_its_evaluation_and_the_module_stays_as_it_was():
    x = normal(0, (5, 6, 6, 2), S)
    module = NnxNet(nnx.Rngs(0))
    module.norm.mean[...] = module.norm.mean[...] + 0.5
    before = jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngState)))
    apply_fn, params = adapters.from_nnx(module)
    out = jax.jit(apply_fn)(params, x)
    after = jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngState)))
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert module.norm.use_running_average is False
    assert module.drop.deterministic is False
    module.eval()
    np.testing.assert_allclose(out, module(x), rtol=2e-5)


def test_nnx_params_are_a_plain_tree_that_drives_the_network():
    x = normal(0, (5, 6, 6, 2), S)
    apply_fn, params = adapters.from_nnx(NnxNet(nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert type(params) is dict
    assert params["head"]["layers"][2]["kernel"].shape == (8, 3)
    silent = {**params, "head": {"layers": {**params["head"]["layers"], 2: jax.tree.map(
        jnp.zeros_like, params["head"]["layers"][2])}}}
    assert np.abs(apply_fn(params, x)).min() > 0
    np.testing.assert_array_equal(apply_fn(silent, x), np.zeros((5, 3)))
    grads = jax.grad(lambda p: apply_fn(p, x).sum())(params)
    np.testing.assert_allclose(grads["head"]["layers"][2]["bias"], [5, 5, 5], rtol=2e-5)


def test_nnx_train_flag_is_found():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x, *, training):
            return self.norm(x, use_running_average=not training)

    x = normal(0, (5, 3), S)
    apply_fn, params = adapters.from_nnx(Net(nnx.Rngs(0)))
    np.testing.assert_allclose(apply_fn(params, x), np.asarray(x) / np.sqrt(1 + 1e-5), rtol=2e-5)


def test_nnx_without_parameters_or_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"has no nnx\.Param"):
        adapters.from_nnx(nnx.Dropout(0.5))
    with pytest.raises(TypeError, match=r"takes a flax\.nnx\.Module, got Dense"):
        adapters.from_nnx(nn.Dense(2))


class Head(nnx.Module):
    """A linear layer behind a body, the call of which a test chooses."""

    def __init__(self, body, call, rngs):
        self.body, self.call, self.linear = body, call, nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.call(self, x)


class AskingHead(Head):
    def __call__(self, x, rngs):
        return self.call(self, x, rngs)


def headed(body, call, kind=Head):
    return adapters.from_nnx(kind(body, call, nnx.Rngs(0)))


def counted(self, x):
    self.body[...] = self.body[...] + 1
    return self.linear(x)


def test_nnx_modules_that_ask_for_rngs_are_given_some_of_which_nothing_may_depend():
    x = normal(0, (4, 3), S)
    apply_fn, params = headed(nnx.Dropout(0.5), lambda m, x, rngs: m.linear(m.body(x, rngs=rngs)), AskingHead)
    np.testing.assert_allclose(apply_fn(params, x), x @ params["linear"]["kernel"] + params["linear"]["bias"], 2e-5)
    noisy = lambda m, x, rngs: m.linear(x) + rngs.noise.normal((2,), S)  # noqa: E731
    for call in (noisy, lambda m, x, rngs: m.linear(m.body(x, deterministic=False, rngs=rngs))):
        apply_fn, params = headed(nnx.Dropout(0.5), call, AskingHead)
        with pytest.raises(ValueError, match=r"AskingHead draws random numbers .*\['default/count'\]"):
            apply_fn(params, x)


def test_nnx_state_that_the_output_does_not_depend_on_may_change():
    x = normal(0, (4, 3), S)
    apply_fn, params = headed(nnx.Variable(jnp.zeros((), S)), counted)
    np.testing.assert_allclose(apply_fn(params, x), x @ params["linear"]["kernel"] + params["linear"]["bias"], 2e-5)
    apply_fn, params = headed(nnx.Variable(jnp.zeros((), S)), lambda m, x: counted(m, x) * m.body[...])
    with pytest.raises(ValueError, match=r"Head updates \['body'\] when it evaluates, and its output depends on them"):
        apply_fn(params, x)
    apply_fn, params = headed(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), lambda m, x: m.linear(m.body(x, deterministic=False)))
    with pytest.raises(ValueError, match=r"draws random numbers .*body/rngs/count"):
        apply_fn(params, x)
    apply_fn, params = headed(nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
                              lambda m, x: m.linear(m.body(x, use_running_average=False)))
    with pytest.raises(ValueError, match=r"updates \['body/mean', 'body/var'\] .*BatchNorm.*use running averages"):
        apply_fn(params, x)


@pytest.mark.parametrize("cell", [nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell])
def test_nnx_recurrent_networks_are_the_loop_over_their_cell(cell):
    x = normal(0, (4, 5, 2), S)
    module = nnx.RNN(cell(2, 3, rngs=nnx.Rngs(0)))
    apply_fn, params = headed(module, lambda m, x: m.linear(m.body(x)[:, -1]))
    carry = jax.tree.map(jnp.zeros_like, module.cell.initialize_carry((4, 2), nnx.Rngs(0)))
    for t in range(5):
        carry, out = module.cell(carry, x[:, t])
    want = out @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(apply_fn(params, x), want, rtol=2e-5, atol=2e-6)


def test_nnx_recurrent_networks_of_random_carries_are_refused():
    cell = functools.partial(nnx.SimpleCell.initialize_carry, carry_init=nnx.initializers.normal())
    body = nnx.SimpleCell(3, 3, rngs=nnx.Rngs(0))
    apply_fn, params = headed(body, lambda m, x, rngs: m.linear(m.body(cell(m.body, x.shape, rngs), x)[1]), AskingHead)
    with pytest.raises(ValueError, match="draws random numbers"):
        apply_fn(params, normal(0, (4, 3), S))


# Equal functions are traced once


@contextlib.contextmanager
def tracings():
    """Count what JAX traces."""
    count = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def linen_net(shift=0.0):
    net = nn.Sequential([nn.Dense(4, param_dtype=D), nn.BatchNorm(**F64), nn.relu, nn.Dense(2, param_dtype=D)])
    dense = lambda n, m: {"kernel": normal(n, (n, m), D), "bias": normal(m, (m,), D)}  # noqa: E731
    variables = {"params": {"layers_0": dense(3, 4), "layers_1": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
                            "layers_3": dense(4, 2)},
                 "batch_stats": {"layers_1": {"mean": jnp.full(4, shift), "var": jnp.ones(4)}}}
    return net, variables


def nnx_net():
    r = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=r), nnx.BatchNorm(4, rngs=r), nnx.relu, nnx.Linear(4, 2, rngs=r))


def made(kind):
    """Two functions of one module, made apart, and one of other averages; parameters and an input."""
    x = jnp.abs(normal(0, (1, 3), D if kind == "linen" else S))
    if kind == "linen":
        (net, variables), others = linen_net(), linen_net(0.5)[1]["batch_stats"]
        (a, params), (b, _) = adapters.from_linen(net, variables), adapters.from_linen(net, variables)
        return a, b, adapters.from_linen(net, {**variables, "batch_stats": others})[0], params, x
    net = nnx_net()
    (a, params), (b, _) = adapters.from_nnx(net), adapters.from_nnx(net)
    net.layers[1].mean[...] = net.layers[1].mean[...] + 0.5
    return a, b, adapters.from_nnx(net)[0], params, x


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_functions_of_one_module_are_equal_and_other_averages_only_their_programs(kind):
    a, b, other, params, x = made(kind)
    assert a == b
    assert hash(a) == hash(b)
    assert a != other
    programs = [read(f, params, x).fn.program for f in (a, b, other)]
    assert programs[0] == programs[1] == programs[2]
    assert not np.allclose(read(a, params, x).fn(params, x), read(other, params, x).fn(params, x))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("call", [pk.paths.log_count, pk.ntk_trace], ids=["log_count", "ntk_trace"])
def test_an_equal_function_is_not_traced_again(kind, call):
    a, b, _, params, x = made(kind)
    first = call(a, params, x)
    with tracings() as count:
        second = call(b, params, x)
    assert not count
    assert first == second


def test_nothing_is_pinned_and_functions_of_nnx_modules_hold_no_parameters():
    a, b, other, params, x = made("nnx")
    leaf, mean = weakref.ref(params["layers"][0]["kernel"]), weakref.ref(jax.tree.leaves(a.constants)[0])
    pk.ntk_trace(a, params, x)
    del params
    gc.collect()
    assert leaf() is None
    held = weakref.ref(a)
    del a, b, other
    gc.collect()
    assert held() is None
    assert mean() is None


SLOPE = 1.0
TABLE = {"slope": [1.0]}


class Sloped(nn.Module):
    """A network that reads its slope wherever Python lets it."""

    slopes: list
    array: np.ndarray | None = None
    factor = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, param_dtype=D)(x) * self.slopes[0] * SLOPE * self.factor * TABLE["slope"][0]
        return self.by_function() * (x if self.array is None else x * self.array[0])

    def by_function(self):
        return helper()


def helper():
    return helper.__defaults__[0] if helper.__defaults__ else 1.0


def changes():
    def set_list(module, patch):
        module.slopes[0] = 3.0

    def set_field(module, patch):
        object.__setattr__(module, "slopes", [3.0])

    def set_array(module, patch):
        module.array[0] = 3.0

    def set_global(module, patch):
        patch.setattr(sys.modules[__name__], "SLOPE", 3.0)

    def set_inside_global(module, patch):
        patch.setitem(TABLE, "slope", [3.0])

    def set_class(module, patch):
        patch.setattr(Sloped, "factor", 3.0)

    def set_method(module, patch):
        patch.setattr(Sloped, "by_function", lambda self: 3.0)

    def set_defaults(module, patch):
        patch.setattr(helper, "__defaults__", (3.0,))

    return [set_list, set_field, set_array, set_global, set_inside_global, set_class, set_method, set_defaults]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_what_a_linen_module_reads_is_never_stale(change, monkeypatch):
    x = normal(0, (3, 4), D)
    module = Sloped([1.0], np.ones(2))
    apply_fn, params = adapters.from_linen(module, {"params": {"Dense_0": {
        "kernel": normal(1, (4, 2), D), "bias": normal(2, (2,), D)}}})
    hash(apply_fn)          # its fields have no hash
    assert apply_fn == adapters.from_linen(module, {"params": params})[0]
    first = pk.ntk_trace(apply_fn, params, x)
    with tracings() as count:
        pk.ntk_trace(apply_fn, params, x)
    assert not count
    change(module, monkeypatch)
    np.testing.assert_allclose(pk.ntk_trace(apply_fn, params, x), 9 * first, rtol=1e-12)


@pytest.mark.parametrize("numpy", [False, True])
def test_averages_that_change_in_place_are_never_stale(numpy):
    net, variables = linen_net()
    if numpy:
        variables = jax.tree.map(np.array, variables)
    apply_fn, params = adapters.from_linen(net, variables)
    x = normal(0, (3, 3), D)
    pk.ntk_trace(apply_fn, params, x)
    stats = variables["batch_stats"]["layers_1"]
    if numpy:
        stats["mean"][...] = 0.5
    else:
        stats["mean"] = jnp.full(4, 0.5)
    want = pk.ntk_trace(lambda p, x: adapters.from_linen(net, linen_net(0.5)[1])[0](p, x), params, x)
    np.testing.assert_allclose(pk.ntk_trace(apply_fn, params, x), want, rtol=1e-12)


def test_what_an_nnx_module_reads_is_never_stale(monkeypatch):
    factor = [1.0]
    apply_fn, params = headed(None, lambda m, x: m.linear(x) * factor[0] * SLOPE)
    x = normal(0, (3, 3), S)
    first = pk.ntk_trace(apply_fn, params, x)
    factor[0] = 3.0
    np.testing.assert_allclose(pk.ntk_trace(apply_fn, params, x), 9 * first, rtol=2e-5)
    monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0)
    np.testing.assert_allclose(pk.ntk_trace(apply_fn, params, x), 36 * first, rtol=2e-5)


def test_functions_made_inside_jit_leave_no_tracer():
    net, variables = linen_net()
    x = normal(0, (2, 3), D)

    @jax.jit
    def inside(variables):
        apply_fn, params = adapters.from_linen(net, variables)
        return pk.ntk_trace(apply_fn, params, x)

    with checking_leaks():
        got = inside(variables)
    np.testing.assert_allclose(got, pk.ntk_trace(*adapters.from_linen(net, variables), x), rtol=1e-12)


# Trees of inputs, other libraries


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        words = nn.Embed(5, 3, param_dtype=D)(x["tokens"]).sum(1)
        return nn.Dense(2, param_dtype=D)(nn.relu(words + nn.Dense(3, param_dtype=D)(x["age"])))


def test_linen_and_nnx_modules_take_trees_of_inputs(key):
    x = {"tokens": jnp.array([[0, 3], [3, 1], [4, 4]]), "age": normal(0, (3, 1), D)}
    apply_fn, params = adapters.from_linen(Pair(), Pair().init(key, x))
    for network in (read(apply_fn, params, x), read(apply_fn, params, x, paths=True)):
        np.testing.assert_allclose(network.over(params, network.batch(x)), apply_fn(params, x), rtol=1e-12)
    apply_fn, params = headed(None, lambda m, x: m.linear(x[0] + x[1]))
    assert apply_fn(params, (jnp.ones((2, 3), S), jnp.ones((2, 3), S))).shape == (2, 2)


CHECK = """
x = jnp.eye(4) + 0.5
out = lambda p: apply_fn(p, x)
want = sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.jacrev(out)(params)))
assert abs(pk.ntk_trace(apply_fn, params, x) - want) < 1e-4 * want
some = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
dense = sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.jacrev(out)(params)) if leaf.ndim > 3)
assert abs(pk.ntk_trace(apply_fn, params, x, trainable=some) - dense) < 1e-4 * want
masks = pk.prune(lambda p: pk.magnitude(p), params, density=0.9).masks
assert pk.paths.log_count(apply_fn, params, x[:1], masks=masks) < pk.paths.log_count(apply_fn, params, x[:1])
"""


@pytest.mark.parametrize(("package", "module", "count"), [("Equinox", "equinox", 2), ("Haiku", "haiku", 1)])
def test_the_lines_of_the_guide_make_networks_of_other_libraries(package, module, count):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "guides" / "networks.md").read_text()
    section = re.search(rf"^## {package}\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)[1]
    blocks = re.findall(r"^```py\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert len(blocks) == count
    code = "import jax\nimport jax.numpy as jnp\nimport pkjax as pk\n" + "".join(block + CHECK for block in blocks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_inputs():
    ones = adapters.ones_input((4, 3))
    assert ones.shape == (1, 4, 3)
    assert ones.dtype == jnp.float32
    assert float(ones.sum()) == 12
    X = np.array([[1.0, -3.0], [2.0, 1.0]])
    np.testing.assert_array_equal(adapters.mean_input(X, absolute=True), [[1.5, 1.0]])
    np.testing.assert_array_equal(adapters.mean_input(np.abs(X)), [[1.5, 2.0]])
    with pytest.raises(ValueError, match=r"negative in 1 of 2 entries.*raw images, or absolute=True"):
        adapters.mean_input(X)
    with pytest.raises(ValueError, match="at least one example"):
        adapters.mean_input(np.ones((0, 2)))
    np.testing.assert_array_equal(jax.jit(adapters.mean_input)(X), [[1.5, -1.0]])
    tree = adapters.mean_input({"a": X, "b": np.array([[1], [2]], np.uint8)}, absolute=True)
    np.testing.assert_array_equal(tree["a"], [[1.5, 1.0]])
    np.testing.assert_array_equal(tree["b"], [[1.5]])
    with pytest.raises(ValueError, match=r"the mean of X's 'a' is negative"):
        adapters.mean_input({"a": X})
    with pytest.raises(ValueError, match=r"one such N, got shape \[\(2, 2\), \(3,\)\]"):
        adapters.mean_input((X, np.ones(3)))
    with pytest.raises(ValueError, match="takes real numbers, but X holds complex128"):
        adapters.mean_input(np.ones((2, 2), np.complex128))
    assert adapters.ones_input((), jnp.int32).dtype == jnp.int32
    assert [x.shape for x in adapters.ones_input([(2, 3), ()])] == [(1, 2, 3), (1,)]
    for wrong in (3, (2.0, 3), (-1,), {"a": "b"}):
        with pytest.raises(ValueError, match="takes the shape of one example"):
            adapters.ones_input(wrong)
    for dtype in (bool, complex):
        with pytest.raises(ValueError, match="a type of real numbers, got"):
            adapters.ones_input((2,), dtype)
