"""What the analyzer returns, and its summaries: lines of text, and HTML tables for notebooks and pages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from pkjax.analysis.exactness import Check
from pkjax.analysis.frozen_kernel import FrozenKernel
from pkjax.analysis.theorem1 import Claim
from pkjax.pruning.result import LayerReport
from pkjax.tables import Raw, format_number, formula, html

__all__ = ["Report", "by_name", "checks_table", "claim_heads", "claims_table", "finding", "frozen_tables", "lines",
           "side_by_side", "status", "summary_table", "summary_text", "wordings"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Spectra, traces, overlaps, claims and checks of one network on one batch.

    Returned by ``analyze``. Prints as text and, in a notebook, as tables; ``pk.plots.report`` draws it, and ``to_dict``
    prepares it for JSON. All arrays are float64 on the host. The quick form leaves what it does not find empty, NaN or
    None. With frozen gates, the gated trace, overlaps, what they carry and claims are of Θ_frozen in place of Θ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax.analysis import analyze
        >>> analyze(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2))
        Report on 2 examples of 1 outputs
          weights kept                     2 of 2
          parameters that train            2
          Tr Θ                             2
          Tr Π                             2
          ...
          claims that do not hold          none of 10
          exactness checks                 9 of 9 passed
    """

    lam: Float[np.ndarray, "l"]
    """λ: eigenvalues of Θ, descending: all NK of them up to NK = 4096, the 256 largest of more."""
    nu: Float[np.ndarray, "n"] = field(default_factory=lambda: np.zeros(0))
    """ν: eigenvalues of A = J_v^f J_v^fᵀ, descending, as many."""
    pi: Float[np.ndarray, "k"]
    """π: the largest eigenvalues of Π, descending, with multiplicities."""
    pi_bounds: Float[np.ndarray, "k"]
    """Bound on the error of each π; infinite where the solver cannot vouch for it."""
    trace_ntk: float
    """Tr Θ."""
    trace_pi: float
    """Tr Π."""
    gated_trace: float
    """The part of Tr Θ on the diagonal of Π."""
    effective_rank: float = np.nan
    """Tr(Π)² / ‖Π‖_F², estimated."""
    log10_paths: float = np.nan
    """log10 of the number of live paths."""
    log10_effective_paths: float | None = None
    """log10 of R_2² / R_4, the participation ratio of the squared path values; None where no path is left, or where
    the two exceed the range of the parameters' type."""
    connected: bool | None = None
    """Whether a path leads from an input entry to an output."""
    overlaps: Float[np.ndarray, "n c"] = field(default_factory=lambda: np.zeros((0, 0)))
    """O_ij: inner products of the eigenvectors of A with those of Π; 0 where ν_i or π_j is 0."""
    carried: Float[np.ndarray, "c"] = field(default_factory=lambda: np.zeros(0))
    """Share of Tr Θ that each of the listed eigenvectors of Π carries: ‖∇f z_j‖² / Tr Θ = Σ_i ν_i π_j O_ij² / Tr Θ."""
    captured: float = np.nan
    """Share of Tr Θ that they carry together."""
    claims: dict[str, Claim] = field(default_factory=dict)
    """Every bound of theorem 1, tested here."""
    checks: dict[str, Check]
    """The analyzer's exactness checks of its own numbers."""
    layers: tuple[LayerReport, ...] = ()
    """What a mask leaves of each kernel."""
    frozen: FrozenKernel | None = None
    """With frozen gates, Θ_frozen = J_v^f Π J_v^fᵀ, and what it lacks of Θ."""
    samples: int
    """N, examples of the batch."""
    outputs: int
    """K, outputs of the network."""
    parameters: int
    """Parameters that train."""
    seconds: dict[str, float]
    """Time spent on each part, compilation included."""
    compile_seconds: dict[str, float] = field(default_factory=dict)
    """The part of these times in which JAX lowered and compiled programs: nothing once they are compiled."""

    @property
    def trace_on_paths(self) -> float:
        """The trace of the kernel that is J_v^f Π J_v^fᵀ: Θ, or with frozen gates Θ_frozen."""
        return self.trace_ntk if self.frozen is None else self.frozen.trace

    @property
    def quick(self) -> bool:
        """Whether this is the quick form, of λ, π and traces alone."""
        return not self.nu.size

    def __repr__(self) -> str:
        return summary_text(self)

    def _repr_html_(self) -> str:
        one = {"": self}
        return "\n".join((summary_table(one), *frozen_tables(one), claims_table(one), checks_table(one)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings that JSON can represent."""
        plain = asdict(self)
        for name, value in plain.items():
            if isinstance(value, np.ndarray):
                plain[name] = value.tolist()
        plain["claims"] = {name: claim._asdict() for name, claim in self.claims.items()}
        plain["checks"] = {name: check._asdict() for name, check in self.checks.items()}
        plain["frozen"] = None if self.frozen is None else self.frozen.to_dict()
        plain["layers"] = [layer.to_dict() for layer in self.layers]
        for name in ("log10_paths", "effective_rank", "captured"):
            plain[name] = plain[name] if np.isfinite(plain[name]) else None
        return plain


def side_by_side(reports: Mapping[str, Report]) -> list[list[str]]:
    """Summarize reports in rows of a quantity and its value in each."""
    frozen = any(report.frozen for report in reports.values())
    each = [lines(report, frozen) for report in reports.values()]
    return [[rows[0][0], *(value for _, value in rows)] for rows in zip(*each, strict=True)]


def lines(report: Report, frozen: bool = False) -> list[tuple[str, str]]:
    """Summarize a report as pairs (quantity, value): traces, largest eigenvalues, ranks, path counts.

    With ``frozen`` there are lines for what frozen gates add, also where this report has none.
    """
    kept, total = (sum(getattr(layer, name) for layer in report.layers) for name in ("kept", "total"))
    bound, kernel = float(report.pi_bounds[0]), "Θ_frozen" if frozen or report.frozen else "Θ"
    largest = f"{format_number(float(report.pi[0]))} ± {format_number(bound, 1)}"
    if report.quick:
        return [
            ("parameters that train", f"{report.parameters:,}"),
            ("Tr Θ", format_number(report.trace_ntk)),
            ("Tr Π", format_number(report.trace_pi)),
            ("gated path trace", format_number(report.gated_trace)),
            ("λ₁, largest of Θ", format_number(float(report.lam[0]))),
            ("π₁, largest of Π", largest),
        ]
    return [
        ("weights kept", f"{kept:,} of {total:,}"),
        ("parameters that train", f"{report.parameters:,}"),
        ("Tr Θ", format_number(report.trace_ntk)),
        ("Tr Π", format_number(report.trace_pi)),
        ("gated path trace", format_number(report.gated_trace)),
        ("λ₁, largest of Θ", format_number(float(report.lam[0]))),
        *(_frozen_lines(report.frozen) if kernel == "Θ_frozen" else ()),
        ("ν₁, largest of A", format_number(float(report.nu[0]))),
        ("π₁, largest of Π", largest),
        ("bound ν₁π₁", format_number(float(report.nu[0] * report.pi[0]))),
        (f"Tr {kernel} in {len(report.pi):,} path eigenvectors", f"{100 * report.captured:.2f} %"),
        ("effective rank of Π", format_number(report.effective_rank)),
        ("log10 of the number of paths", format_number(report.log10_paths)),
        ("log10 of their effective number", format_number(report.log10_effective_paths)),
        ("inputs reach outputs", "yes" if report.connected else "no"),
    ]


def _frozen_lines(held: FrozenKernel | None) -> list[tuple[str, str]]:
    """The lines of the part of Θ that has frozen gates."""
    names = ("Tr Θ_frozen, with gates held", "λ₁, largest of Θ_frozen", "rest: ‖Θ − Θ_frozen‖ / ‖Θ‖", "rest of Tr Θ")
    values = ["–"] * 4 if held is None else [format_number(held.trace), format_number(float(held.lam[0])),
                                             percent(held.rest), percent(held.rest_of_trace)]
    return list(zip(names, values, strict=True))


def percent(share: float) -> str:
    """Write a share in percent, rounding errors as 0."""
    return f"{100 * share if abs(share) >= 5e-5 else 0:.2f} %" if np.isfinite(share) else format_number(share)


def status(claim: Claim) -> str:
    """Name what is known of a claim in general."""
    return "theorem" if claim.proven else "false in general"


def finding(claim: Claim) -> str:
    """Write the outcome of a claim: the largest left side as a multiple of its bound, and its index from 1.

    Examples:
        >>> finding(Claim(True, 0.75, 0, True, "λ_1 ≤ ν_1 π_1")), finding(Claim(False, -2.0, 4, False, "λ_i ≤ ν_i π_i"))
        ('holds: 0.25 at i = 1', 'fails: 3 at i = 5')
    """
    reached = format_number(1 - claim.slack, 3 if claim.slack > -0.01 and not claim.holds else 2)
    return f"{'holds' if claim.holds else 'fails'}: {reached} at i = {claim.worst + 1}"


def summary_text(report: Report) -> str:
    """Write a report in lines of about 80 characters: the summary, what does not hold, the checks."""
    failing = [f"{name} {finding(claim)}" for name, claim in report.claims.items() if not claim.holds]
    failed = [name for name, check in report.checks.items() if not check.passed]
    claims = "claims" if report.frozen is None else "claims on Θ_frozen"
    outcome = [*([(f"{claims} that do not hold", "; ".join(failing) or f"none of {len(report.claims)}")]
                 if report.claims else []),
               ("exactness checks", f"{len(report.checks) - len(failed)} of {len(report.checks)} passed"
                + (f"; FAILED: {', '.join(failed)}" if failed else ""))]
    shown = [*lines(report), *outcome]
    width = max(len(name) for name, _ in shown)
    return "\n".join([f"Report on {report.samples} examples of {report.outputs} outputs",
                      *(f"  {name:{width}}  {value}" for name, value in shown)])


def summary_table(reports: Mapping[str, Report]) -> str:
    """Build the HTML table of the summaries of reports by name, side by side."""
    return html(["", *reports], side_by_side(reports), left=1 + len(reports))


def claims_table(reports: Mapping[str, Report]) -> str:
    """Build the HTML table of the claims' outcomes; a theorem that fails is "broken".

    The columns of reports with frozen gates say that their claims are on Θ_frozen, and so do the claims.
    """
    rows = []
    for name, outcomes in by_name([report.claims for report in reports.values()]).items():
        cells = []
        for outcome in outcomes:
            if outcome is None:
                cells.append(Raw("not made"))
                continue
            kind = "holds" if outcome.holds else "broken" if outcome.proven else "fails"
            cells.append(Raw(f"<span class={kind}>{escape(finding(outcome))}</span>"))
        known = next(outcome for outcome in outcomes if outcome is not None)
        rows.append([Raw(f"<b>{escape(name)}</b>{_lines_of(outcomes)}"), status(known), *cells])
    return html(["claim", "status", *claim_heads(reports)], rows, left=2 + len(reports))


def by_name(of_reports: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Each name's outcomes, one for each report, None where a report has none.

    Examples:
        >>> by_name([{"largest": 1, "total": 2}, {"total": 3}])
        {'largest': [1, None], 'total': [2, 3]}
    """
    names = dict.fromkeys(name for outcomes in of_reports for name in outcomes)
    return {name: [outcomes.get(name) for outcomes in of_reports] for name in names}


def wordings(outcomes: Sequence[Any]) -> list[str]:
    """What a claim or an identity says in each report, equal wordings once.

    Examples:
        >>> wordings([Claim(True, 0.5, 0, True, "λ_1 ≤ ν_1 π_1"), None, Claim(True, 0.7, 0, True, "λ_1 ≤ ν_1 π_1")])
        ['λ_1 ≤ ν_1 π_1']
    """
    return list(dict.fromkeys(outcome.text for outcome in outcomes if outcome is not None))


def _lines_of(outcomes: Sequence[Any]) -> str:
    return "".join(f"<br>{formula(text)}" for text in wordings(outcomes))


def claim_heads(reports: Mapping[str, Report]) -> list[str]:
    """Head the columns of claims, which with frozen gates are on Θ_frozen."""
    return [name if report.frozen is None else f"{name} (Θ_frozen)".strip() for name, report in reports.items()]


def frozen_tables(reports: Mapping[str, Report]) -> list[str]:
    """Build an HTML table for each report with frozen gates: what Θ_frozen lacks of Θ, leaf by leaf."""
    heads = ["leaf", "Tr Θ", "Tr Θ_frozen", "rest of Tr Θ", "‖Θ − Θ_frozen‖ / ‖Θ‖"]
    tables = []
    for name, report in reports.items():
        held = report.frozen
        if held is None:
            continue
        rows = [[leaf.name, format_number(leaf.trace), format_number(leaf.frozen_trace), percent(leaf.rest_of_trace),
                 percent(leaf.rest)] for leaf in held.leaves]
        rows.append(["in all", format_number(report.trace_ntk), format_number(held.trace),
                     percent(held.rest_of_trace), percent(held.rest)])
        of = "" if held.samples == report.samples else f", norms over the first {held.samples} examples"
        tables.append(html(heads, rows, caption=f"{name or 'What frozen gates leave out'}{of}"))
    return tables


def checks_table(reports: Mapping[str, Report]) -> str:
    """Build the HTML table of the exactness checks, including those that only some reports have."""
    rows = []
    for name, checks in by_name([report.checks for report in reports.values()]).items():
        cells = []
        for check in checks:
            if check is None:
                cells.append(Raw("not made"))
            else:
                verdict, kind = ("passed", "holds") if check.passed else ("FAILED", "broken")
                cells.append(Raw(f"<span class={kind}>{verdict}</span>, error {check.error:.1e} of "
                                 f"{check.tolerance:.1e}"))
        rows.append([Raw(f"<b>{formula(name)}</b>{_lines_of(checks)}"), *cells])
    return html(["identity", *reports], rows, left=1 + len(reports))
