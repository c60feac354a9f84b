"""Networks that train together end where each ends alone; what befalls one of them is its own affair."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from flax import nnx
from pkjax.linalg import memory
from pkjax.training import together as module_of
from pkjax.training import trainer
from pkjax.training.fit import Recipe, fit, restore
from pkjax.training.together import fit_together

SHORT = Recipe(learning_rate=0.01, epochs=2, batch_size=32)
SEEDS = (3, 0, 7)


class Small(nn.Module):
    """A network with BatchNorm and Dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))     # BatchNorm first would leave slopes of rounding alone
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))


@pytest.fixture(scope="module")
def digits():
    return pk.data.load("digits", samples=100), pk.data.load("digits", split="test", samples=41)


@pytest.fixture(autouse=True)
def _one_batch(monkeypatch):
    """Train all networks in one batch, however many cores there are."""
    monkeypatch.setattr(module_of, "_cores", lambda: 1)


def starts(module, data):
    """Variables of each seed, and masks of different densities that are not those of one another."""
    variables = [module.init(jax.random.key(seed), data.images[:1]) for seed in SEEDS]
    masks = [pk.prune(pk.magnitude, each["params"], density=density).masks
             for each, density in zip(variables, (0.5, 1.0, 0.25), strict=True)]
    return variables, masks


def measure(params, state):
    leaves = jax.tree.leaves((params, state))
    return {"norm": jnp.sqrt(sum((leaf**2).sum() for leaf in leaves))}


def close(together, alone, tolerance=1e-4):
    """Whether results are the same but for rounding; masked weights, exactly."""
    tree = ((together.params, together.state), (alone.params, alone.state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), *tree)
    for leaf, mask in zip(jax.tree.leaves(together.params), jax.tree.leaves(together.masks), strict=True):
        assert not np.asarray(leaf)[~np.asarray(mask)].any()
    assert len(together.history) == len(alone.history)
    for row, want in zip(together.history, alone.history, strict=True):
        assert list(row) == list(want)
        for name in set(row) - {"seconds"}:
            assert row[name] == pytest.approx(want[name], rel=tolerance, abs=tolerance), name
    assert (together.finished, together.error) == (alone.finished, alone.error)


@pytest.fixture(scope="module")
def alone(digits):
    """What each network comes to by itself."""
    how = dataclasses.replace(SHORT, augment=True, drops=(1,))
    variables, masks = starts(Small(), digits[0])
    given = dict(recipe=how, measure=measure)
    return given, variables, masks, [fit(Small(), *digits, variables=v, masks=m, seed=seed, **given)
                                     for v, m, seed in zip(variables, masks, SEEDS, strict=True)]


def test_networks_that_train_together_end_where_each_ends_alone(digits, alone):
    given, variables, masks, want = alone
    lines = []
    results = fit_together(Small(), *digits, seeds=SEEDS, variables=variables, masks=masks, progress=lines.append,
                           **given)
    for one, other in zip(results, want, strict=True):
        close(one, other)
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2 of 2: test accuracy ")
    assert lines[1].endswith(" %, 3 networks")
    without = fit_together(Small(), *digits, recipe=SHORT, seeds=SEEDS[:2], epochs=1)      # initialised by the seeds
    close(without[1], fit(Small(), *digits, recipe=SHORT, seed=SEEDS[1], epochs=1))


def test_every_network_sees_its_own_examples(alone):
    given, variables, masks, _ = alone
    sets = [(pk.data.load("digits", samples=70, seed=seed), pk.data.load("digits", split="test", samples=30, seed=seed))
            for seed in (1, 2)]
    sets.append(sets[0])
    results = fit_together(Small(), *zip(*sets, strict=True), seeds=SEEDS, variables=variables, masks=masks, **given)
    for i, result in enumerate(results):
        close(result, fit(Small(), *sets[i], variables=variables[i], masks=masks[i], seed=SEEDS[i], **given))
    with pytest.raises(ValueError, match="the train sets of networks that train together have one size"):
        fit_together(Small(), [sets[0][0], pk.data.load("digits", samples=71)], sets[0][1], recipe=SHORT, seeds=(0, 1))


def test_batches_are_as_small_as_memory_and_cache_ask_and_change_nothing(digits, alone, monkeypatch):
    given, variables, masks, want = alone
    given = {**given, "seeds": SEEDS, "variables": variables, "masks": masks}
    sizes, train = [], trainer.Trainer.train
    monkeypatch.setattr(trainer.Trainer, "train", lambda self, members, apart: (
        sizes.append(len(members)), train(self, members, apart))[1])
    for name, value, parts in (("_cores", lambda: 2, [1, 2]), ("CACHE", 1, [1, 1, 1])):
        with monkeypatch.context() as patch:
            patch.setattr(module_of, name, value)
            for one, other in zip(fit_together(Small(), *digits, **given), want, strict=True):
                close(one, other)
        assert sorted(sizes) == parts
        sizes.clear()
    monkeypatch.setattr(memory, "default_memory_limit", lambda devices=1: 1)
    fit_together(Small(), *digits, **{**given, "epochs": 1})
    assert sizes == [1, 1, 1]


def test_convolutions_train_one_by_one_on_a_processor_and_together_elsewhere(digits, monkeypatch):
    class Convolution(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(2, (3, 3), strides=4, use_bias=False)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    sizes, train = [], trainer.Trainer.train
    monkeypatch.setattr(trainer.Trainer, "train", lambda self, members, apart: (
        sizes.append(len(members)), train(self, members, apart))[1])
    given = {"recipe": SHORT, "seeds": SEEDS[:2], "epochs": 1}
    results = fit_together(Convolution(), *digits, **given)
    assert sizes == [1, 1]
    monkeypatch.setattr(module_of, "one_by_one", lambda params: False)      # as on an accelerator
    for one, other in zip(fit_together(Convolution(), *digits, **given), results, strict=True):
        close(one, other)
    assert sizes == [1, 1, 2]


def test_a_network_that_diverges_stops_alone(digits, tmp_path):
    module = pk.models.fc(6, 1)
    variables = [module.init(jax.random.key(seed), digits[0].images[:1]) for seed in SEEDS]
    variables[1] = jax.tree.map(lambda leaf: leaf * jnp.finfo(leaf.dtype).max, variables[1])
    folders = [tmp_path / str(seed) for seed in SEEDS]
    given = {"recipe": SHORT, "seeds": SEEDS, "variables": variables}
    results = fit_together(module, *digits, **given, checkpoint=folders, save_seconds=0.0)
    assert results[1].error.startswith("the training loss is ")
    assert " in epoch 1: lower the learning rate (0.01)" in results[1].error
    assert not results[1].finished
    assert len(results[1].history) == 1
    for i in (0, 2):
        close(results[i], fit(module, *digits, recipe=SHORT, seed=SEEDS[i], variables=variables[i]))
    assert [(folder / "manifest.json").exists() for folder in folders] == [True, False, True]
    with pytest.raises(FloatingPointError, match="the training loss is"):
        fit(module, *digits, recipe=SHORT, seed=SEEDS[1], variables=variables[1])


def test_checkpoints_are_those_of_single_trainings_and_may_stand_at_different_epochs(digits, alone, tmp_path):
    given, variables, masks, want = alone
    folders = [tmp_path / str(seed) for seed in SEEDS]
    given = {**given, "save_seconds": 0.0}
    for i, epochs in ((0, 1), (1, 2)):      # the third has none
        fit(Small(), *digits, seed=SEEDS[i], variables=variables[i], masks=masks[i], checkpoint=folders[i],
            epochs=epochs, **given)
    many = {**given, "seeds": SEEDS, "variables": variables, "masks": masks, "checkpoint": folders}
    part = fit_together(Small(), *digits, **many, epochs=1)
    assert [len(each.history) for each in part] == [2, 3, 2]
    assert len(restore(folders[2]).history) == 2
    for one, other in zip(fit_together(Small(), *digits, **many), want, strict=True):
        close(one, other)
    lines = []
    again = fit(Small(), *digits, seed=SEEDS[2], variables=variables[2], masks=masks[2], checkpoint=folders[2],
                progress=lines.append, **given)
    close(again, want[2])
    assert not lines                        # nothing was left to do
    with pytest.raises(pk.training.checkpoints.CheckpointError, match="another training, with seed 7, not 8"):
        fit_together(Small(), *digits, **{**many, "seeds": (3, 0, 8)})
    with pytest.raises(pk.training.checkpoints.CheckpointError, match=r"with other measurements, norm .* not nothing"):
        fit_together(Small(), *digits, **{**many, "measure": None})


def test_the_last_epoch_may_go_without_checkpoints(digits, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    fit_together(pk.models.fc(4, 1), *digits, recipe=SHORT, seeds=(0, 1), checkpoint=folders, save_last=False)
    assert not any((folder / "manifest.json").exists() for folder in folders)


def test_measurements_that_need_something_of_each_network_are_one_program(digits):
    traced = []

    @jax.jit
    def distance(params, state, start):
        traced.append(1)
        return {"moved": sum(jnp.abs(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (params, start)), strict=True))}

    module = pk.models.fc(4, 1)
    variables = [module.init(jax.random.key(seed), digits[0].images[:1]) for seed in SEEDS]
    given = {"recipe": SHORT, "seeds": SEEDS, "variables": variables, "measure": distance}
    results = fit_together(module, *digits, **given, about=[each["params"] for each in variables])
    for result, each in zip(results, variables, strict=True):
        assert result.history[0]["moved"] == 0
        assert result.history[2]["moved"] == pytest.approx(float(distance(result.params, {}, each["params"])["moved"]))
    assert len(traced) <= 2


def test_nnx_modules_and_keys_of_another_kind_train_too(digits):
    model = pk.models.nnx_fc(64, 4, 1, rngs=nnx.Rngs(0))
    for one, seed in zip(fit_together(model, *digits, recipe=SHORT, seeds=(0, 5), epochs=1), (0, 5), strict=True):
        close(one, fit(model, *digits, recipe=SHORT, seed=seed, epochs=1))
    with jax.default_prng_impl("rbg"):      # whose numbers depend on the batch
        results = fit_together(Small(), *digits, recipe=SHORT, seeds=(0, 5), epochs=1)
        close(results[1], fit(Small(), *digits, recipe=SHORT, seed=5, epochs=1))


@pytest.mark.parametrize(("given", "message"), [
    ({"seeds": ()}, "seeds must hold a seed for each network, got none"),
    ({"masks": [None]}, "masks must be a sequence with a value for each of the 2 seeds, got 1"),
    ({"checkpoint": "run"}, "checkpoint must be a sequence with a value for each of the 2 seeds, got str")])
def test_arguments_that_are_not_one_for_each_network_are_refused(digits, given, message):
    with pytest.raises(ValueError, match=message):
        fit_together(Small(), *digits, **{"recipe": SHORT, "seeds": (0, 1), **given})


def test_an_error_in_one_batch_ends_the_others(digits, monkeypatch):
    monkeypatch.setattr(module_of, "_cores", lambda: 2)

    def fails(line):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fit_together(pk.models.fc(4, 1), *digits, recipe=dataclasses.replace(SHORT, epochs=10**6), seeds=(0, 1),
                     progress=fails)
    assert time.monotonic() - began < 60
