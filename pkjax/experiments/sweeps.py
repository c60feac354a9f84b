"""Sweeps: many runs, each recorded once, in local processes or on a Ray cluster; killed ones go on where they were."""

import concurrent.futures
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from pkjax.experiments.records import recorded, write_failure, write_record
from pkjax.experiments.settings import Settings
from pkjax.experiments.workers import IMAGES, PARTIAL, begin, failure, work

__all__ = ["Outcome", "sweep"]

RUNS_A_PROCESS = 64
"""Runs after which a local process makes room for a fresh one, and what it has compiled with it."""

Result = tuple[Settings, dict[str, Any], PyTree | None]


class Outcome(NamedTuple):
    """How many runs this call did, how many of them failed, and how many were recorded before."""

    run: int
    failed: int
    before: int


def sweep(runs: Sequence[Settings], output: Path | str, *, workers: int = 1, ray: str | None = None, gpus: float = 0.0,
          retry: bool = False, progress: Callable[[str], None] | None = None) -> Outcome:
    """Run experiments that have no record yet, and record each as soon as it is complete.

    ``output/runs/KEY`` holds record and masks of a run, ``output/failed/KEY.json`` the error of one that failed; the
    others go on. Records appear whole or not at all, and only this process writes them, so a sweep that was killed in
    any way goes on when it is called again: what is recorded is not run again, what was training goes on from its last
    checkpoint (local processes). Two sweeps at once cannot write to one folder.

    Args:
        runs: what to run; ``read_grid`` reads them from a file.
        output: the folder of results, made where it is missing.
        workers: local processes, which share the cores; one is right where there is an accelerator.
        ray: address of a Ray cluster to run on instead ("auto" for the running one, "local" for a new one on this
            machine). A run whose worker dies is run again, up to three times.
        gpus: GPUs that a run takes of the Ray cluster.
        retry: run again what failed before.
        progress: is told after each run how far it is.

    Returns: how many runs this call did, how many of them failed, and how many were recorded before.

    Raises: ValueError for fewer than one worker; BlockingIOError where another sweep is writing to the folder;
    ImportError naming the extra where Pebble, filelock or Ray is missing; ConnectionError where there is no cluster.

    Source: Gebhart, Saxena and Schrater (2021), section 5, is such a sweep.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sweep([], folder)
    Outcome(run=0, failed=0, before=0)
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    output = Path(output).absolute()
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
            if progress:
                progress(f"{count} of {len(pending)} runs" + (f", {broken} failed" if broken else ""))
        for leftover in (PARTIAL, IMAGES):
            shutil.rmtree(output / leftover, ignore_errors=True)
    return Outcome(len(pending), broken, len(runs) - len(pending))


def _alone(output: Path) -> Any:
    """Lock the folder for as long as the sweep takes; the lock of a killed sweep is free again."""
    try:
        import filelock
    except ImportError as error:
        raise ImportError("sweeps need filelock: pip install 'pkjax[sweep]'") from error
    output.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(output / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(f"another sweep is writing to {output}") from None


def _locally(pending: Sequence[Settings], output: Path, workers: int) -> Iterator[Result]:
    try:
        from pebble import ProcessExpired, ProcessPool
    except ImportError as error:
        raise ImportError("sweeps need Pebble: pip install 'pkjax[sweep]'") from error
    if not pending:
        return
    context: Any = multiprocessing.get_context("spawn")     # a forked process cannot use JAX
    pool = ProcessPool(max_workers=min(workers, len(pending)), max_tasks=RUNS_A_PROCESS, context=context,
                       initializer=begin, initargs=(context.Value("i", 0), min(workers, len(pending))))
    try:
        futures: dict[Any, Settings] = {pool.schedule(work, args=[settings, output]): settings for settings in pending}
        for future in concurrent.futures.as_completed(futures):
            settings = futures[future]
            try:
                yield settings, *future.result()
            except ProcessExpired as error:
                yield settings, failure(settings, f"its process died with exit code {error.exitcode}"), None
        pool.close()
    finally:
        pool.stop()
        pool.join()


def _on_ray(pending: Sequence[Settings], address: str, gpus: float) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("a Ray cluster needs Ray: pip install 'pkjax[ray]'") from error
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        # A worker that dies (killed, out of memory, its machine gone) is the cluster's failure, not the run's.
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
