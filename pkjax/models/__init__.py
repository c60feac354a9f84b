"""Networks of the pruning literature as Flax modules; Flax is imported when the first of them is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkjax.models.dense import fc
    from pkjax.models.nnx_dense import nnx_fc
    from pkjax.models.resnet import resnet18, resnet20, wide_resnet18, wide_resnet20
    from pkjax.models.vgg import vgg11, vgg16

__all__ = ["fc", "nnx_fc", "resnet18", "resnet20", "vgg11", "vgg16", "wide_resnet18", "wide_resnet20"]

_HOME = {"fc": "dense", "nnx_fc": "nnx_dense", "vgg11": "vgg", "vgg16": "vgg",
         "resnet20": "resnet", "resnet18": "resnet",
         "wide_resnet20": "resnet", "wide_resnet18": "resnet"}


if not TYPE_CHECKING:                                    # to a type checker it would give any name at all
    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'pkjax.models' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(importlib.import_module(f"pkjax.models.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
