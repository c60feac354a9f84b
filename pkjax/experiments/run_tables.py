"""Tables with one row per training run: which runs count, which columns say what, and how runs are grouped."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkjax.extras import needed

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["PREDICTORS", "QUANTITIES", "data_frame", "finished", "floats", "groups"]

QUANTITIES = {"weight_change": "$\\|\\omega_t\\|$", "output_norm": "$\\|f_t\\|$"}
"""Columns that hold the outcome of training, and their names in figures."""
PREDICTORS = {"trace_pi": "Tr Π", "gated_trace": "gated path trace", "bound": "$\\Sigma_i\\,\\nu_i\\pi_i$",
              "trace_ntk": "Tr Θ"}
"""Columns known at initialisation, and their names in figures."""


def data_frame(rows: Sequence[Any], columns: Sequence[str] | None = None) -> Any:
    """Build a pandas `DataFrame`.

    Raises:
        ImportError: pandas is missing.
    """
    return needed("pandas", "sweep", "tables of runs need pandas").DataFrame(rows, columns=columns)


def finished(table: "DataFrame", *columns: str) -> tuple[Any, int]:
    """Return the runs that did not fail, and how many did.

    Raises:
        ValueError: the table has no runs, all its runs failed, or it lacks one of `columns`, which the error names.

    Examples:
        >>> import pandas as pd
        >>> runs, failed = finished(pd.DataFrame({"seed": [0, 1], "status": ["done", "failed"]}), "seed")
        >>> runs["seed"].tolist(), failed
        ([0], 1)
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"the table of runs lacks {', '.join(map(repr, missing))}")
    if len(table) == 0:
        raise ValueError("the table has no runs")
    good = table["status"].ne("failed").to_numpy(bool, na_value=True) if "status" in table.columns else \
        np.ones(len(table), bool)
    if not good.any():
        raise ValueError(f"all {len(table)} runs of the table failed")
    return table[good], int(np.sum(~good))


def floats(runs: Any, column: str) -> np.ndarray:
    """Return a column as float64, with NaN where it has no value."""
    return runs[column].to_numpy(dtype=np.float64, na_value=np.nan)


def _natural(name: object) -> list[Any]:
    """Sort fc-500 before fc-1000."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def groups(runs: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield each data set and model with a label for both and their runs.

    Data sets keep the table's order; models are sorted by name, numbers by size. Runs of one model on two data sets
    stay apart, because the scales of their outputs differ.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": ["fc-1000", "fc-500", "fc-500"]})
        >>> [(model, len(group)) for data, model, label, group in groups(runs)]
        [('fc-500', 2), ('fc-1000', 1)]
    """
    data_of, model_of = runs["data"].astype(str), runs["model"].astype(str)
    sets = list(dict.fromkeys(data_of))
    for data in sets:
        for model in sorted(set(model_of[data_of == data]), key=_natural):
            label = f"{model}, {data}" if len(sets) > 1 else model
            yield data, model, label, runs[(data_of == data) & (model_of == model)]
