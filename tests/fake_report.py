"""A report with made-up numbers, to draw and print without an analysis."""

import numpy as np
from pkjax.analysis.exactness import Check
from pkjax.analysis.report import Report
from pkjax.analysis.theorem1 import Claim
from pkjax.pruning.result import LayerReport

CLAIMS = {
    "per_index": ("λ_i ≤ ν_i π_i for every i", False),
    "sum": ("Σ_{i≤n} λ_i ≤ Σ_{i≤n} ν_i π_i for every n", True),
    "product": ("Π_{i≤n} λ_i ≤ Π_{i≤n} ν_i π_i for every n", True),
    "first_nu": ("λ_i ≤ ν_1 π_i", True),
    "first_pi": ("λ_i ≤ π_1 ν_i", True),
    "unsquared": ("λ_i ≤ √ν_i π_i for every i", False),
}


def report(seed=0, n=320, k=320, pruned=False, overlaps=True):
    rng = np.random.default_rng(seed)
    nu = np.sort(rng.lognormal(3, 2.5, n))[::-1]
    pi = np.sort(rng.lognormal(2, 0.3, k))[::-1]
    lam = nu * np.resize(pi, n) * np.sort(rng.uniform(0.001, 0.5, n))[::-1]
    O = rng.normal(size=(n, k)) / np.sqrt(40 * k) / (1 + np.arange(k)) ** 0.1
    O = O if overlaps else np.zeros((n, k))
    names = [f"Dense_{i}/kernel" for i in range(7)]
    sizes = [6400, *[10_000] * 5, 1000]
    shares = np.linspace(0.05, 0.2, 7) if pruned else np.ones(7)
    layers = tuple(LayerReport(name, (size // 100, 100), 0 if pruned and i == 5 else int(size * s), size,
                               pruned and i == 5)
                   for i, (name, size, s) in enumerate(zip(names, sizes, shares, strict=True)))
    claims = {name: Claim(not (pruned and not proven), -31.5 if pruned and not proven else 0.25, 3, proven, text)
              for name, (text, proven) in CLAIMS.items()}
    checks = {"gated_sum": Check(True, 3e-7, 1e-5, "f equals its gated path sum"),
              "neural_tangents": Check(not pruned, 2e-6, 1e-5, "Θ agrees with neural-tangents <0.6.5>")}
    return Report(
        lam=lam, nu=nu, pi=pi, pi_bounds=np.full(k, 1e-6), trace_ntk=53_211.5, trace_pi=6.02e5,
        gated_trace=48_770.1, effective_rank=77_700.0, log10_paths=-np.inf if pruned else 15.893,
        log10_effective_paths=None if pruned else 6.079, connected=not pruned, overlaps=O,
        carried=np.full(k, 0.031 / k), captured=0.031,
        claims=claims, checks=checks, layers=layers, samples=32, outputs=10, parameters=57_710,
        seconds={"tangent kernel": 1.25, "data factor": 0.5, "path kernel": 3.0})
