"""The tangent kernel Θ and the data factor A: layer by layer, in tiles, or by products with vectors alone."""

from pkjax.linalg.stochastic import Estimate
from pkjax.tangent_kernel.alignment import kernel_alignment, ntk_alignment
from pkjax.tangent_kernel.data_factor import data_factor
from pkjax.tangent_kernel.kernel import ntk, ntk_plan
from pkjax.tangent_kernel.plan import LeafPlan, NtkPlan
from pkjax.tangent_kernel.products import ntk_matvec, ntk_trace
from pkjax.tangent_kernel.regression import KernelRegression, kernel_regression, ntk_regression
from pkjax.tangent_kernel.spectrum import (
    NtkEigenpairs,
    ntk_density,
    ntk_effective_rank,
    ntk_eigenpairs,
    ntk_frobenius,
    ntk_trace_estimate,
)

__all__ = ["Estimate", "KernelRegression", "LeafPlan", "NtkEigenpairs", "NtkPlan", "data_factor", "kernel_alignment",
           "kernel_regression", "ntk", "ntk_alignment", "ntk_density", "ntk_effective_rank", "ntk_eigenpairs",
           "ntk_frobenius", "ntk_matvec", "ntk_plan", "ntk_regression", "ntk_trace", "ntk_trace_estimate"]
