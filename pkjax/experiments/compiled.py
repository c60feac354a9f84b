"""Programs that one process compiled, kept on the disk for the next one by JAX's own compilation cache."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

__all__ = ["as_here", "keep_compiled", "users_folder"]

BYTES = 2**30
"""What the folder may hold; beyond it, what was not used for longest is deleted."""
SECONDS = 0.1
"""Programs that compile faster are compiled again."""


_CAPABILITIES = ("model name", "flags", "Features")      # as Linux names them


def keep_compiled(folder: Path) -> None:
    """Let JAX keep compiled programs in a folder, unless it keeps them elsewhere or is not to keep any.

    JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=false` switches it off. A compiled program holds instructions of the processor that it
    was compiled for: the folder of a kind of processor is its own. A folder that belongs to another user is not used,
    as programs are run as they are read.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    place = folder / _machine()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
            return
        _shorten(place)
    except OSError:      # runs go on without a cache
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def as_here() -> dict[str, str]:
    """Return the environment variables by which other processes keep compiled programs where this one does.

    Examples:
        >>> as_here().keys() <= {"JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR",
        ...                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
        True
    """
    settings: Any = jax.config
    if not settings.jax_enable_compilation_cache:
        return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if not settings.jax_compilation_cache_dir:
        return {}
    return {"JAX_COMPILATION_CACHE_DIR": str(settings.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(settings.jax_persistent_cache_min_compile_time_secs)}


def users_folder() -> Path:
    """Return where the command line keeps compiled programs: `pkjax` in the user's folder of caches.

    Examples:
        >>> users_folder().parts[-2:]
        ('pkjax', 'compiled')
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(home or Path.home() / ".cache") / "pkjax" / "compiled"


def _machine() -> str:
    """Name the kind of processor, by all that it can do."""
    described = "\n".join((platform.system(), platform.machine(), platform.processor()))
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
        described += "\n".join(line for line in lines if line.split("\t")[0].strip() in _CAPABILITIES)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _shorten(place: Path) -> None:
    """Delete the oldest files of a folder that holds too much."""
    files = sorted(((file.stat().st_mtime, file.stat().st_size, file) for file in place.iterdir() if file.is_file()),
                   reverse=True)
    held = 0
    for _, size, file in files:
        held += size
        if held > BYTES:
            file.unlink(missing_ok=True)
