"""What the runs of a sweep show, in numbers: fitted lines and curves, and scores of the predictors of training.

A table has one row per training run. Rows whose `status` is "failed" are ignored; runs that diverged are left out.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from pkjax.experiments.regression import Saturation, line, saturation, spearman
from pkjax.experiments.run_tables import (
    PREDICTORS,
    QUANTITIES,
    data_frame,
    diverging,
    finished,
    floats,
    groups,
    succeeded,
)

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["curves", "fits", "predictor_scores", "rms"]


def fits(table: "DataFrame") -> "DataFrame":
    """Fit ‖ω_t‖ and ‖f_t‖ by lines in ln Tr Π at initialisation, per data set and model.

    Args:
        table: columns data, model, trace_pi, weight_change, output_norm.

    Returns:
        columns data, model, quantity, slope (per factor e of the trace), intercept (at Tr Π = 1), r2, runs, left_out
        (traces without a logarithm, runs that diverged). NaN for fewer than three traces.

    Raises:
        ValueError: the table has no finished runs or lacks a column.
        ImportError: pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2.

    Examples:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "trace_pi": [1., 10., 100.],
        ...                      "weight_change": [1., 2., 3.], "output_norm": [2., 2., 5.]})
        >>> fits(runs)[["quantity", "slope", "r2"]].round(3).to_numpy().tolist()
        [['weight_change', 0.434, 1.0], ['output_norm', 0.651, 0.75]]
    """
    runs = _with_diverged(table, "data", "model", "trace_pi", *QUANTITIES)
    rows = [(data, model, quantity, *line(floats(group, "trace_pi"), _outcome(group, quantity)))
            for data, model, _, group in groups(runs) for quantity in QUANTITIES]
    return data_frame(rows, ["data", "model", "quantity", "slope", "intercept", "r2", "runs", "left_out"])


def predictor_scores(table: "DataFrame") -> "DataFrame":
    """Score Tr Π, the gated path trace, Σ ν_i π_i and Tr Θ as predictors of ‖ω_t‖ and ‖f_t‖.

    Each predictor is scored on the runs where it is known, so compare rows with the same number of runs.

    Args:
        table: columns data, model, trace_pi, gated_trace, bound, trace_ntk, weight_change, output_norm.

    Returns:
        columns data, model, quantity, predictor, r2 (of a line in the predictor's logarithm), spearman, slope (per
        factor e), runs, left_out. NaN for fewer than three different values.

    Raises:
        ValueError: the table has no finished runs or lacks a column.
        ImportError: pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2 for Tr Π, theorem 1 for Σ ν_i π_i.

    Examples:
        >>> import pandas as pd
        >>> trace = [1., 10., 100.]
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "weight_change": [1., 2., 3.], "output_norm": 1.0,
        ...                      **{name: trace for name in PREDICTORS}})
        >>> predictor_scores(runs)[["predictor", "r2"]].head(2).round(3).to_numpy().tolist()
        [['trace_pi', 1.0], ['gated_trace', 1.0]]
    """
    runs = _with_diverged(table, "data", "model", *PREDICTORS, *QUANTITIES)
    rows = []
    for data, model, _, group in groups(runs):
        for quantity in QUANTITIES:
            for predictor in PREDICTORS:
                x, y = floats(group, predictor), _outcome(group, quantity)
                fit = line(x, y)
                rows.append((data, model, quantity, predictor, fit.r2, spearman(x, y), fit.slope, fit.runs,
                             fit.left_out))
    return data_frame(rows, ["data", "model", "quantity", "predictor", "r2", "spearman", "slope", "runs", "left_out"])


def _with_diverged(table: "DataFrame", *columns: str) -> Any:
    """Return the runs that a fit takes and those that it counts as left out: they diverged."""
    finished(table, *columns)      # refuses a table of which nothing is left
    return succeeded(table, *columns)[0]


def _outcome(runs: Any, quantity: str) -> np.ndarray:
    return np.where(diverging(runs), np.nan, floats(runs, quantity))


def curves(runs: Any, t: Any = "fit") -> dict[str, Saturation]:
    """Fit figure 1's curves to the runs of one model, one for each quantity.

        ‖ω_t‖ ≈ a(1 − e^{−ηTr(Π)t}),   ‖f_t‖ ≈ a(1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t}

    Args:
        runs: columns trace_pi_1, learning_rate, weight_change, output_norm.
        t: steps, or "fit" to fit one effective t to each quantity too.

    Raises:
        ValueError: t is neither "fit" nor positive.

    Source: Gebhart, Saxena and Schrater (2021), section 5.1 and figure 1.

    Examples:
        >>> import pandas as pd
        >>> trace = np.array([0.1, 1.0, 10.0, 100.0])
        >>> runs = pd.DataFrame({"trace_pi_1": trace, "learning_rate": 0.1, "weight_change": 3 * (1 - np.exp(-trace)),
        ...                      "output_norm": 2.0 + np.exp(-trace)})
        >>> [round(float(curve.a), 3) for curve in curves(runs, t=10.0).values()]
        [3.0, 2.0]
    """
    trace, eta = floats(runs, "trace_pi_1"), floats(runs, "learning_rate")
    return {quantity: saturation(trace, floats(runs, quantity), eta, t=t, start=quantity == "output_norm")
            for quantity in QUANTITIES}


def rms(residuals: Float[np.ndarray, "..."]) -> float:
    """Compute the root mean square of the residuals that are numbers; NaN where none is.

    Examples:
        >>> rms(np.array([3.0, np.nan, -3.0]))
        3.0
    """
    known = residuals[np.isfinite(residuals)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")
