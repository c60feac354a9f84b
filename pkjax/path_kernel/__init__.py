"""The path kernel Π through its dual Gram matrix G: trace, products, spectrum, effective rank."""

from pkjax.linalg.block_lanczos import NotConvergedWarning
from pkjax.linalg.stochastic import SpectralDensity
from pkjax.path_kernel.kernel import (
    count_above,
    dense,
    density,
    effective_rank,
    eigenpairs,
    eigenvalues,
    gated_trace,
    matvec,
    trace,
)
from pkjax.path_kernel.solvers import Eigenpairs

__all__ = ["Eigenpairs", "NotConvergedWarning", "SpectralDensity", "count_above", "dense", "density",
           "effective_rank", "eigenpairs", "eigenvalues", "gated_trace", "matvec", "trace"]
