"""How results show themselves: an HTML table in a notebook, a short text in a terminal."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any

import jax
import numpy as np

__all__ = ["Progress", "Raw", "brief", "formula", "html", "number", "pairs", "reporter", "some"]

WIDTH = 110
"""Characters from which a text takes one line a field."""


class Raw(str):
    """HTML that is put into a table as it is; any other text is escaped."""

    __slots__ = ()


def formula(text: str) -> Raw:
    """Escape a text and set its indices, ``λ_i`` and ``Σ_{i≤n}``, below the line.

    >>> formula("λ_{i+j-1} ≤ ν_1 π_j")
    'λ<sub>i+j-1</sub> ≤ ν<sub>1</sub> π<sub>j</sub>'
    """
    return Raw(re.sub(r"_(?:\{([^}]+)\}|([A-Za-z0-9θ]+))", lambda found: f"<sub>{found[1] or found[2]}</sub>",
                      escape(text)))


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


def html(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", left: int = 1) -> str:
    """Build an HTML table; its first ``left`` columns are aligned on the left, the others on the right.

    Nothing but alignment is styled, so that the page's own colours, light or dark, stay readable. A negative exponent
    does not start a new line.

    >>> print(html(["layer", "kept"], [["<b>", "3"]]))
    <table><thead><tr><th style=text-align:left>layer</th><th style=text-align:right>kept</th></tr></thead><tbody>
    <tr><td style=text-align:left>&lt;b&gt;</td><td style=text-align:right>3</td></tr>
    </tbody></table>
    """
    def text(cell: str) -> str:
        return cell if isinstance(cell, Raw) else re.sub(r"(?<=\de)-", "\N{NON-BREAKING HYPHEN}", escape(cell))

    def row(tag: str, cells: Sequence[str]) -> str:
        # Notebooks align on the right what does not say otherwise.
        inner = ((text(cell), "left" if i < left else "right") for i, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{tag} style=text-align:{side}>{cell}</{tag}>" for cell, side in inner) + "</tr>"
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(row("td", cells) for cells in rows)
    return f"<table>{top}<thead>{row('th', heads)}</thead><tbody>\n{body}\n</tbody></table>"


def pairs(columns: Mapping[str, np.ndarray], caption: str) -> str:
    """Build the HTML table of arrays (k,) side by side, with the index from 1; of long ones some rows.

    >>> pairs({"eigenvalue": np.array([9.0])}, "of Θ").count("<td")
    2
    """
    chosen = some(len(next(iter(columns.values()))))
    rows = [[str(i + 1), *(number(float(values[i])) for values in columns.values())] for i in chosen]
    return html(["", *columns], rows, caption=caption)


def some(count: int, most: int = 12) -> list[int]:
    """Choose the rows of a long table that are shown: all of a few, else the first, the last and some between.

    >>> some(3), some(100, 4)
    ([0, 1, 2], [0, 33, 66, 99])
    """
    return list(range(count)) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def brief(result: Any) -> str:
    """Write a result dataclass as a short text: of arrays the type, the shape and the ends, of trees the size.

    Stands in a result's class as ``__repr__ = brief``. Works on tracers, deleted arrays and whatever else a tree of
    that structure holds for JAX.

    >>> from pkjax.pruning.result import LayerReport
    >>> brief(LayerReport("kernel", (2, 5), 4, 10, False))
    "LayerReport(name='kernel', shape=(2, 5), kept=4, total=10, emptied=False, flow=None)"
    """
    shown = [f"{field.name}={_value(getattr(result, field.name))}" for field in fields(result)]
    name = type(result).__name__
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(shown) + ")"


def _value(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if isinstance(value, bool | int | str | None):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and all(isinstance(v, bool | int | float | str) for v in value):
        shown = [*map(_value, value)] if len(value) <= 4 else [_value(value[0]), "…", _value(value[-1])]
        return f"({', '.join(shown)}{',' * (len(value) == 1)})"
    if isinstance(value, tuple) and (is_dataclass(value[0]) or hasattr(value[0], "_fields")
                                     or isinstance(value[0], Mapping)):
        return f"<{len(value):,} of {type(value[0]).__name__}>"
    leaves = jax.tree.leaves(value)
    return f"<{len(leaves)} leaves, {sum(int(np.size(leaf)) for leaf in leaves):,} entries>"


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


Progress = Callable[[str], None] | bool
"""How a long computation says how far it is: a function that is given one line of text at a time, True for lines on
the standard error stream, False for nothing."""


def reporter(progress: Progress) -> Callable[[str], None]:
    """Return the function to call with each line of progress.

    >>> lines = []
    >>> reporter(lines.append)("tile 1 of 4"), reporter(False)("tile 2 of 4"), lines
    (None, None, ['tile 1 of 4'])
    """
    if callable(progress):
        return progress
    return (lambda line: print(line, file=sys.stderr, flush=True)) if progress else (lambda line: None)
