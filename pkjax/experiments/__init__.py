"""The paper's experiments: single runs, sweeps over a grid of them, their records and figures."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkjax.experiments import figures
    from pkjax.experiments.descent import trajectories
    from pkjax.experiments.records import table
    from pkjax.experiments.runs import run
    from pkjax.experiments.settings import Settings
    from pkjax.experiments.sweeps import sweep

__all__ = ["Settings", "figures", "run", "sweep", "table", "trajectories"]

_HOME = {"Settings": "settings", "run": "runs", "sweep": "sweeps", "table": "records",
         "trajectories": "descent"}


if not TYPE_CHECKING:                                    # to a type checker it would give any name at all
    def __getattr__(name: str) -> Any:
        if name == "figures":
            return importlib.import_module("pkjax.experiments.figures")
        if name not in _HOME:
            raise AttributeError(f"module 'pkjax.experiments' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(importlib.import_module(f"pkjax.experiments.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
