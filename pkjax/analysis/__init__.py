"""Θ, Π and A of one network side by side, and Theorem 1 tested on them."""

from pkjax.analysis.analyze import analyze
from pkjax.analysis.report import Report

__all__ = ["Report", "analyze"]
