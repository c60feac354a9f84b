"""float64 and strict promotion for every test; shapes checked while the tests run."""

import os
import shutil

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

collect_ignore = ["typed_consumer.py"]      # the search for doctests would import it, and so run it

hook = install_import_hook("pkjax", "beartype.beartype")
hook.__enter__()


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


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_functions():
    """Hundreds of networks are compiled; what one file compiled is of no use to the next."""
    yield
    jax.clear_caches()
