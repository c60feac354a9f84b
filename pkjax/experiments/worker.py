"""A process that runs experiments for a sweep and writes their records itself.

It gets a group of runs at a time, their settings as a line of JSON on the standard input. The parent learns from the
record that a run is done: nothing is handed over, so neither side ever waits for the other to read. The end of the
input is that of the parent, and ends the process at once, wherever it is; an empty line ends it between two groups.
"""

import errno
import json
import os
import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jaxtyping import PyTree

from pkjax import files
from pkjax.data.dataset import Dataset
from pkjax.experiments.compiled import keep_compiled
from pkjax.experiments.environment import environment
from pkjax.experiments.loggers import Log
from pkjax.experiments.methods import images_of
from pkjax.experiments.records import FORMAT, write_failure, write_record
from pkjax.experiments.runs import run, run_together
from pkjax.experiments.settings import Settings
from pkjax.training.checkpoints import CheckpointError

__all__ = ["COMPILED", "IMAGES", "PARTIAL", "UNABLE", "failure", "main", "tail", "work", "work_together"]

PARTIAL, IMAGES, COMPILED = "partial", "images", "compiled"
UNABLE = 86
"""Exit code of a worker that cannot start or write a record; a run that ends its process may use any of the usual."""
TAIL = 4000
"""Bytes of a worker's standard error stream that a record keeps at most."""


def main(output: str, slot: int, workers: int, logger: str | None = None) -> None:
    """Work for the sweep of a folder until its parent has no more runs.

    Args:
        output: the folder of results.
        slot: this worker's number, from 0; the process that replaces a dead one has the same.
        workers: how many there are.
        logger: name of the user's logger.
    """
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)      # nothing else reads the parent's lines
    pending: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines, pending), daemon=True).start()
    code = 0
    try:
        _take_cores(slot, workers)
        keep_compiled(Path(output) / COMPILED)
        while line := pending.get().strip():
            _record([Settings(**values) for values in json.loads(line)], Path(output), logger)
    except BaseException:      # not a failure of the run, but of this process, such as a full disk
        traceback.print_exc()
        code = UNABLE
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)      # no library's threads are waited for


def _receive(lines: BinaryIO, pending: "queue.SimpleQueue[bytes]") -> None:
    while line := lines.readline():
        pending.put(line)
    os._exit(0)


def _take_cores(slot: int, workers: int) -> None:
    """Share the cores among the workers, which would otherwise wait for one another; no core belongs to two."""
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if workers <= len(cores):
            os.sched_setaffinity(0, cores[slot::workers])


def _record(group: Sequence[Settings], output: Path, logger: str | None) -> None:
    """Run experiments and write their records, or those of their failures."""
    for record, masks in work_together(group, output, logger):
        sys.stderr.flush()
        record["stderr"] = tail(2)
        if masks is None:
            write_failure(output, record)
        else:
            write_record(output, record, masks)


def tail(number: int) -> str:
    """Read the end of the file behind a file descriptor; nothing where it is not a file that can be read."""
    try:
        size = os.fstat(number).st_size
        return os.pread(number, TAIL, max(size - TAIL, 0)).decode("utf-8", "replace")
    except (OSError, AttributeError):      # Windows has no pread
        return ""


def work(settings: Settings, folder: Path | None, log: Log | None = None
         ) -> tuple[dict[str, Any], PyTree | None]:
    """Run an experiment; return its record and masks, or the record of its failure and None.

    `folder` is the folder of results, where this process can see it: it keeps decoded images and unfinished trainings.
    A training that cannot be continued, such as one of another version, begins again.
    """
    checkpoint = None if folder is None else folder / PARTIAL / settings.key
    options: Any = {"load": _loader(folder), "checkpoint": checkpoint, "on_epoch": log.on_epoch if log else None}
    try:
        try:
            record, masks = run(settings, **options)
        except CheckpointError:     # what a killed or older sweep left is of use to no other run
            shutil.rmtree(checkpoint or "")
            record, masks = run(settings, **options)
    except (Exception, SystemExit) as error:  # whatever a run raises is its result; the sweep continues
        return _failed(settings, error), None
    return record, jax.tree.map(np.asarray, masks)


def work_together(group: Sequence[Settings], folder: Path | None, logger: str | None = None
                  ) -> Iterator[tuple[dict[str, Any], PyTree | None]]:
    """Run experiments whose networks train together; yield what `work` returns for each, in order.

    Where the group fails as a whole, for lack of memory say, its runs are done one by one. The logger hears of every
    run before it is recorded.
    """
    logs = [Log(logger, settings) for settings in group]
    for log, (record, masks) in zip(logs, _worked(group, folder, logs), strict=True):
        log.on_run(record)
        yield record, masks


def _worked(group: Sequence[Settings], folder: Path | None, logs: Sequence[Log]
            ) -> Iterator[tuple[dict[str, Any], PyTree | None]]:
    together: list[Any] = []
    if len(group) > 1:
        checkpoints = None if folder is None else [folder / PARTIAL / settings.key for settings in group]
        try:
            together = run_together(group, load=_loader(folder), checkpoints=checkpoints,
                                    on_epoch=lambda i, row: logs[i].on_epoch(row))
        except (Exception, SystemExit) as error:
            _failed(group[0], error)
    if not together:
        for settings, log in zip(group, logs, strict=True):
            yield work(settings, folder, log)
    for settings, result in zip(group, together, strict=False):
        if isinstance(result, BaseException):
            yield _failed(settings, result), None
        else:
            yield result[0], jax.tree.map(np.asarray, result[1])


def _failed(settings: Settings, error: BaseException) -> dict[str, Any]:
    """Make the record of the failure of a run; raise an error of the disk."""
    if isinstance(error, OSError) and error.errno in _DISK:
        raise error
    return failure(settings, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)),
                   environment())


_DISK = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that is full or broken: no run can be blamed for them."""


def failure(settings: Settings, error: str, trace: str, where: dict[str, str], stderr: str = "") -> dict[str, Any]:
    """Make the record of a run that failed."""
    return {"format": FORMAT, "key": settings.key, "status": "failed", "settings": settings.to_dict(),
            "error": error, "traceback": trace, "environment": where, "stderr": stderr}


@lru_cache(maxsize=2)
def _loader(folder: Path | None) -> Callable[[str, str], Dataset]:
    """Load data sets, each once per process; decoded images stay in the folder for the next process."""
    @lru_cache(maxsize=4)
    def load(name: str, split: str) -> Dataset:
        if folder is None or name == "digits":
            return images_of(name, split)
        file = folder / IMAGES / f"{name.replace(':', '.')}-{split}.npz"
        if not file.exists():
            dataset = images_of(name, split)
            file.parent.mkdir(parents=True, exist_ok=True)
            kept: dict[str, Any] = {key: np.asarray(getattr(dataset, key)) for key in _KEPT}
            with files.replacing(file) as part, part.open("xb") as out:
                np.savez(out, **kept)
            return dataset
        with np.load(file, allow_pickle=False) as saved:
            kept = {key: saved[key] for key in _KEPT}
        return Dataset(**{**kept, "classes": int(kept["classes"]), "name": name, "levels": int(kept["levels"])})

    return load


_KEPT = ("pixels", "labels", "mean", "std", "classes", "levels")
