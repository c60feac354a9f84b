"""What pruning returns: the masks, and an account of them layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from pkjax import tables

__all__ = ["DisconnectedWarning", "EmptiedLayerWarning", "LayerReport", "PruneResult", "layer_report", "layers_table"]


if TYPE_CHECKING:
    Count: TypeAlias = int      # what a user's typed code sees outside of jit and vmap
else:
    Count = int | Int[Array, "*runs"]


class EmptiedLayerWarning(UserWarning):
    """Pruning left a layer without a single weight: nothing flows through it any more.

    Given by ``prune``, which names the layers.

    Examples:
        >>> import warnings, jax.numpy as jnp, pkjax as pk
        >>> with warnings.catch_warnings(record=True, action="always") as given:
        ...     masks = pk.prune(pk.magnitude, {"a": jnp.ones((2, 2)), "b": 2 * jnp.ones((2, 2))}, density=0.5).masks
        >>> [warning.category.__name__ for warning in given]
        ['EmptiedLayerWarning']
    """


class DisconnectedWarning(UserWarning):
    """No path leads from the input to the output any more: the network is constant.

    Given by ``connectivity``, which names the layers that nothing flows through.

    Examples:
        >>> import warnings, jax.numpy as jnp, pkjax as pk
        >>> net, weights = lambda w, x: x @ w[0] @ w[1], [jnp.ones((2, 2)), jnp.ones((2, 1))]
        >>> with warnings.catch_warnings(record=True, action="always") as given:
        ...     pk.connectivity(net, weights, jnp.ones((1, 2)), masks=[jnp.ones((2, 2), bool), jnp.zeros((2, 1), bool)])
        Connectivity(
            connected=False,
            log10_paths=-inf,
            log10_effective_paths=None,
            layers=<2 of LayerReport>
        )
        >>> [warning.category.__name__ for warning in given]
        ['DisconnectedWarning']
    """


@partial(jax.tree_util.register_dataclass, data_fields=["kept", "emptied", "flow"],
         meta_fields=["name", "shape", "total"])
@dataclass(frozen=True)
class LayerReport:
    """How many weights of one prunable leaf are kept.

    A part of ``PruneResult``, ``Connectivity`` and ``Report``, so returned by ``prune``, ``connectivity`` and
    ``analyze``.

    Examples:
        >>> LayerReport("kernel", (2, 5), kept=4, total=10, emptied=False).density
        0.4
    """

    name: str
    """The leaf's key path, joined by slashes."""
    shape: tuple[int, ...]
    """The leaf's shape."""
    kept: Count
    """Weights kept."""
    total: int
    """Weights before pruning."""
    emptied: bool | Bool[Array, "*runs"]
    """Whether none is left."""
    flow: float | None = None
    """Share of R_1(|θ|), the ℓ1 path norm, that flows through the leaf (1 for every layer of a chain); None where it
    has not been worked out, as ``connectivity`` does."""

    @property
    def density(self) -> Any:
        """Fraction of the leaf's weights that is kept."""
        return self.kept / self.total if self.total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, and the density, ready for JSON."""
        return {"name": self.name, "shape": list(self.shape), "kept": int(self.kept), "total": self.total,
                "emptied": bool(self.emptied), "flow": self.flow, "density": float(self.density)}


def layer_report(name: str, shape: tuple[int, ...], kept: Count, flow: float | None = None) -> LayerReport:
    """Report on a leaf of which so many weights are kept.

    Examples:
        >>> layer_report("kernel", (2, 5), 0).emptied
        True
    """
    total = math.prod(shape)
    return LayerReport(name=name, shape=shape, kept=kept, total=total, emptied=total > 0 and kept == 0, flow=flow)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["masks", "kept", "layers", "history", "zero_scores"],
    meta_fields=["total"],
)
@dataclass(frozen=True, eq=False)
class PruneResult:
    """Masks with the counts they reach: whole numbers, or arrays of them where pruning ran inside ``jit`` or ``vmap``.

    Returned by ``prune``. Prints as a short text and, in a notebook, as a table of its layers.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> pk.prune(pk.magnitude, {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}, density=0.5)
        PruneResult(
            masks=<1 leaf, 4 entries>,
            kept=2,
            total=4,
            layers=<1 of LayerReport>,
            history=(2,),
            zero_scores=0
        )
    """

    masks: PyTree
    """Booleans like the parameters, True where a weight is kept; all True on leaves not prunable."""
    kept: Count
    """Prunable weights kept."""
    total: int
    """Prunable weights before pruning."""
    layers: tuple[LayerReport, ...]
    """A report for each prunable leaf, in flattening order."""
    history: tuple[Count, ...]
    """Weights kept after each step."""
    zero_scores: Count = 0
    """Prunable weights whose score was exactly 0 when they were first scored, among those that were still there."""

    @property
    def density(self) -> Any:
        """Fraction of the prunable weights that is kept, as achieved."""
        return self.kept / self.total

    @property
    def compression(self) -> Any:
        """Compression ρ = −log10(density), as achieved; infinite where nothing is kept."""
        if isinstance(self.kept, jax.Array):
            return -jnp.log10(self.density)
        return -math.log10(self.density) if self.kept else math.inf

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of the layers that have lost all their weights."""
        return tuple(layer.name for layer in self.layers if layer.emptied)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, ready for JSON (a compression that is infinite becomes None).

        Examples:
            >>> layer = LayerReport(name="kernel", shape=(2, 5), kept=1, total=10, emptied=False)
            >>> PruneResult(masks={}, kept=1, total=10, layers=(layer,), history=(1,)).to_dict()["density"]
            0.1
        """
        return {
            "kept": int(self.kept),
            "total": self.total,
            "zero_scores": int(self.zero_scores),
            "density": float(self.density),
            "compression": float(self.compression) if self.kept else None,
            "history": [int(kept) for kept in self.history],
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __repr__(self) -> str:
        """Format as a short text, which says what is lost in whole."""
        names = self.emptied if all(isinstance(layer.emptied, bool) for layer in self.layers) else ()
        return tables.brief(self) + (f"\nno weight is left in {tables.listed(names)}" if names else "")

    def _repr_html_(self) -> str | None:
        if np.ndim(self.kept) or isinstance(self.kept, jax.core.Tracer):
            return None
        caption = f"{self.kept:,} of {self.total:,} weights kept (density {self.density:.4g})"
        if self.zero_scores:
            caption += f"; {self.zero_scores:,} scores were 0"
        return layers_table(self.layers, caption)


def layers_table(layers: Sequence[LayerReport], caption: str) -> str:
    """Build the HTML table of what every layer keeps, and of the flow through it where that is known.

    Examples:
        >>> ">kernel</td>" in layers_table([layer_report("kernel", (2, 5), 4)], "after pruning")
        True
    """
    flow = any(layer.flow is not None for layer in layers)
    rows = [[layer.name, "×".join(map(str, layer.shape)), f"{layer.kept:,}", f"{layer.total:,}",
             "emptied" if layer.emptied else f"{layer.density:.4f}",
             *([tables.format_number(layer.flow, 3)] if flow else [])] for layer in layers]
    return tables.html(["layer", "shape", "kept", "of", "density", *(["flow"] if flow else [])], rows,
                       caption=caption, left=2)
