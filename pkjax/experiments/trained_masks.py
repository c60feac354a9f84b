"""Pruners that find their masks by training: magnitude after training, and iterative magnitude pruning."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree

from pkjax.data.dataset import Dataset
from pkjax.tables import Progress
from pkjax.training.iterative_pruning import iterative_magnitude_pruning
from pkjax.training.recipes import Recipe
from pkjax.trees import Choice, kernels

__all__ = ["TRAINED", "Trained", "TrainedMasks", "train_masks"]


class Trained(NamedTuple):
    """How often a pruner trains, and what it goes back to."""

    steps: int
    """Rounds of training and pruning by default."""
    rewind: Callable[[int], int | None]
    """Epochs of a training → the epoch whose weights it goes back to; None keeps the trained weights."""


TRAINED = {
    "magnitude-after-training": Trained(1, lambda epochs: None),
    "imp": Trained(10, lambda epochs: epochs // 20),
}
"""Name on the command line → pruner. IMP goes back to 5 % of the training: to the initialisation below 20 epochs."""


class TrainedMasks(NamedTuple):
    """Masks from a training, and the weights from which a run then trains, by its whole recipe."""

    variables: PyTree
    masks: PyTree
    pruning: dict[str, Any]
    """The account of the last pruning, ready for JSON, with the weights kept and the accuracy before each."""


def train_masks(pruner: str, module: Any, variables: PyTree, train: Dataset, test: Dataset, *, recipe: Recipe,
                compression: float | int, rounds: int, seed: int, prunable: Choice = kernels, progress: Progress = False
                ) -> TrainedMasks:
    """Find masks by training a Linen module from its variables.

    Examples:
        >>> import jax, pkjax as pk
        >>> digits, module = pk.data.load("digits", samples=64), pk.models.fc(4, 1)
        >>> variables = module.init(jax.random.key(0), digits.images[:1])
        >>> few = Recipe(epochs=1, batch_size=32)
        >>> done = train_masks("imp", module, variables, digits, digits, recipe=few, compression=0.5, rounds=2,
        ...                    seed=0)
        >>> done.pruning["kept"], done.pruning["history"], len(done.pruning["accuracy_before"])
        (94, [166, 94], 2)
    """
    ticket = iterative_magnitude_pruning(module, train, test, recipe=recipe, compression=compression, rounds=rounds,
                                         rewind=TRAINED[pruner].rewind(recipe.epochs), variables=variables, seed=seed,
                                         prunable=prunable, progress=progress)
    account = ticket.rounds[-1].pruning.to_dict()
    account |= {"history": [each.pruning.kept for each in ticket.rounds],
                "accuracy_before": [each.accuracy for each in ticket.rounds]}
    return TrainedMasks(ticket.variables, ticket.masks, account)
