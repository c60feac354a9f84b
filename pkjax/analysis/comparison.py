"""What a comparison of networks returns: a table, spectra, and rank correlations of the traces with the spectra."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pkjax.analysis.correlations import Correlation, correlation
from pkjax.tables import format_number, html

__all__ = ["PREDICTORS", "TARGETS", "Comparison", "Row"]

PREDICTORS = {"trace_pi": "Tr Π", "gated_trace": "gated trace", "nu_pi": "Σ ν_i π_i"}
"""What a spectrum is predicted from → its symbol."""
TARGETS = {"trace_ntk": "Σ λ = Tr Θ", "largest": "λ_1", "effective_rank": "eff. rank of Θ", "decay": "decay of λ"}
"""What is to be predicted → its symbol."""
WITHIN = {"seeds": ("name", "compression"), "compressions": ("name", "seed"), "names": ("compression", "seed"),
          "all": ()}
"""What differs within a group of entries → what its entries have in common."""
WIDTH = 80
MOST = 40
"""Lines of the printed table."""


class Row(NamedTuple):
    """The quantities of one network of a comparison.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> comparison = pk.compare(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), masks={"dense": None})
        >>> comparison.rows[0].trace_ntk, comparison.rows[0].parameters
        (2.0, 2)
    """

    name: str
    """Of the pruner, for example."""
    compression: float | None
    """Or another number that tells entries of a name apart."""
    seed: int | str | None
    """Which tells repetitions apart."""
    parameters: int
    """Parameters that train."""
    connected: bool
    """Whether a path leads from an input entry to an output; where none does, biases alone make the traces."""
    trace_pi: float
    """Tr Π; NaN beyond what float64 holds, where its logarithm is known all the same."""
    gated_trace: float
    """The part of Tr Θ on the diagonal of Π, likewise."""
    trace_ntk: float
    """Tr Θ = Σ λ; NaN where numbers on the way to Θ are outside of the range of their type, as the note says."""
    nu_pi: float
    """Σ ν_i π_i over the π that were found, a lower bound on the whole sum; NaN where none was asked for."""
    nu_pi_upper: float
    """An upper bound on the whole sum, the same number to rounding where all of it was found."""
    largest: float
    """λ_1."""
    effective_rank: float
    """Tr(Θ)² / ‖Θ‖_F²."""
    decay: float
    """α where λ_i falls as i^−α: the slope of a line through ln λ_i against ln i down to λ_1 / 10⁴."""
    log10_trace_pi: float
    """−∞ where the trace is 0."""
    log10_gated_trace: float
    """Likewise."""
    error: float
    """How far each λ may be from the eigenvalue of its rank, by rounding or by the residual of the search."""
    note: str
    """What is missing or estimated, and why; "" where nothing is."""
    frozen_trace: float | None = None
    """With frozen gates Tr Θ_frozen, of the kernel that Tr Π, the gated trace and Σ ν_i π_i are of; else None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """Traces and tangent-kernel spectra of several networks, side by side.

    Returned by ``compare``. Prints as a table of 80 columns and, in a notebook, as an HTML table;
    ``pk.plots.compare`` draws it, ``to_dict`` prepares it for JSON and ``from_dict`` reads that.

    Examples:
        >>> import jax.numpy as jnp, pkjax as pk
        >>> w, X = jnp.ones((2, 1), jnp.float32), jnp.eye(2, dtype=jnp.float32)
        >>> pk.compare(lambda w, x: x @ w, w, X, masks={"dense": None})
        1 network on 2 examples of 1 outputs, float32
        name              ρ    Tr Π   gated    Tr Θ Σ ν_iπ_i     λ_1   rank  decay
        dense             –       2       2       2        2       1      2      0
        ...
    """

    rows: tuple[Row, ...]
    """One for each network, in the order of the masks."""
    spectra: dict[tuple[str, float | None, int | str | None], Float[np.ndarray, "l"]]
    """(name, compression, seed) → λ, descending: all that lie above their error up to NK = 4096, else the largest."""
    samples: int
    """N, examples of the batch."""
    outputs: int
    """K, outputs of the network."""
    dtype: str
    """The type that Θ was computed in."""

    @cached_property
    def correlations(self) -> dict[str, dict[str, dict[str, Correlation]]]:
        """Rank correlations by what differs within a group, predictor and target.

        ``correlations["seeds"]["trace_pi"]["largest"]`` compares the seeds of each (name, compression), "compressions"
        those of each (name, seed), "names" the names of each (compression, seed), "all" everything; what would be one
        group is "all" alone. Networks whose inputs reach no output are left out, and so are those without a Θ: they
        would agree on next to nothing.
        """
        alive = [row for row in self.rows if row.connected and row.trace_ntk > 0]
        found: dict[str, dict[str, dict[str, Correlation]]] = {}
        for within, common in WITHIN.items():
            groups: dict[Any, list[Row]] = {}
            for row in alive:
                groups.setdefault(tuple(getattr(row, name) for name in common), []).append(row)
            if common and len(groups) == 1:      # the same as "all"
                continue
            table = {of: {to: c for to in TARGETS
                          if (c := correlation((_column(rows, of), _column(rows, to))
                                               for rows in groups.values())) is not None} for of in PREDICTORS}
            if table := {of: pairs for of, pairs in table.items() if pairs}:
                found[within] = table
        return found

    def __repr__(self) -> str:
        return _text(self)

    def _repr_html_(self) -> str:
        heads, lines = _cells(self)
        return html(heads, lines, caption=_caption(self))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings that JSON can represent; None stands for NaN."""
        return {"samples": self.samples, "outputs": self.outputs, "dtype": self.dtype,
                "rows": [_plain(row) for row in self.rows],
                "spectra": [self.spectra[row[:3]].tolist() for row in self.rows],
                "correlations": {within: {of: {to: _plain(c) for to, c in pairs.items()}
                                          for of, pairs in table.items()}
                                 for within, table in self.correlations.items()}}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Comparison":
        """Read what ``to_dict`` wrote; correlations are computed anew.

        Raises:
            ValueError: the content is not that of a comparison.
        """
        try:
            rows = tuple(Row(**{name: _restored(name, value) for name, value in row.items()})
                         for row in content["rows"])
            spectra = {row[:3]: np.asarray(values, np.float64)
                       for row, values in zip(rows, content["spectra"], strict=True)}
            return Comparison(rows=rows, spectra=spectra, samples=content["samples"], outputs=content["outputs"],
                              dtype=content["dtype"])
        except (KeyError, TypeError) as error:
            raise ValueError("content must be what Comparison.to_dict returned, but it does not fit: "
                             f"{error}") from None


def _plain(values: Row | Correlation) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in values._asdict().items()}


def _restored(name: str, value: Any) -> Any:
    if value is not None or name in ("compression", "seed", "frozen_trace"):
        return value
    return -np.inf if name.startswith("log10") else np.nan


def _column(rows: Iterable[Row], name: str) -> np.ndarray:
    """A column by its size: the logarithm where there is one, which knows what float64 does not hold."""
    return np.array([getattr(row, f"log10_{name}", getattr(row, name)) for row in rows], np.float64)


COLUMNS = {"trace_pi": "Tr Π", "gated_trace": "gated", "trace_ntk": "Tr Θ", "nu_pi": "Σ ν_iπ_i", "largest": "λ_1",
           "effective_rank": "rank", "decay": "decay"}
WIDTHS = (15, 4, 7, 7, 7, 8, 7, 6, 6)


def _caption(comparison: Comparison) -> str:
    count = len(comparison.rows)
    return (f"{count} network{'s' if count > 1 else ''} on {comparison.samples} examples of {comparison.outputs} "
            f"outputs, {comparison.dtype}")


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table: medians over the seeds."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in comparison.rows:
        groups.setdefault(row[:2], []).append(row)
    lines = []
    for (name, compression), rows in groups.items():
        values = [[getattr(row, column) for row in rows] for column in COLUMNS]
        lines.append([name, format_number(compression), *(
            _number(float(np.median(known))) if (known := [v for v in each if not np.isnan(v)]) else "–"
            for each in values)])
    return ["name", "ρ", *COLUMNS.values()], lines


def _number(value: float) -> str:
    """Format a number in seven characters."""
    text = format_number(value, 3).replace(",", "")
    if len(text) < 7:
        return text
    for digits in (2, 1, 0):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
        if len(text) <= 7:
            break
    return text


def _text(comparison: Comparison) -> str:
    """Write a comparison in lines of 80 columns: the table, the correlations, what was estimated or is missing."""
    heads, lines = _cells(comparison)

    def row(cells: Sequence[str]) -> str:
        first, *others = (cell if len(cell) <= width else f"{cell[:width - 1]}…"
                          for cell, width in zip(cells, WIDTHS, strict=True))
        return " ".join([f"{first:{WIDTHS[0]}}", *(f"{v:>{w}}" for v, w in zip(others, WIDTHS[1:], strict=True))])

    text = [_caption(comparison), row(heads), *map(row, lines[:MOST])]
    if len(lines) > MOST:
        text.append(f"… and {len(lines) - MOST} more")
    if len(lines) < len(comparison.rows):
        text.append("medians over seeds")
    for within, table in comparison.correlations.items():
        text += ["", f"rank correlations {DIFFERS[within]}, ± half of 5 to 95 %",
                 f"{'':12}" + "".join(f"{symbol:>17}" for symbol in TARGETS.values())]
        for of, pairs in table.items():
            cells = [_cell(pairs.get(to)) for to in TARGETS]
            text.append(f"{PREDICTORS[of]:12}" + "".join(f"{cell:>17}" for cell in cells))
    worst = max((row.error / row.largest for row in comparison.rows if row.largest > 0), default=0.0)
    if apart := sum(not row.connected for row in comparison.rows):
        text += ["", f"correlations leave out {apart} of {len(comparison.rows)} networks, whose inputs reach no output"]
    unknown = any(np.isnan(row.trace_ntk) for row in comparison.rows)
    text += ["", f"{comparison.dtype}: λ within {worst:.0e} of the largest; smaller ones are left out" if worst else
             f"no network has a tangent kernel that is {'known and ' if unknown else ''}not 0"]
    shares = [row.frozen_trace / row.trace_ntk for row in comparison.rows
              if row.frozen_trace is not None and row.trace_ntk > 0]
    if known := [share for share in shares if not np.isnan(share)]:
        text += wrap("gates are frozen: Tr Π, gated and Σ ν_iπ_i are of Θ_frozen, whose trace is "
                     f"{min(known):.2g} to {max(known):.2g} of Tr Θ", WIDTH)
    notes = [row.note for row in comparison.rows if row.note]
    for note in dict.fromkeys(notes):
        text += wrap(f"note ({notes.count(note)}×): {note}", WIDTH, subsequent_indent="  ")
    return "\n".join(line.rstrip() for line in text)


def _cell(found: Correlation | None) -> str:
    if found is None:
        return "–"
    value, low, high, *_ = found
    return f"{value:+.2f}" + ("" if np.isnan(low) else f" ± {(high - low) / 2:.2f}")


DIFFERS = {"seeds": "over the seeds of a name and ρ", "compressions": "over the ρ of a name and seed",
           "names": "over the names of a ρ and seed", "all": "over all networks"}
"""What differs within a group → how to say so."""
