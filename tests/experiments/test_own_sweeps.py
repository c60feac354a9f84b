"""The guide's sweep of a network, a score and a data set of one's own: killed, resumed, drawn; and loggers."""

import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pkjax as pk
import pytest
from pkjax.experiments import figures, loggers, records, sweeps, worker
from pkjax.experiments.paper_claims import judge_claims
from pkjax.experiments.runs import run
from pkjax.experiments.settings import Settings, grid

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guides" / "own_sweeps.md").read_text()
FILES = dict(re.findall(r'^```(?:python|toml) title="([\w.]+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
USED = ("my_module.py", "wine.toml")
SHELL = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split("#")[0].split()[1:] for block in SHELL for line in block.splitlines()]
TINY = {"model": "fc-4x1", "epochs": 2, "batch_size": 32, "train_samples": 64, "test_samples": 40, "traces": 0,
        "output_samples": 2}
LOGGER = """
import json
from pathlib import Path

class Log:
    def __init__(self, settings):
        self.file = Path(__file__).with_name(f"{settings.key}.log")
        self.write("begin", settings.seed)

    def write(self, *line):
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_epoch(self, row):
        self.write("epoch", row["epoch"], row["test_loss"])

    def on_run(self, record):
        self.write("end", record["status"])

class Broken(Log):
    def on_epoch(self, row):
        raise ConnectionError("no tracker")

class Deaf:
    def __init__(self, settings): pass
    def on_epoch(self, row): pass

def nothing(settings): return None
def stranger(config): return None
"""


def command(folder, *arguments):
    return [sys.executable, "-m", "pkjax", *map(str, arguments)], {
        "cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """The name of a module with loggers, and its folder."""
    name = f"tracker_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(LOGGER)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name, tmp_path


def lines(folder, settings):
    return [json.loads(line) for line in (folder / f"{settings.key}.log").read_text().splitlines()]


@pytest.mark.slow
def test_the_guides_sweep_is_killed_resumed_and_drawn(tmp_path):
    for name in USED:
        (tmp_path / name).write_text(FILES[name])
    assert sum(bool(line.strip()) for name in USED for line in FILES[name].splitlines()) <= 20
    swept, drawn = COMMANDS[:2]
    assert (swept[:2], drawn[:2]) == (["sweep", "wine.toml"], ["figures", "3"])
    arguments, options = command(tmp_path, *swept)
    first = subprocess.Popen(arguments, **options)
    with first:
        deadline = time.monotonic() + 200
        while not records.recorded(tmp_path / "wine")[0]:
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "wine").glob("runs/*/record.json")}
    assert 1 <= len(before) < 10
    second = subprocess.run(arguments, check=True, **options)
    assert f"{10 - len(before)} runs, 0 of them failed, {len(before)} recorded before" in second.stdout
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())
    table = records.table(tmp_path / "wine")
    assert table["pruner"].value_counts().to_dict() == {"my_module:score": 4, "synflow": 4, "none": 2}
    assert set(table["model"]) == {"my_module:make"}
    assert table["test_accuracy"].min() > 0.3
    assert table.groupby("pruner")["test_accuracy"].max()["none"] > 0.8
    arguments, options = command(tmp_path, *drawn)
    subprocess.run(arguments, check=True, **options)
    for draw in (figures.figure1, figures.figure2, figures.predictors):
        draw(table).savefig(tmp_path / "drawn.png")
    assert set(judge_claims(table)["model"]) == {"my_module:make"}
    assert (tmp_path / "wine" / "figure-3.png").stat().st_size > 10_000
    # Other content is another run: nothing of the former is taken for it, and nothing is lost.
    (tmp_path / "my_module.py").write_text(FILES["my_module.py"].replace("abs(w * g)", "abs(g)"))
    text = FILES["wine.toml"].replace('["none", "my_module:score", "synflow"]', '"my_module:score"')
    (tmp_path / "wine.toml").write_text(text.replace("[0, 1]", "[0]"))
    arguments, options = command(tmp_path, *swept)
    assert "2 runs, 0 of them failed, 0 recorded before" in subprocess.run(arguments, check=True, **options).stdout
    names = {name.partition("@")[0] for name in records.table(tmp_path / "wine")["pruner"]}
    assert names == {"my_module:score", "synflow", "none"}
    assert records.table(tmp_path / "wine")["pruner"].nunique() == 4


@pytest.mark.parametrize("together", [1, 2])
def test_a_logger_hears_of_every_run_and_epoch_in_the_workers(tracked, together):
    name, folder = tracked
    runs = [*grid({**TINY, "seed": [0, 1]}), Settings(**{**TINY, "train_samples": 5000})]
    assert sweeps.sweep(runs, folder / "r", logger=f"{name}:Log", together=together) == (3, 1, 0)
    for settings in runs[:2]:
        record = json.loads((folder / "r" / "runs" / settings.key / "record.json").read_text())
        assert lines(folder, settings) == [["begin", settings.seed], *(
            ["epoch", row["epoch"], row["test_loss"]] for row in record["history"]), ["end", "done"]]
    assert lines(folder, runs[2]) == [["begin", 0], ["end", "failed"]]
    assert sweeps.sweep(runs, folder / "r", logger=f"{name}:Log") == (0, 0, 3)
    assert len(lines(folder, runs[2])) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")        # Ray's own
def test_a_ray_cluster_imports_what_the_sweep_does(tracked):
    pytest.importorskip("ray")
    name, folder = tracked
    (folder / f"{name}_score.py").write_text("def score(params): return {k: v for k, v in params.items()}\n")
    chosen = Settings(**TINY, pruner=f"{name}_score:score", compression=0.3)
    assert sweeps.sweep([chosen], folder / "r", ray="local", logger=f"{name}:Log") == (1, 0, 0)
    assert lines(folder, chosen)[-1] == ["end", "done"]


def test_a_logger_that_raises_costs_its_log_alone(tracked):
    name, folder = tracked
    settings = Settings(**TINY)
    with pytest.warns(UserWarning, match=f"the logger '{name}:Broken' failed .*: ConnectionError: no tracker"):
        (record, _), = worker.work_together([settings], None, f"{name}:Broken")
    assert record["status"] == "done"
    assert lines(folder, settings) == [["begin", 0]]


@pytest.mark.parametrize(("logger", "error", "message"), [
    ("stranger", TypeError, r"must take \(settings\), but needs config"),
    ("Deaf", TypeError, r"methods on_epoch\(row\) and on_run\(record\), but .*Deaf'> has no on_run"),
    ("Missing", ValueError, "has no 'Missing'"),
])
def test_a_logger_that_hears_nothing_is_refused_before_anything_runs(tracked, logger, error, message):
    name, folder = tracked
    with pytest.raises(error, match=message):
        sweeps.sweep([Settings(**TINY)], folder / "r", logger=f"{name}:{logger}")
    assert not (folder / "r").exists()


def test_a_function_that_gives_no_log_is_a_warning(tracked):
    with pytest.warns(UserWarning, match=r"must give an object with the methods on_epoch\(row\)"):
        loggers.Log(f"{tracked[0]}:nothing", Settings())


def test_a_file_names_its_logger(tracked):
    name, folder = tracked
    (folder / "sweep.toml").write_text(f'logger = "{name}:Log"\n[defaults]\nseed = 0\n')
    assert loggers.logger_name(loggers.read_logger(folder / "sweep.toml")) == f"{name}:Log"
    (folder / "sweep.toml").write_text("[defaults]\nseed = 0\n")
    assert loggers.read_logger(folder / "sweep.toml") is None
    (folder / "sweep.toml").write_text("logger = 3\n")
    with pytest.raises(TypeError, match=r"sweep.toml: logger must be a text such as .*, got 3"):
        loggers.read_logger(folder / "sweep.toml")


def test_every_new_row_is_told_once_and_before_it_is_saved(tmp_path):
    digits = pk.data.load("digits", samples=64)
    recipe, module, told = pk.training.Recipe(epochs=3, batch_size=32), pk.models.fc(3, 1), []
    options = {"recipe": recipe, "checkpoint": tmp_path / "run", "on_epoch": told.append}
    pk.training.fit(module, digits, digits, epochs=1, **options)
    done = pk.training.fit(module, digits, digits, **options)
    assert told == list(done.history)
    both = []
    fits = pk.training.fit_together(module, digits, digits, recipe=recipe, seeds=[0, 1],
                                    on_epoch=lambda i, row: both.append((i, row)))
    assert [[row for place, row in both if place == i] for i in (0, 1)] == [list(fit.history) for fit in fits]
    record, _ = run(Settings(**TINY), on_epoch=(rows := []).append)
    assert rows == record["history"]


class Tracker:
    """Notes every call, and returns itself: a stand-in for a tracker's objects."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        def call(*values, **named):
            self.calls.append((name, *values))
            return self

        return self if name == "info" else "id" if name in ("run_id", "experiment_id") else call


@pytest.mark.parametrize(("file", "module", "name", "epoch", "end"), [
    ("trackers.py", "tensorboardX", "TensorBoard", ("add_scalar", "test_loss", 2.5, 1), ("close",)),
    ("trackers_wandb.py", "wandb", "WandB", ("log", {"epoch": 1, "test_loss": 2.5}), ("finish",)),
    ("trackers_mlflow.py", "mlflow", "MLflow", ("log_metric", "id", "test_loss", 2.5),
     ("set_terminated", "id", "FINISHED")),
])
def test_the_guides_recipes_tell_a_tracker_every_number(monkeypatch, file, module, name, epoch, end):
    calls = []
    fake = types.ModuleType(module)
    fake.__getattr__ = getattr(Tracker(calls), "__getattr__")  # noqa: B009
    monkeypatch.setitem(sys.modules, module, fake)
    space = {}
    exec(FILES[file], space)
    log = space[name](settings=Settings())
    log.on_epoch({"epoch": 1, "test_loss": 2.5})
    log.on_run({"status": "done"})
    assert epoch in calls
    assert calls[-1] == end
