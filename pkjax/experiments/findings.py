"""What the runs of a sweep say about the paper's claims, as tables.

A table has one row per training run. A row whose ``status`` is "failed" is left out everywhere.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkjax.experiments.regression import Saturation, line, saturation, spearman

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["PREDICTORS", "QUANTITIES", "claims", "curves", "finished", "fits", "groups", "predictor_scores"]

QUANTITIES = {"weight_change": "$\\|\\omega_t\\|$", "output_norm": "$\\|f_t\\|$"}
"""Columns with what training did, and their names in figures."""
PREDICTORS = {"trace_pi": "Tr Π", "gated_trace": "gated path trace", "bound": "$\\Sigma_i\\,\\nu_i\\pi_i$",
              "trace_ntk": "Tr Θ"}
"""Columns known at initialisation, and their names in figures."""
EXPLAINED = 0.5
"""The share of the variance from which a relation counts as log-linear."""
ROUNDING = 1e-4
"""By so much float32 spectra may exceed a bound."""
_SYNFLOW = ("synflow", "synflow-l2", "synflow-dist", "synflow-l2-dist")


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables of runs need pandas: pip install 'pkjax[sweep]'") from error
    return pandas


def finished(table: "DataFrame", *columns: str) -> tuple[Any, int]:
    """Return the runs that did not fail, and how many did.

    Raises: ValueError for a table without runs, for one whose runs all failed, and for one that lacks ``columns``,
        which it names.

    Source: definition.

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
    """Return a column as float64, NaN where there is no value."""
    return runs[column].to_numpy(dtype=np.float64, na_value=np.nan)


def _natural(name: object) -> list[Any]:
    """Sort fc-500 before fc-1000."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def groups(runs: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield data set, model, a label for both and their runs: data sets in the table's order, models by their names.

    Runs of one model on two data sets differ in the scale of their outputs and stay apart.

    Raises nothing for a table with columns data and model.

    Source: definition; the colours of figure 2 of Gebhart, Saxena and Schrater (2021).

    >>> import pandas as pd
    >>> runs = pd.DataFrame({"data": "digits", "model": ["fc-1000", "fc-500", "fc-500"]})
    >>> [(model, len(some)) for data, model, label, some in groups(runs)]
    [('fc-500', 2), ('fc-1000', 1)]
    """
    data_of, model_of = runs["data"].astype(str), runs["model"].astype(str)
    sets = list(dict.fromkeys(data_of))
    for data in sets:
        for model in sorted(set(model_of[data_of == data]), key=_natural):
            label = f"{model}, {data}" if len(sets) > 1 else model
            yield data, model, label, runs[(data_of == data) & (model_of == model)]


def fits(table: "DataFrame") -> "DataFrame":
    """Fit ‖ω_t‖ and ‖f_t‖ by lines in ln Tr Π at initialisation, per data set and model.

    Returns: columns data, model, quantity, slope (per factor e of the trace), intercept (at Tr Π = 1), r2, runs,
        left_out (traces without a logarithm, quantities that are not finite). NaN for fewer than three traces.

    Raises: ValueError as ``finished``, ImportError where pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2.

    >>> import pandas as pd
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "trace_pi": [1., 10., 100.],
    ...                      "weight_change": [1., 2., 3.], "output_norm": [2., 2., 5.]})
    >>> fits(runs)[["quantity", "slope", "r2"]].round(3).to_numpy().tolist()
    [['weight_change', 0.434, 1.0], ['output_norm', 0.651, 0.75]]
    """
    runs, _ = finished(table, "data", "model", "trace_pi", *QUANTITIES)
    rows = [(data, model, quantity, *line(floats(some, "trace_pi"), floats(some, quantity)))
            for data, model, _, some in groups(runs) for quantity in QUANTITIES]
    return _pandas().DataFrame(rows, columns=["data", "model", "quantity", "slope", "intercept", "r2", "runs",
                                              "left_out"])


def predictor_scores(table: "DataFrame") -> "DataFrame":
    """Score Tr Π, the gated path trace, Σ ν_i π_i and Tr Θ as predictors of ‖ω_t‖ and ‖f_t‖.

    Each predictor is scored on the runs where it is known, so compare rows with the same number of runs.

    Returns: columns data, model, quantity, predictor, r2 (of a line in the predictor's logarithm), spearman, slope
        (per factor e), runs, left_out. NaN for fewer than three different values.

    Raises: ValueError as ``finished``, ImportError where pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), figure 2 for Tr Π, theorem 1 for Σ ν_i π_i.

    >>> import pandas as pd
    >>> trace = [1., 10., 100.]
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "weight_change": [1., 2., 3.], "output_norm": 1.0,
    ...                      **{name: trace for name in PREDICTORS}})
    >>> predictor_scores(runs)[["predictor", "r2"]].head(2).round(3).to_numpy().tolist()
    [['trace_pi', 1.0], ['gated_trace', 1.0]]
    """
    runs, _ = finished(table, "data", "model", *PREDICTORS, *QUANTITIES)
    rows = []
    for data, model, _, some in groups(runs):
        for quantity in QUANTITIES:
            for predictor in PREDICTORS:
                x, y = floats(some, predictor), floats(some, quantity)
                fit = line(x, y)
                rows.append((data, model, quantity, predictor, fit.r2, spearman(x, y), fit.slope, fit.runs,
                             fit.left_out))
    return _pandas().DataFrame(rows, columns=["data", "model", "quantity", "predictor", "r2", "spearman", "slope",
                                              "runs", "left_out"])


def curves(runs: Any, t: Any = "fit") -> dict[str, Saturation]:
    """Fit figure 1's curves to the runs of one model, by quantity; ‖f_t‖ has a level at the start, ‖ω_t‖ has none.

        ‖ω_t‖ ≈ a(1 − e^{−ηTr(Π)t}),   ‖f_t‖ ≈ a(1 − e^{−ηTr(Π)t}) + b e^{−ηTr(Π)t}

    Args:
        runs: columns trace_pi_1, learning_rate, weight_change, output_norm.
        t: steps, or "fit" to fit one effective t to each quantity too.

    Raises: ValueError where t is neither "fit" nor positive.

    Source: Gebhart, Saxena and Schrater (2021), section 5.1 and figure 1.

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


def rms(residuals: np.ndarray) -> float:
    """Root mean square of the residuals that are numbers, NaN where there is none."""
    known = residuals[np.isfinite(residuals)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")


class _Gap(NamedTuple):
    """Mean difference of accuracy of two pruners, in percentage points."""

    mean: float
    error: float
    """Standard error over seeds, NaN for one seed."""
    text: str

    @property
    def sign(self) -> bool | None:
        """Whether the difference is positive; None within two standard errors or where these are unknown."""
        return bool(self.mean > 0) if abs(self.mean) > 2 * self.error else None


def _gap(runs: Any, pruner: str, reference: str, *, upper: bool = False) -> _Gap:
    """Compare two pruners at the compressions and seeds that both ran; ``upper``: from their median compression on."""
    known = runs[np.isfinite(floats(runs, "test_accuracy"))]
    mean = {name: 100 * known[known["pruner"] == name].groupby(["compression", "seed"])["test_accuracy"].mean()
            for name in (pruner, reference)}
    both = (mean[pruner] - mean[reference]).dropna().unstack("seed")
    if both.size == 0:
        return _Gap(float("nan"), float("nan"), f"no compression and seed with both {pruner} and {reference}")
    each = ", ".join(f"{difference:+.2f} at {compression:g}" for compression, difference in both.mean(axis=1).items())
    over = both[both.index >= np.median(both.index)] if upper else both
    per_seed = over.mean(axis=0).dropna().to_numpy(np.float64)
    value = float(over.mean(axis=1).mean())
    error = float(per_seed.std(ddof=1) / np.sqrt(len(per_seed))) if len(per_seed) > 1 else float("nan")
    where = f"mean from compression {over.index.min():g} on" if upper else "mean"
    spread = f" ± {error:.2f} over {len(per_seed)} seeds" if np.isfinite(error) else ", one seed"
    return _Gap(value, error, f"{pruner} minus {reference}, percentage points: {each}; {where} {value:+.2f}{spread}")


def _families(models: list[str]) -> Iterator[list[str]]:
    """Yield lists of models that differ in width alone, narrow first: fc-WIDTHxDEPTH, and a model and its wide one."""
    dense: dict[str, list[str]] = {}
    for model in models:
        if found := re.fullmatch(r"fc-\d+(x\d+)?", model):
            dense.setdefault(found[1] or "", []).append(model)
    yield from (family for family in dense.values() if len(family) > 1)
    yield from ([model, f"wide_{model}"] for model in models if f"wide_{model}" in models)


def _width_claim(runs: Any) -> Iterator[tuple[Any, ...]]:
    claim = "SynFlow-L2 overtakes SynFlow with width"
    gaps: dict[tuple[str, str], _Gap] = {}
    for data, model, _, some in groups(runs):
        gap = gaps[data, model] = _gap(some, "synflow-l2", "synflow", upper=True)
        yield claim, data, model, 3, gap.mean, gap.text, None
    for data in dict.fromkeys(data for data, _ in gaps):
        for family in _families([model for of, model in gaps if of == data]):
            narrow, wide = gaps[data, family[0]], gaps[data, family[-1]]
            grown = _Gap(wide.mean - narrow.mean, float(np.hypot(wide.error, narrow.error)), "")
            text = (f"from {family[0]} to {family[-1]} the difference goes from {narrow.mean:+.2f} to {wide.mean:+.2f} "
                    f"percentage points: by {grown.mean:+.2f} ± {grown.error:.2f}")
            signs = (grown.sign, wide.sign)
            held = False if False in signs else None if None in signs else True
            yield claim, data, f"{family[0]} to {family[-1]}", 3, grown.mean, text, held


def _nearest_claim(runs: Any) -> Iterator[tuple[Any, ...]]:
    for data, model, _, some in groups(runs):
        names = some["pruner"].to_numpy()
        for quantity, curve in curves(some).items():
            errors = {name: rms(curve.residuals[names == name]) for name in dict.fromkeys(names) if name != "none"}
            order = sorted((name for name in errors if np.isfinite(errors[name])), key=errors.__getitem__)
            near = [errors[name] for name in order if name.startswith("synflow-l2")]
            far = [errors[name] for name in order if not name.startswith("synflow-l2")]
            judged = bool(near and far)
            text = f"RMS residual of {quantity}, nearest first: " + ", ".join(f"{n} {errors[n]:.3g}" for n in order)
            yield ("the L2 variants lie nearest to the curve", data, model, 1,
                   max(near) / min(far) if judged and min(far) > 0 else float("nan"),
                   text if judged else f"no curve of {quantity} with L2 variants and others",
                   bool(max(near) < min(far)) if judged else None)


def _order_claim(runs: Any) -> Iterator[tuple[Any, ...]]:
    """Compare the traces of the paper's pruners after the first epoch, as figure 1 shows them."""
    for data, model, _, some in groups(runs):
        trace = floats(some, "trace_pi_1")
        known = some.assign(log=np.log(trace, out=np.full(len(trace), np.nan), where=trace > 0))
        known = known[np.isfinite(known["log"]) & known["pruner"].isin(["snip", "grasp", *_SYNFLOW])]
        mean = known.groupby(["pruner", "compression"])["log"].mean().unstack("pruner").dropna().mean()
        order = mean.sort_values(ascending=False)
        judged = {"snip", "grasp"} < set(order.index)
        text = "mean ln Tr Π, largest first: " + ", ".join(f"{name} {value:.2f}" for name, value in order.items())
        yield ("SNIP's path kernels are the largest, GraSP's the smallest", data, model, 1,
               mean["snip"] - mean["grasp"] if judged else float("nan"),
               text if judged else "no compression with SNIP, GraSP and a SynFlow pruner",
               (order.index[0], order.index[-1]) == ("snip", "grasp") if judged else None)


def _bound_claim(runs: Any) -> Iterator[tuple[Any, ...]]:
    """Count the networks in which an eigenvalue of Θ exceeds its bound."""
    for data, model, _, some in groups(runs):
        excess = floats(some, "per_index")
        over = some[excess > 1 + ROUNDING].assign(excess=excess[excess > 1 + ROUNDING])
        looked = int(np.isfinite(excess).sum())
        text = f"exceeded in {len(over)} of {looked} networks"
        if len(over):
            worst = over.sort_values("excess").iloc[-1]
            named = over.groupby("pruner").size().sort_values(ascending=False)
            text += (f" ({', '.join(f'{name} {count}' for name, count in named.items())}), at worst by a factor of "
                     f"{worst['excess']:.3g} ({worst['pruner']} at {worst['compression']:g})")
        yield ("λ_i ≤ ν_i π_i for every i", data, model, None, float(np.nanmax(excess)) if looked else float("nan"),
               text if looked else "no run with spectra", not len(over) if looked else None)


def claims(table: "DataFrame") -> "DataFrame":
    """Say claim by claim what held of the paper's section 5.

    - "SynFlow-L2 overtakes SynFlow with width": value is the mean difference of accuracy from the median compression
      on. It is judged for models that differ in width alone (fc-WIDTH, wide_resnet20 and resnet20): held where the
      widest is ahead and the difference grew from the narrowest. Single models are not judged.
    - "the -Dist variants perform below their counterparts": value is the mean difference over compressions.
    - "‖ω_t‖ and ‖f_t‖ are linear in log Tr Π": value is R²; held where it is at least 0.5.
    - "the L2 variants lie nearest to the curve": value is the larger RMS residual of the L2 variants over the smallest
      of the other pruners, about figure 1's curve with t fitted; held below 1.
    - "SNIP's path kernels are the largest, GraSP's the smallest": of SNIP, GraSP and the SynFlow family, after the
      first epoch; value is the difference of ln Tr Π between SNIP and GraSP, averaged over compressions and seeds.
    - "λ_i ≤ ν_i π_i for every i" (theorem 1's first claim, which is false in general): value is the largest
      λ_i / ν_i π_i in the runs with spectra.

    A difference within two standard errors over seeds, or of one seed, is not judged.

    Returns: columns claim, data, model, figure (the paper's, None for theorem 1), value (differences in percentage
        points), found (text), held (True, False, or None where the runs cannot tell).

    Raises: ValueError as ``finished``, ImportError where pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), section 5, figures 1 to 3.

    >>> import pandas as pd
    >>> traces = {"trace_pi": [1., 10., 100.], "trace_pi_1": [1., 10., 100.], "weight_change": [1., 2., 3.]}
    >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "synflow", "compression": [1., 2., 3.],
    ...                      "seed": 0, "learning_rate": 0.1, "test_accuracy": 0.9, "output_norm": 1.0, **traces})
    >>> found = claims(runs)
    >>> found[found["claim"].str.contains("linear")]["held"].tolist()
    [True, None]
    """
    runs, _ = finished(table, "data", "model", "pruner", "compression", "seed", "learning_rate", "test_accuracy",
                       "trace_pi", "trace_pi_1", *QUANTITIES)
    rows = [*_width_claim(runs)]
    for data, model, _, some in groups(runs):
        for pruner, reference in (("synflow-dist", "synflow"), ("synflow-l2-dist", "synflow-l2")):
            gap = _gap(some, pruner, reference)
            rows.append(("the -Dist variants perform below their counterparts", data, model, 3, gap.mean, gap.text,
                         None if gap.sign is None else not gap.sign))
    for _, fit in fits(table).iterrows():
        rows.append(("‖ω_t‖ and ‖f_t‖ are linear in log Tr Π", fit["data"], fit["model"], 2, fit["r2"],
                     f"{fit['quantity']}: slope {fit['slope']:.3g} per factor e, R² {fit['r2']:.3f}, "
                     f"{fit['runs']} runs", bool(fit["r2"] >= EXPLAINED) if np.isfinite(fit["r2"]) else None))
    rows += [*_nearest_claim(runs), *_order_claim(runs)]
    if "per_index" in runs.columns:
        rows += _bound_claim(runs)
    found = _pandas().DataFrame(rows, columns=["claim", "data", "model", "figure", "value", "found", "held"])
    held = _pandas().Series([row[-1] for row in rows], dtype=object)
    return found.assign(held=held)
