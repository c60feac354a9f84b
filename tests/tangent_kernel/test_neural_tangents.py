"""The loader lets neural-tangents run, never imports TensorFlow, and leaves no trace in the process."""

import importlib.util
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax.tangent_kernel import neural_tangents

from tests.cases import normal

needs_neural_tangents = pytest.mark.skipif(
    importlib.util.find_spec("neural_tangents") is None, reason="neural-tangents is not installed")


def in_fresh_process(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True,
                          text=True, timeout=300, check=False)


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]


def network(dtype):
    draw = [normal(i, s, dtype) for i, s in enumerate([(5, 7), (7,), (7, 3), (4, 5)])]
    return dict(zip("wbv", draw[:3], strict=True)), draw[3]


def jacobian_theta(params, x1, x2):
    def flat(x):
        leaves = jax.tree.leaves(jax.jacobian(apply_fn)(params, x))
        return jnp.concatenate([j.reshape(len(x), 3, -1) for j in leaves], axis=-1)

    return jnp.einsum("nkp,mlp->nmkl", flat(x1), flat(x2), precision="highest")


@needs_neural_tangents
@pytest.mark.parametrize("implementation", [1, 2])
def test_neural_tangents_gives_the_unaveraged_jacobian_gram(implementation):
    params, x = network(jnp.float64)
    theta = neural_tangents.ntk_fn(apply_fn, implementation=implementation)
    for x2 in (None, x[:2]):
        want = jacobian_theta(params, x, x if x2 is None else x2)
        np.testing.assert_allclose(theta(x, x2, params), want, rtol=1e-12, atol=1e-12)
        jitted = jax.jit(lambda p, a, b: theta(a, b, p))(params, x, x2)
        np.testing.assert_allclose(jitted, want, rtol=1e-12, atol=1e-12)


@needs_neural_tangents
def test_loading_imports_no_tensorflow_and_leaves_jax_and_sys_modules_as_they_were():
    # The first use runs a kernel too: what is looked up late must not come from names left in JAX.
    # Warnings are errors, so names that JAX deprecates must not reach the caller either.
    done = in_fresh_process("""
        import sys
        import jax, jax.core, jax.extend.core, jax.interpreters.ad, jax.numpy as jnp
        from pkjax.tangent_kernel import neural_tangents
        spaces = [jax, jax.core, jax.interpreters.ad, jax.numpy]
        before = [set(vars(space)) for space in spaces]
        for implementation in (1, 2):
            f = neural_tangents.ntk_fn(lambda p, x: x @ p, implementation=implementation)
            theta = f(jnp.ones((2, 3)), None, jnp.ones((3, 2)))
            assert theta.shape == (2, 2, 2, 2) and theta[0, 0, 0, 0] == 3
        left = [name for name in sys.modules if name.split(".")[0] in
                ("tensorflow", "tf2jax", "keras", "neural_tangents") or name == "jax.util"]
        assert not left, left
        for space, names in zip(spaces, before):
            new = {name for name in set(vars(space)) - names if name in
                   ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var", "Value", "zeros_like_p", "util")}
            assert not new, (space, new)
    """)
    assert done.returncode == 0, done.stderr


def test_an_import_that_fails_names_the_extra_and_takes_everything_back(tmp_path):
    (tmp_path / "neural_tangents" / "_src").mkdir(parents=True)
    (tmp_path / "neural_tangents" / "__init__.py").write_text("")
    (tmp_path / "neural_tangents" / "_src" / "__init__.py").write_text("")
    (tmp_path / "neural_tangents" / "_src" / "empirical.py").write_text(
        "from jax.core import Jaxpr, Value\nfrom jax.util import safe_map\n"
        "from jax import a_name_of_the_past\n")
    done = in_fresh_process(f"""
        import sys
        import jax.core, jax.extend.core, jax.interpreters.ad
        sys.path.insert(0, {str(tmp_path)!r})
        from pkjax.tangent_kernel import neural_tangents
        before = set(vars(jax.core)), set(vars(jax.interpreters.ad)), set(sys.modules)
        text = ""
        try:
            neural_tangents.load()
        except ImportError as error:
            text = str(error)
        assert "pip install 'pkjax[ntk]'" in text and "0.6.5" in text and jax.__version__ in text, text
        assert "a_name_of_the_past" in text, text
        lent = {{"Jaxpr", "Value", "zeros_like_p"}}
        assert not (set(vars(jax.core)) - before[0]) & lent
        assert not (set(vars(jax.interpreters.ad)) - before[1]) & lent
        assert not {{name for name in set(sys.modules) - before[2] if "neural_tangents" in name}}
        assert "jax.util" not in sys.modules or "jax.util" in before[2]
    """)
    assert done.returncode == 0, done.stderr


def test_an_absent_package_names_the_extra(monkeypatch):
    neural_tangents.load.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed.*pip install 'pkjax\[ntk\]'.*JAX \d.*Python 3"):
        neural_tangents.load()


def test_python_3_14_is_told_that_tensorflow_has_no_wheels(monkeypatch):
    neural_tangents.load.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(ImportError, match=r"TensorFlow, which has no wheels for Python 3\.14"):
        neural_tangents.load()


def test_implementations_that_do_not_run_on_current_jax_are_refused():
    with pytest.raises(ValueError, match=r"implementation must be 1 .* or 2 .*, got 3"):
        neural_tangents.ntk_fn(apply_fn, implementation=3)
