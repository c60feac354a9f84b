"""Scores: parameters in, a tree like them out, in which a higher number is kept."""

from pkjax.pruning.scores.data_free import magnitude, random, synflow, synflow_l2
from pkjax.pruning.scores.loss import grasp, snip
from pkjax.pruning.scores.ntk_trace import ntk_trace_saliency
from pkjax.pruning.scores.path_exclusion import path_exclusion

__all__ = ["grasp", "magnitude", "ntk_trace_saliency", "path_exclusion", "random", "snip", "synflow", "synflow_l2"]
