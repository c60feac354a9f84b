"""What people do with this repository, each in an environment of its own.

    pip install 'nox[uv]'
    nox -s tests                          # as against every change
    nox -s tests -- -k path_kernel        # what follows -- goes to pytest
    nox -s tests -P 3.13                  # with another Python

The sessions are tests, float32, random, lint, docs, lowest and build.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

QUICK = ("-q", "-n", "auto", "-m", "not slow")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests against the newest of everything; ``-- -m slow`` for the long ones."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *QUICK, *session.posargs)


@nox.session
def float32(session: nox.Session) -> None:
    """Run the tests of tests/float32.txt as users run the library: in float32, with standard promotion."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *QUICK, *session.posargs, env={"PKJAX_TESTS": "float32"})


@nox.session
def random(session: nox.Session) -> None:
    """Let Hypothesis draw other networks in every run; a failure prints how to repeat it."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *QUICK, "--hypothesis-profile=random", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Run the linter and the type checker."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/, and run what it shows: doctests, README's code, pages and notebooks."""
    session.install("-e", ".[test]")
    session.run("mkdocs", "build", "--strict")
    session.run("python", "-m", "pytest", "-q", "-n", "auto", "pkjax", "tests/house/test_docs.py",
                "tests/house/test_readme.py", "tests/house/test_notebooks.py", *session.posargs)


@nox.session(python="3.11", venv_backend="uv", reuse_venv=False)
def lowest(session: nox.Session) -> None:
    """Run the tests against the oldest versions that pyproject.toml allows, on the oldest Python."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    session.run("python", "-m", "pytest", *QUICK, *session.posargs)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, install the wheel and run the main job, away from the sources."""
    session.install("build")
    dist = Path("dist")
    for old in dist.glob("pkjax-*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(dist))
    (wheel,) = (file.resolve() for file in dist.glob("pkjax-*.whl"))
    session.install(f"{wheel}[data,plots,cli]")
    with session.chdir(session.create_tmp()):
        session.run("pkjax", "analyze", "--samples", "8", *session.posargs)
