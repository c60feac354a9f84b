"""Grids are products, keys tell runs apart, and settings of no possible run are refused before anything runs."""

import subprocess
import sys
import time

import pytest
from pkjax.experiments.settings import Settings, grid, read_grid


def test_a_grid_is_the_product_of_its_lists_and_the_dense_network_comes_once(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('[defaults]\nmodel = "fc-6x1"\nseed = [0, 1]\ncompression = [1, 2.5]\n'
                    '[[grid]]\npruner = ["none", "snip", "synflow"]\n[[grid]]\npruner = "snip"\ndrops = [3, 4]\n')
    runs = read_grid(file)
    assert sorted((s.pruner, s.compression, s.seed) for s in runs if s.drops is None) == sorted(
        [("none", 0.0, seed) for seed in (0, 1)]
        + [(pruner, ρ, seed) for pruner in ("snip", "synflow") for ρ in (1.0, 2.5) for seed in (0, 1)])
    assert [s.recipe.drops for s in runs if s.drops] == [(3, 4)] * 4
    assert len({s.key for s in runs}) == len(runs) == 14


def test_keys_tell_runs_apart_and_nothing_else():
    base = Settings(model="fc-6x1")
    assert base.key == Settings(model="fc-6x1", epochs=50, learning_rate=0.01).key        # the defaults, spelled out
    others = [Settings(model="fc-6x1", **more) for more in ({"seed": 1}, {"epochs": 3}, {"data": "mnist"},
              {"pruner": "snip", "compression": 1.0}, {"pruner": "snip", "compression": 2.0}, {"output_samples": 3})]
    assert len({base.key, *(s.key for s in others)}) == 7
    code = "from pkjax.experiments import Settings; print(Settings(model='fc-6x1').key)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == \
        base.key


@pytest.mark.parametrize(("text", "message"), [
    ("[defaults]\nmodle = 'fc-6x1'", "unknown setting 'modle'; choose from model, data"),
    ("[[grid]]\nseed = ['a']", "seed must be int, got 'a'"), ("[[grid]]\nseed = []", "the list of seed is empty"),
    ("[grid]\nseed = 1", r"write \[defaults\] and \[\[grid\]\]"), ("[sweep]\nseed = 1", "holds 'sweep'"),
    ("seed = ", "is not a TOML file"),
    ("[[grid]]\npruner = 'oracle'", "unknown pruner 'oracle'; choose from none, random"),
    ("[[grid]]\nmodel = 'lenet'", "unknown model 'lenet'"),
    ("[[grid]]\ncompression = -1", "compression must be a number"),
    ("[[grid]]\nepochs = 0", "epochs must be at least 1"), ("[[grid]]\ntest_samples = 0", "test_samples must be at")])
def test_a_file_that_fits_no_sweep_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises((ValueError, TypeError), match=message) as info:
        read_grid(file)
    assert str(file) in str(info.value)


@pytest.mark.parametrize(("values", "message"), [
    ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"), ({"seed": 2**64}, "seed must be at most"),
    ({"seed": -1}, "seed must not be negative"), ({"seed": 1.0}, "seed must be int, got 1.0"),
    ({"seed": True}, "seed must be int, got True"), ({"epochs": 2.0}, "epochs must be int, got 2.0"),
    ({"epochs": 10**30}, "epochs must be at most"), ({"epochs": 0}, "epochs must be at least 1"),
    ({"compression": float("nan"), "pruner": "snip"}, "compression must be a number of at least 0, got nan"),
    ({"compression": 10**400, "pruner": "snip"}, "compression must be a number of at least 0, got inf"),
    ({"learning_rate": float("inf")}, "learning_rate must be at most"), ({"learning_rate": 1e39}, "largest float32"),
    ({"learning_rate": float("nan")}, "learning_rate must be positive"), ({"weight_decay": -1}, "weight_decay must be"),
    ({"drops": [60], "epochs": 5}, r"none beyond the last \(5\), got \(60,\)"), ({"drops": [3, 3]}, "different epochs"),
    ({"drops": [1.5]}, "drops must be a list of int"), ({"drops": [0]}, "drops are epochs counted from 1"),
    ({"model": 3}, "model must be str, got 3"), ({"model": "lenet"}, "unknown model 'lenet'"),
    ({"batch_size": "8"}, "batch_size must be int, got '8'"), ({"traces": -1}, "traces must not be negative")])
def test_settings_of_no_possible_run_are_refused_before_anything_runs(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        grid(values)
    with pytest.raises((ValueError, TypeError)):
        Settings(**values)


def test_drops_that_never_come_are_left_out():
    few = Settings(model="vgg11", data="cifar10", epochs=60)
    assert few.recipe.drops == ()
    assert few.key == Settings(model="vgg11", data="cifar10", epochs=60, drops=()).key


def test_a_grid_of_a_thousand_million_runs_is_counted_and_not_built(tmp_path):
    lists = {"seed": [0] * 1000, "epochs": [1] * 1000, "traces": [1] * 1000}
    began = time.monotonic()
    with pytest.raises(ValueError, match="a sweep of 1,000,000,000 runs is too large: at most 100,000 go into one"):
        grid(lists)
    file = tmp_path / "large.toml"
    file.write_text("".join(f"[[grid]]\nseed = {lists['seed']}\ntraces = {[1] * 60}\n" for _ in range(2)))
    with pytest.raises(ValueError, match=r"large.toml: a sweep of 120,000 runs is too large"):
        read_grid(file)
    assert time.monotonic() - began < 5


def test_equal_settings_have_one_key_however_they_are_written():
    assert Settings(compression=1, pruner="snip").key == Settings(compression=1.0, pruner="snip").key
    synflow = Settings(pruner="synflow", compression=1, drops=[7, 3])
    assert synflow.key == Settings(pruner="synflow", compression=1.0, prune_steps=100, drops=(3, 7, 50)).key
    assert Settings(model="fc-100x6").key == Settings(model="fc-100").key
    assert Settings(weight_decay=-0.0).key == Settings(weight_decay=0).key
    assert len(grid({"seed": [0, 1, 0], "compression": [0, 0.0], "pruner": ["none", "snip"]})) == 2
