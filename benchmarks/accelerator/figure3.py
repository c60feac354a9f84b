"""As much of figure 3 (accuracy against compression) for ResNet-20 on the whole of CIFAR-10 as the time allows.

    python -m benchmarks.accelerator.figure3 [--small] [--images FILE] [--epochs E] [--output FILE.json]

One sweep: dense, then six pruners at compression 1, then at 2. Four at most train together, where `training.json`
beside the output says that an epoch of several takes less than as many of one; else one after the other. So what is
done when the time is up is recorded, and drawn. The number of epochs is what the time allows by the seconds of an epoch
there, or measured here. Writes the runs to the JSON file, and beside it the sweep's table (`.parquet`) and picture
(`.png`). `run.sh` switches XLA's timing of candidates off for this part (`XLA_FLAGS` in the file).
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pkjax as pk
from pkjax import experiments, training
from pkjax.experiments.settings import grid
from pkjax.experiments.worker import IMAGES

from benchmarks.accelerator.images import SPLITS, load, noise
from benchmarks.accelerator.rows import Rows, message, options
from benchmarks.accelerator.training import epochs_of, train_one

PRUNERS = ["none", "snip", "grasp", "synflow", "synflow-l2", "synflow-dist", "synflow-l2-dist"]
OVERHEAD = 70.0
"""Seconds for compiling, pruning and measuring, by which the epochs' share of the time is reduced."""
TOGETHER = 4
"""Networks that train together at most."""


def runs(small: bool, epochs: int) -> list[experiments.Settings]:
    """The sweep; its learning rate drops for the last fifth."""
    drop = round(0.8 * epochs)
    return grid({"model": "fc-8x1" if small else "resnet20", "data": "cifar10", "epochs": epochs, "traces": 0,
                 "output_samples": 1, "drops": [drop] if 0 < drop < epochs else [], "compression": [1.0, 2.0],
                 "pruner": PRUNERS[:4] if small else PRUNERS})


def spread_images(folder: Path, images: Path | None, small: bool) -> None:
    """Put decoded images where the sweep's processes look for them first: they need no reader of their own."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        data = noise(100, seed=len(split)) if small else load(images, split)
        np.savez(folder / IMAGES / f"cifar10-{split}.npz", pixels=data.pixels, labels=data.labels, mean=data.mean,
                 std=data.std, classes=data.classes, levels=data.levels)


def pace(chosen: argparse.Namespace) -> tuple[int, float]:
    """How many networks to train together, and the seconds of a later epoch of each, by what has been measured."""
    path, seconds = chosen.output.with_name("training.json"), dict[int, float]()
    for row in json.loads(path.read_text())["rows"] if path.is_file() and not chosen.small else []:
        if row.get("later_epochs"):
            seconds[row["networks"]] = min(row["later_epochs"]) / row["networks"]
    if not seconds:
        data = [noise(128), noise(64, 1)] if chosen.small else [load(chosen.images, split) for split in SPLITS]
        module = pk.models.fc(8, 1) if chosen.small else pk.models.resnet20()
        fits = train_one(module, *data, replace(training.recipe("resnet20", "cifar10"), epochs=2))
        seconds[1] = min(epochs_of(fits)["later_epochs"])
    best = min(seconds, key=lambda count: seconds[count])
    return min(best, TOGETHER), seconds[best]


def sweep(settings: Sequence[experiments.Settings], folder: Path, together: int) -> None:
    """Run the sweep, in a process that can be ended."""
    experiments.sweep(settings, folder, progress=True, together=together)


def publish(rows: Rows, folder: Path) -> None:
    """Write what the sweep recorded: rows, table and picture."""
    table = experiments.table(folder)
    for record in table.sort_values(["compression", "pruner"]).to_dict("records"):
        done = record["status"] == "done"
        rows.add(**{name: record[name] for name in ("pruner", "compression", "epochs")}, **(
            {name: record[name] for name in ("test_accuracy", "train_accuracy", "density", "steps", "seconds")}
            if done else {"error": record["error"]}))
    table.to_parquet(rows.output.with_suffix(".parquet"), index=False)
    experiments.figures.figure3(table).savefig(rows.output.with_suffix(".png"), dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; return how many runs failed."""
    parser = options(__doc__, "figure3", 123, images=True)
    parser.add_argument("--epochs", type=int, help="of each run; by default what the time allows")
    chosen = parser.parse_args(arguments)
    rows = Rows(chosen.output, data="random images" if chosen.small else "CIFAR-10")
    try:
        count, epochs = len(runs(chosen.small, 1)), chosen.epochs
        together, one = pace(chosen)
        if epochs is None:
            left = chosen.seconds - rows.seconds - OVERHEAD
            epochs = 1 if chosen.small else max(1, min(100, int(left / (one * count))))
        settings = runs(chosen.small, epochs)
        rows.about |= {"seconds an epoch of one run": one, "together": together, "epochs": epochs,
                       "runs": len(settings)}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            spread_images(folder, chosen.images, chosen.small)
            process = multiprocessing.get_context("spawn").Process(target=sweep, args=(settings, folder, together))
            process.start()
            process.join(max(1.0, chosen.seconds - rows.seconds))
            process.terminate()
            process.join()
            time.sleep(0.5)      # the workers end with their parent
            if (folder / "runs").is_dir() or (folder / "failed").is_dir():
                publish(rows, folder)
            if len(rows.rows) < len(settings):
                missing = len(settings) - len(rows.rows)
                rows.add(unfinished=f"{missing} runs have no record after {rows.seconds:.0f} s")
            shutil.rmtree(folder / IMAGES, ignore_errors=True)
    except Exception as error:
        rows.add(error=message(error))
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
