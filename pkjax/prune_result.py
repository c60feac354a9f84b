"""What pruning returns: the masks, and an account of them layer by layer."""

import html
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree

__all__ = ["DisconnectedWarning", "EmptiedLayerWarning", "LayerReport", "PruneResult", "layer_report"]


class EmptiedLayerWarning(UserWarning):
    """Pruning left a layer without a single weight: nothing flows through it any more."""


class DisconnectedWarning(UserWarning):
    """No path leads from the input to the output any more: the network is constant."""


@dataclass(frozen=True)
class LayerReport:
    """How many weights of one prunable leaf are kept.

    Attributes:
        name: the leaf's key path, joined by slashes.
        shape: the leaf's shape.
        kept: weights kept.
        total: weights before pruning.
        emptied: whether none is left.
        flow: share of R_1(|θ|), the ℓ1 path norm, that flows through the leaf (1 for every layer of a chain); None
            where it has not been worked out, as ``connectivity`` does.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    emptied: bool
    flow: float | None = None

    @property
    def density(self) -> float:
        """Fraction of the leaf's weights that is kept."""
        return self.kept / self.total if self.total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, and the density, ready for JSON."""
        return {**asdict(self), "shape": list(self.shape), "density": self.density}


def layer_report(name: str, shape: tuple[int, ...], kept: int, flow: float | None = None) -> LayerReport:
    """Report on a leaf of which so many weights are kept.

    >>> layer_report("kernel", (2, 5), 0).emptied
    True
    """
    total = math.prod(shape)
    return LayerReport(name=name, shape=shape, kept=kept, total=total, emptied=total > 0 and kept == 0, flow=flow)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["masks"],
    meta_fields=["kept", "total", "layers", "history"],
)
@dataclass(frozen=True)
class PruneResult:
    """Masks with the counts they reach.

    Attributes:
        masks: booleans like the parameters, True where a weight is kept; all True on leaves not prunable.
        kept: prunable weights kept.
        total: prunable weights before pruning.
        layers: a report for each prunable leaf, in flattening order.
        history: weights kept after each step.
    """

    masks: PyTree
    kept: int
    total: int
    layers: tuple[LayerReport, ...]
    history: tuple[int, ...] = field(repr=False)

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept, as achieved."""
        return self.kept / self.total

    @property
    def compression(self) -> float:
        """Compression ρ = −log10(density), as achieved; infinite where nothing is kept."""
        return -math.log10(self.density) if self.kept else math.inf

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of the layers that have lost all their weights."""
        return tuple(layer.name for layer in self.layers if layer.emptied)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, ready for JSON (a compression that is infinite becomes None).

        >>> layer = LayerReport(name="kernel", shape=(2, 5), kept=1, total=10, emptied=False)
        >>> PruneResult(masks={}, kept=1, total=10, layers=(layer,), history=(1,)).to_dict()["density"]
        0.1
        """
        return {
            "kept": self.kept,
            "total": self.total,
            "density": self.density,
            "compression": self.compression if self.kept else None,
            "history": list(self.history),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(layer.name)}</td><td>{html.escape(str(layer.shape))}</td>"
            f"<td>{layer.kept:,}</td><td>{layer.total:,}</td><td>{layer.density:.4f}</td>"
            f"<td>{'emptied' if layer.emptied else ''}</td></tr>"
            for layer in self.layers
        )
        head = "".join(f"<th>{title}</th>" for title in ("layer", "shape", "kept", "of", "density", ""))
        caption = f"{self.kept:,} of {self.total:,} weights kept (density {self.density:.4g})"
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{rows}</table>"
