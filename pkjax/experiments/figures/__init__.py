"""The paper's figures from the runs of a sweep, and two more: what predicts training, and what carries Θ.

Every function takes a table with one row per run, returns a Matplotlib figure and leaves pyplot's state alone. Given
`axes`, a sequence of one for each panel, it draws on them; the legend that panels share and the note go to their
figure, or to the subfigure that holds them.
"""

from pkjax.experiments.figures.accuracy import figure3
from pkjax.experiments.figures.forecast import figure1
from pkjax.experiments.figures.lines import figure2, predictors
from pkjax.experiments.figures.shares import captured

__all__ = ["captured", "figure1", "figure2", "figure3", "predictors"]
