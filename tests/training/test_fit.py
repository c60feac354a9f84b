"""Recipes are the paper's, pruned weights stay exactly 0, interruptions change nothing, Flax of both kinds trains."""

import dataclasses
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest
from flax import nnx
from pkjax.linalg import memory
from pkjax.training import loops
from pkjax.training.augmentation import crop_and_flip
from pkjax.training.fit import Recipe, fit, recipe, restore

SHORT = Recipe(learning_rate=0.01, epochs=3, batch_size=32)


@pytest.fixture(scope="module")
def digits():
    return pk.data.load("digits", samples=203), pk.data.load("digits", split="test", samples=77)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def flatten(masks):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(masks)])


def pruned(module, digits, key):
    params = module.init(key, digits[0].images[:1])["params"]
    return pk.prune(pk.magnitude, params, compression=0.5).masks


@pytest.mark.parametrize(("model", "data", "rate", "epochs", "drops"), [
    ("fc-100", "mnist", 0.01, 50, ()), ("fc-2000", "cifar10", 0.001, 100, (60,)),
    ("fc-500", "cifar100", 0.001, 100, (60,)), ("resnet20", "cifar10", 0.001, 100, (60,)),
    ("wide_resnet20", "cifar100", 0.001, 100, (60,)), ("vgg11", "cifar10", 0.001, 160, (60, 120)),
    ("vgg16", "cifar100", 0.0005, 160, (60, 120))])
def test_recipes_are_tables_1_and_2(model, data, rate, epochs, drops):
    found = recipe(model, data)
    assert (found.learning_rate, found.epochs, found.drops) == (rate, epochs, drops)
    assert (found.batch_size, found.drop_factor, found.weight_decay) == (64, 0.1, 1e-4)
    assert found.augment == data.startswith("cifar")


@pytest.mark.parametrize(("given", "message"), [
    ({"learning_rate": 0.0}, "learning_rate must be positive"), ({"epochs": 0}, "epochs must be at least 1"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0"), ({"drops": (0,)}, "counted from 1")])
def test_recipes_that_train_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**given)


class Norm(nn.Module):
    """A small network with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (3, 3), use_bias=False)(x)    # a bias would have no gradient but rounding
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def by_hand(digits, masks, key, *, seed, how):
    """The same training by a loop over batches, with optax alone and masks as products."""
    module, (train, test) = Norm(), digits
    variables = module.init(key, train.images[:1])
    params, state = jax.tree.map(jnp.multiply, variables["params"], masks), variables["batch_stats"]
    steps = len(train) // how.batch_size
    rate = optax.piecewise_constant_schedule(how.learning_rate, {d * steps: how.drop_factor for d in how.drops})
    tx = optax.chain(optax.add_decayed_weights(how.weight_decay), optax.adam(rate))
    inner = tx.init(params)

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, state, x, y):
        logits, new = module.apply({"params": params, "batch_stats": state}, x, train=True, mutable=["batch_stats"])
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        return -right.mean(), (new["batch_stats"], logits)

    rows, slopes, update = [], jax.jit(loss), jax.jit(tx.update)
    for epoch in range(1, how.epochs + 1):
        shuffle, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch))
        order = np.asarray(jax.random.permutation(shuffle, len(train)))
        losses = []
        for i in range(steps):
            chosen = order[i * how.batch_size:(i + 1) * how.batch_size]
            (value, (state, _)), slope = slopes(params, state, train.images[chosen], train.labels[chosen])
            slope = jax.tree.map(jnp.multiply, slope, masks)
            updates, inner = update(slope, inner, params)
            params = jax.tree.map(jnp.multiply, optax.apply_updates(params, updates), masks)
            losses.append(float(value))
        logits = module.apply({"params": params, "batch_stats": state}, test.images)
        rows.append((np.mean(losses), float((logits.argmax(1) == test.labels).mean())))
    return params, state, rows


def test_fit_is_a_plain_loop_over_batches(digits, key):
    masks = pruned(Norm(), digits, key)
    how = dataclasses.replace(SHORT, drops=(2,))
    with jax.numpy_dtype_promotion("standard"):
        params, state, rows = by_hand(digits, masks, key, seed=5, how=how)
        variables = Norm().init(key, digits[0].images[:1])
    found = fit(Norm(), *digits, recipe=how, variables=variables, masks=masks, seed=5)
    for a, b in zip(jax.tree.leaves((found.params, found.state["batch_stats"])), jax.tree.leaves((params, state)),
                    strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    assert [row["epoch"] for row in found.history] == [0, 1, 2, 3]
    np.testing.assert_allclose([row["train_loss"] for row in found.history[1:]], [row[0] for row in rows], rtol=1e-3)
    np.testing.assert_allclose([row["test_accuracy"] for row in found.history[1:]], [row[1] for row in rows], atol=0.03)
    np.testing.assert_allclose([row["learning_rate"] for row in found.history[1:]], [0.01, 0.01, 0.001])
    assert found.finished
    assert found.accuracy == found.history[-1]["test_accuracy"]


class Convolution(nn.Module):
    """A small network with a convolution, BatchNorm and Dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)     # the gradient of a bias would be rounding alone
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1)))


def test_a_call_for_each_batch_trains_as_one_program_does(digits, monkeypatch):
    done = {}
    for apart in (True, False):
        monkeypatch.setattr(sys.modules[fit.__module__], "one_by_one", lambda params, apart=apart: apart)
        done[apart] = fit(Convolution(), *digits, recipe=dataclasses.replace(SHORT, augment=True), seed=1)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *((d.params, d.state)
                                                                           for d in done.values()))
    for one, other in zip(*(d.history for d in done.values()), strict=True):
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=0.02)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)


def test_networks_with_convolutions_take_a_call_for_each_batch_on_a_processor(monkeypatch):
    kernels = {"conv": jnp.ones((3, 3, 1, 2)), "dense": jnp.ones((2, 2))}
    dense = {"dense": kernels["dense"]}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert (loops.one_by_one(kernels), loops.one_by_one(dense)) == (True, False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not loops.one_by_one(kernels)


def test_fewer_examples_are_evaluated_at_a_time_where_memory_is_short(monkeypatch):
    wide = {"k": jnp.ones((1, 1, 1, 1000))}

    def network(params, x):
        y = jax.jit(lambda x: jax.lax.conv(x, jnp.ones((1000, 1, 1, 1), x.dtype), (1, 1), "SAME"))(x)
        return y.mean((2, 3))

    x = jnp.ones((1, 1, 10, 10))
    assert loops.examples_at_once(network, wide, x, most=500) == 500
    monkeypatch.setattr(memory, "default_memory_limit", lambda devices=1: 16 * 4 * 100_000 * 7)
    assert loops.examples_at_once(network, wide, x, most=500) == 7
    monkeypatch.setattr(memory, "default_memory_limit", lambda devices=1: 1)
    assert loops.examples_at_once(network, wide, x, most=500) == 1


def test_a_pruned_trained_saved_and_restored_network_has_exactly_the_masked_zeros(digits, key, tmp_path):
    module = pk.models.fc(20, 2)
    masks = pruned(module, digits, key)
    found = fit(module, *digits, recipe=SHORT, masks=masks, checkpoint=tmp_path / "run")
    back = restore(tmp_path / "run")
    assert same(back.params, found.params)
    assert same(back.masks, masks)
    for leaf, mask in zip(jax.tree.leaves(back.params), jax.tree.leaves(masks), strict=True):
        leaf, mask = np.asarray(leaf), np.asarray(mask)
        assert not leaf[~mask].any()
        assert not np.signbit(leaf[~mask]).any()
        if leaf.ndim > 1:
            assert leaf[mask].all()
    assert list(back.history) == list(found.history)
    assert back.finished


def test_an_interrupted_training_ends_where_an_undisturbed_one_does(digits, tmp_path):
    how = dataclasses.replace(SHORT, augment=True, epochs=4)
    whole = fit(Norm(), *digits, recipe=how, seed=3)
    part = fit(Norm(), *digits, recipe=how, seed=3, checkpoint=tmp_path / "run", epochs=2)
    assert not part.finished
    lines = []
    rest = fit(Norm(), *digits, recipe=how, seed=3, checkpoint=tmp_path / "run", progress=lines.append)
    assert same((rest.params, rest.state), (whole.params, whole.state))
    assert len(lines) == 2
    assert lines[-1].startswith("epoch 4 of 4: test accuracy ")
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (rest, whole)]
    assert timeless[0] == timeless[1]
    again = fit(Norm(), *digits, recipe=how, seed=3, checkpoint=tmp_path / "run")    # nothing is left to do
    assert same(again.params, whole.params)


def test_a_checkpoint_of_another_training_is_refused(digits, key, tmp_path):
    module = pk.models.fc(8, 1)
    fit(module, *digits, recipe=SHORT, checkpoint=tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"another training, with learning_rate 0.01, not 0.1: use the same settings"):
        fit(module, *digits, recipe=dataclasses.replace(SHORT, learning_rate=0.1), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="with other initial parameters; other masks: use"):
        fit(module, *digits, recipe=SHORT, masks=pruned(module, digits, key), checkpoint=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        restore(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        restore(tmp_path / "empty")


def test_training_takes_nnx_modules_and_leaves_them_as_they_were(digits):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 12, rngs=rngs)
            self.norm = nnx.BatchNorm(12, rngs=rngs)
            self.last = nnx.Linear(12, 10, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1)))))

    with jax.numpy_dtype_promotion("standard"):
        model = Net(nnx.Rngs(0))
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
        _, params = pk.from_nnx(model)
        masks = pk.prune(pk.magnitude, params, density=0.5, prunable=lambda path, leaf: leaf.ndim == 2).masks
        found = fit(model, *digits, recipe=dataclasses.replace(SHORT, epochs=12), masks=masks)
    assert same(before, nnx.to_pure_dict(nnx.state(model)))
    assert found.accuracy > 0.5
    assert np.abs(np.asarray(jax.tree.leaves(found.state)[0])).max() > 0      # running averages moved
    zero = [np.asarray(p)[~np.asarray(m)] for p, m in zip(jax.tree.leaves(found.params), jax.tree.leaves(masks),
                                                          strict=True)]
    assert sum(z.size for z in zero) > 100
    assert not any(z.any() for z in zero)
    example = pk.models.nnx_fc(64, 10, 2, rngs=nnx.Rngs(1))
    assert fit(example, *digits, recipe=dataclasses.replace(SHORT, epochs=8)).accuracy > 0.4


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(digits, tmp_path):
    module = pk.models.fc(8, 1)
    with pytest.raises(FloatingPointError, match=r"training loss is (nan|inf) in epoch \d: lower the learning rate"):
        fit(module, *digits, recipe=Recipe(learning_rate=1e30, epochs=6, batch_size=16), checkpoint=tmp_path / "run",
            save_seconds=0.0)


def test_dropout_draws_new_numbers_every_step(digits):
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
            return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))

    runs = [fit(Dropped(), *digits, recipe=SHORT, seed=seed) for seed in (0, 0, 1)]
    assert same(runs[0].params, runs[1].params)
    assert not same(runs[0].params, runs[2].params)


def test_anything_but_a_flax_module_is_refused(digits):
    with pytest.raises(TypeError, match="a Linen or NNX module, got function"):
        fit(lambda x: x, *digits, recipe=SHORT)
    with pytest.raises(ValueError, match="holds its own variables"):
        fit(pk.models.nnx_fc(64, 4, 1, rngs=nnx.Rngs(0)), *digits, recipe=SHORT, variables={"params": {}})


def test_augmentation_shifts_and_mirrors_evenly(key):
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 2] = 7
    many = np.asarray(crop_and_flip(key, jnp.asarray(np.repeat(image, 4000, axis=0)), padding=2))
    assert many.dtype == np.uint8
    assert (many.reshape(4000, -1).sum(1) == 7).all()            # the point is never lost within the padding
    rows, columns = np.argwhere(many[..., 0])[:, 1:].T
    assert set(rows) == set(range(2, 7))
    assert set(columns) == set(range(5)) | set(range(4, 9))      # 2 ± 2, and mirrored 6 ± 2
    counts = np.bincount(rows, minlength=9)[2:7]
    assert (np.abs(counts - 800) < 4 * np.sqrt(800)).all()
    assert abs((columns < 4).sum() + (columns == 4).sum() / 2 - 2000) < 4 * np.sqrt(1000)
    shifted = np.asarray(crop_and_flip(key, jnp.ones((50, 4, 4, 1), jnp.float32)))
    assert shifted.min() == 0                                     # black comes in from outside
