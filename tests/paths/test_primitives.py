"""Every primitive of jax.numpy, jax.nn and jax.lax has a rule, or is refused for a reason."""

import jax
import pytest
from pkjax.paths.refusals import REFUSED
from pkjax.paths.rules import RULES

from tests.programs.samples import SKIPPED, emitted, functions

MODULES = {"jax.numpy": jax.numpy, "jax.nn": jax.nn, "jax.lax": jax.lax}


@pytest.mark.parametrize("module", MODULES)
def test_each_function_that_takes_arrays_has_a_sample_call(module):
    without = {name for name in functions(MODULES[module])
               if name not in SKIPPED[module] and emitted(MODULES[module], name) is None}
    assert not without, f"give these functions arguments in tests/programs/samples.py, or skip them: {sorted(without)}"


@pytest.mark.parametrize("module", MODULES)
def test_each_primitive_has_a_rule_or_a_reason_for_its_refusal(module):
    names = [name for name in functions(MODULES[module]) if name not in SKIPPED[module]]
    unknown = {(primitive, name) for name in names for primitive in emitted(MODULES[module], name) or ()
               if primitive not in RULES and primitive not in REFUSED}
    assert not unknown, f"decide on these primitives in pkjax/paths/rules.py or refusals.py: {sorted(unknown)}"


def test_no_primitive_is_both_read_and_refused():
    assert not set(RULES) & set(REFUSED)
