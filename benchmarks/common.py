"""What all benchmarks share: environment, fair timing, the limits of the machine, peak memory, files.

Nothing here imports PyTorch.
"""

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import secrets
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """Cores that this process may use: the size of JAX's thread pool."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(packages: Sequence[str] = ("jax", "jaxlib", "numpy")) -> dict[str, Any]:
    """Where and when: versions, commit, machine and its load."""
    import pkjax

    device = jax.devices()[0]
    return {
        "pkjax": pkjax.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": _cpu_model(),
        "cores": cores(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": load(),
    }


def load() -> list[float]:
    """Processes that ran or waited, averaged over 1, 5 and 15 minutes; one per core is a full machine."""
    return [round(value, 2) for value in os.getloadavg()]


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass
class Timing:
    """Seconds of consecutive calls, the cold one first, and the part of each that XLA spent compiling."""

    seconds: list[float] = field(default_factory=list)
    compiling: list[float] = field(default_factory=list)

    def summary(self, divisor: float = 1.0) -> dict[str, Any]:
        """First call, then median and range of the others, in seconds divided by `divisor` (such as steps)."""
        first, *warm = (t / divisor for t in self.seconds)
        return {"first": first, "median": statistics.median(warm), "min": min(warm), "max": max(warm),
                "compiling": statistics.median(self.compiling[1:]) / divisor, "repeats": len(warm)}


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int, least: float = 0.0
              ) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time calls in turns, so that other load on the machine affects all alike: once each, then `repeats` turns.

    A turn lasts at least `least` seconds and counts as the median of its calls, so that a call of milliseconds is
    measured in continuous use, not as the first after a pause. The order reverses from round to round, and a pause lets
    the threads of one library go to sleep before the next starts. Returns the timing and the last result of every
    call, by name.
    """
    timings = {name: Timing() for name in calls}
    results = {}
    for turn in range(repeats + 1):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            gc.collect()
            time.sleep(0.02)
            before, began, seconds = _compiling(), time.perf_counter(), []
            while not seconds or (turn and time.perf_counter() - began < least):
                results.pop(name, None)
                start = time.perf_counter()
                results[name] = jax.block_until_ready(calls[name]())
                seconds.append(time.perf_counter() - start)
            timings[name].seconds.append(statistics.median(seconds))
            timings[name].compiling.append((_compiling() - before) / len(seconds))
    return timings, results


_compilations: list[float] = []


def _compiling() -> float:
    """Seconds that XLA has spent compiling since the first call of this function."""
    if not _compilations:
        _compilations.append(0.0)
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: _compilations.append(seconds) if event.endswith("/backend_compile_duration")
            else None)
    return sum(_compilations)


def bandwidth(mebibytes: int = 128, repeats: int = 20) -> dict[str, float]:
    """Memory bandwidth in bytes/s over float32 arrays of this many MiB each: the best of `repeats`, by kernel.

    "copy" c = a and "add" c = a + b by NumPy, "read" max a by NumPy, "triad" c = a + 2b by JAX, with one thread per
    core. As in STREAM, only the named arrays count, not what a cache reads before it overwrites a line.
    """
    n = mebibytes * 2**18
    a, b, c = (np.full(n, value, np.float32) for value in (1.0, 2.0, 0.0))
    parts = [slice(i * n // cores(), (i + 1) * n // cores()) for i in range(cores())]
    kernels: dict[str, tuple[int, Callable[[slice], Any]]] = {
        "copy": (2, lambda s: np.copyto(c[s], a[s])),
        "add": (3, lambda s: np.add(a[s], b[s], out=c[s])),
        "read": (1, lambda s: a[s].max()),
    }
    rates = {}
    with ThreadPoolExecutor(cores()) as pool:
        for name, (arrays, kernel) in kernels.items():
            rates[name] = arrays * a.nbytes / _best(lambda kernel=kernel: list(pool.map(kernel, parts)), repeats)
    # The output reuses the donated array: fresh pages would cost more than writing.
    triad = jax.jit(lambda a, b, c: a + jnp.float32(2) * b, donate_argnums=2, keep_unused=True)
    x, y, z = (jnp.asarray(value) for value in (a, b, c))

    def run_triad() -> None:
        nonlocal z
        z = triad(x, y, z).block_until_ready()

    rates["triad"] = 3 * a.nbytes / _best(run_triad, repeats)
    return rates


def arithmetic(size: int = 2048, repeats: int = 10) -> float:
    """Arithmetic rate in float32 operations/s, of a product of two matrices of this size: the best of `repeats`."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: product(a, a).block_until_ready(), repeats)


def _best(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of an importable module in a new process, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises the resident memory of this process at its peak; None except on Linux.

    The call is made once before, so that memory kept from loading and compiling does not count.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    jax.block_until_ready(call())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator retains would hide the same amount of new memory
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    result = jax.block_until_ready(call())
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Sizes, seconds, and the exponent of the power law fitted to them."""
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    return {"sizes": list(sizes), "seconds": list(seconds), "exponent": exponent}


def draw_growth(growth: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw results of `fit`, one panel each: medians on logarithmic axes and the fitted power."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(growth), figsize=(3 * len(growth), 2.8), squeeze=False, layout="constrained")
    for ax, (along, fitted) in zip(axes[0], growth.items(), strict=True):
        sizes, seconds = np.asarray(fitted["sizes"], float), np.asarray(fitted["seconds"])
        middle = np.exp(np.mean(np.log(seconds)) + fitted["exponent"] * (np.log(sizes) - np.mean(np.log(sizes))))
        ax.plot(sizes, 1e3 * middle, color="0.6", label=f"power {fitted['exponent']:.2f}")
        ax.plot(sizes, 1e3 * seconds, "o", color="#0072B2")
        ax.set(xscale="log", yscale="log", xlabel=along)
        ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
        ax.minorticks_off()
        ax.legend(frameon=False)
    axes[0, 0].set_ylabel("milliseconds")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON whole or not at all: beside its target, then moved there."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
