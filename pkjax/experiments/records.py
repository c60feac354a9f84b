"""Records of runs in a folder: written whole, read as one table."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import PyTree

import pkjax as pk
from pkjax import files
from pkjax.extras import needed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FORMAT", "epochs_table", "export", "read_records", "recorded", "table", "write_failure", "write_record"]

FORMAT = "pkjax run 2"
RUNS, FAILED = "runs", "failed"


def write_record(folder: Path, record: dict[str, Any], masks: PyTree) -> None:
    """Write `runs/KEY` with `record.json` and `masks.npz`, whole or not at all."""
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    with files.folder(folder / RUNS / record["key"]) as place:
        (place / "record.json").write_text(files.to_json(record), encoding="utf-8")
        pk.save_masks(place / "masks.npz", masks)
    (folder / FAILED / f"{record['key']}.json").unlink(missing_ok=True)


def write_failure(folder: Path, record: dict[str, Any]) -> None:
    """Write `failed/KEY.json` with the error of a run that failed."""
    (folder / FAILED).mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / FAILED / f"{record['key']}.json") as part:
        part.write_text(files.to_json(record), encoding="utf-8")


def recorded(folder: Path) -> tuple[set[str], set[str]]:
    """List the keys of the finished runs, and of the failed ones."""
    done = {path.parent.name for path in folder.glob(f"{RUNS}/*/record.json") if not path.parent.name.startswith(".")}
    return done, {path.stem for path in folder.glob(f"{FAILED}/*.json") if not path.name.startswith(".")}


def read_records(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Read the records of a folder of results, sorted by key: finished runs, then failed ones.

    Raises:
        FileNotFoundError: the folder holds no records.
        ValueError: a file is not the record of a run, or of an earlier format; the message names it.
    """
    folder = Path(folder)
    done, failed = recorded(folder)
    if not done and not failed:
        raise FileNotFoundError(f"no records of runs in {folder}: it should hold a folder {RUNS}, as `pkjax sweep` "
                                "writes it")
    for path in [folder / RUNS / key / "record.json" for key in sorted(done)] + [
            folder / FAILED / f"{key}.json" for key in sorted(failed)]:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record = {**record, "settings": dict(record["settings"]), "status": str(record["status"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the record of a run: {error}") from error
        if record.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {record.get('format')!r}, but this version reads {FORMAT!r}: "
                             "run the sweep again, into another folder")
        yield record


def table(results: Path | str) -> "pd.DataFrame":
    """Read results as one table, one row per run, sorted by model, data, pruner, compression and seed.

    Args:
        results: a folder of records, or the Parquet file that `export` made of one.

    Returns:
        columns of the settings; `key`, `status` ("done" or "failed") and `error`; `density`, `kept`, `emptied`
        (layers); `trace_pi` (Tr Π at initialisation), `trace_pi_1` (after the first epoch), `trace_ntk`,
        `gated_trace`; `bound` (Σ ν_i π_i), `captured` (shares of Tr Θ), `effective_rank` of Π, `per_index` (the largest
        λ_i / ν_i π_i), `broken_claims` (names of the claims of Theorem 1 that do not hold); after the last epoch
        `test_accuracy`, `train_accuracy`, `test_loss`, `train_loss`, `weight_change` (‖ω_t‖), `output_norm` (‖f_t‖),
        `output_change`; `steps` of the optimizer and `seconds`.

    Raises:
        FileNotFoundError: the folder holds no records.
        ValueError: a file is not the record of a run or not a table of runs.
        ImportError: pandas or, for Parquet, PyArrow is missing.

    Source: the quantities of figures 1 to 3 of Gebhart, Saxena and Schrater (2021), and of theorem 1.

    Examples:
        >>> import tempfile
        >>> failed = {"format": FORMAT, "key": "0f", "status": "failed", "error": "out of memory", "settings": {
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
    """Read results as a table with one row for every epoch of every run.

    Raises:
        FileNotFoundError: the folder holds no records.
        ValueError: a file is not the record of a run.
        ImportError: pandas is missing.
    """
    named = ("model", "data", "pruner", "compression", "seed")
    rows = [{"key": record["key"], **{name: record["settings"][name] for name in named}, **row}
            for record in read_records(folder) for row in record.get("history", [])]
    return _pandas().DataFrame(rows)


def export(folder: Path | str) -> Path:
    """Write the table beside the records as `table.parquet` (Apache Parquet), and return its path.

    Raises:
        FileNotFoundError: the folder holds no records.
        ValueError: a file is not the record of a run.
        ImportError: pandas or PyArrow is missing.
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
    except Exception as error:      # on a damaged file the reader raises nearly anything
        raise ValueError(f"{file} is not a Parquet table of runs: {error}") from error
    if not {"key", "status", "model"} <= set(frame.columns):
        raise ValueError(f"{file} is not a table of runs: it has the columns {', '.join(map(str, frame.columns))}")
    return frame


def _row(record: dict[str, Any]) -> dict[str, Any]:
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in record["settings"].items()}
    base = {"key": record["key"], "status": record["status"], "error": record.get("error"), **settings}
    if record["status"] != "done":
        return base
    history, pruning, spectra = record["history"], record["pruning"], record["spectra"] or {}
    first = {"trace_pi": _exp(history[0]["ln_trace_pi"]),
             "trace_pi_1": _exp(history[min(1, len(history) - 1)]["ln_trace_pi"])}
    last = {name: value for name, value in history[-1].items()
            if name not in ("epoch", "ln_trace_pi", "learning_rate", "seconds")}
    claims = spectra.get("claims", {})
    return {**base, "density": pruning["density"], "kept": pruning["kept"],
            "emptied": sum(layer["emptied"] for layer in pruning["layers"]), **first, **record["initial"],
            "bound": spectra.get("bound"), "captured": spectra.get("captured"), "effective_rank":
            spectra.get("effective_rank"), "per_index": 1 - claims["per index"][1] if claims else None,
            "broken_claims": [name for name, (holds, _) in claims.items() if not holds] if spectra else None, **last,
            "steps": record["steps"], "seconds": record["seconds"]}


def _exp(value: float | None) -> float:
    """Undo a natural logarithm; −∞, which JSON holds as null, belongs to a network without paths, whose trace is 0."""
    if value is None:
        return 0.0
    return math.exp(value) if value < 700 else math.inf


def _pandas() -> Any:
    return needed("pandas", "sweep", "tables of runs need pandas")


def _need_pyarrow() -> None:
    needed("pyarrow", "sweep", "Parquet needs PyArrow")
