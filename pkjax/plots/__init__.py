"""Pictures: spectra with their bound, overlaps, layers, the paths of a network, the course of a training.

Every function returns a Matplotlib figure and leaves pyplot's state alone. It draws on `ax` where one is given;
functions with several panels take `axes`, a sequence of one for each. Everything is readable at the width of a column,
3.3 inches. The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; curves differ in
line style too.
"""

from pkjax.plots.comparisons import compare
from pkjax.plots.kept_weights import layers
from pkjax.plots.kernels import overlaps, spectra
from pkjax.plots.network import paths

# Colours for figures of one's own.
from pkjax.plots.panels import BLACK as BLACK
from pkjax.plots.panels import BLUE as BLUE
from pkjax.plots.panels import GREEN as GREEN
from pkjax.plots.panels import ORANGE as ORANGE
from pkjax.plots.panels import VERMILLION as VERMILLION
from pkjax.plots.reports import report
from pkjax.plots.training_curves import training, trajectories

__all__ = ["compare", "layers", "overlaps", "paths", "report", "spectra", "training", "trajectories"]
