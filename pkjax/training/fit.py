"""Training: compiled epochs of Adam that keep pruned weights at 0, and checkpoints that resume exactly."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax import tables
from pkjax.data.dataset import Dataset
from pkjax.pruning.masks import apply_masks, masked
from pkjax.training.augmentation import crop_and_flip
from pkjax.training.checkpoints import CheckpointError, Checkpoints, read
from pkjax.training.flax_modules import Forward, split_module
from pkjax.training.identity import (
    Identity,
    data_identity,
    digest,
    measured_differences,
    module_fields,
    program_digest,
)
from pkjax.training.loops import compiled_loop, examples_at_once, one_by_one
from pkjax.training.recipes import Recipe, recipe
from pkjax.trees import check_masks

__all__ = ["Fit", "Measure", "Recipe", "fit", "recipe", "restore"]

Measure = Callable[[PyTree, PyTree], Mapping[str, Any]]
"""Maps (params, state) to named numbers, which the history keeps beside the accuracies."""

EVALUATED = 500
"""Examples that are evaluated at a time, fewer where memory is short."""


@dataclass(frozen=True, eq=False)
class Fit:
    """The result of a training: the network and the history of its epochs.

    Returned by `fit` and `restore`. Prints as a short text and, in a notebook, as a table of its epochs.

    Examples:
        >>> row = {"epoch": 0, "test_loss": 2.3, "test_accuracy": 0.1}
        >>> Fit({"kernel": jnp.ones((2, 3))}, {}, {"kernel": jnp.ones((2, 3), bool)}, (row,), finished=False)
        Fit(
            params=<1 leaf, 6 entries>,
            state=<0 leaves, 0 entries>,
            masks=<1 leaf, 6 entries>,
            history=<1 of dict>,
            finished=False
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


def fit(module: Any, train: Dataset, test: Dataset, *, recipe: Recipe, variables: PyTree | None = None,
        masks: PyTree | None = None, seed: int = 0, measure: Measure | None = None,
        checkpoint: Path | str | None = None, save_seconds: float = 30.0, epochs: int | None = None,
        progress: tables.Progress = False) -> Fit:
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
    tell = tables.reporter(progress)
    net = split_module(module, variables, jnp.asarray(train.images[:1]), seed)
    if masks is None:
        masks = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), net.params)
    check_masks(masks, net.params)
    size = min(recipe.batch_size, len(train))
    steps = len(train) // size
    params = apply_masks(net.params, masks)
    begin = {"params": params, "state": jax.tree.map(jnp.copy, net.state),     # an epoch overwrites its input
             "optimizer": jax.jit(recipe.optimizer(steps).init)(params)}
    apart = one_by_one(params)
    run, step = _epoch(net.forward, recipe, size, steps, _scale(train), apart)
    images, held = ((jnp.asarray(d.pixels), jnp.asarray(d.labels)) for d in (train, test))

    def row(epoch: int, now: dict[str, PyTree], **more: float) -> dict[str, Any]:
        loss, accuracy = _evaluate(net.forward, _scale(test), apart)(now["params"], now["state"], *held)
        return {"epoch": epoch, **more, "test_loss": float(loss), "test_accuracy": float(accuracy),
                **_measured(measure, now)}

    saved = None if checkpoint is None else Checkpoints(checkpoint, _identity(
        module, net.forward, train, test, recipe, seed, {**begin, "masks": masks}, step))
    resumed = saved.latest({**begin, "masks": masks}) if saved else None
    if resumed and (differing := measured_differences(_measured(measure, begin), resumed[1][0])):
        raise CheckpointError(f"{checkpoint} holds a checkpoint with other measurements, {'; '.join(differing)} before "
                              "training: use the same measure or another folder")
    now, history = (begin, [row(0, begin)]) if resumed is None else (
        {name: resumed[0][name] for name in begin}, resumed[1])
    last = recipe.epochs if epochs is None else min(epochs, recipe.epochs)
    written = time.monotonic()
    for epoch in range(len(history), last + 1):
        began = time.monotonic()
        now, (loss, accuracy) = run(now, masks, jax.random.fold_in(jax.random.key(seed), epoch), *images)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the training loss is {float(loss)} in epoch {epoch}: lower the learning rate "
                                     f"({recipe.learning_rate:g})")
        history = [*history, row(epoch, now, train_loss=float(loss), train_accuracy=float(accuracy),
                                 learning_rate=recipe.rate(epoch), seconds=time.monotonic() - began)]
        if saved and (epoch == last or time.monotonic() - written >= save_seconds):
            saved.save(epoch, {**now, "masks": masks}, history)
            written = time.monotonic()
        tell(f"epoch {epoch} of {recipe.epochs}: test accuracy {100 * history[-1]['test_accuracy']:.2f} %")
    if saved:
        saved.close()
    return Fit(now["params"], now["state"], masks, tuple(history), len(history) > recipe.epochs)


def restore(checkpoint: Path | str) -> Fit:
    """Read the last state of a training from its checkpoint folder.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or has another format.

    Examples:
        >>> import pkjax as pk, tempfile
        >>> digits, few = pk.data.load("digits", samples=32), Recipe(epochs=1, batch_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = fit(pk.models.fc(2, 1), digits, digits, recipe=few, checkpoint=folder)
        ...     restore(folder).accuracy == done.accuracy
        True
    """
    trees, about = read(checkpoint)
    return Fit(trees["params"], trees["state"], trees["masks"], tuple(about["history"]),
               len(about["history"]) > about["identity"]["values"]["epochs"])


def _identity(module: Any, forward: Forward, train: Dataset, test: Dataset, recipe: Recipe, seed: int,
              begin: Mapping[str, PyTree], step: Callable[..., Any]) -> Identity:
    """Describe a training by whatever decides how it goes on."""
    seen, held = data_identity(train, "training"), data_identity(test, "test")
    values = {**asdict(recipe), "drops": list(recipe.drops), "recipe": type(recipe).__qualname__, "seed": seed,
              **module_fields(module), **seen.values, **held.values, "jax": jax.__version__}
    names = {"params": "initial parameters", "state": "initial state", "optimizer": "initial state of the optimizer"}
    contents = {**seen.contents, **held.contents}
    contents |= {names.get(name, name): digest(tree) for name, tree in begin.items()}
    few, labels = (train.pixels[:1], np.asarray(train.labels[:1], np.int32))
    batch = jnp.zeros(min(recipe.batch_size, len(train)), int), jax.random.key(0)
    now = {name: tree for name, tree in begin.items() if name != "masks"}
    with jax.numpy_dtype_promotion("standard"):
        trains = program_digest(step, now, batch, begin["masks"], few, labels)
    evaluates = program_digest(lambda params, state, x: forward(params, state, x, None)[0], begin["params"],
                               begin["state"], _scale(test)(jnp.asarray(few)))
    return Identity(values, contents, {"operations of a training step (its module, rates, loss, optimizer)": trains,
                                       "operations of the evaluation": evaluates})


def _measured(measure: Measure | None, now: Mapping[str, PyTree]) -> dict[str, Any]:
    """Measure a state, in numbers that JSON takes."""
    return {name: value.item() if hasattr(value, "item") else value
            for name, value in (measure(now["params"], now["state"]) if measure else {}).items()}


class _Scale(NamedTuple):
    """How to normalise bytes, in numbers that can be hashed."""

    levels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Array) -> Array:
        mean, std = (jnp.asarray(v, jnp.float32) for v in (self.mean, self.std))
        return (pixels.astype(jnp.float32) / self.levels - mean) / std


def _scale(dataset: Dataset) -> _Scale:
    return _Scale(dataset.levels, tuple(map(float, dataset.mean)), tuple(map(float, dataset.std)))


def _losses(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Compute the cross entropy of each example, and whether its largest logit is that of its label."""
    import optax

    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, (jnp.argmax(logits, axis=1) == labels).astype(logits.dtype)


@lru_cache(maxsize=32)
def _epoch(forward: Forward, recipe: Recipe, size: int, steps: int, scale: _Scale, apart: bool
           ) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile an epoch: (state, masks, key, pixels, labels) → (state, (loss, accuracy)), means over the batches.

    `apart` makes one call for each batch. The second function is what is done for each.
    """
    import optax

    @jax.jit
    def draw(key: Array, labels: Array) -> tuple[Array, Array]:
        shuffle, draws = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(labels))[: steps * size].reshape(steps, size)
        return order, jax.random.split(draws, steps)

    def step(now: dict[str, PyTree], batch: tuple[Array, Array], masks: PyTree, pixels: Array, labels: Array) -> Any:
        optimizer = masked(recipe.optimizer(steps), masks)
        rows, key = batch
        crop, drop = jax.random.split(key)
        x = scale(crop_and_flip(crop, pixels[rows]) if recipe.augment else pixels[rows])

        def loss(params: PyTree) -> Any:
            logits, state = forward(params, now["state"], x, drop)
            losses, right = _losses(logits, labels[rows])
            return losses.mean(), (state, right.mean())

        (value, (state, accuracy)), slope = jax.value_and_grad(loss, has_aux=True)(now["params"])
        updates, inner = optimizer.update(slope, now["optimizer"], now["params"])
        return {"params": optax.apply_updates(now["params"], updates), "state": state,
                "optimizer": inner}, (value, accuracy)

    loop = compiled_loop(step, one_by_one=apart)

    def run(now: dict[str, PyTree], masks: PyTree, key: Array, pixels: Array, labels: Array) -> Any:
        with jax.numpy_dtype_promotion("standard"):     # optax counts its steps in integers
            now, measured = loop(now, draw(key, labels), masks, pixels, labels)
        return now, jax.tree.map(jnp.mean, measured)

    return run, step


@lru_cache(maxsize=32)
def _evaluate(forward: Forward, scale: _Scale, apart: bool) -> Callable[..., tuple[Array, Array]]:
    """Compile (params, state, pixels, labels) → (loss, accuracy), a few examples at a time."""
    def evaluate_rows(carry: None, rows: Array, params: PyTree, state: PyTree, pixels: Array, labels: Array) -> Any:
        return carry, _losses(forward(params, state, scale(pixels[rows]), None)[0], labels[rows])

    loop, sizes = compiled_loop(evaluate_rows, one_by_one=apart), dict[Any, int]()

    def evaluate(params: PyTree, state: PyTree, pixels: Array, labels: Array) -> tuple[Array, Array]:
        n = len(labels)
        if pixels.shape not in sizes:
            sizes[pixels.shape] = examples_at_once(lambda p, s, x: forward(p, s, scale(x), None)[0], params, state,
                                                   pixels[:1], most=min(EVALUATED, n))
        size = sizes[pixels.shape]
        full = -(-n // size) * size     # the last batch is filled with examples that are not counted
        rows = jnp.minimum(jnp.arange(full), n - 1).reshape(-1, size)
        _, (losses, right) = loop(None, rows, params, state, pixels, labels)
        return losses.ravel()[:n].mean(), right.ravel()[:n].mean()

    return evaluate
