"""Scores, masks, and the one loop that draws masks from scores."""

from pkjax.pruning.baselines import inverted, reinitialize, shuffle_masks
from pkjax.pruning.connectivity import Connectivity, connectivity
from pkjax.pruning.effective_units import EffectiveUnits, effective_units
from pkjax.pruning.masks import apply_masks, load_masks, masked, save_masks
from pkjax.pruning.on_paths import on_paths
from pkjax.pruning.phew import phew
from pkjax.pruning.prune import prune
from pkjax.pruning.result import DisconnectedWarning, EmptiedLayerWarning, LayerReport, PruneResult
from pkjax.pruning.schedules import exponential, linear
from pkjax.pruning.scopes import erk_scope, global_scope, layer_scope, n_m_scope
from pkjax.pruning.scores import (
    fisher,
    grasp,
    magnitude,
    ntk_sap,
    ntk_trace_saliency,
    path_exclusion,
    path_magnitude,
    random,
    snip,
    synflow,
    synflow_l2,
)
from pkjax.pruning.shrinking import LeafShapes, ShrinkResult, shrink
from pkjax.pruning.tensor_files import LoadedTensors, load_safetensors, save_safetensors
from pkjax.pruning.zero_scores import ZeroScoresWarning

__all__ = ["Connectivity", "DisconnectedWarning", "EffectiveUnits", "EmptiedLayerWarning", "LayerReport", "LeafShapes",
           "LoadedTensors", "PruneResult", "ShrinkResult", "ZeroScoresWarning", "apply_masks", "connectivity",
           "effective_units", "erk_scope", "exponential", "fisher", "global_scope", "grasp", "inverted", "layer_scope",
           "linear", "load_masks", "load_safetensors", "magnitude", "masked", "n_m_scope", "ntk_sap",
           "ntk_trace_saliency", "on_paths", "path_exclusion", "path_magnitude", "phew", "prune", "random",
           "reinitialize", "save_masks", "save_safetensors", "shrink", "shuffle_masks", "snip", "synflow",
           "synflow_l2"]
