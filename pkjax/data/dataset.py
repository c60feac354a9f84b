"""Labelled images as arrays: scikit-learn's digits, MNIST and CIFAR through TFDS without TensorFlow, Tiny ImageNet."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Int, UInt8

from pkjax import tables
from pkjax.data.images import Images
from pkjax.extras import needed

__all__ = ["Dataset", "load", "names"]

# Mean and standard deviation per channel of the training images, scaled to [0, 1]; digits' are computed.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": ((0.480, 0.448, 0.397), (0.276, 0.269, 0.282)),
}
_CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}
names = tuple(_CLASSES)
"""The data sets that `load` knows."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in their stored form: one byte per pixel and channel, or floating-point numbers.

    `images` is (raw − mean) / std, where `raw` are the pixels in [0, 1]. Returned by `load`.

    Examples:
        >>> load("digits", samples=32)
        Dataset(
            pixels=uint8[32,8,8,1],
            labels=int64[32] 6 … 4,
            mean=float32[1] 0.3054,
            std=float32[1] 0.3755,
            classes=10,
            name='digits',
            levels=16
        )
    """

    pixels: UInt8[np.ndarray, "n *shape c"] | Float32[np.ndarray, "n *shape c"]
    """Grey levels, from 0 to `levels`: (N, H, W, C) in the data sets of `load`."""
    labels: Int[np.ndarray, " n"]
    """Classes, counted from 0."""
    mean: Float32[np.ndarray, " c"]
    """Mean of each channel of the training images in [0, 1]; 0 without normalisation."""
    std: Float32[np.ndarray, " c"]
    """Standard deviation of each channel of the training images in [0, 1]; 1 without normalisation."""
    classes: int
    """Number of classes."""
    name: str
    """Name of the data set for `load`."""
    levels: int
    """Grey level of white."""

    __repr__ = tables.brief

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    @property
    def images(self) -> Any:
        """The normalised images, an array (N, H, W, C) in float32 of which only what is read is computed; see `Images`.

        Nothing is kept: take `jnp.asarray(data.images)` once to use all of them often.
        """
        return Images(self.pixels, self.levels, self.mean, self.std)

    @property
    def raw(self) -> Any:
        """The pixels in [0, 1], like `images`; their mean over examples is the input of the -Dist scores."""
        return Images(self.pixels, self.levels, np.zeros_like(self.mean), np.ones_like(self.std))

    def normalized(self, raw: T) -> T:
        """Normalise pixels in [0, 1], an array of NumPy or JAX, like `images`."""
        return (raw - self.mean) / self.std


def load(name: str = "digits", *, split: str = "train", samples: int | None = None, seed: int = 0,
         data_dir: str | os.PathLike[str] | None = None, normalize: bool = True,
         download: bool = True) -> Dataset:
    """Load labelled images, all of a split or a seeded choice of them.

    "digits" are the 8×8 images that scikit-learn ships, the last 360 of them the test split. "tiny_imagenet" is read
    from its unpacked folder `tiny-imagenet-200`; its validation images are the test split. The others come through
    TFDS, without TensorFlow. The first n samples of a seed are the same for every value of `samples`.

    Args:
        name: one of `names`.
        split: "train" or "test".
        samples: how many images to choose; None takes all.
        seed: seed of the choice.
        data_dir: the folder of TFDS, or the one that holds `tiny-imagenet-200`; `$TFDS_DATA_DIR` by default, else
            `~/tensorflow_datasets`.
        normalize: whether images are in standard deviations of the training images per channel; otherwise they are
            pixels in [0, 1].
        download: whether TFDS may download what is missing.

    Returns:
        images (N, H, W, C) and labels (N,).

    Raises:
        ValueError: the name or split is unknown, or the split does not have that many samples.
        FileNotFoundError: the data is missing and cannot be downloaded.
        ImportError: the extra is missing.

    Source: the data sets of Gebhart, Saxena and Schrater (2021), section 5, and digits; the channels' statistics are
    the usual ones of PyTorch code.

    Examples:
        >>> digits = load("digits", samples=32)
        >>> digits.images.shape, digits.classes
        ((32, 8, 8, 1), 10)
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(names)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    source = _source(name, split, data_dir, download)
    total = len(source)
    if samples is not None and not 1 <= samples <= total:
        raise ValueError(f"the {split} split of {name} has {total} examples, so samples must be between 1 "
                         f"and {total}, got {samples}")
    chosen = np.arange(total) if samples is None else np.random.default_rng(seed).permutation(total)[:samples]
    pixels, labels = source[chosen]
    channels = pixels.shape[-1]
    mean, std = np.zeros(channels), np.ones(channels)
    if normalize:
        mean, std = (np.array(v) for v in (_STATISTICS[name] if name in _STATISTICS else _digit_statistics()))
    return Dataset(pixels.astype(np.uint8, copy=False), labels, mean.astype(np.float32), std.astype(np.float32),
                   _CLASSES[name], name, 16 if name == "digits" else 255)


def _source(name: str, split: str, data_dir: str | os.PathLike[str] | None, download: bool) -> Any:
    """Find the examples of a split: a sequence that an array of indices can index."""
    if name == "digits":
        return _digits(split)
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if name == "tiny_imagenet":
        from pkjax.data.tiny_imagenet import TinyImageNet

        return TinyImageNet(folder, split)
    return _tfds(name, split, folder, download)


class _Arrays:
    """Examples in memory."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.pixels[chosen], self.labels[chosen]


class _Source:
    """Examples of a TFDS data source, decoded on access."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        examples = self.source.__getitems__([int(i) for i in chosen])
        return (np.stack([example["image"] for example in examples]),
                np.array([example["label"] for example in examples], np.int64))


def _digits(split: str) -> _Arrays:
    bunch = needed("sklearn.datasets", "data", "digits come with scikit-learn").load_digits()
    kept = slice(-360, None) if split == "test" else slice(-360)
    return _Arrays(bunch.images[kept][..., None], bunch.target[kept].astype(np.int64))


def _digit_statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    raw = _digits("train").pixels / 16
    return (float(raw.mean()),), (float(raw.std()),)


def _tfds(name: str, split: str, folder: Path, download: bool) -> _Source:
    # Without TensorFlow, TFDS still needs the first two, and fails without them only deep inside.
    for module in ("importlib_resources", "PIL", "tensorflow_datasets"):
        needed(module, "data", f"{name} is read through tensorflow-datasets, which needs {module}")
    import tensorflow_datasets as tfds

    remedy = (f"download it once with network access, by tfds.data_source({name!r}, "
               f"data_dir={str(folder)!r}), or set data_dir or TFDS_DATA_DIR to a folder that holds it")
    if not download and not any(folder.glob(f"{name}/*/dataset_info.json")):
        raise FileNotFoundError(f"no {name} in {folder}: {remedy}")
    try:
        return _Source(tfds.data_source(name, split=split, data_dir=folder))
    except Exception as error:  # TFDS passes on whatever its downloader, file reader or decoder raises
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(f"no {name} in {folder}, and it could not be downloaded "
                                f"({type(error).__name__}: {reason}): {remedy}") from error
