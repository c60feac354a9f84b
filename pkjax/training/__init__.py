"""Training under masks: compiled epochs of Adam that keep pruned weights at 0, and checkpoints that resume exactly."""

from pkjax.training.fit import Fit, Measure, fit, restore
from pkjax.training.kernel_change import kernel_change
from pkjax.training.recipes import Recipe, recipe
from pkjax.training.together import fit_together

__all__ = ["Fit", "Measure", "Recipe", "fit", "fit_together", "kernel_change", "recipe", "restore"]
