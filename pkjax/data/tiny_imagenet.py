"""Tiny ImageNet as published: a folder of JPEG files."""

from pathlib import Path

import numpy as np

from pkjax.extras import needed

__all__ = ["TinyImageNet"]

FOLDER = "tiny-imagenet-200"
ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


class TinyImageNet:
    """Examples of a split, decoded when an array of indices chooses them.

    Classes are numbered in the order of `wnids.txt`. The published test images have no labels, so the 10,000 validation
    images are the test split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Find the files of a split in `folder` or in `folder/tiny-imagenet-200`.

        Raises:
            FileNotFoundError: the files are missing.
        """
        root = next((f for f in (folder / FOLDER, folder) if (f / "wnids.txt").is_file()), None)
        if root is None:
            raise FileNotFoundError(f"no tiny_imagenet in {folder}: download {ADDRESS} once with network access and "
                                    f"unpack it there, or set data_dir or TFDS_DATA_DIR to the folder that holds "
                                    f"{FOLDER}")
        classes = {name: i for i, name in enumerate((root / "wnids.txt").read_text().split())}
        if split == "train":
            pairs = [(file, classes[name]) for name in classes
                     for file in sorted((root / "train" / name / "images").glob("*.JPEG"))]
        else:
            rows = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
            pairs = [(root / "val" / "images" / row[0], classes[row[1]]) for row in rows]
        if not pairs:
            raise FileNotFoundError(f"no {split} images of tiny_imagenet in {root}: unpack {ADDRESS} again")
        self.files = [file for file, _ in pairs]
        self.labels = np.array([label for _, label in pairs], np.int64)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.files)

    def __getitem__(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode the chosen images; grey images get three equal channels."""
        Image = needed("PIL.Image", "data", "tiny_imagenet needs Pillow")
        pixels = np.empty((len(chosen), 64, 64, 3), np.uint8)
        for row, i in zip(pixels, chosen, strict=True):
            with Image.open(self.files[i]) as image:
                row[:] = np.asarray(image.convert("RGB"))
        return pixels, self.labels[chosen]
