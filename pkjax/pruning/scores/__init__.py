"""Scores: parameters in, a tree like them out; weights with a higher score are kept."""

from pkjax.pruning.scores.data_free import (
    ScaledScores,
    magnitude,
    random,
    synflow,
    synflow_l2,
    synflow_l2_scaled,
    synflow_scaled,
)
from pkjax.pruning.scores.loss import fisher, grasp, snip
from pkjax.pruning.scores.ntk_sap import ntk_sap
from pkjax.pruning.scores.ntk_trace import ntk_trace_saliency
from pkjax.pruning.scores.path_exclusion import path_exclusion
from pkjax.pruning.scores.path_magnitude import path_magnitude

__all__ = ["ScaledScores", "fisher", "grasp", "magnitude", "ntk_sap", "ntk_trace_saliency", "path_exclusion",
           "path_magnitude", "random",
           "snip", "synflow", "synflow_l2", "synflow_l2_scaled", "synflow_scaled"]
