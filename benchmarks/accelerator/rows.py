"""What the accelerator's parts share: a table written row by row, what describes the card, and the command line."""

import argparse
import contextlib
import math
import multiprocessing
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import environment, write_json

UNMEASURED = {"error", "unfinished", "not tried", "out of memory"}
"""What a row says that holds no measurement; of these an error alone is a failure."""
GRACE = 8.0
"""Seconds beyond a part's own in which what has begun may end; the command ends it after 15."""


class Rows:
    """A table in a JSON file that is whole at any moment: it is written again, and moved in place, with each row."""

    def __init__(self, output: Path, **about: Any) -> None:
        """Begin a table; `about` stands beside the environment."""
        self.output, self.rows, self.began = output, list[dict[str, Any]](), time.monotonic()
        self.about = {**environment(), **card(), **about}
        self.write()

    def add(self, **row: Any) -> None:
        """Append a row, print it and write the file."""
        self.rows.append({name: _plain(value) for name, value in row.items()})
        print(", ".join(f"{name} {_short(value)}" for name, value in self.rows[-1].items()), flush=True)
        self.write()

    def write(self) -> None:
        """Write the file whole."""
        self.about["seconds"] = round(self.seconds, 1)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.output, {"environment": self.about, "rows": self.rows})

    @contextlib.contextmanager
    def within(self, seconds: float, *without: Mapping[str, Any]) -> Iterator[None]:
        """End this process and its own where the block is not done when the table is so many seconds old.

        Nothing else ends a compilation. The rows `without` are then written as unfinished: that of the block, and those
        of what would have come after it.
        """
        def end() -> None:
            for row in without:
                self.add(**row, unfinished=f"not ready after {self.seconds:.0f} s")
            for process in multiprocessing.active_children():
                process.kill()
            os._exit(min(self.failed, 1))

        timer = threading.Timer(max(0.0, seconds - self.seconds), end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @property
    def seconds(self) -> float:
        """Seconds since the table began."""
        return time.monotonic() - self.began

    @property
    def failed(self) -> int:
        """Number of rows with an error, which those unfinished are not; where no row is finished, at least 1."""
        finished = any(not UNMEASURED & set(row) for row in self.rows)
        return max(sum("error" in row for row in self.rows), int(not finished))


def card() -> dict[str, Any]:
    """Describe the device, its driver, how precise JAX's float32 products are, and what is compiled already."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        shown = None
    client, kept = jax.devices()[0].client, jax.config.jax_compilation_cache_dir
    return {"card": shown, "runtime": " ".join(str(getattr(client, "platform_version", "")).split()),
            "default_matmul_precision": jax.config.jax_default_matmul_precision or "the device's default",
            "programs on the disk": sum(file.is_file() for file in Path(kept).rglob("*-cache")) if kept else 0}


def message(error: BaseException) -> str:
    """Name an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def options(text: str, name: str, seconds: float, images: bool = False) -> argparse.ArgumentParser:
    """Build the command line that all parts have.

    Args:
        text: the part's description.
        name: of its JSON file.
        seconds: after which it begins nothing new.
        images: whether it reads CIFAR-10.
    """
    warnings.simplefilter("ignore")      # of layers that pruning empties, for one
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a size for a processor, to try the part itself")
    parser.add_argument("--output", type=Path, default=Path(f"{name}.json"), help="JSON file")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which nothing new begins")
    if images:
        parser.add_argument("--images", type=Path, help="file of benchmarks.accelerator.images; TFDS by default")
    return parser


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
