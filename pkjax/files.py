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
    """Write a value as JSON; NaN and infinity become null.

    Examples:
        >>> to_json({"λ": [1.5, float("inf")]})
        '{"λ": [1.5, null]}'
    """
    return json.dumps(_finite(content), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file beside its target, and move it there when the block succeeds; otherwise leave nothing behind."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside its target, and move it there when the block succeeds; otherwise leave nothing behind.

    In a folder that exists, files of the same names are replaced one by one, each of them whole.

    Raises:
        NotADirectoryError: the target is a file.
        FileNotFoundError: the target's parent folder does not exist.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give --output the folder to write to")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} for {target.name}")
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
