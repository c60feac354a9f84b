"""Neural networks as sums over paths: path kernels, exact tangent kernels, pruning at initialisation."""
