"""Reports and results as tables for a terminal of 80 columns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pkjax.analysis.report import Report, by_name, claim_heads, finding, side_by_side, status, wordings
from pkjax.pruning.result import PruneResult
from pkjax.tables import spread

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["history_table", "layers_table", "print_reports", "verdicts_table"]


def print_reports(console: "Console", reports: Mapping[str, Report], settings: Mapping[str, object]
                  ) -> None:
    """Print reports side by side: the summary, every claim, and failed exactness checks."""
    from rich.text import Text

    console.print(Text(", ".join(f"{name} {value}" for name, value in settings.items()), style="dim"))
    table = _table("", *reports)
    for row in side_by_side(reports):
        table.add_row(*row)
    console.print(table)
    table = _table("Theorem 1", *claim_heads(reports))
    for results in by_name([report.claims for report in reports.values()]).values():
        cells = []
        for result in results:
            style = "dim" if result is None else (
                "green" if result.holds else "bold red" if result.proven else "yellow")
            cells.append(Text("not made" if result is None else finding(result), style=style))
        known = next(result for result in results if result is not None)
        table.add_row(Text("\n".join(wordings(results)) + "\n") + Text(status(known), style="dim"), *cells)
    console.print(table)
    console.print(Text("(the largest left side as a multiple of its bound, and at which index)\n", style="dim"))
    for name, report in reports.items():
        failed = [check.text for check in report.checks.values() if not check.passed]
        for text in failed:
            console.print(Text(f"{name}: exactness check FAILED: {text}", style="bold red"))
        passed = len(report.checks) - len(failed)
        console.print(f"{name}: {passed} of {len(report.checks)} exactness checks passed, "
                      f"{sum(report.seconds.values()):.1f} s")


def layers_table(result: PruneResult) -> "Table":
    """Build the table of what every layer keeps."""
    from rich.text import Text

    table = _table("layer", "shape", "kept", "of", "density")
    for column in table.columns[2:]:
        column.justify = "right"
    for layer in result.layers:
        table.add_row(Text(layer.name), "×".join(map(str, layer.shape)), f"{layer.kept:,}", f"{layer.total:,}",
                      Text("empty", style="bold red") if layer.emptied else f"{layer.density:.4f}")
    table.add_section()
    table.add_row("all", "", f"{result.kept:,}", f"{result.total:,}", f"{result.density:.4f}")
    return table


def history_table(record: Mapping[str, Any]) -> "Table":
    """Build the table of a training's epochs; of more than twelve, the first, the last and some in between."""
    history = record["history"]
    table = _table("epoch", "train loss", "train acc.", "test loss", "test acc.", "‖ω‖", "ln Tr Π")
    for column in table.columns:
        column.justify = "right"
    for row in (history[i] for i in spread(len(history))):
        accuracies = [f"{100 * row[name]:.2f} %" if name in row else "" for name in ("train_accuracy", "test_accuracy")]
        losses = [f"{row[name]:.4f}" if name in row else "" for name in ("train_loss", "test_loss")]
        table.add_row(str(row["epoch"]), losses[0], accuracies[0], losses[1], accuracies[1],
                      f"{row['weight_change']:.2f}", f"{row['ln_trace_pi']:.2f}")
    return table


def verdicts_table(verdicts: Any) -> "Table":
    """Build the table of the paper's claims with the verdicts of `paper_claims.judge_claims`."""
    from rich.text import Text

    table = _table("claim and finding", "data, model", "held")
    held = {True: ("yes", "green"), False: ("no", "yellow"), None: ("undecided", "dim")}
    for row in verdicts.itertuples():
        text, style = held[row.held]
        table.add_row(Text(f"{row.claim}\n") + Text(row.finding, style="dim"), f"{row.data}\n{row.model}",
                      Text(text, style=style))
    return table


def _table(*heads: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for head in heads:
        table.add_column(head, overflow="fold")
    return table
