"""A report of the analyzer's shape with made-up numbers, to draw and print without an analysis."""

from dataclasses import asdict, dataclass, field

import numpy as np


@dataclass(frozen=True)
class Claim:
    holds: bool
    slack: float
    worst: int
    proven: bool
    text: str


@dataclass(frozen=True)
class Check:
    passed: bool
    error: float
    tolerance: float
    text: str


@dataclass(frozen=True)
class Report:
    lam: np.ndarray
    nu: np.ndarray
    pi: np.ndarray
    pi_bounds: np.ndarray
    overlaps: np.ndarray | None
    trace_ntk: float = 53_211.5
    trace_pi: float = 6.02e5
    gated_trace: float = 48_770.1
    captured: float = 0.031
    log_paths: float = 15.893
    effective_rank: float = 77_700.0
    effective_paths: float = 1.2e6
    samples: int = 32
    outputs: int = 10
    parameters: int = 57_710
    layers: tuple = ()
    claims: dict = field(default_factory=dict)
    checks: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: {"ntk": 1.25, "data factor": 0.5, "path kernel": 3.0})

    def to_dict(self):
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in asdict(self).items()}


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
    O = rng.normal(size=(n, k)) / np.sqrt(40 * k) / (1 + np.arange(k)) ** 0.1 if overlaps else None
    names = [f"Dense_{i}/kernel" for i in range(7)]
    sizes = [6400, *[10_000] * 5, 1000]
    shares = np.linspace(0.05, 0.2, 7) if pruned else np.ones(7)
    layers = tuple({"name": name, "shape": (size // 100, 100), "kept": 0 if pruned and i == 5 else int(size * s),
                    "total": size, "emptied": pruned and i == 5}
                   for i, (name, size, s) in enumerate(zip(names, sizes, shares, strict=True)))
    claims = {name: Claim(not (pruned and not proven), -31.5 if pruned and not proven else 0.25, 3, proven, text)
              for name, (text, proven) in CLAIMS.items()}
    checks = {"gated_sum": Check(True, 3e-7, 1e-5, "f equals its gated path sum"),
              "neural_tangents": Check(not pruned, 2e-6, 1e-5, "Θ agrees with neural-tangents <0.6.5>")}
    return Report(lam, nu, pi, np.full(k, 1e-6), O, layers=layers, claims=claims, checks=checks)
