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
# The floors of the house, lowest first: a folder imports from lower floors, and from itself where that is no circle.
FLOORS = (
    ("extras", "files", "tables", "trees"),
    ("adapters", "data", "linalg", "models", "programs"),
    ("network",),
    ("paths",),
    ("path_kernel", "tangent_kernel"),
    ("pruning",),
    ("analysis", "dynamics"),
    ("training",),
    ("plots",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# The package itself, with its public names, is imported by what people start.
ON_TOP = ("experiments", "cli", "__main__")

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
    targets = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pkjax"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import; the package writes them in full"
            if node.module and node.module.split(".")[0] == "pkjax":
                targets |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES
                          else node.module for alias in node.names}
    return targets


GRAPH = {name: imports(file) for name, file in MODULES.items()}


def room(name):
    """The folder or top-level file of the package that a module belongs to; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def test_the_graph_is_read_at_all():
    assert "pkjax.trees" in GRAPH["pkjax.network"]
    assert "pkjax.pruning.top_k" in GRAPH["pkjax.pruning.prune"]
    assert all(target in MODULES for targets in GRAPH.values() for target in targets)


def test_the_floors_name_every_folder_and_file():
    assert set(FLOOR) == {room(name) for name in MODULES} - {""}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pkjax"])
def test_imports_point_down(name):
    for target in GRAPH[name]:
        if target == "pkjax":
            assert room(name) in ON_TOP, f"{name} imports the package itself; only what is on top of it may"
        else:
            same = room(target) == room(name)
            assert same or FLOOR[room(target)] < FLOOR[room(name)], f"{name} imports {target}, which is not below it"


def test_no_circle_even_inside_a_folder():
    edges = {name: GRAPH[name] - {name} for name in MODULES if name != "pkjax"}
    graphlib.TopologicalSorter(edges).prepare()


def test_the_architecture_is_one_that_a_reader_can_hold_in_mind():
    arrows = {(room(name), room(target)) for name, targets in GRAPH.items() for target in targets}
    assert len({(a, b) for a, b in arrows if a and b and a != b}) < 80
    assert sum(1 for path in PACKAGE.glob("*.py")) <= 8
    assert sum(1 for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__") <= 14


def test_wings_hand_out_names_and_define_nothing():
    lazy = {"pkjax", "pkjax.experiments", "pkjax.models"}      # they look names up when these are first used
    for name, file in MODULES.items():
        if file.name == "__init__.py" and name not in lazy:
            kinds = {type(node) for node in ast.parse(file.read_text()).body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, name


def test_only_public_jax():
    for name, file in MODULES.items():
        if name == "pkjax.tangent_kernel.neural_tangents":                    # the one exception, see its first lines
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
