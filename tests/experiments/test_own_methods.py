"""Networks, scores and data sets of the user's own: found by name, told apart by content, checked at the door."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest
from pkjax.adapters import linen_init
from pkjax.experiments import paper_claims, records, user_code, worker
from pkjax.experiments.figures.styles import styles_of
from pkjax.experiments.methods import model
from pkjax.experiments.runs import run
from pkjax.experiments.settings import Settings, grid, read_grid, recorded_settings
from pkjax.experiments.user_methods import user_data

FILE = """
import jax, jax.numpy as jnp, numpy as np, pkjax as pk
from flax import linen as nn, nnx
from NAME_helper import WIDTH

class Linen(nn.Module):
    classes: int
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(nn.relu(x))

class Net(nnx.Module):
    def __init__(self, classes, rngs):
        self.a, self.norm = nnx.Linear(64, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.b, self.drop = nnx.Linear(WIDTH, classes, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    def __call__(self, x):
        return self.b(self.drop(nnx.relu(self.norm(self.a(x.reshape(len(x), -1))))))

def pair(classes):
    def init(key, x):
        return {"only": {"w": jax.random.normal(key, (x[0].size, classes), x.dtype)}}
    return init, lambda params, x: x.reshape(len(x), -1) @ params["only"]["w"]

def score(params, loss):
    return jax.tree.map(lambda p, g: jnp.abs(p * g), params, jax.grad(loss)(params))
score.steps = 2

def everything(params, apply_fn, images, labels, masks, key):
    assert images.shape == (30, 8, 8, 1) and labels.shape == (30,)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert apply_fn(params, images).shape == (30, 3)
    return jax.tree.map(lambda p: jax.random.uniform(key, p.shape, p.dtype), params)

def load():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 90)
    images = (draw.random((90, 8, 8, 1)) * 100 + 50 * labels[:, None, None, None]).astype(np.uint8)
    return (images[:60], labels[:60]), (images[60:], labels[60:])

def rows():
    return tuple((images.reshape(len(images), -1) / 100.0, labels) for images, labels in load())

def five(classes): return Linen(5)
class Table(nn.Module):
    array: object
    config: object = None
def unhashable(classes): return Table(jnp.ones(2), {"a": [1]})
def nested(classes): return Table([[classes, 2], [3]])
def of_haiku(classes): return pair(classes)[0], lambda params, rng, *args, **kwargs: pair(classes)[1](params, *args)
def chain(classes): return nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(classes)])
def number(classes): return classes
def seedless(classes): return Net(classes, nnx.Rngs(0))
def stranger(params, gradient): return params
def one_set(): return load()[0]
def sets():
    (images, labels), _ = load()
    return [pk.data.Dataset(images[:, :size], labels, np.zeros(1, np.float32), np.ones(1, np.float32), 3, "any", 255)
            for size in (8, 4)]
def of_words(): return (np.zeros((3, 2)), np.array(["a", "b", "c"])), (np.zeros((1, 2)), np.zeros(1, int))
def too_many(): return load()[0], (load()[1][0], load()[1][1] + 1)
def uneven(): return (np.zeros((3, 2)), np.zeros(2, int)), (np.zeros((3, 2)), np.zeros(3, int))
def not_numbers(): return (np.full((3, 2), np.nan), np.zeros(3, int)), (np.zeros((3, 2)), np.zeros(3, int))
NOTHING = 3
"""
COUNT = itertools.count()      # a process imports a module of a name once
SMALL = {"epochs": 2, "batch_size": 20, "output_samples": 8, "traces": 2, "compression": 0.5}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module of its own in a folder on the path."""
    name = f"own_{next(COUNT)}"
    (tmp_path / f"{name}.py").write_text(FILE.replace("NAME", name))
    (tmp_path / f"{name}_helper.py").write_text("WIDTH = 6\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name


def version(name):
    return name.partition("@")[2]


# Identity


def test_the_version_is_that_of_the_file_and_of_what_it_imports_beside_it(own, tmp_path):
    first = Settings(model=f"{own}:Linen")
    assert Settings(model=f"{own}:Linen").key == first.key
    (tmp_path / "unrelated.py").write_text("WIDTH = 7\n")
    assert Settings(model=f"{own}:Linen").key == first.key
    helper = tmp_path / f"{own}_helper.py"
    helper.write_text("WIDTH = 70\n")
    second = Settings(model=f"{own}:Linen")
    assert second.key != first.key
    variables = linen_init(model(second.model, 3))(jax.random.key(0), jnp.ones((1, 64), jnp.float32))
    assert variables["params"]["Dense_0"]["kernel"].shape == (64, 70)
    user_code.find.cache_clear()                      # as in another process
    with pytest.raises(ValueError, match=rf"'{own}:Linen@{version(first.model)}' is wanted, .* now version "
                                         rf"{version(second.model)}: start the sweep again"):
        run(first)
    helper.write_bytes(b"WIDTH = 70\r\n")             # as some editors end lines
    assert Settings(model=f"{own}:Linen").key == second.key


def test_a_change_within_a_second_that_keeps_the_length_is_seen(own, tmp_path):
    for width in (6, 7, 8):
        (tmp_path / f"{own}_helper.py").write_text(f"WIDTH = {width}\n")
        module = model(Settings(model=f"{own}:Linen").model, 3)
        variables = linen_init(module)(jax.random.key(0), jnp.ones((1, 64), jnp.float32))
        assert variables["params"]["Dense_0"]["kernel"].shape == (64, width)


def test_a_module_in_a_folder_is_found_with_what_it_imports_there(own, tmp_path):
    folder = tmp_path / f"{own}_folder"
    folder.mkdir()
    (folder / "scores.py").write_text("from .parts import part\ndef score(params): return part(params)\n")
    (folder / "parts.py").write_text("def part(params): return params\n")
    first = Settings(pruner=f"{own}_folder.scores:score", compression=1.0)
    (folder / "parts.py").write_text("def part(params): return None\n")
    assert Settings(pruner=f"{own}_folder.scores:score", compression=1.0).key != first.key


@pytest.mark.parametrize("declared", ["__version__ = '1.2-b'", "VERSION = 7"])
def test_a_declared_version_comes_before_the_content(own, tmp_path, declared):
    file = tmp_path / f"{own}.py"
    file.write_text(f"{declared}\n" + file.read_text())
    first = Settings(pruner=f"{own}:score", compression=1.0)
    assert first.pruner == f"{own}:score@{'7' if 'VERSION' in declared else '1.2-b'}"
    file.write_text(file.read_text() + "\n# a remark\n")
    assert Settings(pruner=f"{own}:score", compression=1.0).key == first.key


def test_a_record_is_read_without_the_module_and_a_grid_takes_names_and_functions(own, tmp_path):
    settings = Settings(model=f"{own}:Linen", pruner=f"{own}:score", data=f"{own}:load", **SMALL)
    for file in tmp_path.glob("own_*"):
        file.unlink()
    assert recorded_settings(settings.to_dict()).key == settings.key
    assert settings.to_dict()["prune_steps"] == 2


def test_a_function_is_its_name(own):
    module = __import__(own)
    by_function, = grid({"model": [module.Linen], "pruner": module.score, "data": module.load, "compression": 1})
    by_name, = grid({"model": f"{own}:Linen", "pruner": [f"{own}:score"], "data": f"{own}:load", "compression": 1})
    assert by_function == by_name


def test_what_other_processes_cannot_import_is_refused():
    def inside(classes):
        return classes

    for function, named in ((lambda classes: None, "<lambda>"), (inside, "inside"), (np.vectorize(abs), "vectorize")):
        with pytest.raises(ValueError, match=rf"model is .*{named}.*, which other processes cannot import: define it"):
            Settings(model=function)


def test_the_folder_of_the_file_comes_first(own, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / f"{own}_two.py").write_text("def make(classes): return None\n")
    (folder / "sweep.toml").write_text(f'[defaults]\nmodel = "{own}_two:make"\nseed = [0, 1]\n')
    runs = read_grid(folder / "sweep.toml")
    assert [each.seed for each in runs] == [0, 1]
    assert sys.path[0] == str(folder)
    (tmp_path / f"{own}_two.py").write_text("def make(classes): return None\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match=r"but this process has imported .* by that name: give one of them another"):
        Settings(model=f"{own}_two:make")


def test_a_link_to_a_file_finds_what_is_beside_it(own, tmp_path, monkeypatch):
    (tmp_path / "real.toml").write_text(f'[defaults]\nmodel = "{own}:Linen"\n')
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link.toml").symlink_to(tmp_path / "real.toml")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    assert [each.model.partition("@")[0] for each in read_grid(tmp_path / "links" / "link.toml")] == [f"{own}:Linen"]


def test_threads_find_a_version_at_the_same_time(own, tmp_path, monkeypatch):
    (tmp_path / f"{own}_long.py").write_text("".join(f"def f{i}(params): return [params, {{1: {i}}}]\n"
                                                     for i in range(400)))
    first = user_code.versioned(f"{own}_long:f0", "pruner")
    was = sys.getswitchinterval()
    monkeypatch.setattr(sys, "path", sys.path[:])
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: user_code.versioned(f"{own}_long:f0", "pruner"), range(40)))
    finally:
        sys.setswitchinterval(was)
    assert set(found) == {first}


# At the door


@pytest.mark.parametrize(("values", "error", "message"), [
    ({"model": "OWN"}, ValueError, "unknown model"),
    ({"model": "OWN:"}, ValueError, r"model 'own_\d+:' must be a name such as \"my_module:function\""),
    ({"model": "no_such:make"}, ValueError, "model: there is no module 'no_such'"),
    ({"model": "OWN:Missing"}, ValueError, "has no 'Missing'; it has .*Linen"),
    ({"model": "OWN:NOTHING"}, TypeError, "must be a function, but is 3"),
    ({"model": "OWN:load"}, TypeError, r"must take \(classes\) or \(classes, rngs\), but does not take classes"),
    ({"pruner": "OWN:stranger", "compression": 1}, TypeError, "must take params and.*, but needs gradient"),
    ({"data": "OWN:score"}, TypeError, "must take no arguments, but needs params, loss"),
    ({"data": "imagenet"}, ValueError, "choose from digits.* or name a function of your own, such as"),
])
def test_what_cannot_run_is_refused_before_anything_runs(own, values, error, message):
    with pytest.raises(error, match=message):
        Settings(**{name: value.replace("OWN", own) if isinstance(value, str) else value
                    for name, value in values.items()})


def test_a_function_is_named_behind_its_own_module(own, tmp_path):
    folder = tmp_path / f"{own}_pack"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("def score(params): return params\n")
    name = Settings(pruner=f"{own}_pack.inner:score", compression=1.0).pruner       # now the package has the module
    with pytest.raises(ValueError, match=rf'inner is a module; write "{name.partition(":")[0]}:" before the function'):
        Settings(pruner=f"{own}_pack:inner.score")
    with pytest.raises(ValueError, match=r"other processes cannot import from __main__: move the function into a file"):
        Settings(pruner="__main__:score")
    with pytest.raises(ValueError, match=rf'; write "{own}:function"'):
        Settings(pruner=f"{own}.py:score")


@pytest.mark.parametrize(("text", "where"), [
    ("\ndef score(params) return", "BAD.py, line 2"),
    ("import OWN_worse\n", "OWN_worse.py, line 3"),
])
def test_the_line_of_a_module_that_cannot_be_imported_is_named(own, tmp_path, text, where):
    (tmp_path / f"{own}_worse.py").write_text("\n\n1 / 0\n")
    (tmp_path / f"{own}_bad.py").write_text(text.replace("OWN", own))
    where = where.replace("BAD", f"{own}_bad").replace("OWN", own)
    with pytest.raises(ValueError, match=rf"_bad cannot be imported .*{where}"):
        Settings(pruner=f"{own}_bad:score")


def test_a_module_that_cannot_be_imported_and_steps_that_are_none_are_named(own, tmp_path):
    file = tmp_path / f"{own}_bad.py"
    file.write_text("raise RuntimeError('no card')")
    with pytest.raises(ValueError, match=rf"pruner: {own}_bad cannot be imported \(RuntimeError: no card in .* 1\)"):
        Settings(pruner=f"{own}_bad:score")
    file.write_text("def score(params): return params\nscore.steps = 0.5")
    with pytest.raises(TypeError, match=r"attribute steps of pruner '.*' must be a whole number .*, got 0.5"):
        Settings(pruner=f"{own}_bad:score")


@pytest.mark.parametrize(("function", "message"), [
    ("five", r"gives outputs of shape \(1, 5\) for one image, where .* with its 3 classes needs \(1, 3\)"),
    ("unhashable", r"returns Table, which has no hash because of its fields \(array, config\): use numbers, texts"),
    ("of_haiku", r"returns a pair whose apply takes 'rng', .*: wrap it, with Haiku as hk.without_apply_rng"),
    ("number", "must return a Linen module, an NNX module or a pair .*, but returned 3"),
    ("seedless", r"returns an NNX module, so it must take \(classes, rngs\)"),
])
def test_a_function_that_returns_no_network_is_named(own, function, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(Settings(model=f"{own}:{function}", data=f"{own}:load", **SMALL))


@pytest.mark.parametrize(("function", "message"), [
    ("one_set", r"the training images of .* must have the shape|must be a pair \(images, labels\)"),
    ("of_words", "labels of the training images .* must be whole numbers from 0, got <U1"),
    ("too_many", "the test images .* must be like the training images, .*in 3 classes, got .* labels up to 3"),
    ("sets", r"like the training images, uint8 of shape \(N, 8, 8, 1\) in .*, got uint8 of shape \(N, 4, 8, 1\)"),
    ("uneven", r"the shape \(N, …\) and labels the shape \(N,\), got \(3, 2\) and \(2,\)"),
    ("not_numbers", "the training images .* hold NaN or infinity"),
])
def test_a_data_set_that_is_none_is_named(own, function, message):
    with pytest.raises((ValueError, TypeError), match=message):
        user_data(Settings(data=f"{own}:{function}").data)


# What runs


def test_the_masks_are_those_of_the_score_by_hand(own):
    settings = Settings(model=f"{own}:pair", pruner=f"{own}:score", data=f"{own}:load", seed=3, **SMALL)
    record, masks = run(settings)
    (images, labels), _ = __import__(own).load()
    mean, std = images.mean((0, 1, 2)) / 255, images.std((0, 1, 2)) / 255
    few = np.random.default_rng(3).permutation(60)[:30]
    x = jnp.asarray(((images[few] / 255 - mean) / std).reshape(30, -1), jnp.float32)
    init, _ = __import__(own).pair(3)
    params = linen_init(model(settings.model, 3))(jax.random.key(3), jnp.ones((1, 8, 8, 1), jnp.float32))["params"]
    w, alive = params["only"]["w"], np.ones(192, bool)
    assert jax.tree.map(jnp.shape, init(jax.random.key(3), x)) == jax.tree.map(jnp.shape, params)
    for kept in record["pruning"]["history"]:      # SNIP of a linear network, by the gradient's formula
        theta = np.where(alive.reshape(64, 3), w, 0)
        slope = x.T @ (jax.nn.softmax(x @ theta) - np.eye(3, dtype=np.float32)[labels[few]]) / 30
        order = np.where(alive, np.abs(theta * np.asarray(slope)).ravel(), -1).argsort()
        alive = np.isin(np.arange(192), order[192 - kept:])
    np.testing.assert_array_equal(masks["only"]["w"].ravel(), alive)
    assert record["pruning"]["kept"] == 61
    assert len(record["history"]) == 3


def test_lists_in_lists_become_tuples(own):
    assert model(f"{own}:nested", 3).array == ((3, 2), (3,))


def test_a_chain_of_layers_in_a_list_is_a_network(own):
    record, _ = run(Settings(model=f"{own}:chain", data=f"{own}:load", pruner="synflow", prune_steps=2, **SMALL))
    assert record["pruning"]["total"] == 64 * 3


@pytest.mark.parametrize("network", ["Linen", "Net"])
def test_networks_with_batchnorm_train_and_their_averages_move(own, network):
    settings = Settings(model=f"{own}:{network}", pruner=f"{own}:everything", data=f"{own}:load",
                        **{**SMALL, "epochs": 20, "learning_rate": 0.01})
    record, masks = run(settings)
    assert record["history"][-1]["train_accuracy"] > 0.6
    assert record["history"][-1]["output_change"] > 0
    module = model(settings.model, 3)
    start = linen_init(module)(jax.random.key(0), jnp.ones((1, 8, 8, 1), jnp.float32))
    train, test = user_data(settings.data)
    done = pk.training.fit(module, train, test, recipe=settings.recipe, variables=start, masks=masks)
    averages = next(value for name, value in start.items() if name != "params")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: not np.allclose(a, b), averages,
                                            next(iter(done.state.values())))))
    assert done.history[-1]["test_accuracy"] == pytest.approx(record["history"][-1]["test_accuracy"], abs=0.04)


def test_networks_that_train_together_leave_the_records_of_single_runs(own):
    group = grid({**SMALL, "model": f"{own}:Net", "pruner": f"{own}:score", "data": f"{own}:load", "seed": [0, 1]})
    for settings, (record, masks) in zip(group, worker.work_together(group, None), strict=True):
        alone, kept = run(settings)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), masks, kept))
        for row, want in zip(record["history"], alone["history"], strict=True):
            assert {**row, "seconds": 0} == pytest.approx({**want, "seconds": 0}, rel=1e-3, abs=1e-5)


def test_an_nnx_network_is_what_from_nnx_makes_of_it_and_every_seed_has_its_own(own):
    from flax import nnx

    module = model(Settings(model=f"{own}:Net").model, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    variables = linen_init(module)(jax.random.key(4), x)
    apply_fn, params = pk.from_linen(module, variables)
    alone, theirs = pk.from_nnx(__import__(own).Net(3, nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs)
    np.testing.assert_allclose(apply_fn(params, x), alone(params, x), rtol=1e-6)
    other = linen_init(module)(jax.random.key(5), x)["params"]
    assert not np.array_equal(other["a"]["kernel"], params["a"]["kernel"])
    drawn = [module.apply(variables, x, train=True, mutable=["nnx_state"], rngs={"dropout": jax.random.key(i)})[0]
             for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])


def test_numbers_are_taken_as_they_are_and_rows_need_no_image(own):
    train, test = user_data(Settings(data=f"{own}:rows").data)
    (images, labels), _ = __import__(own).rows()
    np.testing.assert_allclose(train.images, images, rtol=1e-6)
    assert (train.classes, len(test), train.labels.tolist()) == (3, 30, labels.tolist())
    record, _ = run(Settings(model="fc-4x1", data=f"{own}:rows", pruner="snip", **SMALL))
    assert np.isfinite(record["history"][-1]["test_loss"])


def test_own_data_is_not_augmented_and_an_own_model_trains_as_resnet20(own):
    recipe = Settings(model=f"{own}:Linen", data=f"{own}:load").recipe
    assert recipe == pk.training.Recipe(learning_rate=1e-3, epochs=100, drops=(60,))
    assert Settings(model=f"{own}:Linen", data="cifar10").recipe.augment


# Tables, figures, claims


def test_names_are_short_where_there_is_one_version():
    names = ["m:score@1", "m:make@1", "m:make@2", "snip"]
    assert list(user_code.short_names(names).values()) == ["m:score", "m:make@1", "m:make@2", "snip"]


def test_own_pruners_are_drawn_each_in_its_own_way_before_the_dense_network():
    styles = styles_of(["none", "b:s", "snip", "a:s", "_c:s"])
    assert list(styles) == ["snip", "_c:s", "a:s", "b:s", "none"]
    assert len({(style.colour, style.marker) for style in styles.values()}) == 5
    assert styles["_c:s"].label == "c:s"                 # a label that begins with _ has no place in a legend


def test_the_claims_are_about_the_papers_pruners_alone():
    import pandas as pd

    traces = {"trace_pi": [1., 10., 100.], "trace_pi_1": [1., 10., 100.], "weight_change": [1., 2., 3.]}
    runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "synflow", "compression": [1., 2., 3.],
                         "seed": 0, "learning_rate": 0.1, "test_accuracy": 0.9, "output_norm": 1.0, **traces})
    own = runs.assign(pruner="m:score", weight_change=[3., 1., 9.])
    judged = [paper_claims.judge_claims(table).to_dict("records") for table in (runs, pd.concat([runs, own]))]
    assert str(judged[0]) == str(judged[1])


def test_a_table_names_functions_without_their_version(own, tmp_path):
    folder = tmp_path / "results"
    chosen = Settings(model=f"{own}:Linen", pruner=f"{own}:score", compression=1.0)
    records.write_failure(folder, {"format": records.FORMAT, "key": chosen.key, "status": "failed", "error": "none",
                                   "settings": chosen.to_dict()})
    assert records.table(folder)[["model", "pruner"]].to_numpy().tolist() == [[f"{own}:Linen", f"{own}:score"]]
