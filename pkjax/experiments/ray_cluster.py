"""The runs of a sweep on a Ray cluster."""

import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from pkjax.experiments.environment import versions
from pkjax.experiments.records import write_failure, write_record
from pkjax.experiments.settings import Settings
from pkjax.experiments.worker import failure, work_together
from pkjax.extras import needed

__all__ = ["run_on_ray"]

SECONDS = 5.0
"""How long a cluster may take to answer."""
# HTTP/2's greeting, by which every gRPC server answers with its settings: a frame of type 4.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def run_on_ray(groups: Sequence[Sequence[Settings]], output: Path, address: str, gpus: float,
               logger: str | None = None) -> Generator[tuple[Settings, str], None, None]:
    """Run experiments on a Ray cluster and record them here, one after the other; yield each with "done" or "failed".

    A group of runs is one task of the cluster; where that cannot be done, its runs become tasks of their own.

    Raises:
        ValueError: the address is malformed.
        ConnectionError: there is no cluster at the address; found within a few seconds.
        ImportError: Ray is missing.
    """
    if not groups:
        return
    _reach(address)
    ray = needed("ray", "ray", "a Ray cluster needs Ray")
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        # A worker that dies (killed, out of memory, machine lost) is a failure of the cluster, not of the run.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_work)
        waiting = {remote.remote(work_together, group, logger, sys.path): group for group in groups}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            group = waiting.pop(reference)
            try:
                results = ray.get(reference)
            except ray.exceptions.RayError as error:
                if len(group) > 1:
                    waiting |= {remote.remote(work_together, [settings], logger, sys.path): [settings]
                                for settings in group}
                    continue
                results = [(failure(group[0], f"{type(error).__name__}: {error}", "", versions()), None)]
            del reference
            for settings in group:
                record, masks = results.pop(0)
                if masks is None:
                    write_failure(output, record)
                else:
                    write_record(output, record, masks)
                status = record["status"]
                del record, masks      # what is recorded is not held
                yield settings, status
    finally:
        ray.shutdown()


def _work(together: Callable[..., Any], group: Sequence[Settings], logger: str | None, path: Sequence[str]
          ) -> list[Any]:
    """Run a group on a machine of the cluster by `together`; `path` is where the sweep's own process imports from."""
    sys.path[:0] = [folder for folder in path if folder not in sys.path]
    return list(together(group, None, logger))


def _reach(address: str) -> None:
    """Refuse an address at which no cluster answers; Ray itself would wait for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _running() or address
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", address)
    if not match or not 0 < int(match[3]) < 2**16:
        raise ValueError(f"the address of a Ray cluster is HOST:PORT, ray://HOST:PORT, auto or local, got {address!r}")
    try:
        with socket.create_connection((match[1] or match[2], int(match[3])), timeout=SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
                connection.settimeout(SECONDS)
                connection.sendall(GREETING)
                if connection.recv(4)[3:] != b"\x04":
                    raise ConnectionError("what listens there does not speak gRPC, as Ray does")
    except OSError as error:
        raise ConnectionError(f"no Ray cluster at {address}: {error}; `ray start --head` starts one on this machine"
                              ) from error


def _running() -> str:
    """Return the address that Ray noted for the cluster of this machine, which may have died since."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    try:
        return (folder / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""
