"""A checkpoint continues the training that wrote it and no other, and a damaged one is never read."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
import pytest
from flax import nnx
from pkjax.training import checkpoints
from pkjax.training.fit import Recipe, fit, restore
from pkjax.training.identity import digest, module_fields, program_digest

RECIPE = Recipe(learning_rate=0.01, epochs=2, batch_size=16)
DATA = tuple(pk.data.load("digits", split=split, samples=n) for split, n in (("train", 32), ("test", 16)))


class Net(nn.Module):
    """A network whose fields change what it computes and none of its parameters."""

    activation: object = nn.relu
    rate: float = 0.5
    inner: nn.Module | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(nn.Dropout(self.rate, deterministic=not train)(self.activation(nn.Dense(4)(x))))


VARIABLES = Net().init(jax.random.key(0), DATA[0].images[:1])


def train(folder, module=None, data=DATA, **options):
    options = {"recipe": RECIPE, "variables": VARIABLES, "epochs": 1, **options}
    return fit(Net() if module is None else module, *data, checkpoint=folder, **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A training that ended after the first of two epochs."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    return folder, train(folder)


@pytest.fixture
def copy(kept, tmp_path):
    return shutil.copytree(kept[0], tmp_path / "run")


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def changed(split, **fields):
    new = dataclasses.replace(DATA[split], **{name: f(getattr(DATA[split], name)) for name, f in fields.items()})
    return (new, DATA[1]) if split == 0 else (DATA[0], new)


def flipped(pixels):
    pixels = pixels.copy()
    pixels[-1, -1, -1, -1] ^= 1
    return pixels


class Plain(Recipe):
    """Another optimizer with the same hyperparameters."""

    def optimizer(self, steps):
        return optax.sgd(self.learning_rate)


def renamed():
    """A class of the same name and fields with other code."""
    class Net(nn.Module):
        activation: object = nn.relu
        rate: float = 0.5
        inner: nn.Module | None = None

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train, epsilon=1e-3)(x.reshape(len(x), -1))
            return nn.Dense(10)(nn.Dropout(self.rate, deterministic=not train)(self.activation(nn.Dense(4)(x))))

    Net.__qualname__ = "Net"
    return Net()


def halved(tree):
    return jax.tree.map(lambda v: v / 2, tree)


OTHERS = {
    "train pixel": ({"data": changed(0, pixels=flipped)}, "other training images"),
    "train label": ({"data": changed(0, labels=lambda y: (y + (np.arange(32) == 3)) % 10)}, "other training labels"),
    "order": ({"data": changed(0, pixels=lambda p: p[::-1], labels=lambda y: y[::-1])}, "other training images"),
    "train mean": ({"data": changed(0, mean=lambda m: 0 * m)}, r"training mean \[0\.305\d+\], not \[0\.0\]"),
    "train std": ({"data": changed(0, std=lambda s: 2 * s)}, r"training std \[0\.3755\d+\], not \[0\.751\d+\]"),
    "levels": ({"data": changed(0, levels=lambda n: 17)}, "training levels 16, not 17"),
    "classes": ({"data": changed(0, classes=lambda n: 11)}, "training classes 10, not 11"),
    "name": ({"data": changed(0, name=lambda n: "mnist")}, "training data digits, not mnist"),
    "test pixel": ({"data": changed(1, pixels=flipped)}, "other test images"),
    "test label": ({"data": changed(1, labels=lambda y: y[::-1])}, "other test labels"),
    "test mean": ({"data": changed(1, mean=lambda m: 0 * m)}, "test mean"),
    "fewer tests": ({"data": changed(1, pixels=lambda p: p[:9], labels=lambda y: y[:9])}, "test examples 16, not 9"),
    "activation": ({"module": Net(nn.tanh)}, "the module's activation relu, not tanh"),
    "closure": ({"module": Net(lambda x, c=0.1: jnp.maximum(x, c * x))}, "the module's activation relu, not <lambda>"),
    "rate": ({"module": Net(rate=0.1)}, r"the module's rate 0\.5, not 0\.1"),
    "nested": ({"module": Net(inner=nn.Dense(3))}, "the module's inner None, not Dense"),
    "code": ({"module": renamed()}, r"other operations of a training step \(its module"),
    "optimizer": ({"recipe": Plain(**dataclasses.asdict(RECIPE))}, "recipe Recipe, not Plain"),
    "loss": ({"recipe": dataclasses.replace(RECIPE, weight_decay=0.5)}, r"weight_decay 0\.0001, not 0\.5"),
    "schedule": ({"recipe": dataclasses.replace(RECIPE, drops=(1,))}, r"drops \[\], not \[1\]"),
    "augmentation": ({"recipe": dataclasses.replace(RECIPE, augment=True)}, "augment False, not True"),
    "seed": ({"seed": 1}, "seed 0, not 1"),
    "parameters": ({"variables": {**VARIABLES, "params": halved(VARIABLES["params"])}}, "other initial parameters"),
    "averages": ({"variables": {**VARIABLES, "batch_stats": halved(VARIABLES["batch_stats"])}}, "other initial state"),
    "masks": ({"masks": jax.tree.map(lambda v: v == v.ravel()[0], VARIABLES["params"])}, "other masks"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_by_what_differs(kept, name):
    changes, message = OTHERS[name]
    with pytest.raises(ValueError, match=f"holds a checkpoint of another training, with .*{message}.*: use the same "):
        train(kept[0], **changes)


def test_a_checkpoint_of_another_measure_is_refused_by_name(kept, tmp_path):
    with pytest.raises(ValueError, match=r"other measurements, norm nothing, not 1\.0 before training"):
        train(kept[0], measure=lambda params, state: {"norm": 1.0})
    train(tmp_path, measure=lambda params, state: {"norm": jnp.float32(1.0), "nan": np.nan})
    again = train(tmp_path, measure=lambda params, state: {"nan": jnp.nan, "norm": 1.0 + 1e-6})
    assert [row["norm"] for row in again.history] == [1.0, 1.0]
    for other in ({"norm": 2.0, "nan": np.nan}, {"norm": 1.0, "nan": 0.0}, {"norm": 1.0}):
        with pytest.raises(ValueError, match=r"other measurements, .* before training: use the same measure"):
            train(tmp_path, measure=lambda params, state, other=other: other)


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error_and_the_last_one_stays(copy, kept, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(OSError, match=r"of epoch 2 cannot be written \(ValueError: RESOURCE.*'28'\]\): ") as info:
            train(copy, epochs=None)
        assert info.value.filename == str(copy)
    assert same(restore(copy).params, kept[1].params)


def test_a_kill_while_the_last_checkpoint_is_deleted_loses_nothing(copy, tmp_path):
    done = train(shutil.copytree(copy, tmp_path / "later"), epochs=None)
    shutil.copytree(tmp_path / "later" / "2", copy / "2")       # complete, and the manifest is that of epoch 1
    (copy / "1" / "_CHECKPOINT_METADATA").unlink()
    for again in (restore(copy), train(copy, epochs=None), restore(copy)):
        assert len(again.history) == 3
        assert same(again.params, done.params)


def test_a_folder_that_no_checkpoint_can_be_written_to_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match=r"udcff' is not UTF-8, which checkpoints need: name another folder"):
        train(tmp_path / "\udcff")


def test_a_checkpoint_stays_in_its_folder_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def moving(params, state):
        monkeypatch.chdir(tmp_path / "elsewhere")
        return {}

    train("run", measure=moving)
    assert (tmp_path / "run" / "manifest.json").exists()
    assert len(restore(tmp_path / "run").history) == 2


def test_what_changes_nothing_is_the_same_training(kept, copy):
    aside = (dataclasses.replace(DATA[0], pixels=DATA[0].pixels[::-1].copy()[::-1], labels=DATA[0].labels.astype(int)),
             DATA[1])
    again = train(copy, Net(nn.relu, 0.5), aside, save_seconds=1e9, masks=jax.tree.map(
        lambda v: np.ones(v.shape, bool), VARIABLES["params"]))
    assert same(again.params, kept[1].params)
    assert list(again.history) == list(kept[1].history)


def test_another_process_with_other_hashes_continues_to_the_same_end(copy):
    whole = fit(pk.models.fc(3, 1), *DATA, recipe=RECIPE)
    fit(pk.models.fc(3, 1), *DATA, recipe=RECIPE, checkpoint=copy.parent / "fc", epochs=1)
    code = ("import jax, pkjax as pk; jax.config.update('jax_enable_x64', {x64}); from pkjax.training import *; "
            "data = [pk.data.load('digits', split=s, samples=n) for s, n in (('train', 32), ('test', 16))]; "
            "recipe = Recipe(learning_rate=0.01, epochs=2, batch_size=16); "
            "done = fit(pk.models.fc(3, 1), *data, recipe=recipe, checkpoint={folder!r}); "
            "print([row['test_loss'] for row in done.history])")
    code = code.format(x64=jax.config.jax_enable_x64, folder=str(copy.parent / "fc"))
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                         env={**os.environ, "PYTHONHASHSEED": "7"})
    np.testing.assert_allclose(json.loads(out.stdout), [row["test_loss"] for row in whole.history], rtol=1e-6)


def damages(folder, draw):
    """Damage one file, or one folder, of a checkpoint at a time, and say which."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            path.rename(folder.parent / "aside")
            yield f"{name} missing"
            path.write_text("x")
            yield f"{name} a file"
            path.unlink()
            (folder.parent / "aside").rename(path)
            continue
        content, bit = path.read_bytes(), draw.randrange(8 * path.stat().st_size)
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        for new in (bytes(altered), draw.choice([content[:len(content) // 2], b"", b'{"' + content[::-1]])):
            path.write_bytes(new)
            yield f"{name} {new!r}"
        path.unlink()
        yield f"{name} missing"
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_one_clear_error_or_the_exact_state(kept, copy):
    messages, count = [], 0
    for damage in damages(copy, random.Random(0)):
        count += 1
        try:
            trees, about = checkpoints.read(copy)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert same(trees["params"], kept[1].params), damage
            assert about["history"] == list(kept[1].history), damage
    assert len(messages) > 0.98 * count > 100
    for message in messages:
        assert re.match(rf"the checkpoint in {copy} is damaged \(.+\): delete the folder to start this training again$",
                        message)


def test_training_goes_on_from_no_damaged_checkpoint(copy):
    (copy / "1" / "params" / "manifest.ocdbt").write_bytes(b"")
    for read in (lambda: train(copy), lambda: restore(copy)):
        with pytest.raises(ValueError, match=r"damaged \(the file 1/params/manifest\.ocdbt is not what was written\)"):
            read()
    shutil.rmtree(copy / "1")
    with pytest.raises(ValueError, match=r"damaged \(the folder of epoch 1 is missing\)"):
        train(copy)
    shutil.rmtree(copy)
    copy.write_text("not a folder")
    for read in (lambda: train(copy), lambda: restore(copy)):
        with pytest.raises(ValueError, match="run is a file, where a folder of checkpoints is expected"):
            read()


def test_arrays_that_are_not_those_that_were_written_are_refused_without_the_manifest_too(copy, monkeypatch):
    import orbax.checkpoint as ocp

    (copy / "manifest.json").unlink()             # the process ended before it was written
    assert restore(copy).accuracy >= 0
    real = ocp.CheckpointManager.restore

    def altered(self, epoch, args):
        trees = real(self, epoch, args=args)
        if "params" not in trees:
            return trees
        return {**trees, "params": jax.tree.map(lambda v: v.at[(0,) * v.ndim].add(1e-3), trees["params"])}

    monkeypatch.setattr(ocp.CheckpointManager, "restore", altered)
    for read in (lambda: train(copy), lambda: restore(copy)):
        with pytest.raises(ValueError, match=r"damaged \(the params of epoch 1 are not those that were written\)"):
            read()


def test_a_history_that_is_not_what_was_written_is_refused_without_the_manifest_too(copy):
    (copy / "manifest.json").unlink()
    about = copy / "1" / "about" / "metadata"
    content = json.loads(about.read_text())
    content["history"][0]["test_accuracy"] = 0.75
    about.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"damaged \(the description of epoch 1 is not what was written\)"):
        restore(copy)
    about.write_text(json.dumps({**content, "format": "pkjax training 1"}))
    with pytest.raises(ValueError, match="has the format 'pkjax training 1', but this version reads 'pkjax trai"):
        restore(copy)


def test_leaves_that_a_checkpoint_cannot_tell_apart_are_refused(tmp_path):
    twins = {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)}
    saved = checkpoints.Checkpoints(tmp_path / "run", checkpoints.Identity({}, {}, {}))
    with pytest.raises(ValueError, match=r"params has two leaves that a checkpoint calls 'a\.b'"):
        saved.latest({"params": twins})
    saved.close()


def test_keys_of_random_numbers_and_lists_of_nnx_modules_come_back(tmp_path):
    class Drop(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(64, 4, rngs=rngs) for _ in range(1)])
            self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 10, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.layers[0](x.reshape(len(x), -1)))))

    with jax.numpy_dtype_promotion("standard"):
        whole = fit(Drop(nnx.Rngs(0)), *DATA, recipe=RECIPE)
        fit(Drop(nnx.Rngs(0)), *DATA, recipe=RECIPE, checkpoint=tmp_path, epochs=1)
        done = fit(Drop(nnx.Rngs(0)), *DATA, recipe=RECIPE, checkpoint=tmp_path)
        assert same(done.params, whole.params)
        assert same(jax.tree.leaves(restore(tmp_path).params), jax.tree.leaves(done.params))
        other = Drop(nnx.Rngs(0))
        other.drop.rate = 0.25
        with pytest.raises(ValueError, match=r"the module's drop\.rate 0\.5, not 0\.25"):
            fit(other, *DATA, recipe=RECIPE, checkpoint=tmp_path)


def test_digests_are_of_contents():
    x = np.arange(12.0).reshape(3, 4)
    assert digest({"a": x}) == digest({"a": jnp.asarray(x)}) == digest({"a": np.asfortranarray(x)})
    assert len({digest(tree) for tree in ({"a": x}, {"b": x}, {"a": x.reshape(4, 3)}, {"a": x.astype("f4")},
                                          {"a": -x}, {"a": np.where(x == 0, -0.0, x)}, {"a": {"b": x}})}) == 7
    assert digest(jax.random.key(0)) != digest(jax.random.key(1))


def test_programs_are_told_apart_by_operations_and_closed_over_numbers():
    def scaled(c):
        return lambda x: jax.nn.relu(c * x)

    big = np.arange(2.0)
    assert program_digest(scaled(2.0), big) == program_digest(scaled(2.0), -big)
    assert len({program_digest(fn, big) for fn in (scaled(2.0), scaled(3.0), scaled(big), scaled(-big), jnp.tanh)}) == 5


def test_fields_of_modules_are_written_without_addresses():
    fields = module_fields(Net(lambda x: x, inner=nn.Sequential([nn.relu, nn.Dense(3, dtype=jnp.float32)])))
    assert fields["the module's inner.layers.1.features"] == "3"
    assert fields["the module's inner.layers.1.dtype"] == "float32"
    assert "0x" not in str(fields)
