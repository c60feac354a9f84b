"""Sweeps: every run once, whatever is killed; failures are recorded; the table says what the runs did."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pkjax as pk
import pytest
from pkjax.experiments import findings, records, sweeps, workers
from pkjax.experiments.paper_claims import judge_claims
from pkjax.experiments.runs import run
from pkjax.experiments.settings import Settings, grid, read_grid

TINY = {"model": "fc-6x1", "epochs": 2, "batch_size": 32, "train_samples": 96, "test_samples": 50, "traces": 2,
        "output_samples": 8, "prune_steps": 3}


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


def test_a_record_says_what_the_functions_say_one_by_one():
    chosen = Settings(**TINY, pruner="synflow-dist", compression=0.5, seed=2, spectra=2)
    record, masks = run(chosen)
    train = pk.data.load("digits", samples=96, seed=2)
    module = pk.models.fc(6, 1)
    apply_fn, params = pk.from_linen(module, module.init(jax.random.key(2), train.images[:1]))
    mean = train.raw.mean(0, keepdims=True)
    want = pk.prune(lambda p: pk.synflow(apply_fn, p, mean), params, compression=0.5, steps=3).masks
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (masks, want)), strict=True))
    few = train.images[np.random.default_rng(2).permutation(96)[:2]]
    report = pk.analyze(apply_fn, params, few, masks=want)
    np.testing.assert_allclose(record["initial"]["trace_ntk"], report.trace_ntk, rtol=1e-4)
    np.testing.assert_allclose(record["initial"]["gated_trace"], report.gated_trace, rtol=1e-4)
    np.testing.assert_allclose(np.exp(record["history"][0]["ln_trace_pi"]), report.trace_pi, rtol=1e-4)
    shares = record["spectra"]["captured"]      # which vectors of an eigenspace that k cuts are listed is open
    assert len(shares) == len(report.pi) == 20
    assert 0 < shares[0] <= shares[-1] <= 1
    np.testing.assert_allclose(record["spectra"]["bound"], (report.nu * report.pi[:20]).sum(), rtol=1e-4)
    first, last = record["history"][0], record["history"][-1]
    seen = jax.numpy.asarray(train.images)[np.random.default_rng(2).permutation(96)[:8]]
    f = apply_fn(pk.apply_masks(params, want), seen)
    np.testing.assert_allclose(first["output_norm"], np.linalg.norm(f), rtol=1e-4)
    assert first["weight_change"] == first["output_change"] == 0
    assert last["weight_change"] > 0
    assert [row["epoch"] for row in record["history"]] == [0, 1, 2]
    assert record["steps"] == 6
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_a_network_with_batchnorm_runs_and_its_traces_are_those_of_the_functions():
    chosen = Settings(**{**TINY, "model": "resnet20", "epochs": 1, "train_samples": 32, "test_samples": 20},
                      pruner="magnitude", compression=0.5, seed=1)
    record, masks = run(chosen)
    train = pk.data.load("digits", samples=32, seed=1)
    module = pk.models.resnet20(10)
    apply_fn, params = pk.from_linen(module, module.init(jax.random.key(1), train.images[:1]))
    few = train.images[np.random.default_rng(1).permutation(32)[:2]]
    np.testing.assert_allclose(record["initial"]["trace_ntk"], pk.ntk_trace(apply_fn, params, few, masks=masks),
                               rtol=1e-4)
    np.testing.assert_allclose(record["initial"]["gated_trace"],
                               pk.path_kernel.gated_trace(apply_fn, params, few, masks=masks), rtol=1e-4)
    assert record["history"][1]["weight_change"] > 0


SWEPT = [*grid({**TINY, "pruner": ["none", "magnitude"], "compression": 1.0, "seed": [0, 1]})]
TIMED = ["seconds"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "results"
    assert sweeps.sweep(SWEPT, folder, workers=2) == (4, 0, 0)
    return folder


def test_a_sweep_records_every_run_once_and_reads_as_a_table(undisturbed):
    assert sweeps.sweep(SWEPT, undisturbed) == (0, 0, 4)
    table = records.table(undisturbed)
    assert sorted(table["key"]) == sorted(s.key for s in SWEPT)
    assert (table["status"] == "done").all()
    record, masks = run(SWEPT[2])
    row = table[table["key"] == SWEPT[2].key].iloc[0]
    for name in ("test_accuracy", "train_loss", "weight_change", "output_norm"):
        np.testing.assert_allclose(row[name], record["history"][-1][name], rtol=1e-4)
    assert row["density"] == record["pruning"]["density"]
    params = pk.models.fc(6, 1).init(jax.random.key(0), np.ones((1, 8, 8, 1), np.float32))["params"]
    kept = pk.load_masks(undisturbed / "runs" / SWEPT[2].key / "masks.npz", like=params)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (kept, masks)), strict=True))
    epochs = records.epochs_table(undisturbed)
    assert len(epochs) == 4 * 3
    assert sorted(os.listdir(undisturbed)) == [".lock", "runs"]


def test_parquet_holds_the_table_and_is_read_in_place_of_the_records(undisturbed, tmp_path, monkeypatch):
    import pandas as pd

    back = pd.read_parquet(records.export(undisturbed))
    table = records.table(undisturbed)
    assert list(back["key"]) == list(table["key"])
    np.testing.assert_array_equal(back["test_accuracy"], table["test_accuracy"])
    again = records.table(undisturbed / "table.parquet")
    for column in ("trace_pi", "bound", "captured", "compression", "prune_steps", "steps"):
        assert again[column].isna().equals(table[column].isna())
    pd.testing.assert_frame_equal(findings.fits(again), findings.fits(table))
    pd.testing.assert_frame_equal(judge_claims(again), judge_claims(table))
    (tmp_path / "torn.parquet").write_bytes((undisturbed / "table.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"torn.parquet is not a Parquet table of runs"):
        records.table(tmp_path / "torn.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not a table of runs: it has the columns a"):
        records.table(tmp_path / "other.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'pkjax\[sweep\]'"):
        records.table(undisturbed / "table.parquet")


def test_a_sweep_killed_in_the_middle_goes_on_to_the_same_table(undisturbed, tmp_path):
    file, folder = tmp_path / "sweep.toml", tmp_path / "results"
    file.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in [("[defaults]\nmodel", TINY["model"]), *list(
        TINY.items())[1:], ("compression", 1.0), ("seed", [0, 1])]) + '\n[[grid]]\npruner = ["none", "magnitude"]\n')
    command = [sys.executable, "-m", "pkjax", "sweep", file, "--output", folder, "--workers", "2"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not records.recorded(folder)[0]:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/record.json")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{4 - len(before)} runs, 0 of them failed, {len(before)} recorded before" in second.stdout
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())          # nothing was run twice
    table, want = (records.table(f).drop(columns=TIMED) for f in (folder, undisturbed))
    assert table.astype(str).equals(want.astype(str))


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path):
    bad = Settings(**{**TINY, "train_samples": 5000})
    assert sweeps.sweep([bad, SWEPT[0]], tmp_path / "r") == (2, 1, 0)
    table = records.table(tmp_path / "r").set_index("key")
    assert table.loc[bad.key, "status"] == "failed"
    assert "digits has 1437 examples in this split, fewer than the 5000 wanted" in table.loc[bad.key, "error"]
    assert table.loc[SWEPT[0].key, "status"] == "done"
    assert sweeps.sweep([bad, SWEPT[0]], tmp_path / "r") == (0, 0, 2)                  # a failure is a result
    assert sweeps.sweep([bad], tmp_path / "r", retry=True) == (1, 1, 0)


def dies(chosen, folder):
    if chosen.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return workers.work(chosen, folder)


def test_a_process_that_dies_is_a_failure_of_its_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "work", dies)
    assert sweeps.sweep(SWEPT[:2], tmp_path / "r") == (2, 1, 0)
    table = records.table(tmp_path / "r").set_index("seed")
    assert "exit code" in table.loc[1, "error"]
    assert table.loc[0, "status"] == "done"


def test_two_sweeps_cannot_write_to_one_folder(tmp_path):
    with sweeps._alone(tmp_path), pytest.raises(BlockingIOError, match="another sweep is writing"):
        sweeps.sweep(SWEPT, tmp_path)


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records of runs in"):
        records.table(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"record.json is not the record of a run"):
        records.table(tmp_path)


def test_records_of_an_earlier_format_are_refused_by_name(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "runs" / SWEPT[0].key, tmp_path / "runs" / SWEPT[0].key)
    file = tmp_path / "runs" / SWEPT[0].key / "record.json"
    file.write_text(file.read_text().replace(records.FORMAT, "pkjax run 1"))
    with pytest.raises(ValueError, match=r"record.json has the format 'pkjax run 1', but this version reads 'pkjax"):
        records.table(tmp_path)


def kill_once(chosen, folder):
    """Kill the worker at the first try of a run; the file beside the results remembers it."""
    mark = Path(os.environ["PKJAX_TEST_MARK"])
    if chosen.seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return workers.work(chosen, folder)


@pytest.mark.filterwarnings("ignore")        # Ray's own: it forks beside JAX's threads, and leaves files open
def test_a_ray_cluster_whose_worker_is_killed_ends_with_the_same_table(undisturbed, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PKJAX_TEST_MARK", str(tmp_path / "killed"))
    monkeypatch.setattr(sweeps, "work", kill_once)
    assert sweeps.sweep(SWEPT[:2], tmp_path / "r", ray="local") == (2, 0, 0)
    assert (tmp_path / "killed").exists()
    for chosen in SWEPT[:2]:    # alone, as what pandas writes for "unset" depends on the other rows
        shutil.copytree(undisturbed / "runs" / chosen.key, tmp_path / "want" / "runs" / chosen.key)
    table, want = (records.table(tmp_path / name).drop(columns=TIMED) for name in ("r", "want"))
    assert table.astype(str).equals(want.astype(str))
