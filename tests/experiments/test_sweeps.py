"""Sweeps: every run once, whatever is killed; failures are recorded; the table says what the runs did."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pkjax as pk
import pytest
from pkjax.experiments import findings, processes, ray_cluster, records, sweeps, worker
from pkjax.experiments.paper_claims import judge_claims
from pkjax.experiments.runs import run
from pkjax.experiments.settings import Settings, grid

TINY = {"model": "fc-6x1", "epochs": 2, "batch_size": 32, "train_samples": 96, "test_samples": 50, "traces": 2,
        "output_samples": 8, "prune_steps": 3}


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


def same_rows(folder, other, runs):
    """Whether two folders hold the same rows of runs and of epochs, except for times; what pandas writes for "unset"
    depends on the other rows, and so only these runs are compared."""
    def texts(results):
        rows = [records._row(json_record(results, chosen)) for chosen in runs]
        epochs = [json_record(results, chosen)["history"] for chosen in runs]
        return [[{name: str(value) for name, value in row.items() if name not in TIMED} for row in table]
                for table in (rows, *epochs)]

    return texts(folder) == texts(other)


def json_record(folder, chosen):
    return records._read(folder / "runs" / chosen.key / "record.json", chosen.key, "done")


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
    # Folders of another name are records that were being written.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/[!.]*/record.json")}
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


ORDINARY = worker.work


def starting(monkeypatch, name):
    """Start workers with a function of this module in place of `work`."""
    monkeypatch.setattr(processes, "START", processes.START.replace(
        "    main(*arguments)", f"""
    from pkjax.experiments import worker
    from tests.experiments import test_sweeps
    worker.work = test_sweeps.{name}
    main(*arguments)"""))


def dies(chosen, folder, log=None):
    with (folder / f"begun-{chosen.seed}").open("a") as file:
        file.write("x")
    if chosen.seed == 1:
        print("out of cheese", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return ORDINARY(chosen, folder)


def test_a_checkpoint_that_cannot_be_continued_is_begun_again(tmp_path):
    place = tmp_path / worker.PARTIAL / SWEPT[0].key
    place.mkdir(parents=True)
    (place / "manifest.json").write_text('{"epoch": 1')
    record, masks = worker.work(SWEPT[0], tmp_path)
    assert record["status"] == "done"
    assert masks is not None


def test_a_process_that_dies_twice_is_a_failure_of_its_run_alone(tmp_path, monkeypatch):
    starting(monkeypatch, "dies")
    assert sweeps.sweep(SWEPT[:2], tmp_path / "r", workers=2) == (2, 1, 0)
    table = records.table(tmp_path / "r").set_index("seed")
    assert table.loc[1, "error"] == "its process died with exit code -9 (SIGKILL), 2 times"
    assert table.loc[0, "status"] == "done"
    record = json.loads((tmp_path / "r" / "failed" / f"{SWEPT[1].key}.json").read_text())
    assert record["stderr"] == "out of cheese\n"
    assert [(tmp_path / "r" / f"begun-{seed}").read_text() for seed in (0, 1)] == ["x", "xx"]


def ends(chosen, folder, log=None):
    if chosen.seed == 1:
        os._exit(1)
    return ORDINARY(chosen, folder)


def test_a_run_that_ends_its_process_is_a_failure_of_its_run_alone(tmp_path, monkeypatch):
    starting(monkeypatch, "ends")
    assert sweeps.sweep(SWEPT[:2][::-1], tmp_path / "r") == (2, 1, 0)
    table = records.table(tmp_path / "r").set_index("seed")
    assert table.loc[1, "error"] == "its process died with exit code 1, 2 times"
    assert table.loc[0, "status"] == "done"


def large(chosen, folder, log=None):
    """A result of 4 MB, which no pipe holds; what the worker sees of the machine stands in it."""
    record, masks = ORDINARY(chosen, folder)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    record["machine"] = [os.environ["PKJAX_WORKERS"], cores, os.getpid()]
    return {**record, "large": "x" * 4_000_000}, masks


SCRIPT = """
import sys, threading, time
from pathlib import Path
import pytest
from pkjax.experiments import sweeps
from tests.experiments import test_sweeps
patch = pytest.MonkeyPatch()
test_sweeps.starting(patch, "large")
print(sweeps.sweep(test_sweeps.SWEPT, sys.argv[1], workers=2))
"""      # without a main guard


@contextlib.contextmanager
def started(script, *arguments):
    """Run a script that Python reads from its standard input."""
    with subprocess.Popen([sys.executable, "-", *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.stdin.write(script)
            process.stdin.close()
            yield process
        finally:
            process.kill()


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_killed_while_its_parent_is_stopped_costs_only_its_own_run(undisturbed, tmp_path):
    folder = tmp_path / "r"
    with started(SCRIPT, folder) as first:
        wait_for(lambda: any(folder.glob("runs/.*.part")) or any(folder.glob("runs/*")))    # a result is handed over
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(children(first.pid)[0], signal.SIGKILL)
        time.sleep(0.2)
        os.kill(first.pid, signal.SIGCONT)
        shown, errors = first.stdout.read(), first.stderr.read()
        assert (first.wait(), errors) == (0, "")
        assert shown == "Outcome(run=4, failed=0, before=0)\n"
        assert same_rows(folder, undisturbed, SWEPT)
        machines = [json.loads(file.read_text())["machine"] for file in folder.glob("runs/*/record.json")]
        assert {number for number, _, _ in machines} == {"2"}
        assert len({pid for _, _, pid in machines}) in (2, 3)
        everything = sorted(os.sched_getaffinity(0))
        if len(everything) > 1:      # a new process takes the cores of the dead one
            assert {tuple(cores) for _, cores, _ in machines} <= {tuple(everything[0::2]), tuple(everything[1::2])}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_workers_end_with_their_parent(tmp_path, number):
    folder = tmp_path / "r"
    with started(SCRIPT, folder) as first:
        wait_for(lambda: len(children(first.pid)) == 2)
        time.sleep(0.5)
        crew = children(first.pid)
        os.kill(crew[0], signal.SIGSTOP)      # a stopped worker ends too
        first.send_signal(number)
        assert first.wait(30) in (-number, 1)
        assert "KeyboardInterrupt" in first.stderr.read() or number == signal.SIGKILL
        wait_for(lambda: not any(alive(pid) for pid in crew), 30)
        with sweeps._alone(folder):
            pass
        assert records.recorded(folder)[1] == set()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def breaks(chosen, folder, log=None):
    (folder / "runs").touch()                         # no folder can be made there any more
    return ORDINARY(chosen, None)


def test_a_worker_that_cannot_write_its_record_stops_the_sweep_and_no_run_fails(tmp_path, monkeypatch):
    starting(monkeypatch, "breaks")
    with pytest.raises(ChildProcessError, match="a worker process cannot work: FileExistsError"):
        sweeps.sweep(SWEPT[:1], tmp_path / "r")
    monkeypatch.setattr(processes, "START", processes.START.replace("pkjax.experiments.worker", "no_such_module"))
    with pytest.raises(ChildProcessError, match="cannot work: ModuleNotFoundError: No module named 'no_such_module'"):
        sweeps.sweep(SWEPT[:1], tmp_path / "s")
    assert records.recorded(tmp_path / "s") == (set(), set())


def fills(chosen, folder, log=None):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        return ORDINARY(chosen, folder)


def test_no_run_fails_on_a_full_disk(tmp_path, monkeypatch):
    starting(monkeypatch, "fills")
    with pytest.raises(ChildProcessError, match=r"cannot be written .ValueError: RESOURCE_EXHAUSTED: No space left"):
        sweeps.sweep(SWEPT[:1], tmp_path / "r")
    assert records.recorded(tmp_path / "r") == (set(), set())


@pytest.mark.parametrize("workers", [0, True])
def test_arguments_of_no_sweep_are_refused_before_anything_runs(tmp_path, workers):
    with pytest.raises(ValueError, match=f"workers must be a whole number of at least 1, got {workers}"):
        sweeps.sweep(SWEPT[:1], tmp_path / "r", workers=workers)
    with pytest.raises(ValueError, match="is not UTF-8"):
        sweeps.sweep(SWEPT[:1], tmp_path / "\udcff")
    assert not list(tmp_path.iterdir())


def test_equal_settings_are_one_run(undisturbed):
    again = Settings(**{**TINY, "prune_steps": None, "traces": 2}, compression=0, drops=())
    assert sweeps.sweep([*SWEPT, again, SWEPT[0], *SWEPT], undisturbed) == (0, 0, 4)


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


def kill_once(group, folder, logger):
    """Kill the worker at the first try of a run; the file beside the results remembers it."""
    mark = Path(os.environ["PKJAX_TEST_MARK"])
    if group[0].seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return worker.work_together(group, folder, logger)


@pytest.mark.filterwarnings("ignore")        # Ray's own: it forks beside JAX's threads, and leaves files open
def test_a_ray_cluster_whose_worker_is_killed_ends_with_the_same_table(undisturbed, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PKJAX_TEST_MARK", str(tmp_path / "killed"))
    monkeypatch.setattr(ray_cluster, "work_together", kill_once)
    assert sweeps.sweep(SWEPT[:2], tmp_path / "r", ray="local") == (2, 0, 0)
    assert (tmp_path / "killed").exists()
    assert same_rows(tmp_path / "r", undisturbed, SWEPT[:2])


def test_a_cluster_that_is_not_there_is_an_error_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))      # whatever else runs on this machine
    began = time.monotonic()
    with socket.socket() as free, socket.socket() as deaf:
        free.bind(("127.0.0.1", 0))
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        nothing, other = (f"127.0.0.1:{place.getsockname()[1]}" for place in (free, deaf))
        monkeypatch.setattr(ray_cluster, "SECONDS", 0.5)
        for address in (nothing, f"ray://{nothing}", other):
            with pytest.raises(ConnectionError, match=f"no Ray cluster at {address}: .*ray start"):
                sweeps.sweep(SWEPT, tmp_path / "r", ray=address)
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(nothing)      # left by a cluster that died
        with pytest.raises(ConnectionError, match=f"no Ray cluster at {nothing}"):
            sweeps.sweep(SWEPT, tmp_path / "r", ray="auto")
        monkeypatch.setenv("RAY_ADDRESS", nothing)
        with pytest.raises(ConnectionError, match=f"no Ray cluster at {nothing}"):
            sweeps.sweep(SWEPT, tmp_path / "r", ray="auto")
    for address in ("", "host", "host:port", "host:0", "host:99999", "a b:1", "http://host:1"):
        with pytest.raises(ValueError, match=r"is HOST:PORT, ray://HOST:PORT, auto or local, got"):
            sweeps.sweep(SWEPT, tmp_path / "r", ray=address)
    assert time.monotonic() - began < 15
    assert records.recorded(tmp_path / "r") == (set(), set())
