"""The result of a training, and how it is read back from a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from pkjax import tables
from pkjax.training.checkpoints import read

__all__ = ["Fit", "restore"]


@dataclass(frozen=True, eq=False)
class Fit:
    """The result of a training: the network and the history of its epochs.

    Returned by `fit`, `fit_together` and `restore`. Prints as a short text, in a notebook as a table of its epochs.

    Examples:
        >>> import jax.numpy as jnp
        >>> row = {"epoch": 0, "test_loss": 2.3, "test_accuracy": 0.1}
        >>> Fit({"kernel": jnp.ones((2, 3))}, {}, {"kernel": jnp.ones((2, 3), bool)}, (row,), finished=False)
        Fit(
            params=<1 leaf, 6 entries>,
            state=<0 leaves, 0 entries>,
            masks=<1 leaf, 6 entries>,
            history=<1 of dict>,
            finished=False,
            error=''
        )
    """

    params: PyTree
    """The trained parameters; pruned ones are exactly 0."""
    state: PyTree
    """The other variables of the module, such as BatchNorm's running averages."""
    masks: PyTree
    """Booleans like `params`."""
    history: tuple[Mapping[str, Any], ...]
    """One row before training (epoch 0) and one after each epoch: losses, accuracies, learning rate, seconds."""
    finished: bool
    """Whether the training ran all its epochs."""
    error: str = ""
    """Why this network of several stopped early: its loss became infinite or NaN. Empty otherwise."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        def cell(row: Mapping[str, Any], name: str) -> str:
            if name not in row:
                return ""
            return str(row[name]) if name == "epoch" else tables.format_number(float(row[name]))

        shown = [self.history[i] for i in tables.spread(len(self.history))]
        names = list(dict.fromkeys(name for row in shown for name in row))
        rows = [[cell(row, name) for name in names] for row in shown]
        return tables.html([name.replace("_", " ") for name in names], rows, left=0,
                           caption="finished" if self.finished else "not finished")

    @property
    def accuracy(self) -> float:
        """Accuracy on the test set after the last epoch, as a fraction."""
        return self.history[-1]["test_accuracy"]


def restore(checkpoint: Path | str) -> Fit:
    """Read the last state of a training from its checkpoint folder.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or has another format.

    Examples:
        >>> import pkjax as pk, tempfile
        >>> digits, few = pk.data.load("digits", samples=32), pk.training.Recipe(epochs=1, batch_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = pk.training.fit(pk.models.fc(2, 1), digits, digits, recipe=few, checkpoint=folder)
        ...     restore(folder).accuracy == done.accuracy
        True
    """
    trees, about = read(checkpoint)
    return Fit(trees["params"], trees["state"], trees["masks"], tuple(about["history"]),
               len(about["history"]) > about["identity"]["values"]["epochs"])
