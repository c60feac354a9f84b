"""Sweeps: many runs, each recorded once, in local processes or on a Ray cluster; killed sweeps can be resumed."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pkjax.experiments.loggers import logger_name
from pkjax.experiments.processes import run_locally
from pkjax.experiments.ray_cluster import run_on_ray
from pkjax.experiments.records import FAILED, RUNS, check_records, recorded
from pkjax.experiments.settings import Settings, unique
from pkjax.experiments.worker import COMPILED, IMAGES, PARTIAL
from pkjax.extras import needed
from pkjax.tables import Progress, reporter
from pkjax.training.checkpoints import check_folder

__all__ = ["Outcome", "sweep"]


class Outcome(NamedTuple):
    """How many runs a sweep did."""

    run: int
    """Runs of this call; equal settings are one."""
    failed: int
    """How many of them failed."""
    before: int
    """Runs that were recorded before."""


def sweep(runs: Sequence[Settings], output: Path | str, *, workers: int = 1, together: int = 1,
          ray: str | None = None, gpus: float = 0.0, retry: bool = False, progress: Progress = False,
          logger: str | Callable[..., Any] | None = None) -> Outcome:
    """Run experiments that have no record yet, and record each as soon as it is complete.

    `output/runs/KEY` holds the record and masks of a run, `output/failed/KEY.json` the error of a failed run, after
    which the others continue. Records appear whole or not at all, each written by the process that ran it. A run whose
    process dies is begun once more, and fails if that dies too. A sweep that was killed, and its workers with it,
    resumes when it is called again: recorded runs are not repeated, and interrupted trainings continue from their last
    checkpoint (in local processes). Equal settings are one run. Two sweeps cannot write to one folder at the same time.

    Workers are processes with a command line of their own, so that `sweep` works at the top level of a script and in a
    notebook. Each of N workers takes its share of the cores, and of the memory by `PKJAX_WORKERS=N` in its environment.

    Args:
        runs: what to run; `read_grid` reads them from a file.
        output: the folder of results, created where it is missing.
        workers: local processes, which share the cores; keep 1 where there is an accelerator.
        together: how many runs that differ in seed, pruner, compression and pruning steps alone go to a worker at a
            time, which trains their networks as one program where that pays (`pk.training.fit_together`). Each run
            keeps its own record, and fails alone.
        ray: address of a Ray cluster to run on instead ("auto" for the running one, "local" for a new one on this
            machine). A run whose worker dies is repeated up to three times.
        gpus: GPUs of the Ray cluster that a run occupies.
        retry: whether to repeat runs that failed before.
        progress: where to report the number of finished runs.
        logger: a class or function of the user's own, or its name "module:Log", that the process that does a run calls
            by `logger(settings=settings)` for an object with two methods: `on_epoch(row)` is given every new row of the
            run's history, `on_run(record)` the record of the run, done or failed, before it is written. Runs that go
            together have an object each, whose methods may be called from several threads. What is done again after a
            process was killed is logged again. A logger that raises an error is not called again in that run, with a
            warning in the run's `stderr`; it does not belong to the settings of a run.

    Returns:
        how many runs this call did, how many of them failed, and how many were recorded before.

    Raises:
        TypeError: the logger does not take `settings`, or lacks a method.
        ValueError: the logger cannot be imported, `workers` or `together` is less than 1, the address or the number of
            GPUs is malformed, the folder's name is not UTF-8, or it holds a record that cannot be read; the message
            names it.
        NotADirectoryError: `output` is a file.
        BlockingIOError: another sweep is writing to the folder.
        ImportError: filelock or Ray is missing; the message names the extra.
        ConnectionError: there is no cluster.
        ChildProcessError: a worker cannot start or cannot write its records or checkpoints, as on a full disk.

    Source: Gebhart, Saxena and Schrater (2021), section 5, is such a sweep.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sweep([], folder)
        Outcome(run=0, failed=0, before=0)
    """
    for name, value in (("workers", workers), ("together", together)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= gpus < float("inf"):
        raise ValueError(f"gpus must be a number of at least 0, got {gpus}")
    output, runs, tell = Path(output).absolute(), unique(runs), reporter(progress)
    check_folder(output)
    listener = logger_name(logger)
    with _alone(output):
        _tidy(output)
        check_records(output, again={settings.key for settings in runs})
        done, failed = recorded(output)
        pending = [settings for settings in runs if settings.key not in (done if retry else done | failed)]
        groups, broken = _grouped(pending, together), 0
        with contextlib.closing(run_locally(groups, output, workers, listener) if ray is None else
                                run_on_ray(groups, output, ray, gpus, listener)) as ended:
            for count, (settings, status) in enumerate(ended, 1):
                broken += status == "failed"
                shutil.rmtree(output / PARTIAL / settings.key, ignore_errors=True)
                tell(f"{count} of {len(pending)} runs" + (f", {broken} failed" if broken else ""))
        for leftover in (PARTIAL, IMAGES, COMPILED):
            shutil.rmtree(output / leftover, ignore_errors=True)
    return Outcome(len(pending), broken, len(runs) - len(pending))


def _grouped(runs: Sequence[Settings], together: int) -> list[list[Settings]]:
    """Put runs that can train together into groups of nearly one size, `together` at most."""
    alike: dict[str, list[Settings]] = {}
    for settings in runs:
        alike.setdefault(settings.program if together > 1 else settings.key, []).append(settings)
    groups = []
    for each in alike.values():
        parts = -(-len(each) // together)
        groups += [each[len(each) * i // parts:len(each) * (i + 1) // parts] for i in range(parts)]
    return groups


def _tidy(output: Path) -> None:
    """Delete what killed workers left half written."""
    for name in (RUNS, FAILED):
        for part in (output / name).glob(".*.part"):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


def _alone(output: Path) -> Any:
    """Lock the folder for the time of the sweep; the lock of a killed sweep is released."""
    filelock = needed("filelock", "sweep", "sweeps need filelock")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; name another folder for the results")
    output.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(output / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(f"another sweep is writing to {output}") from None
