"""Runs that train together leave the records of single runs; what befalls one of them is its own affair."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pkjax as pk
import pytest
from pkjax.experiments import compiled, processes, records, runs, sweeps, worker
from pkjax.experiments.settings import Settings, grid

TINY = {"model": "fc-6x1", "epochs": 2, "batch_size": 32, "train_samples": 96, "test_samples": 50, "traces": 2,
        "output_samples": 8, "prune_steps": 3}
GROUP = grid({**TINY, "pruner": ["none", "magnitude", "synflow", "snip"], "compression": [0.5, 1.0], "seed": [0, 1]})
ROOT = Path(__file__).resolve().parents[2]


def same_record(one, other):
    """Whether two records say the same but for rounding, and for times."""
    for name in ("key", "settings", "pruning", "steps"):
        assert one[name] == other[name]
    assert one["initial"] == pytest.approx(other["initial"], rel=1e-4)
    assert len(one["history"]) == len(other["history"])
    for row, want in zip(one["history"], other["history"], strict=True):
        assert list(row) == list(want)
        for name in set(row) - {"seconds"}:
            assert row[name] == pytest.approx(want[name], rel=2e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "r"
    lines = []
    assert sweeps.sweep(GROUP, folder, together=len(GROUP), progress=lines.append) == (len(GROUP), 0, 0)
    assert lines[-1] == f"{len(GROUP)} of {len(GROUP)} runs"
    return folder


def record(folder, chosen):
    return json.loads((folder / "runs" / chosen.key / "record.json").read_text())


def test_a_run_of_a_group_leaves_the_record_and_masks_of_a_single_run(swept):
    assert len(GROUP) == 14      # four of the 16 are dense, two of them equal
    for chosen in GROUP[::3]:
        alone, masks = runs.run(chosen)
        same_record(record(swept, chosen), json.loads(json.dumps(alone)))
        kept = pk.load_masks(swept / "runs" / chosen.key / "masks.npz", like=masks)
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), kept, masks))
    assert sorted(os.listdir(swept)) == [".lock", "runs"]
    assert sweeps.sweep(GROUP, swept, together=3) == (0, 0, len(GROUP))


def test_groups_hold_runs_of_one_program_in_nearly_equal_parts():
    others = grid({**TINY, "model": ["fc-6x1", "fc-5x1"], "epochs": [2, 3], "seed": list(range(5))})
    groups = sweeps._grouped(others, 3)
    assert sorted(map(len, groups)) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert all(len({settings.program for settings in group}) == 1 for group in groups)
    assert sorted(settings.key for group in groups for settings in group) == sorted(s.key for s in others)
    assert sweeps._grouped(others, 1) == [[settings] for settings in others]
    for name, value in {"train_samples": 95, "test_samples": 49, "traces": 3, "spectra": 1, "output_samples": 9,
                        "learning_rate": 0.1, "weight_decay": 0.1, "batch_size": 31, "drops": (1,)}.items():
        assert Settings(**{**TINY, name: value}).program != Settings(**TINY).program
    with pytest.raises(ValueError, match="runs that train together differ in seed, pruner, compression"):
        runs.run_together(others[:11])
    with pytest.raises(ValueError, match="together must be a whole number of at least 1, got 0"):
        sweeps.sweep(others, "nowhere", together=0)


def test_a_run_that_cannot_be_pruned_fails_alone(swept):
    bad = Settings(**TINY, pruner="magnitude", compression=9.0)
    results = runs.run_together([bad, GROUP[0]])
    assert isinstance(results[0], ValueError)
    assert "keeps none of the" in str(results[0])
    same_record(record(swept, GROUP[0]), json.loads(json.dumps(results[1][0])))


def test_a_run_that_diverges_fails_alone(monkeypatch, tmp_path):
    start = runs._init

    def huge(module):
        def init(key, x):
            variables = start(module)(key, x)
            large = jax.random.key_data(key)[1] == 1      # the seed 1
            return jax.tree.map(lambda leaf: leaf * jax.numpy.where(large, 1e38, 1).astype(leaf.dtype), variables)

        return init

    monkeypatch.setattr(runs, "_init", huge)
    group = [Settings(**{**TINY, "traces": 0, "seed": seed}) for seed in (0, 1, 2)]
    done = list(worker.work_together(group, tmp_path))
    assert [each["status"] for each, _ in done] == ["done", "failed", "done"]
    assert done[1][0]["error"].startswith("FloatingPointError: the training loss is ")
    assert done[1][1] is None


ORDINARY = worker.run_together


def together_in(monkeypatch, name):
    """Start workers with a function of this module in place of `run_together`."""
    monkeypatch.setattr(processes, "START", processes.START.replace(
        "    main(*arguments)", f"""
    from pkjax.experiments import worker
    from tests.experiments import test_together
    test_together.{name}(worker)
    main(*arguments)"""))


def dying(module):
    """End the process where the run of seed 1 is begun, in a group or alone; count how often each is begun."""
    single, group = module.work, module.run_together

    def note(chosen, folder):
        for settings in chosen:
            with (folder / f"begun-{settings.seed}").open("a") as file:
                file.write("g" if len(chosen) > 1 else "s")
            if settings.seed == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def work(chosen, folder, log=None):
        note([chosen], folder)
        return single(chosen, folder)

    def run_together(chosen, **options):
        note(chosen, options["checkpoints"][0].parents[1])
        return group(chosen, **options)

    module.work, module.run_together = work, run_together


def test_a_group_whose_process_dies_is_begun_again_and_then_one_by_one(monkeypatch, tmp_path):
    together_in(monkeypatch, "dying")
    group = [Settings(**{**TINY, "seed": seed}) for seed in (0, 1)]
    assert sweeps.sweep(group, tmp_path / "r", together=2) == (2, 1, 0)
    assert [(tmp_path / "r" / f"begun-{seed}").read_text() for seed in (0, 1)] == ["ggs", "ggss"]
    failed = json.loads((tmp_path / "r" / "failed" / f"{group[1].key}.json").read_text())
    assert failed["error"] == "its process died with exit code -9 (SIGKILL), 2 times"
    assert records.recorded(tmp_path / "r")[0] == {group[0].key}


def test_a_group_that_cannot_run_as_one_runs_one_by_one(monkeypatch, swept, tmp_path):
    def short(*_, **__):
        raise MemoryError("no memory for all of them")

    monkeypatch.setattr(worker, "run_together", short)
    done = list(worker.work_together(GROUP[:2], tmp_path))
    for chosen, (each, _) in zip(GROUP[:2], done, strict=True):
        same_record(record(swept, chosen), json.loads(json.dumps(each)))


def test_a_killed_group_is_continued_from_the_checkpoints_of_its_networks(monkeypatch, swept, tmp_path):
    from pkjax.training import trainer

    def stops(line):
        if line.startswith("epoch 1"):
            raise KeyboardInterrupt

    checkpoints = [tmp_path / settings.key for settings in GROUP[:3]]
    begin = trainer.Trainer.__init__
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda self, module, recipe, measure, epochs, save_seconds,
                        save_last, tell: begin(self, module, recipe, measure, epochs, 0.0, save_last, tell))
    with pytest.raises(KeyboardInterrupt):
        runs.run_together(GROUP[:3], checkpoints=checkpoints, progress=stops)
    saved = [place for place in checkpoints if (place / "manifest.json").exists()]
    assert saved
    lines = []
    done = runs.run_together(GROUP[:3], checkpoints=checkpoints, progress=lines.append)
    assert not any(line.startswith("epoch 1") for line in lines) or len(saved) < 3
    for chosen, (each, _) in zip(GROUP[:3], done, strict=True):
        same_record(record(swept, chosen), json.loads(json.dumps(each)))


CACHE = """
import sys, jax
from pathlib import Path
from pkjax.experiments.compiled import as_here, keep_compiled
keep_compiled(Path(sys.argv[1]))
print(jax.config.jax_compilation_cache_dir, as_here().get("JAX_COMPILATION_CACHE_DIR"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3))
"""


@pytest.mark.parametrize("switch", ["on", "off", "elsewhere"])
def test_compiled_programs_lie_where_they_are_said_to_unless_jax_is_told_otherwise(tmp_path, switch):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"off": {"JAX_ENABLE_COMPILATION_CACHE": "false"}, "on": {},
            "elsewhere": {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}}[switch]
    shown = subprocess.run([sys.executable, "-c", CACHE, tmp_path / "kept"], env=env, cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.split()
    place = {"on": str(tmp_path / "kept" / compiled._machine()), "off": "None", "elsewhere": str(tmp_path / "own")}
    assert shown == [place[switch], place[switch]]
    assert any((tmp_path / "kept").glob("*/*")) == (switch == "on")
    assert not (tmp_path / "own").exists() or any((tmp_path / "own").iterdir())


def test_the_oldest_programs_go_where_the_folder_holds_too_much(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}").write_bytes(bytes(10))
        os.utime(tmp_path / f"{i}", (i, i))
    monkeypatch.setattr(compiled, "BYTES", 25)
    compiled._shorten(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2", "3"]


def test_a_run_like_an_earlier_one_compiles_nothing():
    once = [Settings(**{**TINY, "seed": seed, "pruner": "snip", "compression": 0.5 + seed}) for seed in (0, 1)]
    runs.run(once[0])
    counted = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: counted.append(name) if "backend_compile" in name else None)
    runs.run(once[1])
    jax.monitoring.clear_event_listeners()
    assert not counted
