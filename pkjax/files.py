"""Files and folders that appear whole or not at all, and JSON that keeps NaN and infinity."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["folder", "from_json", "replacing", "sync", "to_json"]

_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The floats that JSON lacks, by the strings that stand for them."""


def to_json(content: Any) -> str:
    r"""Write a value as JSON, with NaN and infinity as the strings "NaN", "Infinity" and "-Infinity".

    A text that reads like one of these gets a backslash in front; `from_json` restores both.

    Examples:
        >>> to_json({"λ": [1.5, float("inf"), None]})
        '{"λ": [1.5, "Infinity", null]}'
        >>> print(to_json("NaN"))
        "\\NaN"
    """
    return json.dumps(_named(content), allow_nan=False, ensure_ascii=False)


def from_json(text: str) -> Any:
    """Read what `to_json` wrote.

    Raises:
        ValueError: the text is not JSON.

    Examples:
        >>> from_json(to_json([float("-inf"), "NaN", None, 2]))
        [-inf, 'NaN', None, 2]
    """
    return _restored(json.loads(text))


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _named(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner) for inner in value]
    if isinstance(value, str):
        return f"\\{value}" if value.lstrip("\\") in _NAMED else value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restored(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_restored(inner) for inner in value]
    if isinstance(value, str) and value.lstrip("\\") in _NAMED:
        return _NAMED.get(value, value[1:])
    return value


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":      # Windows opens no folders
        return
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _move(part: Path, target: Path) -> None:
    """Rename, with an error that names the target."""
    try:
        os.replace(part, target)
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise


def _part(parent: Path) -> Path:
    """Choose a temporary name in a folder; it is short, since names have at most 255 bytes."""
    return parent / f".{secrets.token_hex(8)}.part"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file beside its target, and move it there when the block succeeds; otherwise leave nothing behind.

    File and name are on the disk when the block is left.
    """
    part = _part(target.parent)
    try:
        yield part
        sync(part)
        _move(part, target)
        sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside its target, and move it there when the block succeeds; otherwise leave nothing behind.

    In a folder that exists, files of the same names are replaced one by one, each of them whole. Files and names are on
    the disk when the block is left.

    Raises:
        NotADirectoryError: the target is a file.
        FileNotFoundError: the target's parent folder does not exist.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give --output the folder to write to")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} for {target.name}")
    part = _part(parent)
    part.mkdir()
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            sync(path)
        if target.exists():
            for file in sorted(part.iterdir()):
                _move(file, target / file.name)
            sync(target)
        else:
            _move(part, target)
            sync(parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
