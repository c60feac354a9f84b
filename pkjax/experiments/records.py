"""Records of runs in a folder: written whole, read as one table."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import PyTree

import pkjax as pk
from pkjax import files

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["epochs_table", "export", "read_records", "recorded", "table", "write_failure", "write_record"]

RUNS, FAILED = "runs", "failed"


def write_record(folder: Path, record: dict[str, Any], masks: PyTree) -> None:
    """Write ``runs/KEY`` with ``record.json`` and ``masks.npz``; it is there whole or not at all."""
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    with files.folder(folder / RUNS / record["key"]) as place:
        (place / "record.json").write_text(files.to_json(record), encoding="utf-8")
        pk.save_masks(place / "masks.npz", masks)
    (folder / FAILED / f"{record['key']}.json").unlink(missing_ok=True)


def write_failure(folder: Path, record: dict[str, Any]) -> None:
    """Write ``failed/KEY.json`` with the error of a run that failed."""
    (folder / FAILED).mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / FAILED / f"{record['key']}.json") as part:
        part.write_text(files.to_json(record), encoding="utf-8")


def recorded(folder: Path) -> tuple[set[str], set[str]]:
    """List the keys of the runs that are done, and of those that failed."""
    done = {path.parent.name for path in folder.glob(f"{RUNS}/*/record.json") if not path.parent.name.startswith(".")}
    return done, {path.stem for path in folder.glob(f"{FAILED}/*.json") if not path.name.startswith(".")}


def read_records(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Read the records of a folder of results, in the order of their keys: done ones, then failed ones.

    Raises FileNotFoundError where the folder holds none, ValueError naming a file that is no record.
    """
    folder = Path(folder)
    done, failed = recorded(folder)
    if not done and not failed:
        raise FileNotFoundError(f"no records of runs in {folder}: it should hold the folder {RUNS} that "
                                "`pkjax sweep` writes")
    for path in [folder / RUNS / key / "record.json" for key in sorted(done)] + [
            folder / FAILED / f"{key}.json" for key in sorted(failed)]:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            yield {**record, "settings": dict(record["settings"]), "status": str(record["status"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a run: {error}") from error


def table(results: Path | str) -> "pd.DataFrame":
    """Read results as one table, a row a run, sorted by model, data, pruner, compression and seed.

    ``results`` is a folder of records, or the Parquet file that ``export`` made of one.

    Columns: the settings; ``status`` ("done" or "failed") and ``error``; ``density``, ``kept``, ``emptied`` (layers);
    ``trace_pi`` (Tr Π at initialisation), ``trace_pi_1`` (after the first epoch), ``trace_ntk``, ``gated_trace``;
    ``bound`` (Σ ν_i π_i), ``captured`` (shares of Tr Θ), ``effective_rank`` of Π, ``per_index`` (the largest
    λ_i / ν_i π_i), ``broken_claims`` (names of those of Theorem 1 that do not hold);
    after the last epoch ``test_accuracy``, ``train_accuracy``, ``test_loss``, ``train_loss``, ``weight_change``
    (‖ω_t‖), ``output_norm`` (‖f_t‖), ``output_change``; ``steps`` of the optimizer; ``seconds``; ``key``.

    Raises FileNotFoundError and ValueError as ``read_records``, ImportError where pandas is missing, and ValueError
    for a file that is no such table.

    Source: the quantities of figures 1 to 3 of Gebhart, Saxena and Schrater (2021), and of theorem 1.

    >>> import tempfile
    >>> failed = {"key": "0f", "status": "failed", "error": "out of memory", "settings": {
    ...     "model": "fc-100", "data": "digits", "pruner": "snip", "compression": 1.0, "seed": 0}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_failure(Path(folder), failed)
    ...     table(folder)[["model", "pruner", "status"]].to_numpy().tolist()
    [['fc-100', 'snip', 'failed']]
    """
    if Path(results).is_file():
        return _read_parquet(Path(results))
    frame = _pandas().DataFrame([_row(record) for record in read_records(results)])
    return frame.sort_values(["model", "data", "pruner", "compression", "seed", "key"], ignore_index=True)


def epochs_table(folder: Path | str) -> "pd.DataFrame":
    """Read results as a table with a row for every epoch of every run.

    Raises as ``table``.
    """
    named = ("model", "data", "pruner", "compression", "seed")
    rows = [{"key": record["key"], **{name: record["settings"][name] for name in named}, **row}
            for record in read_records(folder) for row in record.get("history", [])]
    return _pandas().DataFrame(rows)


def export(folder: Path | str) -> Path:
    """Write the table beside the records as ``table.parquet`` (Apache Parquet), whole, and return its path.

    Raises as ``table``, and ImportError where PyArrow is missing.
    """
    target = Path(folder) / "table.parquet"
    frame = table(folder)
    _need_pyarrow()
    with files.replacing(target) as part:
        frame.to_parquet(part, engine="pyarrow", index=False)
    return target


def _read_parquet(file: Path) -> "pd.DataFrame":
    _need_pyarrow()
    pandas = _pandas()
    try:
        frame = pandas.read_parquet(file, engine="pyarrow")
    except Exception as error:      # a damaged file makes the reader raise nearly anything
        raise ValueError(f"{file} is no table of runs in Parquet: {error}") from error
    if not {"key", "status", "model"} <= set(frame.columns):
        raise ValueError(f"{file} is no table of runs: it has the columns {', '.join(map(str, frame.columns))}")
    return frame


def _row(record: dict[str, Any]) -> dict[str, Any]:
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in record["settings"].items()}
    base = {"key": record["key"], "status": record["status"], "error": record.get("error"), **settings}
    if record["status"] != "done":
        return base
    history, pruning, spectra = record["history"], record["pruning"], record["spectra"] or {}
    first = {"trace_pi": _exp(history[0]["log_trace_pi"]), "trace_pi_1": _exp(history[min(1, len(history) - 1)]
                                                                               ["log_trace_pi"])}
    last = {name: value for name, value in history[-1].items() if name not in ("epoch", "log_trace_pi", "learning_rate",
                                                                               "seconds")}
    claims = spectra.get("claims", {})
    return {**base, "density": pruning["density"], "kept": pruning["kept"],
            "emptied": sum(layer["emptied"] for layer in pruning["layers"]), **first, **record["initial"],
            "bound": spectra.get("bound"), "captured": spectra.get("captured"), "effective_rank":
            spectra.get("effective_rank"), "per_index": 1 - claims["per index"][1] if claims else None,
            "broken_claims": [name for name, (holds, _) in claims.items() if not holds] if spectra else None, **last,
            "steps": record["steps"], "seconds": record["seconds"]}


def _exp(value: float | None) -> float:
    """Undo a logarithm; −∞, which JSON holds as null, is the trace of a network without paths: 0."""
    if value is None:
        return 0.0
    return math.exp(value) if value < 700 else math.inf


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables of results need pandas: pip install 'pkjax[sweep]'") from error
    return pandas


def _need_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError("Parquet needs PyArrow: pip install 'pkjax[sweep]'") from error
