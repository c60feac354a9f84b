"""Records of runs in a folder: written whole, read as one table."""

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import PyTree

import pkjax as pk
from pkjax import files
from pkjax.experiments.settings import recorded_settings
from pkjax.experiments.user_code import short_names
from pkjax.extras import needed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FORMAT", "check_records", "epochs_table", "export", "read_records", "recorded", "table",
           "write_failure", "write_record"]

FORMAT = "pkjax run 3"
RUNS, FAILED = "runs", "failed"


def write_record(folder: Path, record: dict[str, Any], masks: PyTree) -> None:
    """Write `runs/KEY` with `record.json` and `masks.npz`, whole or not at all."""
    with files.folder(_room(folder, RUNS) / record["key"]) as place:
        (place / "record.json").write_text(files.to_json(record), encoding="utf-8")
        pk.save_masks(place / "masks.npz", masks)
    (folder / FAILED / f"{record['key']}.json").unlink(missing_ok=True)


def write_failure(folder: Path, record: dict[str, Any]) -> None:
    """Write `failed/KEY.json` with the error of a run that failed."""
    with files.replacing(_room(folder, FAILED) / f"{record['key']}.json") as part:
        part.write_text(files.to_json(record), encoding="utf-8")


def _room(folder: Path, name: str) -> Path:
    room = folder / name
    if not room.is_dir():
        room.mkdir(parents=True, exist_ok=True)
        files.sync(folder)
    return room


def recorded(folder: Path) -> tuple[set[str], set[str]]:
    """List the keys of the finished runs, and of those that only failed."""
    done = {place.name for place in _places(folder) if (place / "record.json").exists()}
    return done, {path.stem for path in _listed(folder / FAILED) if path.suffix == ".json"} - done


def _listed(room: Path) -> list[Path]:
    return sorted(path for path in room.iterdir() if not path.name.startswith(".")) if room.is_dir() else []


def _places(folder: Path) -> list[Path]:
    return [path for path in _listed(folder / RUNS) if path.is_dir()]


def check_records(folder: Path, again: Collection[str] = ()) -> None:
    """Refuse a folder with a record that cannot be read; the folders of the runs in `again` may be without one.

    Raises:
        ValueError: as in `read_records`.
    """
    if any(recorded(folder)) or _places(folder):
        for _ in read_records(folder, again):
            pass


def read_records(folder: Path | str, again: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Read the records of a folder of results, sorted by key: finished runs, then failed ones.

    A run that failed once and finished later is a finished one.

    Raises:
        FileNotFoundError: the folder holds no records.
        ValueError: a file is not the record of its run, or of an earlier format; or a run's folder, except of those in
            `again`, is without a record. The message names the file.
    """
    folder = Path(folder)
    done, failed = recorded(folder)
    torn = next((place for place in _places(folder) if place.name not in done | set(again)), None)
    if torn:
        raise ValueError(f"{torn} holds no record.json: run the sweep again, which repeats this run, or delete the "
                         "folder")
    if not done and not failed and not again:
        raise FileNotFoundError(f"no records of runs in {folder}: it should hold a folder {RUNS}, as `pkjax sweep` "
                                "writes it")
    for key in sorted(done):
        yield _read(folder / RUNS / key / "record.json", key, "done")
    for key in sorted(failed):
        yield _read(folder / FAILED / f"{key}.json", key, "failed")


def _read(path: Path, key: str, status: str) -> dict[str, Any]:
    try:
        record = files.from_json(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "format" not in record:
            raise ValueError("it has no format")
        if record["format"] == FORMAT:
            _check(record, key, status)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not the record of a run: {reason}; delete it to run the experiment again"
                         ) from error
    if record["format"] != FORMAT:
        raise ValueError(f"{path} has the format {record['format']!r}, but this version reads {FORMAT!r}: "
                         "run the sweep again, into another folder")
    return record


def _check(record: dict[str, Any], key: str, status: str) -> None:
    """Refuse a record that stands in another run's place, or from which the tables cannot be made."""
    if record["status"] != status:
        raise ValueError(f"it stands among the runs that are {status}, but its status is {record['status']!r}")
    if record["key"] != key:
        raise ValueError(f"it belongs to the run {record['key']!r}")
    if (own := recorded_settings(record["settings"]).key) != key:
        raise ValueError(f"its settings are those of the run {own}")
    if status == "done":
        if not record["history"]:
            raise ValueError("its history is empty")
        for row in record["history"]:
            if "epoch" not in row or not all(map(_is_number, row.values())):
                raise ValueError(f"its history holds {row}, where numbers with their names belong")
    elif not isinstance(record["error"], str):
        raise ValueError(f"its error is {record['error']!r}, where a text belongs")
    for name, value in _row(record).items():
        numbers = value if name == "captured" else [value]
        unmeasured = value is None and name in _SPECTRA
        if not (name in {*record["settings"], *_TEXTS} or unmeasured or (
                isinstance(numbers, list) and all(map(_is_number, numbers)))):
            raise ValueError(f"its {name} is {value!r}, where numbers belong")


_TEXTS = {"key", "status", "error", "broken_claims", "diverged"}
"""Columns that do not hold numbers, beside the settings."""
_SPECTRA = {"bound", "captured", "effective_rank", "per_index"}
"""Columns without a value where the spectra were not measured."""


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a column of a table takes."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


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
        `output_change`; `steps` of the optimizer and `seconds`; `diverged`: whether a number of the run's history is
        NaN or infinite. Functions of the user's own are named "module:function", with their version where the
        folder holds several.

    Raises:
        FileNotFoundError: the folder holds no records.
        ValueError: a file is not the record of a run or not a table of runs.
        ImportError: pandas or, for Parquet, PyArrow is missing.

    Source: the quantities of figures 1 to 3 of Gebhart, Saxena and Schrater (2021), and of theorem 1.

    Examples:
        >>> import tempfile
        >>> from pkjax.experiments import Settings
        >>> chosen = Settings(pruner="snip", compression=1.0)
        >>> failed = {"format": FORMAT, "key": chosen.key, "status": "failed", "error": "out of memory",
        ...           "settings": chosen.to_dict()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_failure(Path(folder), failed)
        ...     table(folder)[["model", "pruner", "status"]].to_numpy().tolist()
        [['fc-100', 'snip', 'failed']]
    """
    if Path(results).is_file():
        return _read_parquet(Path(results))
    frame = _readable(_pandas().DataFrame([_row(record) for record in read_records(results)]))
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
    return _readable(_pandas().DataFrame(rows, columns=None if rows else ["key", *named, "epoch"]))


def _readable(frame: Any) -> Any:
    """Leave the version out of names of the user's own functions, where a table holds one alone."""
    return frame.assign(**{name: frame[name].map(short_names(frame[name])) for name in ("model", "data", "pruner")})


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
        return {**base, "diverged": False}
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
            "steps": record["steps"], "seconds": record["seconds"], "diverged": any(map(_diverged, history))}


def _exp(value: float | int) -> float:
    """Undo a natural logarithm; −∞ belongs to a network without paths, whose trace is 0, and NaN stays NaN."""
    return math.inf if value > 700 else math.exp(value)


def _diverged(row: dict[str, Any]) -> bool:
    """Whether a row of the history holds NaN or infinity; a logarithm of −∞, of a network without paths, is neither."""
    return not all(math.isfinite(value) or (name == "ln_trace_pi" and value == -math.inf)
                   for name, value in row.items())


def _pandas() -> Any:
    return needed("pandas", "sweep", "tables of runs need pandas")


def _need_pyarrow() -> None:
    needed("pyarrow", "sweep", "Parquet needs PyArrow")
