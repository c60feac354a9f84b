"""The second configuration runs tests that exist, and compares to what float32 holds."""

import ast
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests import cases

FOLDER = Path(cases.__file__).parent


def test_every_name_on_the_list_is_that_of_one_test():
    names = [node.name for file in FOLDER.rglob("test_*.py") for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    listed = cases.named_in_float32_txt()
    assert {name: names.count(name) for name in listed} == dict.fromkeys(listed, 1)
    assert len(listed) > 100


def test_the_type_of_the_configuration_is_the_type_of_arrays():
    assert jnp.ones(1).dtype == cases.normal(0, (1,)).dtype == cases.FLOAT


def test_a_difference_beyond_rounding_is_noticed():
    want = np.array([1.0, 1e-9])
    cases.assert_close(want + 0.5 * cases.TOLERANCE, want)
    with pytest.raises(AssertionError):
        cases.assert_close(want + 4 * cases.TOLERANCE, want, rtol=0)
    assert cases.approx(1.0, rel=1e-12) == 1 + 0.5 * cases.TOLERANCE
    assert cases.approx(1.0) != 1 + max(4 * cases.TOLERANCE, 4e-6)
