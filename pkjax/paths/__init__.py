"""Networks as sums over paths: the path polynomial, gates, taps and enumeration."""

from pkjax.paths.errors import NotPathNetworkError
from pkjax.paths.polynomial import gates, log_count, polynomial, tied

__all__ = ["NotPathNetworkError", "gates", "log_count", "polynomial", "tied"]
