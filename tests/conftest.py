"""The two configurations of the tests.

The suite runs in float64 with strict promotion, where oracles hold to many digits. With `PKJAX_TESTS=float32` in the
environment, the tests that `tests/float32.txt` lists run as users do: in float32, with JAX's standard promotion, and
with the shapes and types of all arguments and results checked.
"""

import gc
import os
import shutil

import jax
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests import cases

jax.config.update("jax_enable_x64", not cases.FLOAT32)
jax.config.update("jax_numpy_dtype_promotion", "standard" if cases.FLOAT32 else "strict")
# Compiling takes most of the time, and a third less without XLA's dearest optimisations. Users have them, and so does
# the second configuration. Processes that tests start do as this one does.
jax.config.update("jax_disable_most_optimizations", not cases.FLOAT32)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not cases.FLOAT32))
# The older way to make code of a fusion compiles in half the time; jaxlib 0.12 has no such flag.
if not cases.FLOAT32 and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_traceback_filtering", "off")     # filtering looks for files at every error of a test

# The same draws in every run; `--hypothesis-profile random` draws others (nox -s random).
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("fixed")

collect_ignore = ["typed_consumer.py"]      # the search for doctests would import it, and so run it

# The checks take a fifth of the time: the second configuration makes them, with tests of every public function.
if cases.FLOAT32:
    install_import_hook("pkjax", "beartype.beartype").__enter__()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let each worker begin with whole files, which share what they compile, and take from the other's end at last."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_configure(config):
    """Keep what was compiled for the next run: most of the time is XLA's compiler.

    Every worker has a folder, as JAX writes its files in several steps; and no maximum size, which costs a look at
    every file of the folder whenever one is added.
    """
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    folder = config.cache.mkdir("compiled-" + os.environ.get("PYTEST_XDIST_WORKER", "alone"))
    if sum(file.stat().st_size for file in folder.iterdir()) > 2**30:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Processes that tests start take part.
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # A file that a killed run left half written is compiled anew.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


def pytest_collection_modifyitems(config, items):
    """Keep doctests and the tests on the list alone in the second configuration."""
    if cases.FLOAT32:
        listed = cases.named_in_float32_txt()
        kept = [item for item in items if isinstance(item, pytest.DoctestItem) or item.originalname in listed]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_collection_finish(session):
    """Leave what is imported out of the searches for garbage and for leaked tracers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _tolerances_of_the_type():
    """Compare in float32 to what float32 holds, whatever number of digits a test asks for."""
    with pytest.MonkeyPatch.context() as patch:
        if cases.FLOAT32:
            patch.setattr(np.testing, "assert_allclose", cases.assert_close)
            patch.setattr(pytest, "approx", cases.approx)
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_functions():
    """Hundreds of networks are compiled; what one file compiled is of no use to the next."""
    yield
    jax.clear_caches()
