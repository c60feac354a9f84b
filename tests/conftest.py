"""float64 and strict promotion for every test; shapes checked while the tests run."""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

hook = install_import_hook("pkjax", "beartype.beartype")
hook.__enter__()


def pytest_configure(config):
    """Compile what several tests, workers or runs share once: half of their time is XLA's compiler."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
    jax.config.update("jax_compilation_cache_max_size", 2**30)     # workers take turns by a lock
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_functions():
    """Hundreds of networks are compiled; what one file compiled is of no use to the next."""
    yield
    jax.clear_caches()
