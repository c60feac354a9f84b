"""Sweeps: many runs, each recorded once, in local processes or on a Ray cluster; killed sweeps can be resumed."""

import concurrent.futures
import logging
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from pkjax.experiments.records import recorded, write_failure, write_record
from pkjax.experiments.settings import Settings
from pkjax.experiments.workers import IMAGES, PARTIAL, begin, failure, work
from pkjax.extras import needed
from pkjax.tables import Progress, reporter

__all__ = ["Outcome", "sweep"]

RUNS_A_PROCESS = 64
"""Runs after which a fresh process replaces a local one, to free the memory of what that one compiled."""

Result = tuple[Settings, dict[str, Any], PyTree | None]


class Outcome(NamedTuple):
    """How many runs a sweep did."""

    run: int
    """Runs of this call."""
    failed: int
    """How many of them failed."""
    before: int
    """Runs that were recorded before."""


def sweep(runs: Sequence[Settings], output: Path | str, *, workers: int = 1, ray: str | None = None, gpus: float = 0.0,
          retry: bool = False, progress: Progress = False) -> Outcome:
    """Run experiments that have no record yet, and record each as soon as it is complete.

    `output/runs/KEY` holds the record and masks of a run, `output/failed/KEY.json` the error of a failed run, after
    which the others continue. Records appear whole or not at all, and only this process writes them. A sweep that was
    killed resumes when it is called again: recorded runs are not repeated, and interrupted trainings continue from
    their last checkpoint (in local processes). Two sweeps cannot write to one folder at the same time.

    Args:
        runs: what to run; `read_grid` reads them from a file.
        output: the folder of results, created where it is missing.
        workers: local processes, which share the cores; keep 1 where there is an accelerator.
        ray: address of a Ray cluster to run on instead ("auto" for the running one, "local" for a new one on this
            machine). A run whose worker dies is repeated up to three times.
        gpus: GPUs of the Ray cluster that a run occupies.
        retry: whether to repeat runs that failed before.
        progress: where to report the number of finished runs.

    Returns:
        how many runs this call did, how many of them failed, and how many were recorded before.

    Raises:
        ValueError: there is less than one worker.
        BlockingIOError: another sweep is writing to the folder.
        ImportError: Pebble, filelock or Ray is missing; the message names the extra.
        ConnectionError: there is no cluster.

    Source: Gebhart, Saxena and Schrater (2021), section 5, is such a sweep.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sweep([], folder)
        Outcome(run=0, failed=0, before=0)
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    output = Path(output).absolute()
    tell = reporter(progress)
    with _alone(output):
        done, failed = recorded(output)
        pending = [settings for settings in runs if settings.key not in (done if retry else done | failed)]
        execute = _locally(pending, output, workers) if ray is None else _on_ray(pending, ray, gpus)
        broken = 0
        for count, (settings, record, masks) in enumerate(execute, 1):
            if record["status"] == "done":
                write_record(output, record, masks)
            else:
                write_failure(output, record)
                broken += 1
            shutil.rmtree(output / PARTIAL / settings.key, ignore_errors=True)
            tell(f"{count} of {len(pending)} runs" + (f", {broken} failed" if broken else ""))
        for leftover in (PARTIAL, IMAGES):
            shutil.rmtree(output / leftover, ignore_errors=True)
    return Outcome(len(pending), broken, len(runs) - len(pending))


def _alone(output: Path) -> Any:
    """Lock the folder for the time of the sweep; the lock of a killed sweep is released."""
    filelock = needed("filelock", "sweep", "sweeps need filelock")
    output.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(output / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(f"another sweep is writing to {output}") from None


def _locally(pending: Sequence[Settings], output: Path, workers: int) -> Iterator[Result]:
    pebble = needed("pebble", "sweep", "sweeps need Pebble")
    if not pending:
        return
    context: Any = multiprocessing.get_context("spawn")     # a forked process cannot use JAX
    pool = pebble.ProcessPool(max_workers=min(workers, len(pending)), max_tasks=RUNS_A_PROCESS, context=context,
                       initializer=begin, initargs=(context.Value("i", 0), min(workers, len(pending))))
    try:
        futures: dict[Any, Settings] = {pool.schedule(work, args=[settings, output]): settings for settings in pending}
        for future in concurrent.futures.as_completed(futures):
            settings = futures[future]
            try:
                yield settings, *future.result()
            except pebble.ProcessExpired as error:
                yield settings, failure(settings, f"its process died with exit code {error.exitcode}"), None
        pool.close()
    finally:
        pool.stop()
        pool.join()


def _on_ray(pending: Sequence[Settings], address: str, gpus: float) -> Iterator[Result]:
    ray = needed("ray", "ray", "a Ray cluster needs Ray")
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        # A worker that dies (killed, out of memory, machine lost) is a failure of the cluster, not of the run.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(work)
        waiting = {remote.remote(settings, None): settings for settings in pending}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            settings = waiting.pop(reference)
            try:
                yield settings, *ray.get(reference)
            except ray.exceptions.RayError as error:
                yield settings, failure(settings, f"{type(error).__name__}: {error}"), None
    finally:
        ray.shutdown()
