"""The path kernel Π through its dual Gram matrix G: trace, products, spectrum, effective rank."""

from pkjax.linalg.block_lanczos import NotConvergedWarning
from pkjax.linalg.stochastic import SpectralDensity
from pkjax.path_kernel.estimates import Estimate, density, effective_rank, effective_rank_estimate
from pkjax.path_kernel.kernel import dense, gated_trace, matvec, trace
from pkjax.path_kernel.solvers import Eigenpairs
from pkjax.path_kernel.spectrum import BoundedEigenvalues, bounded_eigenvalues, count_above, eigenpairs, eigenvalues

__all__ = ["BoundedEigenvalues", "Eigenpairs", "Estimate", "NotConvergedWarning", "SpectralDensity",
           "bounded_eigenvalues", "count_above", "dense", "density", "effective_rank", "effective_rank_estimate",
           "eigenpairs", "eigenvalues", "gated_trace", "matvec", "trace"]
