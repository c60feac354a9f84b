"""Scores, masks, and the one loop that draws masks from scores."""

from pkjax.pruning.baselines import inverted, reinitialize, shuffle_masks
from pkjax.pruning.connectivity import Connectivity, connectivity
from pkjax.pruning.masks import apply_masks, load_masks, masked, save_masks
from pkjax.pruning.prune import prune
from pkjax.pruning.result import DisconnectedWarning, EmptiedLayerWarning, LayerReport, PruneResult
from pkjax.pruning.schedules import exponential, linear
from pkjax.pruning.scopes import erk_scope, global_scope, layer_scope
from pkjax.pruning.scores import (
    grasp,
    magnitude,
    ntk_trace_saliency,
    path_exclusion,
    path_magnitude,
    random,
    snip,
    synflow,
    synflow_l2,
)
from pkjax.pruning.zero_scores import ZeroScoresWarning

__all__ = ["Connectivity", "DisconnectedWarning", "EmptiedLayerWarning", "LayerReport", "PruneResult",
           "ZeroScoresWarning", "apply_masks", "connectivity", "erk_scope", "exponential", "global_scope", "grasp",
           "inverted", "layer_scope", "linear", "load_masks", "magnitude", "masked", "ntk_trace_saliency",
           "path_exclusion", "path_magnitude", "prune", "random", "reinitialize", "save_masks", "shuffle_masks", "snip",
           "synflow", "synflow_l2"]
