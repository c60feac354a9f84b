"""What is built holds the package alone and says what it needs; what it exports is typed."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built without a network by the backend that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        licence = wheel.read(f"pkjax-{PROJECT['version']}.dist-info/licenses/LICENSE")
    source = {str(file.relative_to(ROOT)) for file in (ROOT / "pkjax").rglob("*")
              if file.is_file() and "__pycache__" not in file.parts}
    assert {name for name in names if ".dist-info/" not in name} == source
    assert "pkjax/py.typed" in names
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_holds_what_tests_and_documents_need_and_no_leftovers(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml", "noxfile.py",
            "pkjax/py.typed", "tests/conftest.py", "tests/house/test_packaging.py", "docs/report.png",
            "benchmarks/bench_ntk.py"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.venv|_cache/|\.pyc$|^dist/|report\.html", name)]


def test_the_metadata_say_what_pyproject_says(built):
    with zipfile.ZipFile(built[0]) as wheel:
        info = f"pkjax-{PROJECT['version']}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "pkjax"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.15,>=3.11"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    needed = metadata.get_all("Requires-Dist")
    plain = {re.split(r"[<>=!~;\[ ]", line)[0] for line in needed if "extra ==" not in line}
    assert plain == {re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]}
    assert "pkjax = pkjax.cli.main:main" in scripts
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()


def test_the_citation_names_this_version_and_the_paper():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == PROJECT["version"]
    assert re.search(r"^license: (.+)$", citation, re.M)[1] == PROJECT["license"]
    assert "doi: 10.48550/arXiv.2101.10552" in citation


# A user's mypy: pkjax as installed packages are, read for its types alone.
CONFIG = """
[mypy]
strict = true
[mypy-pkjax.*]
follow_imports = silent
[mypy-optax.*,flax.*,orbax.*,matfree.*,neural_tangents.*,sklearn.*,scipy.*,matplotlib.*]
ignore_missing_imports = true
follow_imports = skip
"""
WRONG = """
import jax.numpy as jnp
import pkjax as pk

def apply_fn(params: object, x: object) -> jnp.ndarray:
    return jnp.ones((1, 1))

X = jnp.ones((1, 1))
pk.ntk(apply_fn, X)                                     # no inputs
pk.prune(pk.magnitude, X, compresion=1)                 # no such option
kept: str = pk.prune(pk.magnitude, X, compression=1).kept  # a number
pk.analyze(apply_fn, X, X).lamda                        # no such result
pk.synflow_l3(apply_fn, X, X)                           # no such score
pk.models.lenet()                                       # no such model
pk.ntk(apply_fn, X, X, tile="all")                      # not a number
pk.prune(X, X, compression=1)                           # no function
"""


def mypy(file, folder):
    (folder / "mypy.ini").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), str(file),
         "--cache-dir", str(ROOT / ".mypy_cache" / "consumer")],
        cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_users_typed_code_passes_in_strict_mode(tmp_path):
    assert mypy(ROOT / "tests" / "typed_consumer.py", tmp_path) == (0, "Success: no issues found in 1 source file\n")


def test_wrong_uses_are_found_before_they_run(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    code, output = mypy(file, tmp_path)
    assert code == 1
    wrong = {number for number, line in enumerate(WRONG.splitlines(), 1) if "  # " in line}
    assert {int(number) for number in re.findall(r"wrong\.py:(\d+): error", output)} == wrong, output
