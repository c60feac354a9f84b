"""What the runs of a sweep say about the claims of the paper's section 5, claim by claim."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pkjax.experiments.findings import curves, fits, rms
from pkjax.experiments.run_tables import QUANTITIES, data_frame, finished, floats, groups
from pkjax.experiments.user_code import is_own

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["judge_claims"]

EXPLAINED = 0.5
"""Share of the variance from which a relation counts as log-linear."""
ROUNDING = 1e-4
"""By how much spectra in float32 may exceed a bound."""
_SYNFLOW = ("synflow", "synflow-l2", "synflow-dist", "synflow-l2-dist")


class _Gap(NamedTuple):
    """Mean difference in accuracy between two pruners, in percentage points."""

    mean: float
    error: float
    """Standard error over seeds, NaN for one seed."""
    text: str

    @property
    def sign(self) -> bool | None:
        """Whether the difference is positive; None within two standard errors, or where the error is unknown."""
        return bool(self.mean > 0) if abs(self.mean) > 2 * self.error else None


def _gap(runs: Any, pruner: str, reference: str, *, upper: bool = False) -> _Gap:
    """Compare two pruners at the compressions and seeds of both; `upper` starts at their median compression."""
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
    """Yield lists of models that differ only in width, narrow first: fc-WIDTHxDEPTH, and a model and its wide one."""
    dense: dict[str, list[str]] = {}
    for model in models:
        if match := re.fullmatch(r"fc-\d+(x\d+)?", model):
            dense.setdefault(match[1] or "", []).append(model)
    yield from (family for family in dense.values() if len(family) > 1)
    yield from ([model, f"wide_{model}"] for model in models if f"wide_{model}" in models)


def _width(runs: Any) -> Iterator[tuple[Any, ...]]:
    claim = "SynFlow-L2 overtakes SynFlow with width"
    gaps: dict[tuple[str, str], _Gap] = {}
    for data, model, _, group in groups(runs):
        gap = gaps[data, model] = _gap(group, "synflow-l2", "synflow", upper=True)
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


def _dist(runs: Any) -> Iterator[tuple[Any, ...]]:
    for data, model, _, group in groups(runs):
        for pruner, reference in (("synflow-dist", "synflow"), ("synflow-l2-dist", "synflow-l2")):
            gap = _gap(group, pruner, reference)
            yield ("the -Dist variants perform below their counterparts", data, model, 3, gap.mean, gap.text,
                   None if gap.sign is None else not gap.sign)


def _linear(table: Any) -> Iterator[tuple[Any, ...]]:
    for _, fit in fits(table).iterrows():
        yield ("‖ω_t‖ and ‖f_t‖ are linear in ln Tr Π", fit["data"], fit["model"], 2, fit["r2"],
               f"{fit['quantity']}: slope {fit['slope']:.3g} per factor e, R² {fit['r2']:.3f}, {fit['runs']} runs",
               bool(fit["r2"] >= EXPLAINED) if np.isfinite(fit["r2"]) else None)


def _nearest(runs: Any) -> Iterator[tuple[Any, ...]]:
    for data, model, _, group in groups(runs):
        names = group["pruner"].to_numpy()
        for quantity, curve in curves(group).items():
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


def _order(runs: Any) -> Iterator[tuple[Any, ...]]:
    """Compare the traces of the paper's pruners after the first epoch, as figure 1 shows them."""
    for data, model, _, group in groups(runs):
        trace = floats(group, "trace_pi_1")
        known = group.assign(ln_trace=np.log(trace, out=np.full(len(trace), np.nan), where=trace > 0))
        known = known[np.isfinite(known["ln_trace"]) & known["pruner"].isin(["snip", "grasp", *_SYNFLOW])]
        mean = known.groupby(["pruner", "compression"])["ln_trace"].mean().unstack("pruner").dropna().mean()
        order = mean.sort_values(ascending=False)
        judged = {"snip", "grasp"} < set(order.index)
        text = "mean ln Tr Π, largest first: " + ", ".join(f"{name} {value:.2f}" for name, value in order.items())
        yield ("SNIP's path kernels are the largest, GraSP's the smallest", data, model, 1,
               mean["snip"] - mean["grasp"] if judged else float("nan"),
               text if judged else "no compression with SNIP, GraSP and a SynFlow pruner",
               (order.index[0], order.index[-1]) == ("snip", "grasp") if judged else None)


def _bound(runs: Any) -> Iterator[tuple[Any, ...]]:
    """Count the networks in which an eigenvalue of Θ exceeds its bound."""
    for data, model, _, group in groups(runs):
        excess = floats(group, "per_index")
        over = group[excess > 1 + ROUNDING].assign(excess=excess[excess > 1 + ROUNDING])
        measured = int(np.isfinite(excess).sum())
        text = f"exceeded in {len(over)} of {measured} networks"
        if len(over):
            worst = over.sort_values("excess").iloc[-1]
            named = over.groupby("pruner").size().sort_values(ascending=False)
            text += (f" ({', '.join(f'{name} {count}' for name, count in named.items())}), at worst by a factor of "
                     f"{worst['excess']:.3g} ({worst['pruner']} at {worst['compression']:g})")
        yield ("λ_i ≤ ν_i π_i for every i", data, model, None, float(np.nanmax(excess)) if measured else float("nan"),
               text if measured else "no run with spectra", not len(over) if measured else None)


def judge_claims(table: "DataFrame") -> "DataFrame":
    """Judge the claims of the paper's section 5 by the runs of a sweep.

    - "SynFlow-L2 overtakes SynFlow with width": the value is the mean difference in accuracy from the median
      compression on. Judged for models that differ only in width (fc-WIDTH; wide_resnet20 and resnet20): it held where
      the widest is ahead and the difference grew from the narrowest. Single models are not judged.
    - "the -Dist variants perform below their counterparts": the value is the mean difference over compressions.
    - "‖ω_t‖ and ‖f_t‖ are linear in ln Tr Π": the value is R²; it held from 0.5 on.
    - "the L2 variants lie nearest to the curve": the value is the larger RMS residual of the L2 variants divided by the
      smallest of the other pruners, about figure 1's curve with t fitted; it held below 1.
    - "SNIP's path kernels are the largest, GraSP's the smallest": of SNIP, GraSP and the SynFlow family, after the
      first epoch. The value is the difference in ln Tr Π between SNIP and GraSP, averaged over compressions and seeds.
    - "λ_i ≤ ν_i π_i for every i" (the first claim of theorem 1, false in general): the value is the largest
      λ_i / ν_i π_i in the runs with spectra.

    A difference within two standard errors over seeds, or of one seed, is not judged. Runs that failed or diverged are
    left out, and so are pruners of the user's own, of which the paper says nothing.

    Args:
        table: columns data, model, pruner, compression, seed, learning_rate, test_accuracy, trace_pi, trace_pi_1,
            weight_change, output_norm; per_index for the last claim.

    Returns:
        columns claim, data, model, figure (of the paper; None for theorem 1), value (differences in percentage
        points), finding (text), held (True, False, or None where the runs cannot tell).

    Raises:
        ValueError: the table has no finished runs or lacks a column.
        ImportError: pandas is missing.

    Source: Gebhart, Saxena and Schrater (2021), section 5, figures 1 to 3.

    Examples:
        >>> import pandas as pd
        >>> traces = {"trace_pi": [1., 10., 100.], "trace_pi_1": [1., 10., 100.], "weight_change": [1., 2., 3.]}
        >>> runs = pd.DataFrame({"data": "digits", "model": "fc-100", "pruner": "synflow", "compression": [1., 2., 3.],
        ...                      "seed": 0, "learning_rate": 0.1, "test_accuracy": 0.9, "output_norm": 1.0, **traces})
        >>> judged = judge_claims(runs)
        >>> judged[judged["claim"].str.contains("linear")]["held"].tolist()
        [True, None]
    """
    if "pruner" in table.columns and len(left := table[[not is_own(str(name)) for name in table["pruner"]]]):
        table = left
    runs = finished(table, "data", "model", "pruner", "compression", "seed", "learning_rate", "test_accuracy",
                    "trace_pi", "trace_pi_1", *QUANTITIES).runs
    rows = [*_width(runs), *_dist(runs), *_linear(table), *_nearest(runs), *_order(runs)]
    if "per_index" in runs.columns:
        rows += _bound(runs)
    judged = data_frame(rows, ["claim", "data", "model", "figure", "value", "finding", "held"])
    return judged.astype({"held": object})
