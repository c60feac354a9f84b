"""Networks as sums over paths: the path polynomial, gates, taps and enumeration."""

from pkjax.paths.dense_layers import dense_layers
from pkjax.paths.dense_pairs import NotDensePairsError, dense_pairs
from pkjax.paths.differences import ChangeBound, change_bound
from pkjax.paths.enumeration import Factorization, Path, factorize
from pkjax.paths.errors import NotFullyConnectedError, NotPathNetworkError
from pkjax.paths.evaluation import unit_weights
from pkjax.paths.exponents import power_of_two
from pkjax.paths.frozen import frozen
from pkjax.paths.layers import DenseLayer
from pkjax.paths.norms import distance, norm
from pkjax.paths.polynomial import gates, polynomial, tied
from pkjax.paths.rescaling import PathConditioned, path_condition, rescale
from pkjax.paths.scaled import log_count, scaled_polynomial
from pkjax.paths.sites import Site
from pkjax.paths.taps import sites, tapped
from pkjax.paths.units import NotRescalableError

__all__ = [
    "ChangeBound", "DenseLayer", "Factorization", "NotDensePairsError", "NotFullyConnectedError", "NotPathNetworkError",
    "NotRescalableError", "Path", "PathConditioned", "Site", "change_bound", "dense_layers", "dense_pairs", "distance",
    "factorize", "frozen", "gates", "log_count", "norm", "path_condition", "polynomial", "power_of_two", "rescale",
    "scaled_polynomial", "sites", "tapped", "tied", "unit_weights",
]
