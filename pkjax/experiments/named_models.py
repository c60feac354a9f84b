"""The networks that can be chosen by name, at the sizes that their data ask for."""

import re
from collections.abc import Sequence
from typing import Any

import pkjax as pk
from pkjax.experiments.user_networks import Nnx

__all__ = ["MODELS", "SIGNAL_MODELS", "named_model"]

MODELS = ("vgg11", "vgg16", "resnet20", "wide_resnet20", "resnet18", "wide_resnet18")
"""Functions of `pk.models` that take a number of classes and `plain`."""
SIGNAL_MODELS = ("vit_tiny", "mlp_mixer", "convnext_tiny")
"""Functions of `pk.models` that make NNX modules for square images; they have paths with frozen gates alone."""
IMAGE = (32, 32, 3)
"""The images of CIFAR."""


def named_model(name: str, classes: int, shape: Sequence[int] = IMAGE) -> Any:
    """Build the Linen module of a name for images (H, W, C); None for a name that stands for none.

    `-plain` leaves out BatchNorm. Patches of ViT and Mixer leave 7 or more of them along an image, 4 of a small one:
    4×4 pixels of 28 or 32, 8×8 of 64, 2×2 of 8.

    Raises:
        ValueError: the network takes square images, and these are none.

    Examples:
        >>> named_model("fc-100x2", 10).depth, named_model("resnet20-plain", 10).plain, named_model("fc-0", 10)
        (2, True, None)
    """
    if dense := re.fullmatch(r"fc-([1-9]\d{0,5})(?:x([1-9]\d?))?", name):
        return pk.models.fc(int(dense[1]), int(dense[2] or 6), classes)
    base = name.removesuffix("-plain")
    if base in MODELS:
        return getattr(pk.models, base)(classes, plain=base != name)
    sized = re.fullmatch(r"(vit_tiny|mlp_mixer)-([1-9]\d{0,4})x([1-9]\d?)", name)
    if not sized and name not in SIGNAL_MODELS:
        return None
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(f"{name} takes square images (H, H, C), got images of shape {tuple(shape)}")
    image, channels = shape[0], shape[2]
    if name == "convnext_tiny":
        sizes = {"patch": 2 if image >= 16 else 1, "depths": (1, 1, 2, 1), "widths": (24, 48, 96, 192)}
    else:
        width, depth = (int(sized[2]), int(sized[3])) if sized else (192, 12) if name == "vit_tiny" else (128, 8)
        sizes = {"image": image, "patch": _patch(image), "width": width, "depth": depth}
        if name.startswith("vit_tiny"):
            sizes["heads"] = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
    make = getattr(pk.models, sized[1] if sized else name)

    def build(rngs: Any) -> Any:
        return make(classes, channels=channels, rngs=rngs, **sizes)

    return Nnx(build, make.__annotations__["return"])


def _patch(image: int) -> int:
    """Choose the height of a patch.

    Examples:
        >>> [_patch(image) for image in (8, 28, 32, 64)]
        [2, 4, 4, 8]
    """
    least = 7 if image >= 16 else 4
    return max(size for size in range(1, image + 1) if image % size == 0 and (image // size >= least or size == 1))
