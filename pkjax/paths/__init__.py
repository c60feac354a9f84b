"""Networks as sums over paths: the path polynomial, gates, taps and enumeration."""

from pkjax.paths.dense_layers import dense_layers
from pkjax.paths.dense_pairs import NotDensePairsError, dense_pairs
from pkjax.paths.enumeration import Factorization, Path, factorize
from pkjax.paths.errors import NotFullyConnectedError, NotPathNetworkError
from pkjax.paths.evaluation import unit_weights
from pkjax.paths.exponents import power_of_two
from pkjax.paths.layers import DenseLayer
from pkjax.paths.polynomial import gates, polynomial, tied
from pkjax.paths.scaled import log_count, scaled_polynomial
from pkjax.paths.taps import Site, sites, tapped

__all__ = [
    "DenseLayer", "Factorization", "NotDensePairsError", "NotFullyConnectedError", "NotPathNetworkError",
    "Path", "Site", "dense_layers", "dense_pairs",
    "factorize", "gates", "log_count", "polynomial", "power_of_two", "scaled_polynomial", "sites", "tapped", "tied",
    "unit_weights",
]
