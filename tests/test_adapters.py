"""Adapters hold against the modules' own evaluation and against hand-written arithmetic."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax.adapters as adapters
import pytest
from flax import nnx

from tests.cases import normal

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


def test_nnx_that_updates_state_or_has_no_parameters_is_refused():
    class Training(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(x, use_running_average=False)

    apply_fn, params = adapters.from_nnx(Training(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="use running averages"):
        apply_fn(params, normal(0, (5, 3), S))
    with pytest.raises(ValueError, match=r"has no nnx\.Param"):
        adapters.from_nnx(nnx.Dropout(0.5))
    with pytest.raises(TypeError, match=r"takes a flax\.nnx\.Module, got Dense"):
        adapters.from_nnx(nn.Dense(2))


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
