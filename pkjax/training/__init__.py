"""Training under masks: compiled epochs of Adam that keep pruned weights at 0, and checkpoints that resume exactly."""

from pkjax.training.batch_norm import warm_batch_norm
from pkjax.training.fit import Fit, Measure, fit, restore
from pkjax.training.iterative_pruning import Round, Ticket, iterative_magnitude_pruning
from pkjax.training.kernel_change import kernel_change
from pkjax.training.recipes import CosineRecipe, Recipe, recipe
from pkjax.training.together import fit_together

__all__ = ["CosineRecipe", "Fit", "Measure", "Recipe", "Round", "Ticket", "fit", "fit_together",
           "iterative_magnitude_pruning", "kernel_change", "recipe", "restore", "warm_batch_norm"]
