"""Functions of the user's own: named "module:function", and told apart by the content of their files.

The full name "module:function@version" stands in settings and records. The version is what the module declares as
`__version__` or `VERSION`, else a hash of its file and of those that it imports from the same folder.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

__all__ = ["accepted", "find", "import_beside", "import_from", "is_own", "name_of", "short_names", "versioned"]

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_NAME = re.compile(rf"({_DOTTED}):({_DOTTED})(?:@([\w.+-]+))?")
_VERSION = re.compile(r"[\w.+-]{1,40}")
_INSTALLED = ("site-packages", "dist-packages")

_seen: dict[str, str] = {}
"""Module → hash of the files from which this process imported it."""
_alone = threading.RLock()
"""Runs that go together are prepared by several threads, which may neither parse nor import at the same time."""


def is_own(name: str) -> bool:
    """Whether a name is that of a function of the user's own.

    Examples:
        >>> is_own("my_module:score"), is_own("synflow")
        (True, False)
    """
    return ":" in name


def name_of(function: Callable[..., Any], what: str) -> str:
    """Name a function "module:function", by which other processes can import it.

    Args:
        function: a function or class at the top level of a module.
        what: the setting, for errors.

    Raises:
        ValueError: other processes cannot import it by its name.

    Examples:
        >>> import math
        >>> name_of(math.sqrt, "model")
        'math:sqrt'
        >>> name_of(lambda classes: None, "model")
        Traceback (most recent call last):
        ...
        ValueError: model is <lambda> of ..., which other processes cannot import: define it at the top level of ...
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    place: Any = None if module in (None, "__main__") or not name or "<" in name else sys.modules.get(str(module))
    for part in str(name).split(".") if place else ():
        place = getattr(place, part, None)
    if place is not function:
        shown = f"{name} of {module}" if name else repr(function)
        raise ValueError(f"{what} is {shown}, which other processes cannot import: define it at the top level of a "
                         "file of its own, such as my_module.py, and import it from there, or give its name, "
                         '"my_module:function"')
    return f"{module}:{name}"


def import_from(folder: Path | str) -> None:
    """Let Python import modules from a folder first, as it does from that of a script."""
    place = str(Path(folder).resolve())
    if place in sys.path:
        sys.path.remove(place)
    sys.path.insert(0, place)


def import_beside(file: Path | str) -> None:
    """Let Python import modules from the folder of a file first, then from that of the file that it is a link to."""
    import_from(Path(file).resolve().parent)
    import_from(Path(file).parent)


def versioned(name: str, what: str) -> str:
    """Complete a name by the version of its module, which is imported.

    A module whose files changed since this process imported it is imported anew.

    Raises:
        ValueError: the name is malformed, or the module cannot be imported or declares no possible version.
    """
    module, function, version = _parts(name, what)
    with _alone:
        return name if version else f"{module}:{function}@{_version(module, what)}"


@lru_cache(maxsize=64)
def find(name: str, what: str) -> Callable[..., Any]:
    """Import the function of a full name.

    Raises:
        ValueError: as in `versioned`; the module lacks the function, or its version is another one.
        TypeError: what has that name cannot be called.
    """
    module, function, version = _parts(name, what)
    with _alone:
        now = _version(module, what)
        value: Any = sys.modules[module]
    if now != (version or now):
        raise ValueError(f"{what} {name!r} is wanted, but the files of {module} are now version {now}: start the sweep "
                         "again for that version, or bring the former files back")
    for part in function.split("."):
        if not hasattr(value, part):
            listed = ", ".join(key for key, each in vars(sys.modules[module]).items()
                               if callable(each) and not key.startswith("_"))
            raise ValueError(f"{what} {name!r}: {module} has no {function!r}; it has {listed or 'no functions'}")
        value = getattr(value, part)
        if inspect.ismodule(value):      # the version is not that of its file
            raise ValueError(f"{what} {name!r}: {part} is a module; write \"{value.__name__}:\" before the function")
    if not callable(value):
        raise TypeError(f"{what} {name!r} must be a function, but is {value!r:.60}")
    return value


def accepted(function: Callable[..., Any], what: str, name: str, wanted: str, known: Collection[str],
             required: Collection[str] = ()) -> list[str]:
    """Name the arguments that a function takes, out of those that are known; they are passed by name.

    Raises:
        TypeError: the function needs an argument that is unknown, or does not take a required one.

    Examples:
        >>> accepted(lambda params, key: params, "pruner", "m:f", "(params, …)", ("params", "loss", "key"), ("params",))
        ['params', 'key']
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        raise TypeError(f"{what} {name!r} must take {wanted}, but its arguments cannot be read") from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = list(known) if any(p.kind is p.VAR_KEYWORD for p in parameters) else [
        p.name for p in named if p.name in known]
    foreign = [p.name for p in parameters if p.default is p.empty and p.name not in known
               and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    missing = [each for each in required if each not in given]
    if foreign or missing:
        raise TypeError(f"{what} {name!r} must take {wanted}, but "
                        + (f"needs {', '.join(foreign)}" if foreign else f"does not take {', '.join(missing)}")
                        + f": its arguments are {inspect.signature(function)}")
    return given


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Leave the version out of every name of which there is one version.

    Examples:
        >>> short_names(["synflow", "m:score@1", "m:make@1", "m:make@2"])
        {'synflow': 'synflow', 'm:score@1': 'm:score', 'm:make@1': 'm:make@1', 'm:make@2': 'm:make@2'}
    """
    names = list(dict.fromkeys(names))
    bare = [name.partition("@")[0] if is_own(name) else name for name in names]
    return {name: short if bare.count(short) == 1 else name for name, short in zip(names, bare, strict=True)}


def _parts(name: str, what: str) -> tuple[str, str, str | None]:
    if not (match := _NAME.fullmatch(name)):
        raise ValueError(f'{what} {name!r} must be a name such as "my_module:function"')
    return match[1], match[2], match[3]


def _version(module: str, what: str) -> str:
    """Import a module as its files are now, and return its version."""
    top = module.partition(".")[0]
    if top == "__main__":
        raise ValueError(f"{what}: other processes cannot import from {module}: move the function into a file of its "
                         'own, such as my_module.py, and write "my_module:function"')
    importlib.invalidate_caches()
    spec = PathFinder.find_spec(top) or importlib.util.find_spec(top)
    packages = list(spec.submodule_search_locations or ()) if spec else []
    origin = spec.origin if spec else None
    place = Path(packages[0] if packages else origin or "")
    if not packages and not place.is_file():
        raise ValueError(f"{what}: there is no module {top!r} in {', '.join(map(repr, sys.path[:1]))} or elsewhere on "
                         "the Python path; modules are found beside the TOML file, or on the path")
    loaded = getattr(sys.modules.get(top), "__file__", None)
    if origin and loaded is not None and Path(loaded).resolve() != Path(origin).resolve():
        raise ValueError(f"{what}: {top} is {origin}, but this process has imported {loaded} by that name: give "
                         "one of them another name, or use another process")
    try:
        files = _files(module, place.parent) or {module: place}
        content = hashlib.sha256()
        for name, file in sorted(files.items()):
            content.update(f"{name}\0".encode() + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
        if _seen.get(module, content.hexdigest()) != content.hexdigest():
            for name in files:
                sys.modules.pop(name, None)
        imported = _imported(module)
    except (Exception, SystemExit) as error:      # whatever the user's file raises
        hint = f'; write "{module.removesuffix(".py")}:function"' if module.endswith(".py") else ""
        raise ValueError(f"{what}: {module} cannot be imported ({type(error).__name__}: {error}"
                         f"{_place(error, place)}){hint}") from error
    _seen[module] = content.hexdigest()
    declared = getattr(imported, "__version__", getattr(imported, "VERSION", None))
    if declared is None:
        return content.hexdigest()[:10]
    if not _VERSION.fullmatch(str(declared)):
        raise ValueError(f"{what}: the version that {module} declares must be at most 40 letters, digits and . + - _, "
                         f"got {declared!r}")
    return str(declared)


def _place(error: BaseException, place: Path) -> str:
    """Say in which line of the user's files an error arose, where it says nothing of that itself."""
    folder = place.parent.resolve()
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if folder in Path(frame.filename).parents]
    if isinstance(error, SyntaxError) or not lines:
        return ""
    return f" in {lines[-1].filename}, line {lines[-1].lineno}"


def _imported(module: str) -> Any:
    """Import a module, and leave no bytecode: Python takes it for that of a file changed within the same second."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return importlib.import_module(module)
    finally:
        sys.dont_write_bytecode = before


def _files(module: str, folder: Path) -> dict[str, Path]:
    """List the files of a module, and of those that it imports from its folder.

    Of an installed package that is the package alone; pkjax, whose version records hold, is left out.
    """
    top, files, waiting = module.partition(".")[0], dict[str, Path](), [module]
    installed = any(part in _INSTALLED for part in folder.parts)
    while waiting:
        parts = waiting.pop().split(".")
        if parts[0] != top and (installed or parts[0] == "pkjax"):
            continue
        for length in range(1, len(parts) + 1):
            name, place = ".".join(parts[:length]), folder.joinpath(*parts[:length])
            file = next((each for each in (place / "__init__.py", place.with_name(f"{place.name}.py"))
                         if each.is_file()), None)
            if file is not None and name not in files:
                files[name] = file
                waiting += _imports(name, file)
    return files


def _imports(name: str, file: Path) -> Iterator[str]:
    """Yield the modules that a file may import, in full."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (part for alias in node.names for part in (base, f"{base}.{alias.name}") if base)
