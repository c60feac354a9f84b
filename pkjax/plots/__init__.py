"""Pictures: a report's spectra with their bound, its overlaps and layers, a network's paths, a training's accuracies.

Every function returns a Matplotlib figure and leaves pyplot's state alone. It draws on ``ax`` where one is given; those
of several panels take ``axes``, a sequence of as many. Everything can be read at the width of a column, 3.3 inches.
Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; curves differ in their line style too.
"""

from pkjax.plots.network import paths
from pkjax.plots.report import layers, overlaps, report, spectra, training, trajectories

__all__ = ["layers", "overlaps", "paths", "report", "spectra", "training", "trajectories"]
