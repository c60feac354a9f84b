"""Networks as sums over paths: the path polynomial, gates, taps and enumeration."""

from pkjax.paths.errors import NotFullyConnectedError, NotPathNetworkError
from pkjax.paths.layers import DenseLayer, dense_layers
from pkjax.paths.polynomial import gates, log_count, polynomial, tied

__all__ = ["DenseLayer", "NotFullyConnectedError", "NotPathNetworkError", "dense_layers",
           "gates", "log_count", "polynomial", "tied"]
