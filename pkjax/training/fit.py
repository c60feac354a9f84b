"""Training: compiled epochs of Adam that keep pruned weights at 0, and checkpoints that resume exactly."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from pkjax import tables
from pkjax.data.dataset import Dataset
from pkjax.training.loops import one_by_one
from pkjax.training.recipes import Recipe, recipe
from pkjax.training.result import Fit, restore
from pkjax.training.trainer import Member, Trainer

__all__ = ["Fit", "Measure", "Recipe", "fit", "recipe", "restore"]

Measure = Callable[[PyTree, PyTree], Mapping[str, Any]]
"""Maps (params, state) to named numbers, which the history keeps beside the accuracies."""


def fit(module: Any, train: Dataset, test: Dataset, *, recipe: Recipe, variables: PyTree | None = None,
        masks: PyTree | None = None, seed: int = 0, measure: Measure | None = None,
        checkpoint: Path | str | None = None, save_seconds: float = 30.0, epochs: int | None = None,
        progress: tables.Progress = False, on_epoch: Callable[[Mapping[str, Any]], None] | None = None) -> Fit:
    """Train a Flax module on labelled images by Adam; pruned weights are 0 from the first step to the last.

        L = −(1/B) Σ_x ln softmax(f(x, θ))_{y(x)},   g = ∇L + w θ

    where w is the recipe's weight decay, part of the gradient that Adam sees (as in PyTorch's Adam). An epoch is one
    compiled scan over a permutation of the examples, which seed and epoch determine; for networks with convolutions on
    a CPU it is one compiled step for each batch. Examples that do not fill a batch are left out of that epoch. Images
    stay on the device, as bytes.

    Args:
        module: a Linen or NNX module; the usual arguments put BatchNorm and Dropout into training mode.
        train: training images.
        test: images for the accuracy after each epoch.
        recipe: learning rate, drops, weight decay, epochs, batch size, augmentation; `recipe(model, data)` is the
            paper's.
        variables: a Linen module's variables to start from; None initialises them by the seed.
        masks: booleans like the parameters, as `pk.prune` returns them; None trains all weights.
        seed: seed of initialisation, permutations, augmentation and Dropout.
        measure: (params, state) → numbers to keep in the history, before training and after each epoch. A checkpoint is
            continued with the measure that it began with.
        checkpoint: a folder for the last state. If it holds a checkpoint of the same training, that training resumes,
            with the same result as without the interruption.
        save_seconds: seconds between checkpoints, written at the ends of epochs; the last epoch always writes one.
        epochs: stop after this epoch, to resume later from the checkpoint; None runs all epochs of the recipe.
        progress: where to report the test accuracy after each epoch.
        on_epoch: a function that is given every new row of the history, before training and after each epoch, before
            the checkpoint is written. Rows that a checkpoint holds were given before. What it raises ends the training.

    Returns:
        parameters, state, masks and history.

    Raises:
        ValueError: the masks do not match.
        CheckpointError: the checkpoint belongs to another training, and the message says what differs (data, module,
            beginning, recipe, masks, seed, measure); or it is damaged. It is a `ValueError`.
        OSError: the checkpoint cannot be written, as on a full disk.
        TypeError: `module` is not a Flax module.
        FloatingPointError: the loss is no longer finite; earlier checkpoints stay.

    Source: Gebhart, Saxena and Schrater (2021), appendix A.4.3, tables 1 and 2.

    Examples:
        >>> import pkjax as pk
        >>> digits = pk.data.load("digits", samples=128)
        >>> result = fit(pk.models.fc(8, 1), digits, digits, recipe=Recipe(learning_rate=0.01, epochs=2, batch_size=32))
        >>> len(result.history), result.finished
        (3, True)
    """
    def measured(_: Sequence[Member], now: Mapping[str, PyTree]) -> list[dict[str, Any]]:
        """Measure a state, in numbers that JSON takes."""
        return [{name: value.item() if hasattr(value, "item") else value
                 for name, value in (measure(now["params"], now["state"]) if measure else {}).items()}]

    trainer = Trainer(module, recipe, measured, epochs, save_seconds, save_last=True, tell=tables.reporter(progress))
    member = Member(train, test, seed, variables, masks, checkpoint, None, on_epoch)
    done, = trainer.train([member], one_by_one)
    if done.error:
        raise FloatingPointError(done.error)
    return done
