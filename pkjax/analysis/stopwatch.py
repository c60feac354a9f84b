"""Times of the analyzer's parts, and how much of them the compiler took."""

import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax

from pkjax.tables import Progress, reporter

__all__ = ["Stopwatch"]

_COMPILER = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class _Spent(threading.local):
    seconds = 0.0
    """What the compiler has taken in this thread."""


_spent = _Spent()


@lru_cache(maxsize=1)
def _listen() -> None:
    """Add up what JAX says of its compiler, from the first call on."""
    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILER:
            _spent.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)


class Stopwatch:
    """Runs parts one after the other and keeps their times.

    Examples:
        >>> watch = Stopwatch(progress=False)
        >>> watch.part("sum", lambda: 1 + 1), list(watch.seconds), watch.compile_seconds["sum"]
        (2, ['sum'], 0.0)
    """

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        """Time that each part took, compilation included."""
        self.compile_seconds: dict[str, float] = {}
        """Time of these in which JAX lowered and compiled programs."""
        self._tell = reporter(progress)

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a part and wait for its result."""
        self._tell(name)
        _listen()
        began, before = time.perf_counter(), _spent.seconds
        out = jax.block_until_ready(run())
        self.seconds[name] = time.perf_counter() - began
        self.compile_seconds[name] = min(_spent.seconds - before, self.seconds[name])
        return out
