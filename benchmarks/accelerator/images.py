"""CIFAR-10 in one file that travels: the images as TFDS stores them (still encoded), read back by Pillow alone.

    python -m benchmarks.accelerator.images cifar10.npz

The pixels are those that `pk.data.load("cifar10")` gives.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pkjax as pk
from pkjax.data.dataset import Dataset

SPLITS = ("train", "test")


def write(path: Path) -> None:
    """Store both splits as TFDS has them."""
    import tensorflow_datasets as tfds

    splits = {}
    for split in SPLITS:
        source = tfds.data_source("cifar10", split=split, decoders={"image": tfds.decode.SkipDecoding()})
        examples = source.__getitems__(list(range(len(source))))
        splits[split] = [example["image"] for example in examples], [example["label"] for example in examples]
    store(path, splits)


def store(path: Path, splits: Mapping[str, tuple[Sequence[bytes], Sequence[int]]]) -> None:
    """Store encoded images end to end, where each ends, and labels."""
    stored: dict[str, Any] = {}
    for split, (encoded, labels) in splits.items():
        stored |= {f"{split}_bytes": np.frombuffer(b"".join(encoded), np.uint8),
                   f"{split}_ends": np.cumsum([len(image) for image in encoded]),
                   f"{split}_labels": np.array(labels, np.int8)}
    np.savez_compressed(path, **stored)


def load(path: Path | None, split: str) -> Dataset:
    """Read a split from the file, or from TFDS where there is none."""
    if path is None:
        return pk.data.load("cifar10", split=split, download=False)
    from PIL import Image

    with np.load(path, allow_pickle=False) as stored:
        content, ends, labels = (stored[f"{split}_{name}"] for name in ("bytes", "ends", "labels"))
    content = content.tobytes()

    def decoded(begin: int, end: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content[begin:end])).convert("RGB"))

    with ThreadPoolExecutor() as pool:      # Pillow decodes beside Python
        pixels = np.stack(list(pool.map(decoded, [0, *ends[:-1]], ends)))
    return _dataset(pixels, labels.astype(np.int64))


def noise(count: int, seed: int = 0) -> Dataset:
    """Random images and labels, to try a part where CIFAR-10 is not."""
    rng = np.random.default_rng(seed)
    return _dataset(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count))


def _dataset(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    mean, std = (np.array(values, np.float32) for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    return Dataset(pixels, labels, mean, std, 10, "cifar10", 255)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    path = parser.parse_args(arguments).output
    write(path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, " + " and ".join(
        f"{len(load(path, split)):,} {split} images" for split in SPLITS))


if __name__ == "__main__":
    main()
