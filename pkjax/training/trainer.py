"""The one loop of training, for a network or for several that go through it together.

Everything that belongs to one network (beginning, checkpoint, history, divergence) stays its own; only the programs
are shared. `fit` and `fit_together` are its faces.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pkjax.data.dataset import Dataset
from pkjax.pruning.masks import apply_masks
from pkjax.training.checkpoints import CheckpointError, Checkpoints
from pkjax.training.epochs import draws, epoch, evaluation, initial, scale_of, training_step
from pkjax.training.flax_modules import SplitModule, split_module
from pkjax.training.identity import Identities, measured_differences
from pkjax.training.recipes import Recipe
from pkjax.training.result import Fit
from pkjax.trees import check_masks

__all__ = ["Begun", "Member", "Trainer", "join", "part"]

SAVING = 0.1
"""The share of the time that a training may spend on checkpoints before their ends."""
_NOW = ("params", "state", "optimizer")


class Member(NamedTuple):
    """A network to train, as it was asked for."""

    train: Dataset
    test: Dataset
    seed: int
    variables: PyTree | None
    masks: PyTree | None
    checkpoint: Path | str | None
    about: PyTree
    """What its measurements need."""
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None
    """What is told every row of its history."""


class Begun(NamedTuple):
    """A network where its training stands."""

    member: Member
    net: SplitModule
    masks: PyTree
    now: dict[str, PyTree]
    history: list[dict[str, Any]]
    saved: Checkpoints | None


@jax.jit
def join(trees: Sequence[PyTree]) -> PyTree:
    """Stack trees along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def part(tree: PyTree, i: Array | int) -> PyTree:
    """Take a tree out of those that were stacked."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


@dataclass(frozen=True, eq=False)
class Trainer:
    """What the networks of one call have in common."""

    module: Any
    recipe: Recipe
    measure: Callable[[Sequence[Member], Mapping[str, PyTree]], list[dict[str, Any]]]
    """(networks, their state, stacked where there are several) → a row of numbers for each."""
    epochs: int | None
    save_seconds: float
    save_last: bool
    tell: Callable[[str], None]
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends the training after the epoch that runs."""
    _saving: Any = field(default_factory=threading.Lock)

    def train(self, members: Sequence[Member], apart: Callable[[PyTree], bool]) -> list[Fit]:
        """Train networks, those that stand at the same epoch as one program; `apart` as in `one_by_one`."""
        begun = self.begin(members)
        results: dict[int, Fit] = {}
        for length in sorted({len(each.history) for each in begun}):
            places = [i for i, each in enumerate(begun) if len(each.history) == length]
            alike = [begun[i] for i in places]
            results.update(zip(places, self._train(alike, apart(alike[0].now["params"])), strict=True))
        for each in begun:
            if each.saved:
                each.saved.close()
        return [results[i] for i in range(len(members))]

    def steps(self, train: Dataset) -> int:
        """Count the steps of an epoch."""
        return len(train) // min(self.recipe.batch_size, len(train))

    def begin(self, members: Sequence[Member]) -> list[Begun]:
        """Initialise networks, or read them from their checkpoints."""
        begun: list[Begun] = []
        identities: Identities | None = None
        for member in members:
            train, test = member.train, member.test
            net = split_module(self.module, member.variables, jnp.asarray(train.images[:1]), member.seed)
            masks = member.masks
            if masks is None:
                masks = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), net.params)
            check_masks(masks, net.params)
            params = apply_masks(net.params, masks)
            # An epoch overwrites its input.
            now = {"params": params, "state": jax.tree.map(jnp.copy, net.state),
                   "optimizer": initial(self.recipe, self.steps(train))(params)}
            saved, history = None, []
            if member.checkpoint is not None:
                step = training_step(net.forward, self.recipe, self.steps(train), scale_of(train))
                identities = identities or Identities(self.module, net.forward, self.recipe, step)
                whole = {**now, "masks": masks}
                saved = Checkpoints(member.checkpoint, identities.of(train, test, member.seed, whole))
                if (resumed := saved.latest(whole)) is not None:
                    self._check_measure(member, now, resumed[1])
                    now, history = {name: resumed[0][name] for name in _NOW}, resumed[1]
            begun.append(Begun(member, net, masks, now, history, saved))
        return begun

    def _check_measure(self, member: Member, begin: Mapping[str, PyTree], history: Sequence[Mapping[str, Any]]) -> None:
        if differing := measured_differences(self.measure([member], begin)[0], history[0]):
            raise CheckpointError(f"{member.checkpoint} holds a checkpoint with other measurements, "
                                  f"{'; '.join(differing)} before training: use the same measure or another folder")

    def _train(self, begun: Sequence[Begun], apart: bool) -> list[Fit]:
        """Train networks that stand at the same epoch."""
        networks, members = len(begun), [each.member for each in begun]
        many, first = networks > 1, begun[0]
        forward, train, test = first.net.forward, first.member.train, first.member.test
        steps, size = self.steps(train), min(self.recipe.batch_size, len(train))
        run = epoch(training_step(forward, self.recipe, steps, scale_of(train)), apart, many)
        draw = partial(draws, examples=len(train), steps=steps, size=size)
        if many:
            draw = jax.vmap(draw, out_axes=1)     # the loop goes along the first axis
        evaluate = evaluation(forward, scale_of(test), apart, networks if many else 0)
        (images, firsts), (held, held_firsts) = (
            pool([getattr(m, split) for m in members]) for split in ("train", "test"))
        masks, now = join([b.masks for b in begun]) if many else first.masks, first.now
        if many:
            now = join([b.now for b in begun])
        histories, errors = [list(each.history) for each in begun], [""] * networks
        stopped: dict[int, dict[str, PyTree]] = {}

        def rows(**columns: Any) -> list[dict[str, Any]]:
            measured = evaluate(now["params"], now["state"], *held, held_firsts, len(test))
            columns = {**columns, **dict(zip(("test_loss", "test_accuracy"), jax.device_get(measured), strict=True))}
            return [{**{name: _number(values, i) for name, values in columns.items()}, **more}
                    for i, more in enumerate(self.measure(members, now))]

        def keep(row: dict[str, Any], i: int) -> None:
            histories[i].append(row)
            if (tell := members[i].on_epoch) is not None:
                tell(dict(row))

        if not histories[0]:
            for i, row in enumerate(rows(epoch=0)):
                keep(row, i)
        last = self.recipe.epochs if self.epochs is None else min(self.epochs, self.recipe.epochs)
        written, cost = time.monotonic(), 0.0
        for number in range(len(histories[0]), last + 1):
            if self.stop.is_set():
                break
            began = time.monotonic()
            keys = [jax.random.fold_in(jax.random.key(m.seed), number) for m in members]
            drawn = draw(jnp.stack(keys), jnp.asarray(firsts)) if many else draw(keys[0], jnp.asarray(firsts[0]))
            now, measured = run(now, drawn, masks, *images)
            loss, accuracy = jax.device_get(measured)
            for i in range(networks):
                if not errors[i] and not np.isfinite(_number(loss, i)):
                    errors[i] = (f"the training loss is {_number(loss, i)} in epoch {number}: lower the learning rate "
                                 f"({self.recipe.learning_rate:g})")
                    stopped[i] = part(now, i) if many else now
            alive = [i for i in range(networks) if not errors[i]]
            if not alive:
                break
            new = rows(epoch=number, train_loss=loss, train_accuracy=accuracy, learning_rate=self.recipe.rate(number),
                       seconds=(time.monotonic() - began) / networks)
            for i in alive:
                keep(new[i], i)
            ended = number == last
            if (ended and self.save_last) or (
                    not ended and time.monotonic() - written >= max(self.save_seconds, cost / SAVING)):
                written = time.monotonic()
                with self._saving:
                    for i in alive:
                        if saved := begun[i].saved:
                            kept = {**(part(now, i) if many else now), "masks": begun[i].masks}
                            saved.save(number, kept, histories[i])
                cost, written = time.monotonic() - written, time.monotonic()
            reached = [100 * histories[i][-1]["test_accuracy"] for i in alive]
            self.tell(f"epoch {number} of {self.recipe.epochs}: test accuracy {min(reached):.2f} %"
                      + (f" to {max(reached):.2f} %, {len(alive)} networks" if many else ""))
        ends = [stopped.get(i, part(now, i) if many else now) for i in range(networks)]
        return [Fit(end["params"], end["state"], each.masks, tuple(history), len(history) > self.recipe.epochs, error)
                for end, each, history, error in zip(ends, begun, histories, errors, strict=True)]


def pool(datasets: Sequence[Dataset]) -> tuple[tuple[Array, Array], list[int]]:
    """Lay data sets behind one another on the device, each once; say at which row that of each network begins."""
    different = {id(each): each for each in datasets}
    places = {name: i for i, name in enumerate(different)}
    arrays = [[np.asarray(getattr(each, name)) for each in different.values()] for name in ("pixels", "labels")]
    pixels, labels = (jnp.asarray(each[0] if len(each) == 1 else np.concatenate(each)) for each in arrays)
    return (pixels, labels), [places[id(each)] * len(each) for each in datasets]


def _number(values: Any, i: int) -> Any:
    """The i-th of the numbers of networks, or the one that all share."""
    return values if not hasattr(values, "dtype") else float(values if np.ndim(values) == 0 else values[i])
