"""A report in words: the lines that the screen and the HTML page both show."""

import math

from pkjax.analysis import Report
from pkjax.theorem1 import Claim

__all__ = ["finding", "lines", "number", "status"]


def number(value: float | None, digits: int = 4) -> str:
    """Write a number for readers: thousands in groups, very large and small ones as powers of ten.

    >>> number(12345.678), number(6.02e23), number(0.0), number(None)
    ('12,346', '6.02e+23', '0', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if value == 0 or (float(value).is_integer() and size < 1e9):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 1e3 <= size < 1e9 else f"{value:.{digits}g}"


def lines(report: Report) -> list[tuple[str, str]]:
    """Say what a report found, as (quantity, value): traces, largest eigenvalues, ranks, path counts."""
    kept, total = (sum(getattr(layer, name) for layer in report.layers) for name in ("kept", "total"))
    bound = float(report.pi_bounds[0])
    return [
        ("weights kept", f"{kept:,} of {total:,}"),
        ("parameters that train", f"{report.parameters:,}"),
        ("Tr Θ", number(report.trace_ntk)),
        ("Tr Π", number(report.trace_pi)),
        ("gated path trace", number(report.gated_trace)),
        ("λ₁, largest of Θ", number(float(report.lam[0]))),
        ("ν₁, largest of A", number(float(report.nu[0]))),
        ("π₁, largest of Π", f"{number(float(report.pi[0]))} ± {number(bound, 1)}"),
        ("bound ν₁π₁", number(float(report.nu[0] * report.pi[0]))),
        (f"Tr Θ in {len(report.pi):,} path eigenvectors", f"{100 * report.captured:.2f} %"),
        ("effective rank of Π", number(report.effective_rank)),
        ("log10 of the number of paths", number(report.log_paths)),
        ("log10 of their effective number", number(report.log_effective_paths)),
        ("inputs reach outputs", "yes" if report.connected else "no"),
    ]


def status(claim: Claim) -> str:
    """Say what is known of a claim in general."""
    return "theorem" if claim.proven else "false in general"


def finding(claim: Claim) -> str:
    """Say what became of a claim: the largest left side as a multiple of its bound, and its index from 1.

    >>> finding(Claim(True, 0.75, 0, True, "λ_1 ≤ ν_1 π_1")), finding(Claim(False, -2.0, 4, False, "λ_i ≤ ν_i π_i"))
    ('holds: 0.25 at i = 1', 'fails: 3 at i = 5')
    """
    reached = number(1 - claim.slack, 3 if claim.slack > -0.01 and not claim.holds else 2)
    return f"{'holds' if claim.holds else 'fails'}: {reached} at i = {claim.worst + 1}"
