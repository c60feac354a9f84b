"""Imports point downwards, and `import pkjax` stays light."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pkjax
import pytest

PACKAGE = Path(pkjax.__file__).parent
# Lowest first. A module may import from its own row and from lower ones; what no row names belongs to "core".
FOUNDATION = {"tables", "trees", "paths"}
THEOREM = {"gram_spectra", "theorem1", "checks", "analysis", "dynamics", "dynamics_checks", "linear_network",
           "forecasts", "summary"}
TOP = {"models", "data", "tiny_imagenet", "augmentation", "recipes", "trainables", "checkpoints", "training",
       "experiments", "environment", "files", "plots", "panels", "picture", "path_picture", "html", "screen", "options",
       "commands", "cli", "__main__"}
# Side by side in the picture: analysis knows nothing of pruning.
SPECTRAL = {"path_kernel", "data_factor", "ntk"}
PRUNING = {"saliency", "data_saliency", "score_trees", "streams", "masks", "schedules", "scopes", "selection",
           "prune_plan", "pruning", "baselines"}

HEAVY = ("tensorflow", "flax", "tensorflow_datasets", "matplotlib", "neural_tangents", "optax", "sklearn",
         "rich", "tyro", "pandas")


def module_name(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file):
    """The pkjax modules that a file imports, inside functions too but for type checking alone."""
    tree = ast.parse(file.read_text())
    skipped = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
               and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
               for statement in block.body for node in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pkjax"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import; the package writes them in full"
            if node.module and node.module.split(".")[0] == "pkjax":
                found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES
                          else node.module for alias in node.names}
    return found


GRAPH = {name: imports(file) for name, file in MODULES.items()}


def part(name):
    """The file or folder of the package that a module belongs to."""
    return name.split(".")[1] if "." in name else ""


def rank(name):
    here = part(name)
    return 0 if here in FOUNDATION else 2 if here in THEOREM else 3 if here in TOP else 1


def test_the_graph_is_read_at_all():
    assert "pkjax.trees" in GRAPH["pkjax.adapters"]
    assert "pkjax.masks" in GRAPH["pkjax.pruning"]
    assert all(target in MODULES for targets in GRAPH.values() for target in targets)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pkjax"])
def test_imports_point_down(name):
    for target in GRAPH[name]:
        if target == "pkjax":
            assert rank(name) == 3, f"{name} imports the package itself; only what is on top of it may"
        else:
            assert rank(target) <= rank(name), f"{name} imports {target}, which is above it"
            assert not (part(name) in SPECTRAL and part(target) in PRUNING), f"{name} imports {target}"


def test_imports_have_no_cycle():
    edges: dict[str, set[str]] = {}
    for name, targets in GRAPH.items():
        edges.setdefault(part(name), set()).update(part(t) for t in targets if part(t) not in ("", part(name)))
    del edges[""]
    graphlib.TopologicalSorter(edges).prepare()


def test_only_public_jax():
    for name, file in MODULES.items():
        if name == "pkjax.nt_loader":                    # the one exception, see its first lines
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [f"{node.module}.{alias.name}" for alias in node.names]
                     if isinstance(node, ast.ImportFrom) else [])
            private = [n for n in names if n.startswith(("jax.", "flax.")) and "._" in n]
            assert not private, f"{name} imports {private}"


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          cwd=PACKAGE.parent)
    return done.stdout.strip()


def test_import_pkjax_loads_nothing_heavy():
    loaded = fresh("import sys, pkjax; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "jax" in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_pkjax_costs_at_most_300_ms_on_top_of_jax():
    # The processor's time, to which other processes hardly add; the least of several, as they do add a little.
    code = "import time, jax; start = time.process_time(); import pkjax; print(time.process_time() - start)"
    best = float("inf")
    for _ in range(5):
        best = min(best, float(fresh(code)))
        if best <= 0.3:
            break
    assert best <= 0.3


def test_every_public_name_exists_and_the_version_is_the_distributions():
    for name in pkjax.__all__:
        assert getattr(pkjax, name) is not None
    assert set(pkjax.__all__) <= set(dir(pkjax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pkjax.nothing  # noqa: B018
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert pkjax.__version__ == project["version"]
