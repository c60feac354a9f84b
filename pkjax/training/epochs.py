"""What a training computes: one step, epochs of it and the evaluation, for one network or for many at once.

There is one step. Networks that train together take it under `vmap`, each with its own examples and random numbers;
the data sets of all of them lie behind one another in memory, so that an example's row tells its set as well.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pkjax.data.dataset import Dataset
from pkjax.pruning.masks import masked
from pkjax.training.augmentation import crop_and_flip
from pkjax.training.flax_modules import Forward
from pkjax.training.loops import compiled_loop, examples_at_once
from pkjax.training.recipes import Recipe

__all__ = ["Scale", "Step", "draws", "epoch", "evaluation", "initial", "scale_of", "training_step"]

EVALUATED = 500
"""Examples that are evaluated at a time, fewer where memory is short."""

Step = Callable[..., tuple[dict[str, PyTree], tuple[Array, Array]]]
"""(state, (rows, key), masks, pixels, labels) → (state, (loss, accuracy))."""


class Scale(NamedTuple):
    """How to normalise bytes, in numbers that can be hashed."""

    levels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Array) -> Array:
        """Normalise pixels."""
        mean, std = (jnp.asarray(v, jnp.float32) for v in (self.mean, self.std))
        return (pixels.astype(jnp.float32) / self.levels - mean) / std


def scale_of(dataset: Dataset) -> Scale:
    """Return how a data set is normalised."""
    return Scale(dataset.levels, tuple(map(float, dataset.mean)), tuple(map(float, dataset.std)))


def _losses(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Compute the cross entropy of each example, and whether its largest logit is that of its label."""
    import optax

    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, (jnp.argmax(logits, axis=1) == labels).astype(logits.dtype)


@lru_cache(maxsize=32)
def initial(recipe: Recipe, steps: int) -> Callable[[PyTree], PyTree]:
    """Compile the beginning of the optimizer: parameters → its state."""
    return jax.jit(recipe.optimizer(steps).init)


@partial(jax.jit, static_argnames=("examples", "steps", "size"))
def draws(key: Array, first: Array, *, examples: int, steps: int, size: int) -> tuple[Array, Array]:
    """Draw an epoch: the rows of each batch, among `examples` from the row `first` on, and a key for each.

    Examples:
        >>> rows, keys = draws(jax.random.key(0), jnp.asarray(10), examples=5, steps=2, size=2)
        >>> rows.shape, keys.shape, bool((rows >= 10).all())
        ((2, 2), (2,), True)
    """
    shuffle, each = jax.random.split(key)
    order = jax.random.permutation(shuffle, examples)[: steps * size].reshape(steps, size)
    return order + first.astype(order.dtype), jax.random.split(each, steps)


@lru_cache(maxsize=32)
def training_step(forward: Forward, recipe: Recipe, steps: int, scale: Scale) -> Step:
    """Build the step of one network; `steps` is their number in an epoch."""
    import optax

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

    return step


@lru_cache(maxsize=32)
def epoch(step: Step, apart: bool, together: bool) -> Callable[..., Any]:
    """Compile an epoch: (state, draws, masks, pixels, labels) → (state, (loss, accuracy)), means over the batches.

    Args:
        step: what is done for each batch.
        apart: make one call for each batch.
        together: whether state and masks have an axis of networks, the first; that of draws is the second.
    """
    loop = compiled_loop(jax.vmap(step, (0, 0, 0, None, None)) if together else step, one_by_one=apart)

    def run(now: dict[str, PyTree], drawn: tuple[Array, Array], masks: PyTree, pixels: Array, labels: Array) -> Any:
        with jax.numpy_dtype_promotion("standard"):     # optax counts its steps in integers
            now, measured = loop(now, drawn, masks, pixels, labels)
        return now, jax.tree.map(lambda values: values.mean(0), measured)

    return run


@lru_cache(maxsize=32)
def evaluation(forward: Forward, scale: Scale, apart: bool, networks: int) -> Callable[..., tuple[Array, Array]]:
    """Compile (params, state, pixels, labels, firsts) → (loss, accuracy), a few examples at a time.

    `networks` is 0 for one network without an axis of networks. Otherwise that is the first, and `firsts` holds the
    first row of each network's examples; where all networks share their examples, each example is read once.
    """
    def one(rows: Array, params: PyTree, state: PyTree, pixels: Array, labels: Array) -> tuple[Array, Array]:
        return _losses(forward(params, state, scale(pixels[rows]), None)[0], labels[rows])

    def batch(carry: None, rows: Array, params: PyTree, state: PyTree, pixels: Array, labels: Array,
              firsts: Array | None) -> Any:
        if not networks:
            return carry, one(rows, params, state, pixels, labels)
        shift: Array | int = 0 if firsts is None else firsts.astype(rows.dtype)[:, None]
        along = (None if firsts is None else 0, 0, 0, None, None)
        return carry, jax.vmap(one, along)(rows + shift, params, state, pixels, labels)

    loop, sizes = compiled_loop(batch, one_by_one=apart), dict[Any, int]()

    def evaluate(params: PyTree, state: PyTree, pixels: Array, labels: Array, firsts: Sequence[int], examples: int
                 ) -> tuple[Array, Array]:
        if (pixels.shape, examples) not in sizes:
            alone = jax.tree.map(lambda leaf: leaf[0] if networks else leaf, (params, state))
            at_once = examples_at_once(lambda p, s, x: forward(p, s, scale(x), None)[0], *alone, pixels[:1],
                                       most=EVALUATED * max(1, networks))
            sizes[pixels.shape, examples] = max(1, min(at_once // max(1, networks), EVALUATED, examples))
        size = sizes[pixels.shape, examples]
        full = -(-examples // size) * size     # the last batch is filled with examples that are not counted
        rows = jnp.minimum(jnp.arange(full), examples - 1).reshape(-1, size)
        shared = not networks or not any(firsts)
        _, measured = loop(None, rows, params, state, pixels, labels, None if shared else jnp.asarray(firsts))
        shape = (networks, full) if networks else (full,)
        each = (jnp.moveaxis(v, 1, 0).reshape(shape) if networks else v.reshape(shape) for v in measured)
        losses, right = (v[..., :examples].mean(-1) for v in each)
        return losses, right

    return evaluate
