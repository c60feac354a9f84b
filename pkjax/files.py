"""Files and folders that appear whole or not at all."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["folder", "replacing", "to_json"]


def to_json(content: Any) -> str:
    """Write as JSON; what it cannot hold (NaN, infinity) becomes null.

    >>> to_json({"λ": [1.5, float("inf")]})
    '{"λ": [1.5, null]}'
    """
    return json.dumps(_finite(content), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold (NaN, infinity) by null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file beside its place and move it there when the block ends well; else leave nothing behind."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside its place and move it there when the block ends well; else leave nothing behind.

    Where the folder is there already, its files of the same names are replaced, one by one and whole.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; --output names the folder to write")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    part = parent / f".{target.absolute().name}.{secrets.token_hex(8)}.part"
    part.mkdir()
    try:
        yield part
        if target.exists():
            for file in sorted(part.iterdir()):
                os.replace(file, target / file.name)
        else:
            os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
