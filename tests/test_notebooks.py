"""Notebook sources run from top to bottom, in a small setting."""

import re
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source):
    text, changed = re.subn(r"WIDTH, SAMPLES = \d+, \d+", "WIDTH, SAMPLES = 8, 3", source.read_text())
    assert changed == 1
    scope = {}
    exec(compile(text, source, "exec"), scope)
    assert all(figure.axes for figure in scope["figures"].values())
    assert scope["pruned"].kept == round(scope["pruned"].total / 10)
