"""How to train: the hyperparameters of the paper's tables, and those of transformers, as recipes."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optax

__all__ = ["CosineRecipe", "Recipe", "recipe"]


@dataclass(frozen=True)
class Recipe:
    """Adam with an ℓ2 term in the gradient and a learning rate that drops at given epochs.

    Raises:
        ValueError: a value is out of its range.

    Source: Gebhart, Saxena and Schrater (2021), tables 1 and 2.

    Examples:
        >>> Recipe(learning_rate=0.01, epochs=50)
        Recipe(learning_rate=0.01, epochs=50, batch_size=64, drops=(), drop_factor=0.1, weight_decay=0.0001, ...)
    """

    learning_rate: float = 1e-3
    """η of the first epoch."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    drops: tuple[int, ...] = ()
    """Epochs after which the learning rate is multiplied by `drop_factor`."""
    drop_factor: float = 0.1
    """Factor of the learning rate at each drop."""
    weight_decay: float = 1e-4
    """w: the gradient is that of the loss and w θ."""
    augment: bool = False
    """Whether training images are shifted by up to four pixels and mirrored at random."""

    def __post_init__(self) -> None:
        """Refuse values out of their range."""
        for name in ("learning_rate", "drop_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(drop < 1 for drop in self.drops):
            raise ValueError(f"drops are epochs counted from 1, got {self.drops}")

    def rate(self, epoch: int) -> float:
        """Compute the learning rate of an epoch, counted from 1.

        Examples:
            >>> [Recipe(learning_rate=1.0, drops=(2,)).rate(epoch) for epoch in (1, 2, 3)]
            [1.0, 1.0, 0.1]
        """
        return self.learning_rate * self.drop_factor ** sum(epoch > drop for drop in self.drops)

    def after(self, epoch: int) -> "Recipe":
        """Return the recipe of the epochs that remain after one of them, with the learning rates that they have here.

        Examples:
            >>> Recipe(learning_rate=1.0, epochs=9, drops=(2, 6)).after(4)
            Recipe(learning_rate=0.1, epochs=5, batch_size=64, drops=(2,), drop_factor=0.1, weight_decay=0.0001, ...)
        """
        return replace(self, learning_rate=self.rate(epoch + 1), epochs=self.epochs - epoch,
                       drops=tuple(drop - epoch for drop in self.drops if drop > epoch))

    def optimizer(self, steps: int) -> "optax.GradientTransformation":
        """Build the optimizer for a number of steps per epoch: Adam on g + w θ, as PyTorch treats weight decay."""
        import optax

        schedule = optax.piecewise_constant_schedule(
            self.learning_rate, {drop * steps: self.drop_factor for drop in self.drops})
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optax.adam(schedule))


@dataclass(frozen=True)
class CosineRecipe(Recipe):
    """AdamW with a learning rate that rises linearly from 0 and falls to 0 as a cosine, as transformers are trained.

        η_t = η t / W  for t ≤ W,   η_t = (η/2) (1 + cos(π (t − W) / (T − W)))  after it

    where t counts epochs, T is their number and W = `warm_up` · T. Weight decay is apart from the gradient, Δθ = −η_t
    (Adam(∇L) + w θ), and acts on leaves of at least two axes: not on biases and scales.

    Raises:
        ValueError: a value is out of its range, or there are drops.

    Source: Loshchilov and Hutter (2019), algorithm 2, and (2017), equation 5.

    Examples:
        >>> CosineRecipe(learning_rate=0.01, epochs=20, weight_decay=0.05)
        CosineRecipe(learning_rate=0.01, epochs=20, ..., weight_decay=0.05, augment=False, warm_up=0.1, completed=0)
    """

    warm_up: float = 0.1
    """The part of all epochs in which the learning rate rises."""
    completed: int = 0
    """Epochs of the whole training that came before these."""

    def __post_init__(self) -> None:
        """Refuse values out of their range."""
        super().__post_init__()
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must be at least 0 and below 1, got {self.warm_up}")
        if self.completed < 0:
            raise ValueError(f"completed must be at least 0, got {self.completed}")
        if self.drops:
            raise ValueError(f"the learning rate of CosineRecipe falls without drops, got {self.drops}: leave them "
                             "out, or use Recipe")

    def rate(self, epoch: int) -> float:
        """Compute the learning rate in the middle of an epoch, counted from 1.

        Examples:
            >>> [round(CosineRecipe(1.0, 5, warm_up=0.4).rate(epoch), 3) for epoch in (1, 2, 3, 4, 5)]
            [0.25, 0.75, 0.933, 0.5, 0.067]
        """
        total = self.completed + self.epochs
        now, rising = self.completed + epoch - 0.5, self.warm_up * total
        if now < rising:
            return self.learning_rate * now / rising
        return self.learning_rate * (1 + math.cos(math.pi * (now - rising) / (total - rising))) / 2

    def after(self, epoch: int) -> "CosineRecipe":
        """Return the recipe of the epochs that remain after one of them, with the learning rates that they have here.

        Examples:
            >>> CosineRecipe(epochs=9).after(4)
            CosineRecipe(learning_rate=0.001, epochs=5, ..., completed=4)
        """
        return replace(self, epochs=self.epochs - epoch, completed=self.completed + epoch)

    def optimizer(self, steps: int) -> "optax.GradientTransformation":
        """Build the optimizer for a number of steps per epoch: AdamW, which decays matrices and kernels."""
        import jax
        import optax

        total = (self.completed + self.epochs) * steps
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, round(self.warm_up * total), total)
        return optax.adamw(lambda count: schedule(count + self.completed * steps), weight_decay=self.weight_decay,
                           mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))


_CONVOLUTIONAL = Recipe(learning_rate=1e-3, epochs=100, drops=(60,), augment=True)
_VGG = replace(_CONVOLUTIONAL, epochs=160, drops=(60, 120))
_TRANSFORMER = CosineRecipe(learning_rate=1e-3, epochs=100, batch_size=128, weight_decay=0.05, augment=True)


def recipe(model: str, data: str) -> Recipe:
    """Look up how the paper trains a model on a data set, by names; transformers train as the literature does.

    Tables 1 and 2 have Adam, batches of 64, weight decay 1e-4 and drops by a factor of 0.1. Fully connected networks
    train on MNIST for 50 epochs at 0.01, on CIFAR for 100 at 0.001 with a drop after 60. ResNet-20 and Wide-ResNet-20
    train for 100 at 0.001 with a drop after 60; VGG-11 and VGG-16 for 160 at 0.001 (CIFAR-100: 0.0005) with drops after
    60 and 120. CIFAR images are augmented, as usual and as in the code that the paper builds on; its text does not
    mention it.

    Cases that the tables omit take the nearest column: digits and Fashion-MNIST that of MNIST, Tiny ImageNet that of
    CIFAR, ResNet-18 and Wide-ResNet-18 that of ResNet-20. An unknown model trains as ResNet-20, an unknown data set as
    CIFAR.

    The paper has no transformers. Names that begin with vit, mlp_mixer or convnext take a `CosineRecipe`: AdamW with
    batches of 128, weight decay 0.05, and 100 epochs at 0.001, of which 10 warm up. That is how Lee, Lee and Song train
    a ViT on CIFAR from scratch, but for the stronger augmentation, label smoothing and stochastic depth that they add.

    Source: Gebhart, Saxena and Schrater (2021), tables 1 and 2; the defaults of the code of Lee, Lee and Song (2021),
    "Vision Transformer for Small-Size Datasets".

    Examples:
        >>> recipe("fc-100", "mnist").learning_rate, recipe("vgg16", "cifar100").drops
        (0.01, (60, 120))
        >>> recipe("vit_tiny", "cifar10").weight_decay
        0.05
    """
    small = data in ("digits", "mnist", "fashion_mnist")
    if model.startswith("fc-"):
        nearest = Recipe(learning_rate=0.01, epochs=50) if small else Recipe(1e-3, 100, drops=(60,), augment=True)
    elif model.startswith("vgg"):
        nearest = replace(_VGG, learning_rate=5e-4) if data == "cifar100" else _VGG
    elif model.startswith(("vit", "mlp_mixer", "convnext")):
        nearest = _TRANSFORMER
    else:
        nearest = _CONVOLUTIONAL
    return replace(nearest, augment=nearest.augment and not small)
