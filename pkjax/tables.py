"""Results as people read them: an HTML table in a notebook, a short text in a terminal, lines of progress."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from html import escape
from typing import Any

import jax
import numpy as np
import wadler_lindig as wl

__all__ = ["Progress", "Raw", "brief", "format_number", "formula", "html", "listed", "pairs", "reporter", "spread"]

WIDTH = 80
"""Characters in a line of a result's text."""

Progress = Callable[[str], None] | bool
"""Where a long computation reports its progress: a function that takes one line of text, True for the standard error
stream, False for nowhere."""


def reporter(progress: Progress) -> Callable[[str], None]:
    """Return the function to call with each line of progress.

    Examples:
        >>> lines = []
        >>> reporter(lines.append)("tile 1 of 4"), reporter(False)("tile 2 of 4"), lines
        (None, None, ['tile 1 of 4'])
    """
    if callable(progress):
        return progress
    return (lambda line: print(line, file=sys.stderr, flush=True)) if progress else (lambda line: None)


class Raw(str):
    """HTML that goes into a table as it is; any other text is escaped."""

    __slots__ = ()


def formula(text: str) -> Raw:
    """Escape a text and turn its indices, `λ_i`, `Σ_{i≤n}` and `J_v^f`, into subscripts and superscripts.

    Examples:
        >>> formula("λ_{i+j-1} ≤ ν_1 π_j of J_v^f")
        'λ<sub>i+j-1</sub> ≤ ν<sub>1</sub> π<sub>j</sub> of J<sub>v</sub><sup>f</sup>'
    """
    above = re.sub(r"\^([A-Za-z0-9])", r"<sup>\1</sup>", escape(text))
    return Raw(re.sub(r"_(?:\{([^}]+)\}|([A-Za-z0-9θ]+))", lambda index: f"<sub>{index[1] or index[2]}</sub>", above))


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a number for reading: thousands in groups, very large and very small ones as powers of ten.

    Examples:
        >>> format_number(12345.678), format_number(6.02e23), format_number(0.0), format_number(None)
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


def html(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", left: int = 1) -> str:
    """Build an HTML table whose first `left` columns are aligned left, the others right.

    Only alignment is styled, so that the table stays readable in the page's own colours, light or dark. A negative
    exponent does not wrap.

    Examples:
        >>> print(html(["layer", "kept"], [["<b>", "3"]]))
        <table><thead><tr><th style=text-align:left>layer</th><th style=text-align:right>kept</th></tr></thead><tbody>
        <tr><td style=text-align:left>&lt;b&gt;</td><td style=text-align:right>3</td></tr>
        </tbody></table>
    """
    def text(cell: str) -> str:
        return cell if isinstance(cell, Raw) else re.sub(r"(?<=\de)-", "\N{NON-BREAKING HYPHEN}", escape(cell))

    def row(tag: str, cells: Sequence[str]) -> str:
        # Notebooks align cells right unless told otherwise.
        inner = ((text(cell), "left" if i < left else "right") for i, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{tag} style=text-align:{side}>{cell}</{tag}>" for cell, side in inner) + "</tr>"
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(row("td", cells) for cells in rows)
    return f"<table>{top}<thead>{row('th', heads)}</thead><tbody>\n{body}\n</tbody></table>"


def pairs(columns: Mapping[str, np.ndarray], caption: str) -> str:
    """Build the HTML table of arrays (k,) side by side with an index from 1; long arrays are sampled.

    Examples:
        >>> pairs({"eigenvalue": np.array([9.0])}, "of Θ").count("<td")
        2
    """
    shown = spread(len(next(iter(columns.values()))))
    rows = [[str(i + 1), *(format_number(float(values[i])) for values in columns.values())] for i in shown]
    return html(["", *columns], rows, caption=caption)


def spread(count: int, most: int = 12) -> list[int]:
    """Choose which rows of a long table to show: all of a few; else the first, the last, and some evenly between.

    Examples:
        >>> spread(3), spread(100, 4)
        ([0, 1, 2], [0, 33, 66, 99])
    """
    return list(range(count)) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def listed(names: Sequence[str]) -> str:
    """Join names, of many the first four and how many there are more.

    Examples:
        >>> listed("abc"), listed("abcdefg")
        ('a, b, c', 'a, b, c, d and 3 more')
    """
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def brief(result: Any) -> str:
    """Format a result dataclass as a short text: arrays by dtype, shape and ends, trees by their size.

    Meant as a class's `__repr__ = brief`. It also works on tracers, on deleted arrays and on whatever JAX puts into a
    tree of that structure.

    Examples:
        >>> from pkjax.pruning.result import LayerReport
        >>> print(brief(LayerReport("kernel", (2, 5), 4, 10, False)))
        LayerReport(
            name='kernel', shape=(2, 5), kept=4, total=10, emptied=False, flow=None
        )
    """
    return wl.pformat(result, width=WIDTH, indent=4, hide_defaults=False, custom=_summary)


def _summary(value: Any) -> wl.AbstractDoc | None:
    """Summarise what would be long; None leaves the rest to wadler_lindig."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return wl.TextDoc(_array(value))
    if isinstance(value, bool | int | str | None) or is_dataclass(value):
        return None
    if isinstance(value, float):
        return wl.TextDoc(f"{value:.4g}")
    if isinstance(value, tuple) and all(isinstance(v, bool | int | float | str) for v in value):
        return None if len(value) <= 4 else wl.bracketed(
            wl.TextDoc("("), [wl.pdoc(value[0]), wl.TextDoc("…"), wl.pdoc(value[-1])], wl.comma, wl.TextDoc(")"), 4)
    if isinstance(value, tuple) and (is_dataclass(value[0]) or hasattr(value[0], "_fields")
                                     or isinstance(value[0], Mapping)):
        return wl.TextDoc(f"<{len(value):,} of {type(value[0]).__name__}>")
    leaves = jax.tree.leaves(value)
    return wl.TextDoc(f"<{_count(len(leaves), 'leaf', 'leaves')}, "
                      f"{_count(sum(int(np.size(leaf)) for leaf in leaves), 'entry', 'entries')}>")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _array(value: Any) -> str:
    kind = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    hidden = isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and (
        value.is_deleted() or not value.is_fully_addressable))
    if hidden or value.ndim > 1 or value.size == 0 or value.dtype.kind not in "biuf":
        return kind
    if value.ndim == 0:
        return f"{float(value):.4g}"
    ends = [float(v) for v in np.asarray(value)[[0, -1]]]
    return f"{kind} {ends[0]:.4g}" + (f" … {ends[1]:.4g}" if value.size > 1 else "")
