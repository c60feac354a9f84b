"""Neural networks as sums over paths: path kernels, exact tangent kernels and pruning at initialisation.

    import pkjax as pk

    apply_fn, params = pk.from_linen(module, variables)

Every function takes a network as ``(apply_fn, params)``, where ``apply_fn(params, x)`` maps a batch
(N, *input) to (N, K). ``pk.models``, ``pk.data``, ``pk.dynamics`` and ``pk.plots`` load when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pkjax import path_kernel, paths
from pkjax.adapters import from_linen, from_nnx, mean_input, ones_input
from pkjax.analysis import Comparison, Report, analyze, compare
from pkjax.paths import NotFullyConnectedError, NotPathNetworkError
from pkjax.pruning import (
    Connectivity,
    DisconnectedWarning,
    EffectiveUnits,
    EmptiedLayerWarning,
    LayerReport,
    LeafShapes,
    LoadedTensors,
    PruneResult,
    ShrinkResult,
    ZeroScoresWarning,
    apply_masks,
    connectivity,
    effective_units,
    erk_scope,
    exponential,
    fisher,
    global_scope,
    grasp,
    inverted,
    layer_scope,
    linear,
    load_masks,
    load_safetensors,
    magnitude,
    masked,
    n_m_scope,
    ntk_sap,
    ntk_trace_saliency,
    on_paths,
    path_exclusion,
    path_magnitude,
    phew,
    prune,
    random,
    reinitialize,
    save_masks,
    save_safetensors,
    shrink,
    shuffle_masks,
    snip,
    synflow,
    synflow_l2,
)
from pkjax.tangent_kernel import (
    KernelRegression,
    LeafPlan,
    NtkEigenpairs,
    NtkPlan,
    data_factor,
    kernel_alignment,
    kernel_regression,
    ntk,
    ntk_alignment,
    ntk_density,
    ntk_effective_rank,
    ntk_eigenpairs,
    ntk_frobenius,
    ntk_matvec,
    ntk_plan,
    ntk_regression,
    ntk_trace,
    ntk_trace_estimate,
)
from pkjax.trees import kernels

if TYPE_CHECKING:
    from pkjax import data, dynamics, experiments, models, plots, training

__version__ = "0.1.0"

__all__ = [
    "Comparison", "Connectivity", "DisconnectedWarning", "EffectiveUnits", "EmptiedLayerWarning", "KernelRegression",
    "LayerReport", "LeafPlan", "LeafShapes", "LoadedTensors", "NotFullyConnectedError", "NotPathNetworkError",
    "NtkEigenpairs", "NtkPlan", "PruneResult", "Report", "ShrinkResult", "ZeroScoresWarning", "analyze", "apply_masks",
    "compare", "connectivity", "data", "data_factor", "dynamics", "effective_units", "erk_scope", "experiments",
    "exponential", "fisher", "from_linen", "from_nnx", "global_scope", "grasp", "inverted", "kernel_alignment",
    "kernel_regression", "kernels", "layer_scope", "linear", "load_masks", "load_safetensors", "magnitude", "masked",
    "mean_input", "models", "n_m_scope", "ntk", "ntk_alignment", "ntk_density", "ntk_effective_rank", "ntk_eigenpairs",
    "ntk_frobenius", "ntk_matvec", "ntk_plan", "ntk_regression", "ntk_sap", "ntk_trace", "ntk_trace_estimate",
    "ntk_trace_saliency", "on_paths", "ones_input", "path_exclusion", "path_kernel", "path_magnitude", "paths", "phew",
    "plots", "prune", "random", "reinitialize", "save_masks", "save_safetensors", "shrink", "shuffle_masks", "snip",
    "synflow", "synflow_l2", "training",
]

_LAZY = ("data", "dynamics", "experiments", "models", "plots", "training")


if not TYPE_CHECKING:                                    # to a type checker it would give any name at all
    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'pkjax' has no attribute {name!r}")
        return importlib.import_module(f"pkjax.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
