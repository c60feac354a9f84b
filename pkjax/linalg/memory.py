"""How much memory there is: everything that divides work by memory asks here.

A device's memory is what it reports. The host's is the smallest of the machine's memory, the limits of the control
groups that the process is in (a container's, a batch job's, a service's) and its own limits, as by `ulimit -v`. It is
shared by the devices of one CPU and by the workers of a sweep, which find their number in the environment.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

import jax

__all__ = ["WORKERS", "budget", "default_memory_limit", "host_memory"]

WORKERS = "PKJAX_WORKERS"
"""The environment variable that says how many processes share this machine's memory."""

_SHARE = 0.5   # of a device's memory
_UNKNOWN = 2**32   # bytes assumed where the system does not tell
_ROOT = Path("/")
_PARTS = 16   # of the limit, of which one intermediate array takes one
_LIMITS = {"cgroup2": ("memory.max", "memory.high"), "cgroup": ("memory.limit_in_bytes",)}


def default_memory_limit(devices: int = 1) -> int:
    """Return half of a device's memory, in bytes; the `devices` of one CPU, and the workers of a sweep, share it.

    Raises:
        ValueError: the environment variable `PKJAX_WORKERS` is not a whole number of at least 1.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and stats.get("bytes_limit"):
        return int(_SHARE * stats["bytes_limit"]) // _workers()
    return int(_SHARE * host_memory() / devices) // _workers()


def budget(most: int, itemsize: int = 4) -> int:
    """Return how many numbers an intermediate array may have: `most`, or fewer where memory is short.

    Args:
        most: the number beyond which larger arrays gain no speed.
        itemsize: bytes of a number.

    Examples:
        >>> 0 < budget(2**20) <= 2**20
        True
    """
    return max(1, min(most, default_memory_limit() // (_PARTS * itemsize)))


def host_memory(root: Path | None = None) -> int:
    """Return the bytes of the host's memory that this process may use, before it is shared among workers.

    Args:
        root: the folder that holds `proc` and `sys`; None means the root of the file system, whose control groups are
            read once.
    """
    limits = [*(_own_groups_limits(_ROOT) if root is None else _cgroup_limits(root)), *_process_limits()]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if 0 < limit < 2**62), default=_UNKNOWN)


def _workers() -> int:
    told = os.environ.get(WORKERS) or "1"
    if not re.fullmatch(r"\s*0*[1-9][0-9]*\s*", told, re.ASCII):
        raise ValueError(f"the environment variable {WORKERS} must be a whole number of at least 1, got {told!r}")
    return int(told)


def _process_limits() -> Iterator[int]:
    """The limits of the process's own address space and data."""
    with contextlib.suppress(ImportError):
        import resource

        for name in ("RLIMIT_AS", "RLIMIT_DATA"):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                soft = resource.getrlimit(getattr(resource, name))[0]
                if soft != resource.RLIM_INFINITY:
                    yield soft


@lru_cache(maxsize=1)
def _own_groups_limits(root: Path) -> tuple[int, ...]:
    return tuple(_cgroup_limits(root))


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of the control groups that this process is in, from its own upwards: each binds those inside it."""
    groups = _groups(root)
    for kind, top, mount in _mounts(root):
        if kind not in groups:
            continue
        group = PurePosixPath("/", *(part for part in PurePosixPath(groups[kind]).parts if part != ".."))
        # Inside a container the mount may show a part of the tree alone, or the path may be the host's.
        inside = group.relative_to(top) if group.is_relative_to(top) else group.relative_to("/")
        for folder in (inside, *inside.parents):
            for name in _LIMITS[kind]:
                with contextlib.suppress(OSError, ValueError):     # "max" is not a number
                    yield int((root / mount.lstrip("/") / folder / name).read_text())


def _groups(root: Path) -> dict[str, str]:
    """The paths of the process's groups, of version 2 and of version 1's memory controller."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            groups["cgroup"] = path
        elif number == "0" and not controllers:
            groups["cgroup2"] = path
    return groups


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """(kind, path of the group at the top, folder) of each hierarchy of groups that may limit memory."""
    yield "cgroup2", "/", "/sys/fs/cgroup"
    yield "cgroup", "/", "/sys/fs/cgroup/memory"
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, what = line.partition(" - ")
        fields, kind = place.split(), what.split()
        if len(fields) > 4 and len(kind) > 2 and (kind[0] == "cgroup2" or (
                kind[0] == "cgroup" and "memory" in kind[2].split(","))):
            top, mount = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in fields[3:5])
            yield kind[0], top, mount


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
