"""How much memory one computation may take: the one place that says so."""

import os

import jax

__all__ = ["default_memory_limit"]

_SHARE = 0.5   # of a device's memory
_UNKNOWN = 2**32   # bytes that a device is taken to have where none can be asked


def default_memory_limit(devices: int = 1) -> int:
    """Half of what a device has in bytes; devices of a processor share its memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(_SHARE * stats["bytes_limit"])
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = _UNKNOWN
    return int(_SHARE * total / devices)
