"""How much memory one computation may use: everything that divides work by memory asks here."""

import os

import jax

__all__ = ["default_memory_limit"]

_SHARE = 0.5   # of a device's memory
_UNKNOWN = 2**32   # bytes assumed where the system does not tell


def default_memory_limit(devices: int = 1) -> int:
    """Return half of a device's memory, in bytes; the `devices` of one CPU share its memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(_SHARE * stats["bytes_limit"])
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = _UNKNOWN
    return int(_SHARE * total / devices)
