"""Tables with one row per training run: which runs count, which columns say what, and how runs are grouped."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkjax.extras import needed

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["PREDICTORS", "QUANTITIES", "Finished", "data_frame", "diverging", "finished", "floats", "groups",
           "succeeded"]

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


class Finished(NamedTuple):
    """The runs of a table that can be drawn and fitted, and how many cannot."""

    runs: Any
    """The rows of the others."""
    failed: int
    """Runs without a result."""
    diverged: int
    """Runs whose training led to NaN or infinity."""


def finished(table: "DataFrame", *columns: str) -> Finished:
    """Return the runs that neither failed nor diverged, and how many did.

    Raises:
        ValueError: the table has no runs, none of its runs is left, or it lacks one of `columns`, which the error
            names.

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"seed": [0, 1, 2], "status": ["done", "failed", "done"], "diverged": [0, 0, 1]})
        >>> runs, failed, diverged = finished(table, "seed")
        >>> runs["seed"].tolist(), failed, diverged
        ([0], 1, 1)
    """
    runs, failed = succeeded(table, *columns)
    left = ~diverging(runs)
    if not left.any():
        raise ValueError(f"all {len(table)} runs of the table {'failed or ' if failed else ''}diverged")
    return Finished(runs[left], failed, int(np.sum(~left)))


def succeeded(table: "DataFrame", *columns: str) -> tuple[Any, int]:
    """Return the runs that did not fail, those that diverged included, and how many failed.

    Raises:
        ValueError: the table has no runs, all its runs failed, or it lacks one of `columns`, which the error names.
    """
    if len(table) == 0:
        raise ValueError("the table has no runs")
    good = table["status"].ne("failed").to_numpy(bool, na_value=True) if "status" in table.columns else \
        np.ones(len(table), bool)
    if not good.any():
        raise ValueError(f"all {len(table)} runs of the table failed")
    missing = [name for name in columns if name not in table.columns]      # failed runs alone have few columns
    if missing:
        raise ValueError(f"the table of runs lacks {', '.join(map(repr, missing))}")
    return table[good], int(np.sum(~good))


def diverging(runs: Any) -> np.ndarray:
    """Tell which runs diverged: by the column `diverged`, or because an outcome of training is NaN or infinite."""
    marked = np.zeros(len(runs), bool)
    if "diverged" in runs.columns:
        marked |= np.nan_to_num(floats(runs, "diverged")) != 0
    for name in QUANTITIES:
        if name in runs.columns:
            marked |= ~np.isfinite(floats(runs, name))
    return marked


def floats(runs: Any, column: str) -> np.ndarray:
    """Return a column as float64, with NaN where it has no value.

    Raises:
        ValueError: the column holds something else than numbers.
    """
    try:
        return runs[column].to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the column {column!r} of the table of runs does not hold numbers: {error}") from error


def _natural(name: object) -> list[Any]:
    """Sort fc-500 before fc-1000."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def groups(runs: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield each data set and model with a label for both and their runs.

    Data sets keep the table's order; models are sorted by name, numbers by size. Runs of one model on two data sets
    stay apart, because the scales of their outputs differ. So do runs of a model whose gates are frozen at different
    references, which then stand in its name.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": ["fc-1000", "fc-500", "fc-500"]})
        >>> [(model, len(group)) for data, model, label, group in groups(runs)]
        [('fc-500', 2), ('fc-1000', 1)]
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-9", "reference": [None, "ones", "images"]})
        >>> [model for data, model, label, group in groups(runs)]
        ['fc-9', 'fc-9, frozen at images', 'fc-9, frozen at ones']
    """
    data_of, model_of = runs["data"].astype(str), runs["model"].astype(str)
    if "reference" in runs.columns:
        frozen = runs["reference"].fillna("").astype(str)
        several = model_of.map(frozen.groupby(model_of).nunique()) > 1
        model_of = model_of.where(~several | frozen.eq(""), model_of + ", frozen at " + frozen)
    sets = list(dict.fromkeys(data_of))
    for data in sets:
        for model in sorted(set(model_of[data_of == data]), key=_natural):
            label = f"{model}, {data}" if len(sets) > 1 else model
            yield data, model, label, runs[(data_of == data) & (model_of == model)]
