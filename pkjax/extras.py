"""Packages that only some functions need: imported when they are used, with an error that names the extra."""

import importlib
from typing import Any

__all__ = ["needed"]


def needed(module: str, extra: str, purpose: str) -> Any:
    """Import a module, or raise an ImportError that says which extra of pkjax to install.

    Args:
        module: the module's full name.
        extra: the extra of pkjax that brings it, or "" where it comes with pkjax itself.
        purpose: what needs it, as the beginning of a sentence: "sweeps need filelock".

    Raises:
        ImportError: the module, or one that it imports, is missing.

    Examples:
        >>> needed("math", "data", "arithmetic needs math").sqrt(4.0)
        2.0
        >>> needed("no_such_module", "data", "digits need scikit-learn")
        Traceback (most recent call last):
            ...
        ImportError: digits need scikit-learn: pip install 'pkjax[data]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = f"pkjax[{extra}]" if extra else module.split(".")[0]
        raise ImportError(f"{purpose}: pip install '{package}'") from error
