"""Running averages are NumPy's mean and variance of what each layer sees, for Linen and NNX, and nothing else moves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from flax import nnx
from pkjax.training import warm_batch_norm

X = np.random.default_rng(0).normal(1.0, 3.0, (24, 5)).astype(np.float32)
SPLIT = [X[:6], X[6:16], X[16:]]
EPSILON = 1e-5


class Linen(nn.Module):
    """Two norms, of which the second sees what the first made, and one that is frozen."""

    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="first")(x)
        x = nn.relu(nn.Dense(4, name="dense")(x))
        x = nn.BatchNorm(use_running_average=True, name="frozen")(nn.Dropout(0.0)(x, deterministic=not train))
        return nn.BatchNorm(use_running_average=not train, name="second")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)
        self.second = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.drop(nnx.relu(self.dense(self.first(x)))))


def numpy_averages(kernel, bias, batches, frozen=lambda y: y):
    """Means and variances of both layers, over batches by their sizes."""
    rows = []
    for x in batches:
        x = x.astype(np.float64)
        y = frozen(np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) @ kernel + bias, 0))
        rows.append((len(x), x.mean(0), x.var(0), y.mean(0), y.var(0)))
    sizes = np.array([row[0] for row in rows]) / sum(row[0] for row in rows)
    return [sum(s * row[i] for s, row in zip(sizes, rows, strict=True)) for i in range(1, 5)]


@pytest.fixture(scope="module")
def variables():
    variables = Linen().init(jax.random.key(0), X)
    stats = jax.tree.map(lambda v: v + 0.25, variables["batch_stats"])
    return {**variables, "batch_stats": stats}


@pytest.mark.parametrize(("batches", "momentum"), [([X], 0.99), ([X], 0.5), (SPLIT, 0.9)])
def test_linen_averages_are_numpys(variables, batches, momentum):
    found = warm_batch_norm(Linen(momentum), X if len(batches) == 1 else iter(batches), variables=variables)
    dense = variables["params"]["dense"]
    want = numpy_averages(np.asarray(dense["kernel"], np.float64), np.asarray(dense["bias"]), batches,
                          lambda y: (y - 0.25) / np.sqrt(1.25 + EPSILON))
    got = [found["batch_stats"][layer][kind] for layer in ("first", "second") for kind in ("mean", "var")]
    # 1 − 0.99 is known to 6e-6 in float32.
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-5)
    frozen, before = found["batch_stats"]["frozen"], variables["batch_stats"]["frozen"]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])


def test_nnx_averages_are_numpys_and_the_module_stays_as_it_was():
    model = Nnx(nnx.Rngs(1))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    found = warm_batch_norm(model, SPLIT)
    want = numpy_averages(np.asarray(model.dense.kernel[...], np.float64), np.asarray(model.dense.bias[...]), SPLIT)
    got = [v[...] for v in (found.first.mean, found.first.var, found.second.mean, found.second.var)]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)
    jax.tree.map(np.testing.assert_array_equal, pk.from_nnx(found)[1], pk.from_nnx(model)[1])


def test_the_networks_of_one_batch_agree_in_training_and_evaluation(variables):
    masks = {"dense": {"kernel": np.arange(20).reshape(5, 4) % 3 > 0, "bias": np.ones(4, bool)},
             **{name: jax.tree.map(lambda v: np.ones(v.shape, bool), variables["params"][name])
                for name in ("first", "frozen", "second")}}
    found = warm_batch_norm(Linen(), X, variables=variables, masks=masks)
    params = pk.apply_masks(variables["params"], masks)
    apply_fn, _ = pk.from_linen(Linen(), found)
    trained, _ = Linen().apply({**found, "params": params}, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(apply_fn(params, jnp.asarray(X)), trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("module", "given", "X", "message"), [
    (pk.models.fc(3, 1), {"params": {"Dense_0": {"kernel": np.ones((5, 3), np.float32)}}}, X,
     "FC has no running averages of BatchNorm to set"),
    (Linen(), None, X, r"needs its variables: pass variables=module.init\(key, x\)"),
    (Linen(), {"params": {}}, [], "X holds no batch"),
    (Linen(), {"params": {}}, X * np.nan, "hold")])
def test_bad_input_is_named(module, given, X, message):
    with pytest.raises(ValueError, match=message):
        warm_batch_norm(module, X, variables=given)


def test_averages_that_no_momentum_explains_are_refused():
    class Squares(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            mean = self.variable("batch_stats", "mean", lambda: jnp.ones(5, jnp.float32))
            if train:
                mean.value = mean.value**2 + x.mean(0)
            return x - mean.value + nn.Dense(5)(x)

    variables = Squares().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="'mean' are not updated as m · old"):
        warm_batch_norm(Squares(), X, variables=variables)
