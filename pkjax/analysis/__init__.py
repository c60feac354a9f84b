"""Θ, Π and A of one network side by side, Theorem 1 tested on them, and several networks compared."""

from pkjax.analysis.analyze import analyze
from pkjax.analysis.compare import compare
from pkjax.analysis.comparison import Comparison
from pkjax.analysis.report import Report

__all__ = ["Comparison", "Report", "analyze", "compare"]
