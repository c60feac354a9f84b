"""Load neural-tangents 0.6.5, the reference for the tangent kernel, on versions of JAX newer than it knows.

Its empirical kernels are sound, but the release uses attributes that JAX has since moved, and its package imports
TensorFlow. This is the only file of the library that uses another project's private names. It loads the module of
empirical kernels alone, lends JAX the missing attributes during the import and removes them afterwards, and leaves no
module in `sys.modules`: a program that imports neural-tangents itself is not affected.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.interpreters.ad
import jax.numpy as jnp
import numpy as np

__all__ = ["load", "ntk_fn"]

PACKAGE = "neural_tangents"
SUPPORTED = "0.6.5"
_lock = threading.Lock()


@functools.cache
def load() -> ModuleType:
    """Import the module of neural-tangents that holds `empirical_ntk_fn` and `NtkImplementation`.

    Implementations 1 (`JACOBIAN_CONTRACTION`) and 2 (`NTK_VECTOR_PRODUCTS`) run on current JAX; 3
    (`STRUCTURED_DERIVATIVES`) interprets private parts of JAX that no longer exist. TensorFlow is not imported.

    Raises:
        ImportError: the module cannot be imported; the message names the installed versions and the extra to install.
    """
    with _lock:
        already = sys.modules.get(f"{PACKAGE}._src.empirical")
        if already is not None and hasattr(already, "empirical_ntk_fn"):
            return already
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(_message("neural-tangents is not installed"))
        try:
            # Deprecated names of JAX do not concern the caller: their warnings are suppressed.
            with (warnings.catch_warnings(action="ignore"),
                  _private_package(list(spec.submodule_search_locations)), _lent_names()):
                module = importlib.import_module(f"{PACKAGE}._src.empirical")
                _settle([each for name, each in sys.modules.items() if name.startswith(f"{PACKAGE}.")])
        except Exception as error:
            raise ImportError(_message(f"neural-tangents does not import here ({error})")) from error
        return module


def ntk_fn(apply_fn: Callable[..., Any], *, implementation: int = 1) -> Callable[..., Any]:
    """Return neural-tangents' Θ, neither traced nor averaged over outputs: (x1, x2 or None, params) → (N, N2, K, K).

    Args:
        apply_fn: the network.
        implementation: 1 contracts Jacobians, 2 takes NTK-vector products.

    Raises:
        ValueError: another implementation is requested.
        ImportError: neural-tangents cannot be loaded.
    """
    if implementation not in (1, 2):
        raise ValueError(f"implementation must be 1 (Jacobian contraction) or 2 (NTK-vector products), got "
                         f"{implementation!r}")
    empirical = load()
    # By default neural-tangents averages over the outputs: both sets of axes are empty here.
    kernel = empirical.empirical_ntk_fn(apply_fn, trace_axes=(), diagonal_axes=(), vmap_axes=0,
                                        implementation=empirical.NtkImplementation(implementation))

    def theta(x1: Any, x2: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            return kernel(x1, x2, params)

    return theta


def _message(reason: str) -> str:
    try:
        installed = importlib.metadata.version("neural-tangents")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    python = ".".join(map(str, sys.version_info[:3]))
    text = (f"{reason}. This needs the extra: pip install 'pkjax[ntk]'. Installed: neural-tangents {installed} "
            f"(needed: {SUPPORTED}), JAX {jax.__version__}, Python {python}.")
    if sys.version_info >= (3, 14):
        text += (" neural-tangents depends on TensorFlow, which has no wheels for Python 3.14, so the extra is empty "
                 f"there; pip install --no-deps neural-tangents=={SUPPORTED} suffices, as pkjax does not use "
                 "TensorFlow.")
    return text + " The engines 'structured' and 'jacobian' need nothing more."


@contextmanager
def _private_package(locations: list[str]) -> Iterator[None]:
    """Put an empty package in place of `neural_tangents`, whose `__init__` imports TensorFlow."""
    ours = {name: module for name, module in sys.modules.items()
            if name == PACKAGE or name.startswith(f"{PACKAGE}.")}
    for name in ours:
        del sys.modules[name]
    package = ModuleType(PACKAGE)
    package.__path__ = locations
    package.__spec__ = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    sys.modules[PACKAGE] = package
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]
        sys.modules.update(ours)


@contextmanager
def _lent_names() -> Iterator[None]:
    """Give JAX's modules the names that neural-tangents imports from them, then remove those added."""
    lent: list[tuple[ModuleType, str]] = []
    util = sys.modules.get("jax.util")
    try:
        for module, names in ((jax.core, _core_names()), (jax.interpreters.ad, _ad_names())):
            for name, value in _missing(module, names).items():
                setattr(module, name, value)
                lent.append((module, name))
        if util is None or not hasattr(util, "safe_map"):
            stand_in = ModuleType("jax.util")
            vars(stand_in).update(safe_map=_safe_map, safe_zip=_safe_zip)
            sys.modules["jax.util"] = stand_in
        yield
    finally:
        for module, name in lent:
            delattr(module, name)
        if sys.modules.get("jax.util") is not util:
            if util is None:
                del sys.modules["jax.util"]
            else:
                sys.modules["jax.util"] = util


def _core_names() -> dict[str, Any]:
    names = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    moved = {name: getattr(jax.extend.core, name) for name in names}
    # The others appear only in annotations and isinstance checks.
    return moved | {"Value": Any, "AbstractValue": object, "ShapedArray": jax.ShapeDtypeStruct}


def _ad_names() -> dict[str, Any]:
    # Keys of a table of rules for implementation 3: any primitive that no program contains serves.
    fresh = jax.extend.core.Primitive
    return {"zeros_like_p": fresh("zeros_like"), "add_jaxvals_p": fresh("add_any")}


def _settle(loaded: list[ModuleType]) -> None:
    """Give neural-tangents' own modules stand-ins for the names that they look up at run time.

    By then JAX's modules are as they were, and `jax.numpy.size` rejects the abstract arrays that it is given.
    """
    for module in loaded:
        if getattr(module, "core", None) is jax.core:
            vars(module)["core"] = _stand_in(jax.core, _missing(jax.core, _core_names()))
        if getattr(module, "jnp", None) is jnp:
            vars(module)["jnp"] = _stand_in(jnp, {"size": _size, "shape": _shape})


def _missing(module: ModuleType, names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.items() if not hasattr(module, name)}


def _stand_in(module: ModuleType, names: dict[str, Any]) -> ModuleType:
    """Build a module that has `names`, and otherwise the attributes of `module`."""
    stand_in = ModuleType(module.__name__)
    vars(stand_in).update(names, __getattr__=lambda name: getattr(module, name))
    return stand_in


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if hasattr(x, "shape") else np.shape(x)


def _size(x: Any) -> int:
    return math.prod(_shape(x))


def _safe_map(f: Callable[..., Any], *sequences: Any) -> list[Any]:
    return [f(*args) for args in _safe_zip(*sequences)]


def _safe_zip(*sequences: Any) -> list[tuple[Any, ...]]:
    return list(zip(*sequences, strict=True))
