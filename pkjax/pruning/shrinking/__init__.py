"""Smaller dense networks of what masks leave: units through which nothing flows are found exactly and removed."""

from pkjax.pruning.shrinking.shrink import LeafShapes, ShrinkResult, shrink

__all__ = ["LeafShapes", "ShrinkResult", "shrink"]
