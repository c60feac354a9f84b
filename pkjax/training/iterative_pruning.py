"""Pruning by magnitude after training, once or in rounds with rewinding: iterative magnitude pruning (IMP)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax.numpy as jnp
from jaxtyping import PyTree

from pkjax import tables
from pkjax.data.dataset import Dataset
from pkjax.pruning.masks import apply_masks
from pkjax.pruning.plan import density_asked, whole
from pkjax.pruning.prune import prune
from pkjax.pruning.result import EmptiedLayerWarning, PruneResult
from pkjax.pruning.schedules import Schedule, exponential
from pkjax.pruning.scopes import Scope, global_scope
from pkjax.pruning.scores.data_free import magnitude
from pkjax.training.fit import fit
from pkjax.training.flax_modules import placed, split_module
from pkjax.training.recipes import Recipe
from pkjax.trees import Choice, kernels

__all__ = ["Round", "Ticket", "iterative_magnitude_pruning"]


class Round(NamedTuple):
    """One round of iterative magnitude pruning: a training, and the pruning after it.

    A part of `Ticket`.

    Examples:
        >>> import pkjax as pk, jax.numpy as jnp
        >>> pruning = pk.prune(pk.magnitude, {"kernel": jnp.array([[3.0, 1.0]])}, density=0.5)
        >>> Round(0.9, (), pruning).pruning.kept
        1
    """

    accuracy: float
    """Accuracy on the test set of the network that was trained, before it was pruned."""
    history: tuple[Mapping[str, Any], ...]
    """The epochs of the training, as in `Fit`."""
    pruning: PruneResult
    """The masks after the round."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A pruned network, ready to be trained: masks, and the parameters that pruning went back to.

    Returned by `iterative_magnitude_pruning`. Prints as a short text.

    Examples:
        >>> import pkjax as pk
        >>> digits, few = pk.data.load("digits", samples=32), Recipe(epochs=2, batch_size=16)
        >>> ticket = iterative_magnitude_pruning(pk.models.fc(2, 1), digits, digits, recipe=few, density=0.5, rewind=1)
        >>> result = fit(ticket.module, digits, digits, variables=ticket.variables, masks=ticket.masks,
        ...              recipe=ticket.recipe)
        >>> [row["epoch"] for row in result.history]
        [0, 1]
    """

    params: PyTree
    """The parameters of the epoch that was rewound to, or the trained ones; pruned ones are 0."""
    state: PyTree
    """The other variables of that moment, such as BatchNorm's running averages."""
    masks: PyTree
    """Booleans like `params`."""
    rounds: tuple[Round, ...]
    """What every round trained and pruned."""
    recipe: Recipe
    """The recipe of the epochs that remain after the one that was rewound to."""
    module: Any
    """The module to train: a Linen module as it was given, or a copy of an NNX module with `params` and `state`."""

    __repr__ = tables.brief

    @property
    def variables(self) -> PyTree | None:
        """Variables of a Linen module; None for an NNX module, which holds its own."""
        return placed(self.module, self.params, self.state)[1]


def iterative_magnitude_pruning(
    module: Any, train: Dataset, test: Dataset, *, recipe: Recipe, compression: SupportsFloat | None = None,
    density: SupportsFloat | None = None, rounds: int = 1, rewind: int | None = 0, schedule: Schedule = exponential,
    scope: Scope = global_scope, prunable: Choice = kernels, min_per_layer: int = 0, variables: PyTree | None = None,
    seed: int = 0, checkpoint: Path | str | None = None, progress: tables.Progress = False,
) -> Ticket:
    """Find masks by training: train, prune the smallest weights, go back to earlier weights, and again.

        θ_k = θ_0 after k epochs;   for r = 1 … n:   θ = train(θ_k ∘ m, epochs k + 1 … T),
        m = the round(schedule(r, n, density) · size) weights of largest |θ| among those of m

    The exponential schedule prunes the same fraction of what is left in every round, 1 − density^(1/n): n rounds of
    20 % are `density=0.8**n, rounds=n`. `rounds=1` is magnitude pruning after training. With `rewind=None` weights keep
    their trained values, and only the learning rate goes back to its beginning.

    Costs n trainings (and k epochs); the last, of the ticket itself, is the caller's. After rewinding, Adam's moments
    start at 0, and epochs are counted anew from k: the learning rate is that of epoch k + 1, and permutations are those
    of epoch 1.

    Args:
        module: a Linen or NNX module.
        train: training images.
        test: images for the accuracy after each epoch.
        recipe: how to train, T epochs in all.
        compression: ρ ≥ 0, keeps the fraction 10^−ρ in the end. Give this or `density`.
        density: the fraction of all prunable weights to keep in the end, in (0, 1].
        rounds: n, how often to train and prune.
        rewind: k, the epoch whose weights and other variables every round goes back to, 0 for the initialisation (the
            original lottery ticket); None goes back nowhere (learning rate rewinding).
        schedule: density after each round, see `pkjax.pruning.schedules`.
        scope: which leaves compete, see `pkjax.pruning.scopes`.
        prunable: which leaves to prune, as in `pk.prune`.
        min_per_layer: weights that every prunable leaf keeps at least.
        variables: a Linen module's variables to start from; None initialises them by the seed.
        seed: seed of initialisation, permutations, augmentation and Dropout, of every round alike.
        checkpoint: a folder for the last state of every training, from which the same call resumes.
        progress: where to report rounds and epochs.

    Returns:
        masks, the parameters gone back to, and what every round trained and pruned.

    Raises:
        ValueError: `rounds` is below 1; `rewind` is not an epoch before the recipe's last; or as in `pk.prune`.
        TypeError: `module` is not a Flax module, or a number is of another type.
        FloatingPointError: the loss of a training is no longer finite.
        CheckpointError: a checkpoint belongs to another training.

    Source: Frankle and Carbin 2019 (rewind=0); Frankle, Dziugaite, Roy and Carbin 2020, algorithm 1 (rewind=k); Renda,
    Frankle and Carbin 2020 (rewind=None).

    Examples:
        >>> import pkjax as pk
        >>> digits, few = pk.data.load("digits", samples=128), Recipe(learning_rate=0.01, epochs=2, batch_size=32)
        >>> ticket = iterative_magnitude_pruning(pk.models.fc(8, 1), digits, digits, recipe=few, density=0.25, rounds=2)
        >>> [done.pruning.kept for done in ticket.rounds]
        [296, 148]
    """
    target, count = density_asked(compression, density), whole("rounds", rounds, 1)
    if rewind is not None and whole("rewind", rewind, 0) >= recipe.epochs:
        raise ValueError(f"rewind must be an epoch before the last, at most {recipe.epochs - 1}, or None, got {rewind}")
    tell = tables.reporter(progress)

    def trained(module: Any, variables: PyTree | None, name: str, **options: Any) -> Any:
        return fit(module, train, test, variables=variables, seed=seed, progress=lambda line: tell(f"{name}, {line}"),
                   checkpoint=None if checkpoint is None else Path(checkpoint) / name.replace(" ", "-"), **options)

    net = split_module(module, variables, jnp.asarray(train.images[:1]), seed)
    params, state, rest, masks = net.params, net.state, recipe, None
    with warnings.catch_warnings():      # what cannot be pruned is refused before a training
        warnings.simplefilter("ignore", EmptiedLayerWarning)
        prune(magnitude, params, density=schedule(count, count, target), scope=scope, prunable=prunable,
              min_per_layer=min_per_layer)
    if rewind:
        early = trained(*placed(module, params, state), "before rewinding", recipe=recipe, epochs=rewind)
        params, state, rest = early.params, early.state, recipe.after(rewind)
    done: list[Round] = []
    for number in range(1, count + 1):
        now = trained(*placed(module, params, state), f"round {number} of {count}", recipe=rest, masks=masks)
        pruning = prune(magnitude, now.params, density=schedule(number, count, target), scope=scope, prunable=prunable,
                        masks=masks, min_per_layer=min_per_layer)
        masks = pruning.masks
        done.append(Round(now.accuracy, now.history, pruning))
        if rewind is None:
            params, state = now.params, now.state
    params = apply_masks(params, masks)
    return Ticket(params, state, masks, tuple(done), rest, placed(module, params, state)[0])
