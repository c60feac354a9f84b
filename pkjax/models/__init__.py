"""Networks of the literature as Flax modules; Flax is imported when the first of them is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkjax.models.convnext import convnext_tiny
    from pkjax.models.dense import fc
    from pkjax.models.gpt2 import gpt
    from pkjax.models.mixer import mlp_mixer
    from pkjax.models.nnx_dense import nnx_fc
    from pkjax.models.resnet import resnet18, resnet20, wide_resnet18, wide_resnet20
    from pkjax.models.vgg import vgg11, vgg16
    from pkjax.models.vit import vit_tiny

__all__ = ["convnext_tiny", "fc", "gpt", "mlp_mixer", "nnx_fc", "resnet18", "resnet20", "vgg11", "vgg16", "vit_tiny",
           "wide_resnet18", "wide_resnet20"]

_HOME = {"fc": "dense", "nnx_fc": "nnx_dense", "vgg11": "vgg", "vgg16": "vgg",
         "resnet20": "resnet", "resnet18": "resnet",
         "wide_resnet20": "resnet", "wide_resnet18": "resnet",
         "vit_tiny": "vit", "mlp_mixer": "mixer", "convnext_tiny": "convnext", "gpt": "gpt2"}


if not TYPE_CHECKING:                                    # to a type checker it would give any name at all
    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'pkjax.models' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(importlib.import_module(f"pkjax.models.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
