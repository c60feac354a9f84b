"""Loggers: what a sweep tells the user's own tracker of every run, epoch by epoch."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pkjax.experiments.settings import Settings, read_file
from pkjax.experiments.user_code import accepted, find, import_beside, name_of

__all__ = ["Log", "logger_name", "read_logger"]


def logger_name(logger: str | Callable[..., Any] | None) -> str | None:
    """Name a logger, by which a worker imports it, and check its arguments.

    Raises:
        ValueError: it cannot be imported by its name.
        TypeError: it does not take `settings`, or is a class without `on_epoch` or `on_run`.
    """
    if logger is None:
        return None
    name = logger if isinstance(logger, str) else name_of(logger, "logger")
    function = find(name, "logger")
    accepted(function, "logger", name, "(settings)", ("settings",), ("settings",))
    if isinstance(function, type):
        _check(function, name)
    return name


def read_logger(path: Path) -> str | None:
    """Read the name of the user's logger from the TOML file of a sweep, `logger = "my_module:Log"` at its top.

    The folder of the file is put at the front of `sys.path` where there is one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a TOML file, or holds what no sweep has.
        TypeError: the logger is not a text.
    """
    if (name := read_file(path).get("logger")) is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"{path}: logger must be a text such as \"my_module:Log\", got {name!r}")
    import_beside(path)
    return name


def _check(log: Any, name: str) -> None:
    if missing := [each for each in ("on_epoch", "on_run") if not callable(getattr(log, each, None))]:
        raise TypeError(f"logger {name!r} must give an object with the methods on_epoch(row) and on_run(record), but "
                        f"{log!r:.60} has no {' and no '.join(missing)}")


class Log:
    """The log of one run. A logger that raises an error ends its log with a warning; the run goes on.

    Examples:
        >>> Log(None, Settings()).on_epoch({"epoch": 0})      # nobody listens
    """

    def __init__(self, name: str | None, settings: Settings) -> None:
        """Begin the log: `name` is that of the logger, None for none."""
        self._name, self._log = name, None
        if name is not None:
            self._log = self._safely(self._begun, settings)

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """Pass on a row of the history."""
        if self._log is not None:
            self._safely(self._log.on_epoch, row)

    def on_run(self, record: Mapping[str, Any]) -> None:
        """Pass on the record, and end the log."""
        if self._log is not None:
            self._safely(self._log.on_run, record)
            self._log = None

    def _begun(self, settings: Settings) -> Any:
        assert self._name is not None
        log = find(self._name, "logger")(settings=settings)
        _check(log, self._name)
        return log

    def _safely(self, call: Callable[..., Any], value: Any) -> Any:
        try:
            return call(value)
        except Exception as error:      # a tracker that cannot be reached costs no run
            self._log = None
            warnings.warn(f"the logger {self._name!r} failed and is not called again in this run: "
                          f"{type(error).__name__}: {error}", UserWarning, stacklevel=3)
            return None
