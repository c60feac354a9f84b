"""ResNet-20 trained on CIFAR-10: seconds of the first epoch, which compiles, and of later ones; one network and eight.

    python -m benchmarks.accelerator.training [--small] [--images FILE] [--output FILE]

Seconds of several networks that train as one program are those of an epoch of all. `run.sh` switches XLA's timing of
candidates off for this part (`XLA_FLAGS` in the file), which shortens what comes before the first epoch.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pkjax as pk
from pkjax import training
from pkjax.data.dataset import Dataset

from benchmarks.accelerator.images import load, noise
from benchmarks.accelerator.rows import GRACE, Rows, message, options

TOGETHER = 8


def epochs_of(fits: Sequence[Any]) -> dict[str, Any]:
    """Seconds and accuracies of networks that were trained together."""
    longest = max((fit.history for fit in fits), key=len)      # a network that diverges stops alone
    first, *later = [row["seconds"] for row in longest[1:]]
    return {"first_epoch": first, "later_epochs": later, "test_accuracy": [round(fit.accuracy, 4) for fit in fits],
            "train_loss": [round(fit.history[-1].get("train_loss", float("nan")), 4) for fit in fits]}


def train_one(module: Any, train: Dataset, test: Dataset, recipe: Any) -> Sequence[Any]:
    """Train one network."""
    return [training.fit(module, train, test, recipe=recipe, seed=0, progress=True)]


def train_together(module: Any, train: Dataset, test: Dataset, recipe: Any, count: int = TOGETHER) -> Sequence[Any]:
    """Train several networks as one program."""
    return training.fit_together(module, train, test, recipe=recipe, seeds=range(count), progress=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return how many trainings failed."""
    parser = options(__doc__, "training", 50, images=True)
    parser.add_argument("--epochs", type=int, default=3)
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    data = [noise(128), noise(64, 1)] if chosen.small else [load(chosen.images, split) for split in ("train", "test")]
    recipe = replace(training.recipe("resnet20", "cifar10"), epochs=2 if chosen.small else chosen.epochs)
    model = "fc-16x1" if chosen.small else "resnet20"
    rows = Rows(chosen.output, data="random images" if chosen.small else "CIFAR-10", examples=len(data[0]),
                reading=round(time.monotonic() - began, 1), batch_size=recipe.batch_size)
    module = pk.models.fc(16, 1) if chosen.small else pk.models.resnet20()
    todo = {1: train_one, TOGETHER: train_together}
    for count, run in todo.items():
        row: dict[str, Any] = {"model": model, "networks": count}
        began = time.monotonic()
        try:
            with rows.within(chosen.seconds + GRACE, *({**row, "networks": each} for each in todo if each >= count)):
                row |= ({"unfinished": "no time left"} if rows.seconds > chosen.seconds else
                        epochs_of(run(module, *data, recipe)))
        except Exception as error:      # the others are still wanted
            row["error"] = message(error)
        rows.add(**row, seconds=time.monotonic() - began)
        recipe = replace(recipe, epochs=2)
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
