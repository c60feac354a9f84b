"""Training of the linearised network, solved from its tangent kernel, and its forecast from Tr Π."""

from pkjax.dynamics.forecast import ForecastFit, fit_forecast, forecast
from pkjax.dynamics.tangent_network import linearize, predict, weight_change
from pkjax.dynamics.trajectory import Trajectory, flow, linearized

__all__ = ["ForecastFit", "Trajectory", "fit_forecast", "flow", "forecast", "linearize", "linearized", "predict",
           "weight_change"]
