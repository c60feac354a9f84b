"""One self-contained HTML page for reports side by side, with embedded pictures."""

import base64
import io
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from pkjax import plots, tables
from pkjax.analysis.report import Report, checks_table, claims_table, frozen_tables, summary_table

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --note: #444; --line: #ddd; --rule: #888;
  --holds: #00563f; --fails: #a34700; --broken: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #161616; --note: #b4b4b4; --line: #3a3a3a; --rule: #777;
    --holds: #5fd3ab; --fails: #ffb072; --broken: #ff8a95; }
  figure img { filter: invert(.91) hue-rotate(180deg); }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.note { color: var(--note); max-width: 50rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { border-bottom: 2px solid var(--rule); }
.holds { color: var(--holds); } .fails { color: var(--fails); font-weight: 600; }
.broken { color: var(--broken); font-weight: 700; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; } figcaption { font-weight: 600; }
sub, sup { line-height: 0; }
@media (max-width: 40rem) {
  body { font-size: 13px; margin: 1rem auto; padding: 0 .5rem; }
  th, td { padding: .2rem .3rem; }
  .pictures { grid-template-columns: 1fr; }
}
"""

FROZEN = ("These networks are sums over paths with coefficients that depend on θ. Their tangent kernel has two parts: "
          "Θ_frozen = J_v^f Π J_v^fᵀ, in which the coefficients are held, and a rest from the gradients of the "
          "coefficients. Theorem 1 is about Θ_frozen alone, whose eigenvalues are the λ of those columns.")
"""What the page says of frozen gates."""
PICTURES: tuple[tuple[str, Callable[[Report], Any], str], ...] = (
    ("Spectra", plots.spectra, "λ of the tangent kernel Θ, ν of the data factor A, π of the path kernel Π, and the "
     "bound ν_i π_i. π ends where the list of computed eigenvalues ends."),
    ("Overlaps", plots.overlaps, "How much of Tr Θ each pair of eigenvectors of A and Π carries: "
     "ν_i π_j O_ij² / Tr Θ, summed over bins of indices."),
    ("Layers", plots.layers, "What the mask leaves of each kernel."),
)


def page(reports: Mapping[str, Report], *, title: str, settings: Mapping[str, object],
         environment: Mapping[str, object]) -> str:
    """Write the reports, by name and side by side, as one HTML page.

    A claim that is false in general may fail without an error. A theorem or an exactness check that fails is an error,
    shown in red.

    Raises:
        ValueError: there is no report.
        ImportError: Matplotlib is missing.
    """
    if not reports:
        raise ValueError("a page needs at least one report")
    names = list(dict.fromkeys(name for report in reports.values() for name in report.seconds))
    seconds = [[name, *(f"{report.seconds.get(name, 0.0):.2f}" for report in reports.values())] for name in names]
    seconds.append(["in all", *(f"{sum(report.seconds.values()):.2f}" for report in reports.values())])
    tables_of_rests = frozen_tables(reports)
    frozen = [
        "<h2>What frozen gates leave out</h2>",
        f"<p class=note>{tables.formula(FROZEN)}</p>", *tables_of_rests] if tables_of_rests else []
    body = [
        f"<h1>{escape(title)}</h1>", f"<p class=note>{_sentence(settings)}</p>",
        "<h2>Summary</h2>", summary_table(reports),
        "<h2>Theorem 1, claim by claim</h2>",
        "<p class=note>All eigenvalues sorted downwards: λ of Θ, ν of A, π of Π. The number is the largest left "
        "side as a multiple of its bound, with the index; for products, per factor. Claims that are false in "
        "general are marked as such.</p>",
        claims_table(reports),
        *frozen,
        "<h2>Exactness checks</h2>",
        "<p class=note>The same quantities, computed a second way.</p>",
        checks_table(reports),
    ]
    for name, draw, note in PICTURES:
        figures = "".join(f"<figure><figcaption>{escape(head)}</figcaption><img alt=\"{escape(name)}, {escape(head)}\""
                          f" src=\"data:image/png;base64,{_png(draw(report))}\"></figure>"
                          for head, report in reports.items())
        body += [f"<h2>{name}</h2><p class=note>{tables.formula(note)}</p>", f"<div class=pictures>{figures}</div>"]
    body += ["<h2>Time</h2>", tables.html(["seconds", *reports], seconds, left=1 + len(reports)),
             f"<p class=note>{_sentence(environment)}</p>"]
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(body)
            + "\n</body></html>\n")


def _sentence(values: Mapping[str, object]) -> str:
    return " · ".join(f"{escape(str(name))} <b>{escape(str(value))}</b>" for name, value in values.items())


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
