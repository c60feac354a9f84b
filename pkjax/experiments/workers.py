"""The work of a process that runs experiments for a sweep."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import pkjax as pk
from pkjax import files
from pkjax.data.dataset import Dataset
from pkjax.experiments.environment import environment
from pkjax.experiments.records import FORMAT
from pkjax.experiments.runs import run
from pkjax.experiments.settings import Settings

__all__ = ["begin", "failure", "work"]

PARTIAL, IMAGES = "partial", "images"


def begin(counter: Any, workers: int) -> None:
    """Prepare a local worker process: give it its share of the cores, and end it with its parent.

    Workers that each used all cores would only wait for one another.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with counter.get_lock():
        mine = counter.value
        counter.value += 1
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[mine % workers::workers] or cores)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(settings: Settings, folder: Path | None) -> tuple[dict[str, Any], PyTree | None]:
    """Run an experiment; return its record and masks, or the record of its failure and None.

    `folder` is the folder of results, where this process can see it: it keeps decoded images and unfinished trainings.
    """
    try:
        record, masks = run(settings, load=_loader(folder),
                            checkpoint=None if folder is None else folder / PARTIAL / settings.key)
    except Exception as error:  # whatever a run raises is its result; the sweep continues
        return failure(settings, f"{type(error).__name__}: {error}", traceback.format_exc()), None
    return record, jax.tree.map(np.asarray, masks)


def failure(settings: Settings, error: str, trace: str = "") -> dict[str, Any]:
    """Make the record of a run that failed."""
    return {"format": FORMAT, "key": settings.key, "status": "failed", "settings": settings.to_dict(),
            "error": error, "traceback": trace, "environment": environment()}


@lru_cache(maxsize=2)
def _loader(folder: Path | None) -> Callable[[str, str], Dataset]:
    """Load data sets, each once per process; decoded images stay in the folder for the next process."""
    @lru_cache(maxsize=4)
    def load(name: str, split: str) -> Dataset:
        if folder is None or name == "digits":
            return pk.data.load(name, split=split)
        file = folder / IMAGES / f"{name}-{split}.npz"
        if not file.exists():
            dataset = pk.data.load(name, split=split)
            file.parent.mkdir(parents=True, exist_ok=True)
            kept: dict[str, Any] = {key: np.asarray(getattr(dataset, key)) for key in _KEPT}
            with files.replacing(file) as part, part.open("xb") as out:
                np.savez_compressed(out, **kept)
            return dataset
        with np.load(file, allow_pickle=False) as saved:
            kept = {key: saved[key] for key in _KEPT}
        return Dataset(**{**kept, "classes": int(kept["classes"]), "name": name, "levels": int(kept["levels"])})

    return load


_KEPT = ("pixels", "labels", "mean", "std", "classes", "levels")
